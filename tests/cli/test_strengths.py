"""``--te``, ``--unet``, ``--lbw`` and an adapter's own factors, in `merge` and `bake`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from helpers import DATA, read, run, succeed
from torch import Tensor

from lycotool.models.block_weights import BlockWeights, parse_weights

BASE, LORA, LOHA = (DATA / f"{name}.safetensors" for name in ("base", "lora", "loha"))
EPS = torch.finfo(torch.float32).eps


def baked(tmp_path: Path, adapter: str, *options: object) -> dict[str, Tensor]:
    """What an adapter adds to the sample checkpoint, by key, in float64."""
    output = tmp_path / "baked.safetensors"
    succeed("bake", BASE, adapter, *options, "--dtype", "fp32", "-f", "-o", output)
    before, after = read(BASE), read(output)
    return {key: after[key].double() - before[key].double() for key in before}


def assert_scaled(changes: dict[str, Tensor], whole: dict[str, Tensor], factors: dict[str, float]) -> None:
    """Each change is its factor times the whole one, but for the sum's rounding to float32."""
    weights = read(BASE)
    for key, change in whole.items():
        rounding = 4 * EPS * float(weights[key].double().abs().max())
        assert (changes[key] - factors[key] * change).abs().max() <= rounding, key


def is_text(key: str) -> bool:
    return key.startswith("cond_stage_model.")


@pytest.mark.parametrize("adapter", [LORA, LOHA])
def test_te_and_unet(adapter: Path, tmp_path: Path) -> None:
    whole = baked(tmp_path, f"{adapter}")
    factors = {key: 0.5 * (0.25 if is_text(key) else 3.0) for key in whole}

    assert_scaled(baked(tmp_path, f"{adapter}:0.5", "--te", 0.25, "--unet", 3), whole, factors)
    assert_scaled(baked(tmp_path, f"{adapter}:0.5:te=0.25:unet=3"), whole, factors)
    assert_scaled(baked(tmp_path, f"{adapter}:0.5:te=0.5:unet=3", "--te", 0.5), whole, factors)


def test_block_weights_scale_each_layer_by_its_block(tmp_path: Path) -> None:
    """The keys of the checkpoint are modules of ComfyUI's dialect."""
    numbers = ",".join(str(index / 16) for index in range(26))
    blocks = BlockWeights("sd1", parse_weights(numbers))
    whole = baked(tmp_path, f"{LORA}")
    names = {
        key: key.removeprefix("model.").removesuffix(".weight")
        if not is_text(key)
        else "lora_te_" + key.removeprefix("cond_stage_model.transformer.").removesuffix(".weight").replace(".", "_")
        for key in whole
    }  # fmt: skip
    factors = {key: blocks.factor(name) for key, name in names.items()}
    assert len(set(factors.values())) > 10

    assert_scaled(baked(tmp_path, f"{LORA}", "--lbw", numbers), whole, factors)
    assert_scaled(baked(tmp_path, f"{LORA}:lbw={numbers}"), whole, factors)


@pytest.mark.parametrize("adapter", [LORA, LOHA])
def test_one_adapter_with_block_weights_is_a_block_weighted_adapter(adapter: Path, tmp_path: Path) -> None:
    output = tmp_path / "weighted.safetensors"
    options = ("--lbw", "OUTALL", "--te", 0.5, "--lbw-rule", "OUT05:attn1:2")

    succeed("merge", adapter, *options, "-o", output, "--dtype", "fp32")

    one, two = baked(tmp_path, f"{output}"), baked(tmp_path, f"{adapter}", *options)
    scale = max(float(change.abs().max()) for change in two.values())
    assert max(float((one[key] - two[key]).abs().max()) for key in two) <= 16 * EPS * max(1.0, scale)
    assert len(read(output)) < len(read(adapter))  # blocks of weight 0 are left out


def test_a_preset_file(tmp_path: Path) -> None:
    presets = tmp_path / "presets.txt"
    presets.write_text("# mine\nSOFT:" + ",".join(["0.5"] * 17) + "\nNIL:" + ",".join(["0"] * 17) + "\n")
    one = baked(tmp_path, f"{LORA}", "--lbw", f"{presets}#SOFT")
    two = baked(tmp_path, f"{LORA}", "--lbw", "ALL0.5")

    assert all(torch.equal(one[key], two[key]) for key in one)
    assert run("bake", BASE, LORA, "--lbw", presets, "-o", tmp_path / "x.safetensors").exit_code == 2
    assert (
        run("bake", BASE, LORA, "--lbw", f"{presets}#LOUD", "-o", tmp_path / "x.safetensors").exit_code == 2
    )


def test_provenance_records_the_factors(tmp_path: Path) -> None:
    from safetensors import safe_open

    output = tmp_path / "out.safetensors"
    succeed("merge", BASE, f"{LORA}:0.5:te=0", "--lbw", "MIDD", "-o", output)
    with safe_open(output, "pt") as file:
        base, adapter = json.loads(file.metadata()["lycotool.merge"])["inputs"]

    sha256 = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in (BASE, LORA)}
    assert base == {"file": "base.safetensors", "sha256": sha256[BASE]}
    assert adapter == {
        "file": "lora.safetensors",
        "sha256": sha256[LORA],
        "strength": 0.5,
        "te": 0.0,
        "lbw": "MIDD",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("merge", LORA), "there is nothing to merge"),
        (("merge", BASE), "there is nothing to merge"),
        (("merge", BASE, LORA, "--lbw", "1,2,3"), "3 block weights, expected 17 or 26 for sd1"),
        (("merge", BASE, LORA, "--lbw", "LOUD"), "no list of block weights and no preset"),
        (("merge", BASE, LORA, "--lbw", "MIDDD"), "did you mean MIDD?\nhint: presets are NONE, ALL"),
        (("merge", BASE, LORA, "--te", "nan"), "--te is nan"),
        (("bake", BASE, f"{LORA}:te=inf"), "te is inf"),
        (("bake", BASE, f"{LORA}:te=x"), "te=x is no number"),
        (("bake", BASE, LORA, "--lbw-rule", "IN01"), "expected BLOCKS:LAYERS:factor"),
        (("merge", f"{BASE}:te=0.5", LORA), "a checkpoint takes no strength"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_input(arguments: tuple[object, ...], message: str, tmp_path: Path) -> None:
    result = run(*arguments, "-o", tmp_path / "x.safetensors")

    assert result.exit_code == 2, result.stderr
    assert message in result.stderr
    assert not list(tmp_path.iterdir())
