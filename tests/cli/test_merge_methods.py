"""``merge --method`` and the ranks of the result, as users type them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from helpers import checkpoint, lora, read, run, succeed, write
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from lycotool.cli import merge as cli
from lycotool.linalg.merging.base import Change, Settings
from lycotool.linalg.merging.methods import METHODS
from lycotool.ops import _truncate

UNET, OTHER, TEXT = "lora_unet_down_a", "lora_unet_down_b", "lora_te_text_model_encoder_layers_0_mlp_fc1"
EPS = torch.finfo(torch.float32).eps
RANDOM = [method.name for method in METHODS.values() if method.is_random]
COMBINING = [method for method in METHODS.values() if method.combine is not None]


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(7)
    return tmp_path


def options_of(name: str) -> list[str]:
    """What a method cannot do without, and its range's needs."""
    return ["--method", name, *(["--density", "0.5"] if METHODS[name].needs else [])]


def dense(tensors: dict[str, Tensor], module: str = UNET) -> Tensor:
    """The change a module of the written file makes, in float64."""
    if f"{module}.diff" in tensors:
        return tensors[f"{module}.diff"].double()
    down, up = (tensors[f"{module}.lora_{side}.weight"].double() for side in ("down", "up"))
    scale = float(tensors.get(f"{module}.alpha", torch.tensor(down.shape[0]))) / down.shape[0]
    return (scale * up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def two(
    out: int = 12, width: int = 10, modules: tuple[str, ...] = (UNET,)
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two adapters in files a and b."""
    a = {k: t for module in modules for k, t in lora(module, out, width, rank=2, alpha=1.0).items()}
    b = {k: t for module in modules for k, t in lora(module, out, width, rank=3, alpha=6.0).items()}
    write(Path("a.safetensors"), a)
    write(Path("b.safetensors"), b)
    return a, b


def merged(*arguments: object, output: str = "out.safetensors") -> dict[str, Tensor]:
    succeed("merge", *arguments, "-f", "-o", output)
    return read(Path(output))


# --- declarations -----------------------------------------------------------------------------


def test_the_command_line_knows_every_method() -> None:
    assert list(get_args(cli.METHODS)) == list(METHODS)
    text = succeed("merge", "--help").stdout
    for method in METHODS.values():
        assert f"{method.name}:" in text.replace("-\n                                  ", "-")


def test_defaults_are_those_of_the_operation() -> None:
    """What a recipe leaves out is what the command line leaves out."""
    import typer.main

    from lycotool.cli import app
    from lycotool.ops._merge_options import OPTIONS, merge_options, values_of
    from lycotool.ops.merge import MergeOptions

    command = typer.main.get_command(app).commands["merge"]  # type: ignore[attr-defined]
    declared = {max(p.opts, key=len)[2:]: p.default for p in command.params if p.opts[0].startswith("-")}
    values = {name: declared[name] for name in OPTIONS}

    assert merge_options(values) == MergeOptions()
    assert values_of(MergeOptions()) == {}


# --- methods ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [m for m in COMBINING if not m.is_random], ids=lambda method: method.name)
def test_each_method_works_on_the_weighted_changes(method: object) -> None:
    """The written difference is the method's formula on ``w·c·up·down``, computed here in float64."""
    a, b = two()
    name = method.name  # type: ignore[attr-defined]
    out = merged("a.safetensors:0.8", "b.safetensors:-0.5", *options_of(name))
    weights = (0.8, -0.5)
    plain = [dense(a), dense(b)]
    if METHODS[name].strengths == "scale":
        plain = [weight * change for weight, change in zip(weights, plain, strict=True)]
    changes = [
        Change(x, weight, 0.5 if METHODS[name].needs else 1.0, 0.01, 0.15)
        for x, weight in zip(plain, weights, strict=True)
    ]
    expected = METHODS[name].combine(changes, Settings(normalize=METHODS[name].normalize))  # type: ignore[misc]

    assert out.keys() == {f"{UNET}.diff"}
    # float32 products of rank 3, sums of two, and the arc's weights: well under 64 roundings.
    assert (out[f"{UNET}.diff"].double() - expected).abs().max() <= 64 * EPS * float(expected.abs().max())


@pytest.mark.parametrize("name", RANDOM)
def test_random_methods_repeat_by_seed_and_by_place_alone(name: str) -> None:
    a, b = two(modules=(UNET, OTHER))
    base = merged("a.safetensors", "b.safetensors", *options_of(name))

    assert all(
        torch.equal(base[k], t)
        for k, t in merged("a.safetensors", "b.safetensors", *options_of(name), "--seed", 0).items()
    )
    other = merged("a.safetensors", "b.safetensors", *options_of(name), "--seed", 1)
    assert not torch.equal(base[f"{UNET}.diff"], other[f"{UNET}.diff"])

    for side, tensors in (("a", a), ("b", b)):  # the other module alone: nothing else moves its numbers
        write(Path(f"{side}1.safetensors"), {k: t for k, t in tensors.items() if k.startswith(OTHER)})
    alone = merged("a1.safetensors", "b1.safetensors", *options_of(name))
    assert torch.equal(alone[f"{OTHER}.diff"], base[f"{OTHER}.diff"])
    same = {k.replace(OTHER, UNET): t.clone() for k, t in a.items() if k.startswith(OTHER)}
    write(Path("a2.safetensors"), {k: t for k, t in a.items() if k.startswith(OTHER)} | same)
    masks = merged("a2.safetensors:1.5", *options_of(name), "--normalize", "none")
    assert not torch.equal(masks[f"{UNET}.diff"] == 0, masks[f"{OTHER}.diff"] == 0)


def test_dare_keeps_rescaled_elements_of_the_change() -> None:
    a, _ = two()
    out = merged("a.safetensors:2", "--method", "dare", "--density", 0.5)[f"{UNET}.diff"]
    expected = 2 * dense(a) / 0.5

    kept = out != 0
    assert 30 < int(kept.sum()) < 90  # of 120
    assert (out.double() - expected)[kept].abs().max() <= 16 * EPS * float(expected.abs().max())


@pytest.mark.parametrize("method", COMBINING, ids=lambda method: method.name)
def test_into_a_checkpoint_the_combined_change_is_added(method: object) -> None:
    """The same as the merged adapter baked: in float32 but for the difference's own rounding."""
    name = method.name  # type: ignore[attr-defined]
    layer = "model.diffusion_model.down.a"
    write(Path("base.safetensors"), checkpoint(12, 10))
    a, b = two()
    write(Path("a.safetensors"), a | {f"{UNET}.diff_b": torch.randn(12)})
    write(Path("b.safetensors"), b | {f"{UNET}.diff_b": torch.randn(12)})
    inputs = ("a.safetensors:0.8", "b.safetensors:0.6", *options_of(name))

    folded = merged("base.safetensors", *inputs)
    merged(*inputs, output="ab.safetensors")
    succeed("bake", "base.safetensors", "ab.safetensors", "-o", "baked.safetensors")

    baked, before = read(Path("baked.safetensors")), read(Path("base.safetensors"))
    for part in ("weight", "bias"):
        key = f"{layer}.{part}"
        assert not torch.equal(folded[key], before[key])
        assert (folded[key] - baked[key]).abs().max() <= 2 * EPS * float(baked[key].abs().max())
    assert torch.equal(
        folded["first_stage_model.untouched.weight"], before["first_stage_model.untouched.weight"]
    )


def test_a_fused_tensor_is_combined_row_by_row_as_its_parts_are(in_folder: Path) -> None:
    """OpenCLIP's ``in_proj_weight``: q, k and v are trimmed apart, as the adapters name them."""
    stem = "conditioner.embedders.1.model.transformer.resblocks.0"
    names = [f"lora_te2_text_model_encoder_layers_0_self_attn_{letter}_proj" for letter in "qkv"]
    base = {f"{stem}.attn.in_proj_weight": torch.randn(36, 12), f"{stem}.attn.in_proj_bias": torch.randn(36),
            "model.diffusion_model.out.2.weight": torch.randn(4, 4, 3, 3)}  # fmt: skip
    write(Path("base.safetensors"), base)
    two(12, 12, modules=tuple(names))
    options = ("a.safetensors", "b.safetensors:0.5", "--method", "ties", "--density", 0.4)

    folded = merged("base.safetensors", *options)[f"{stem}.attn.in_proj_weight"]
    parts = merged(*options)

    expected = base[f"{stem}.attn.in_proj_weight"] + torch.cat([parts[f"{name}.diff"] for name in names])
    assert (folded - expected).abs().max() <= 2 * EPS * float(expected.abs().max())


@pytest.mark.parametrize("into", [(), ("base.safetensors",)], ids=["adapter", "checkpoint"])
def test_layers_are_computed_one_after_the_other(
    into: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer's change is asked for when its turn to be written has come, never before."""
    from lycotool.ops import _bake_tensors, _merge_adapters
    from lycotool.ops._common import as_bytes
    from lycotool.ops._methods import Combination

    two(modules=(UNET, OTHER, "lora_unet_down_c"))
    layers = {f"model.diffusion_model.down.{letter}.weight": torch.randn(12, 10) for letter in "abc"}
    write(Path("base.safetensors"), layers)
    events: list[str] = []
    combined = Combination.combined

    def noted(self: Combination, place: tuple[str, str], *rest: object) -> Tensor:
        events.append(f"compute {place[1]}")
        return combined(self, place, *rest)  # type: ignore[arg-type]

    def written(tensor: Tensor) -> memoryview:
        events.append("write")
        return as_bytes(tensor)

    monkeypatch.setattr(Combination, "combined", noted)
    monkeypatch.setattr(_merge_adapters, "as_bytes", written)
    monkeypatch.setattr(_bake_tensors, "as_bytes", written)
    command = ("merge", *into, "a.safetensors", "b.safetensors", *options_of("ties"), "-o", "out.safetensors")
    succeed(*command, "-n")
    assert events == []
    succeed(*command)
    assert events == ["compute down_a", "write", "compute down_b", "write", "compute down_c", "write"]


def test_work_in_float64_passes_mps_over(monkeypatch: pytest.MonkeyPatch) -> None:
    two()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for options in (options_of("slerp"), ("--rank", "2")):
        merged("a.safetensors", "b.safetensors", *options)
        result = run(
            "merge",
            "a.safetensors",
            "b.safetensors",
            *options,
            "--device",
            "mps",
            "-f",
            "-o",
            "out.safetensors",
        )
        assert result.exit_code == 2
        assert "mps has no float64" in result.stderr


def test_algorithms_of_all_kinds_meet(in_folder: Path) -> None:
    """LoRA, LoHa, LoKr, a difference and its bias in one layer; norms in another."""
    norm = "lora_unet_down_norm"
    files: dict[str, dict[str, Tensor]] = {
        "lora": lora(UNET, 12, 10, rank=2, alpha=2.0),
        "loha": {f"{UNET}.hada_w{i}_{s}": torch.randn(*shape) for i in (1, 2) for s, shape in (("a", (12, 2)), ("b", (2, 10)))},
        "lokr": {f"{UNET}.lokr_w1": torch.randn(3, 2), f"{UNET}.lokr_w2": torch.randn(4, 5)},
        "full": {f"{UNET}.diff": torch.randn(12, 10), f"{UNET}.diff_b": torch.randn(12), f"{norm}.w_norm": torch.randn(6)},
        "norm": {f"{norm}.w_norm": torch.randn(6), f"{norm}.b_norm": torch.randn(6)},
    }  # fmt: skip
    for name, tensors in files.items():
        write(Path(f"{name}.safetensors"), tensors)
    out = merged(*(f"{name}.safetensors" for name in files), "--rebuild", "--method", "ties", "--density", 1)

    loha = files["loha"]
    changes = [
        dense(files["lora"]),
        (loha[f"{UNET}.hada_w1_a"] @ loha[f"{UNET}.hada_w1_b"] * (loha[f"{UNET}.hada_w2_a"] @ loha[f"{UNET}.hada_w2_b"])).double(),
        torch.kron(files["lokr"][f"{UNET}.lokr_w1"], files["lokr"][f"{UNET}.lokr_w2"]).double(),
        files["full"][f"{UNET}.diff"].double(),
    ]  # fmt: skip
    assert out.keys() == {f"{UNET}.diff", f"{UNET}.diff_b", f"{norm}.w_norm", f"{norm}.b_norm"}
    for slot, given in (
        (f"{UNET}.diff", changes),
        (f"{UNET}.diff_b", [files["full"][f"{UNET}.diff_b"].double()]),
        (f"{norm}.w_norm", [files[f][f"{norm}.w_norm"].double() for f in ("full", "norm")]),
        (f"{norm}.b_norm", [files["norm"][f"{norm}.b_norm"].double()]),
    ):
        x = np.stack([tensor.numpy() for tensor in given])
        agree = np.sign(x) == np.where(x.sum(0) >= 0, 1, -1)
        expected = (x * agree).sum(0) / np.maximum(agree.sum(0), 1)
        assert np.abs(out[slot].double().numpy() - expected).max() <= 64 * EPS * np.abs(x).max()


def test_what_needs_the_base_gets_it(in_folder: Path) -> None:
    """DoRA beside LoRA: its change is ``m·V/‖V‖ - W`` of the checkpoint given."""
    base = checkpoint(12, 10)
    write(Path("base.safetensors"), base)
    a, b = two()
    magnitude = 1 + torch.rand(12, 1)
    write(Path("b.safetensors"), b | {f"{UNET}.dora_scale": magnitude})
    options = (
        "a.safetensors",
        "b.safetensors:0.5",
        "--rebuild",
        "--method",
        "magnitude-prune",
        "--density",
        1,
    )

    assert run("merge", *options, "-o", "x.safetensors").exit_code == 5
    out = dense(merged(*options, "--base", "base.safetensors"))

    weight = base["model.diffusion_model.down.a.weight"].double()
    v = weight + dense(b)
    expected = dense(a) + 0.5 * (magnitude * v / v.norm(dim=1, keepdim=True) - weight)
    assert (out - expected).abs().max() <= 64 * EPS * float(v.abs().max())


def test_strengths_and_factors_are_weights_of_the_method(in_folder: Path) -> None:
    """`--te` and an adapter's own, block weights too, are in τ = w·ΔW before signs are elected."""
    a, b = two(modules=(UNET, TEXT))
    out = merged(
        "a.safetensors:0.5:te=0", "b.safetensors:unet=-2", "--te", 0.25, "--method", "ties", "--density", 1
    )

    x = np.stack([0.5 * dense(a).numpy(), -2 * dense(b).numpy()])
    agree = np.sign(x) == np.where(x.sum(0) >= 0, 1, -1)
    expected = (x * agree).sum(0) / agree.sum(0)
    assert np.abs(dense(out).numpy() - expected).max() <= 64 * EPS * np.abs(x).max()
    text = 0.25 * dense(b, TEXT)  # the first adapter's text encoder has weight 0
    assert (dense(out, TEXT) - text).abs().max() <= 64 * EPS * float(text.abs().max())


def test_an_adapter_without_the_layer_stands_for_no_change(in_folder: Path) -> None:
    a, _ = two(modules=(UNET, OTHER))
    write(Path("b.safetensors"), lora(UNET, 12, 10))

    slerp = merged("a.safetensors", "b.safetensors", "--method", "slerp", "--t", 0.25)
    nuslerp = merged("a.safetensors:3", "b.safetensors", "--method", "nuslerp")
    ties = merged("a.safetensors", "b.safetensors", "--method", "ties", "--density", 1)
    mean = merged(
        "a.safetensors", "b.safetensors:3", "--method", "dare", "--density", 1, "--normalize", "weight"
    )

    whole = dense(a, OTHER)
    for out, share in ((slerp, 0.75), (nuslerp, 0.75), (ties, 1), (mean, 0.25)):
        assert (dense(out, OTHER) - share * whole).abs().max() <= 16 * EPS * float(whole.abs().max())


def test_an_adapter_may_have_its_own_density(in_folder: Path) -> None:
    a, b = two()
    out = merged(
        "a.safetensors:1:density=0.1", "b.safetensors", "--method", "magnitude-prune", "--density", 1
    )

    left = (dense(out) - dense(b)).abs() > 64 * EPS * float(dense(b).abs().max())
    largest = dense(a).abs().flatten().topk(12).indices
    assert left.flatten().nonzero().flatten().tolist() == sorted(largest.tolist())
    wide = merged("a.safetensors:gamma=0.5", "--method", "breadcrumbs", "--density", 0.25)
    narrow = merged("a.safetensors", "--method", "breadcrumbs", "--density", 0.25, "--gamma", 0.5)
    assert torch.equal(dense(wide), dense(narrow))
    flat = merged("a.safetensors:epsilon=0.4", "--method", "della", "--density", 0.5)
    assert torch.equal(
        dense(flat), dense(merged("a.safetensors", "--method", "della", "--density", 0.5, "--epsilon", 0.4))
    )
    assert not torch.equal(dense(flat), dense(merged("a.safetensors", "--method", "della", "--density", 0.5)))


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("ties", "--lambda", 0.5), ("ties", "--normalize", "none"), ("ties", "--consensus", "frequency"),
        ("ties", "--density", 0.2), ("slerp", "--t", 0.9), ("nuslerp", "--along", "rows"), ("dare", "--seed", 3),
        ("della", "--epsilon", 0.4), ("breadcrumbs", "--gamma", 0.2),
    ],
)  # fmt: skip
def test_each_option_has_an_effect(name: str, option: str, value: object) -> None:
    two()
    plain = options_of(name) if option != "--density" else ["--method", name, "--density", "0.8"]
    write(Path("c.safetensors"), lora(UNET, 12, 10))
    inputs = ("a.safetensors", "b.safetensors") + (("c.safetensors",) if name == "ties" else ())

    one, other = merged(*inputs, *plain), merged(*inputs, *plain, option, value)

    assert not torch.equal(dense(one), dense(other))


def test_half_precision_is_rounded_once(in_folder: Path) -> None:
    a, _ = two()
    write(Path("a.safetensors"), {k: t.half() for k, t in a.items()})
    half = {k: t.half().float() for k, t in a.items()}
    out = merged("a.safetensors:0.3", "--method", "ties", "--density", 1)[f"{UNET}.diff"]

    assert out.dtype == torch.float16
    expected = 0.3 * dense(half)
    assert (out.double() - expected).abs().max() <= 0.51 * torch.finfo(torch.float16).eps * float(
        expected.abs().max()
    )


def test_provenance_names_the_method_and_its_seed(in_folder: Path) -> None:
    two()
    merged(
        "a.safetensors", "b.safetensors:0.5:density=0.25", "--method", "dare", "--density", 0.5, "--seed", 9
    )
    with safe_open("out.safetensors", "pt") as file:
        made = json.loads(file.metadata()["lycotool.merge"])

    assert (made["method"], made["density"], made["seed"]) == ("dare", 0.5, 9)
    assert made["inputs"][1]["density"] == 0.25


def test_a_plan_says_what_the_merge_does(in_folder: Path) -> None:
    two()
    for options in ((), ("--rank", 2)):
        command = (
            "merge",
            "a.safetensors",
            "b.safetensors",
            "--method",
            "ties",
            "--density",
            0.5,
            *options,
            "--json",
        )
        plan = json.loads(succeed(*command, "-n").stdout)
        assert not Path("a+b.safetensors").exists()
        done = json.loads(succeed(*command).stdout)
        assert plan.pop("dry_run") is not done.pop("dry_run")
        assert plan == done
        assert done["method"] == "ties"
        assert done["nbytes"] == Path("a+b.safetensors").stat().st_size
        Path("a+b.safetensors").unlink()


# --- ranks ------------------------------------------------------------------------------------


def best(matrix: Tensor, rank: int) -> NDArray[np.float64]:
    u, s, v = np.linalg.svd(matrix.flatten(1).numpy(), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ v[:rank]).reshape(matrix.shape)


@pytest.fixture(params=[0.0, math.inf], ids=["by dense changes", "by thin factors"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the layers' widths would choose."""
    monkeypatch.setattr(_truncate, "_THIN", request.param)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize(
    "options", [("--method", "svd"), (), ("--method", "ties", "--density", "0.5")], ids=str
)
def test_a_rank_gives_the_best_factors_of_it(options: tuple[str, ...]) -> None:
    a, b = two()
    whole = dense(a) + 0.5 * dense(b)
    if options[1:2] == ("ties",):
        whole = dense(merged("a.safetensors", "b.safetensors:0.5", *options))
    result = json.loads(
        succeed(
            "merge",
            "a.safetensors",
            "b.safetensors:0.5",
            *options,
            "--rank",
            3,
            "--json",
            "-f",
            "-o",
            "out.safetensors",
        ).stdout
    )
    out = read(Path("out.safetensors"))

    expected = best(whole, 3)
    assert out[f"{UNET}.lora_down.weight"].shape == (3, 10)
    assert float(out[f"{UNET}.alpha"]) == 3
    assert np.abs(dense(out).numpy() - expected).max() <= 64 * EPS * np.abs(expected).max()
    left = np.linalg.norm(whole.numpy() - expected) / np.linalg.norm(whole.numpy())
    assert result["relative_error"] == pytest.approx(left, rel=1e-4)
    assert result["method"] == ("ties" if "ties" in options else "svd")


@pytest.mark.usefixtures("either_way")
def test_a_rank_of_all_there_is_keeps_the_exact_factors(in_folder: Path) -> None:
    two()
    exact = merged("a.safetensors", "b.safetensors")
    assert all(
        torch.equal(exact[k], t) for k, t in merged("a.safetensors", "b.safetensors", "--rank", 64).items()
    )


@pytest.mark.usefixtures("either_way")
def test_convolutions_have_a_rank_of_their_own(in_folder: Path) -> None:
    def conv(rank: int) -> dict[str, Tensor]:
        return {
            f"{OTHER}.lora_up.weight": torch.randn(8, rank, 1, 1),
            f"{OTHER}.lora_down.weight": torch.randn(rank, 6, 3, 3),
        }

    a, b = two()
    write(Path("a.safetensors"), a | conv(4))
    write(Path("b.safetensors"), b | conv(3) | {f"{UNET}.diff_b": torch.ones(12)})
    out = merged("a.safetensors", "b.safetensors", "--rank", 4, "--conv-rank", 2)

    assert out[f"{UNET}.lora_up.weight"].shape == (12, 4)
    assert out[f"{OTHER}.lora_down.weight"].shape == (2, 6, 3, 3)
    assert torch.equal(out[f"{UNET}.diff_b"], torch.ones(12))
    whole = dense(merged("a.safetensors", "b.safetensors"), OTHER)
    assert np.abs(dense(out, OTHER).numpy() - best(whole, 2)).max() <= 256 * EPS * float(whole.abs().max())


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("options", [(), ("--method", "ties", "--density", "0.6")], ids=str)
def test_an_error_is_kept_with_as_few_ranks_as_it_takes(options: tuple[str, ...]) -> None:
    two(40, 30, modules=(UNET, OTHER))
    whole = merged("a.safetensors", "b.safetensors", *options)
    out = merged("a.safetensors", "b.safetensors", *options, "--error", 0.4)

    lost = total = 0.0
    for module in (UNET, OTHER):
        lost += float((dense(out, module) - dense(whole, module)).square().sum())
        total += float(dense(whole, module).square().sum())
    assert 0 < (lost / total) ** 0.5 <= 0.4
    ranks = [out[f"{module}.lora_down.weight"].shape[0] for module in (UNET, OTHER)]
    for i in range(2):  # one rank less anywhere would be too few
        fewer = list(ranks)
        fewer[i] -= 1
        left = sum(
            float((torch.from_numpy(best(dense(whole, m), r)) - dense(whole, m)).square().sum())
            for m, r in zip((UNET, OTHER), fewer, strict=True)
        )
        assert (left / total) ** 0.5 > 0.4


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("options", [(), ("--method", "dare", "--density", "0.9")], ids=str)
def test_a_size_is_kept_and_used(options: tuple[str, ...]) -> None:
    two(200, 200, modules=(UNET, OTHER))
    merged("a.safetensors", "b.safetensors", *options, "--size", "8KB")
    small = Path("out.safetensors").stat().st_size
    merged("a.safetensors", "b.safetensors", *options, "--size", "8KB", "--rank", 1)

    assert 4800 <= small <= 8000
    assert Path("out.safetensors").stat().st_size < small
    assert (
        run(
            "merge", "a.safetensors", "b.safetensors", *options, "--size", 2000, "-f", "-o", "out.safetensors"
        ).exit_code
        == 5
    )


def test_norms_stay_vectors_when_the_rest_is_truncated(in_folder: Path) -> None:
    a, _ = two()
    write(Path("a.safetensors"), a | {"lora_unet_norm.w_norm": torch.ones(5)})
    out = merged("a.safetensors", "b.safetensors", "--rank", 2)

    assert torch.equal(out["lora_unet_norm.w_norm"], torch.ones(5))


def test_dialects_without_alpha_get_none(in_folder: Path) -> None:
    for name, rank in (("a", 2), ("b", 3)):
        tensors = lora("x", 12, 10, rank=rank, alpha=None)
        renamed = {
            "x.lora_up.weight": "unet.down.a.lora_B.weight",
            "x.lora_down.weight": "unet.down.a.lora_A.weight",
        }
        write(Path(f"{name}.safetensors"), {renamed[k]: t for k, t in tensors.items()})
    out = merged("a.safetensors", "b.safetensors", "--method", "svd", "--rank", 2)

    assert {k: tuple(t.shape) for k, t in out.items()} == {
        "unet.down.a.lora_A.weight": (2, 10),
        "unet.down.a.lora_B.weight": (12, 2),
    }
    full = merged("a.safetensors", "b.safetensors", "--method", "ties", "--density", 0.5)
    assert full.keys() == {"unet.down.a.diff"}


# --- errors -----------------------------------------------------------------------------------

AB = ("a.safetensors", "b.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*AB, "--method", "mean"), "--method is 'mean', expected one of exact"),
        ((*AB, "--density", 0.5), "exact takes no --density"),
        ((*AB, "--method", "ties"), "ties needs `--density`"),
        (("a.safetensors:density=0.5", "b.safetensors", "--method", "ties"), "ties needs `--density`"),
        ((*AB, "--method", "ties", "--density", 0), "density is 0"),
        ((*AB, "--method", "ties", "--density", 1.5), "density is 1.5, expected a number from 0 to 1"),
        ((*AB, "--method", "ties", "--density", "nan"), "density is nan"),
        ((*AB, "--method", "ties", "--density", 0.5, "--t", 0.5), "ties takes no --t"),
        ((*AB, "--method", "ties", "--density", 0.5, "--seed", 1), "--seed goes with `--method` dare, dare-ties, della"),
        ((*AB, "--method", "dare", "--density", 0.5, "--consensus", "total"), "dare takes no --consensus"),
        ((*AB, "--method", "dare", "--density", 0.5, "--normalize", "count"), "does not ask for"),
        ((*AB, "--method", "dare", "--density", 0.5, "--seed", -1), "--seed is -1"),
        ((*AB, "--method", "dare", "--density", 0.5, "--lambda", "inf"), "--lambda is inf"),
        ((*AB, "--method", "della", "--density", 0.9), "make probabilities from 0.75 to 1.05"),
        ((*AB, "--method", "della", "--density", 0.1), "make probabilities from -0.05 to 0.25"),
        ((*AB, "--method", "breadcrumbs", "--density", 0.5, "--gamma", 2), "gamma is 2"),
        ((*AB, "--method", "slerp", "--t", 1.1), "t is 1.1"),
        ((*AB, "a.safetensors", "--method", "slerp"), "slerp combines 2 adapters, not 3"),
        (("base.safetensors", "a.safetensors", "--method", "nuslerp"), "nuslerp combines 2 adapters, not 1"),
        ((*AB, "--method", "nuslerp", "--lambda", 2), "nuslerp takes no --lambda"),
        ((*AB, "--method", "svd"), "it needs `--rank`"),
        ((*AB, "--method", "exact", "--rank", 4), "`--method exact` keeps every rank"),
        ((*AB, "--rank", 0), "--rank is 0"),
        ((*AB, "--conv-rank", 4), "`--conv-rank` needs `--rank`"),
        ((*AB, "--size", "1MB", "--error", 0.1), "exclude each other"),
        ((*AB, "--size", "big"), "big is no size"),
        ((*AB, "--error", 1), "--error is 1.0"),
        (("a.safetensors:density=0.5", "b.safetensors"), "exact takes no density"),
        (("a.safetensors:density=x", "b.safetensors"), "density=x is no number"),
        (("base.safetensors", "a.safetensors", "--rank", 4), "--size or --error: BASE is a checkpoint here"),
        (("base.safetensors", "a.safetensors", "--base", "base.safetensors"), "--base: BASE is a checkpoint here"),
        (("base.safetensors", "a.safetensors", "--title", "x"), "metadata have no modelspec"),
        ((*AB, "--title", "x"), "--title: BASE is an adapter here"),
        (("base.safetensors", "a.safetensors", "--metadata", "none"), "--metadata: BASE is a checkpoint here"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_combinations_are_usage_errors(arguments: tuple[object, ...], message: str) -> None:
    two()
    write(Path("base.safetensors"), checkpoint(12, 10))
    before = sorted(Path().iterdir())
    result = run("merge", *arguments, "-o", "x.safetensors")

    assert result.exit_code == 2, result.stderr
    assert message in " ".join(result.stderr.split())
    assert sorted(Path().iterdir()) == before


def test_bake_has_no_methods() -> None:
    two()
    write(Path("base.safetensors"), checkpoint(12, 10))
    result = run("bake", "base.safetensors", "a.safetensors:density=0.5")

    assert result.exit_code == 2
    assert "density is for `lycotool merge`" in result.stderr


def test_one_adapter_alone_can_be_sparsified(in_folder: Path) -> None:
    two()
    out = merged("a.safetensors", "--method", "magnitude-prune", "--density", 0.25)

    assert int((dense(out) != 0).sum()) == 30
