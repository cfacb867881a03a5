"""``merge --verify`` of adapters, and ``--compat kohya``."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers import checkpoint, lora, read, run, succeed, write
from torch import Tensor

UNET, OTHER = "lora_unet_down_a", "lora_unet_down_b"
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(5)
    write(tmp_path / "a.safetensors", lora(UNET, 40, 30, rank=2, alpha=1.0))
    write(tmp_path / "b.safetensors", lora(UNET, 40, 30, rank=2, alpha=4.0))
    loha = {
        f"{UNET}.hada_w{i}_{s}": torch.randn(*shape)
        for i in (1, 2)
        for s, shape in (("a", (40, 2)), ("b", (2, 30)))
    }
    write(
        tmp_path / "loha.safetensors",
        loha | {f"{OTHER}.diff": torch.randn(4, 4), f"{OTHER}.diff_b": torch.randn(4)},
    )
    write(
        tmp_path / "norm.safetensors",
        {"lora_unet_n.w_norm": torch.randn(5), "lora_unet_n.b_norm": torch.randn(5)},
    )
    write(tmp_path / "dora.safetensors", lora(UNET, 40, 30) | {f"{UNET}.dora_scale": 1 + torch.rand(40, 1)})
    write(tmp_path / "base.safetensors", checkpoint(40, 30))
    return tmp_path


# --- verification -----------------------------------------------------------------------------

MERGES: Sequence[tuple[tuple[str, ...], float]] = [
    (("a.safetensors:0.3", "b.safetensors:-2"), EPS),
    (("a.safetensors:0.3", "b.safetensors:-2", "--dtype", "fp16"), torch.finfo(torch.float16).eps),
    (("a.safetensors", "loha.safetensors:0.5", "norm.safetensors"), EPS),
    (("loha.safetensors:0.5", "loha.safetensors:0.25", "norm.safetensors", "norm.safetensors:2"), EPS),
    (("loha.safetensors", "--unet", "0.5"), EPS),
    (("a.safetensors", "dora.safetensors:0.5", "--rebuild", "--base", "base.safetensors"), EPS),
    (("a.safetensors", "loha.safetensors", "--method", "ties", "--density", "0.5"), EPS),
    (("a.safetensors", "loha.safetensors", "--method", "dare", "--density", "0.5", "--dtype", "bf16"), 2**-7),
    (("a.safetensors", "b.safetensors", "--compat", "kohya"), EPS),
    (("a.safetensors", "b.safetensors:-0.5", "--compat", "kohya", "--concat"), EPS),
]


@pytest.mark.parametrize(("arguments", "eps"), MERGES, ids=str)
def test_what_was_written_says_what_it_must(arguments: tuple[str, ...], eps: float) -> None:
    result = succeed("merge", *arguments, "--verify", "--json", "-o", "out.safetensors")
    found = json.loads(result.stdout)["verified"]

    assert found["modules"] == json.loads(result.stdout)["modules"]
    assert 0 <= found["mean_error"] <= found["max_error"] <= 4 * (eps + EPS)
    assert "verified:" in result.stderr


def test_truncation_is_reported_as_error_and_is_no_fault(in_folder: Path) -> None:
    for options in ((), ("--method", "ties", "--density", "0.7")):
        command = (
            "merge",
            "a.safetensors",
            "b.safetensors",
            *options,
            "--rank",
            "2",
            "--verify",
            "--json",
            "-f",
        )
        document = json.loads(succeed(*command, "-o", "out.safetensors").stdout)

        assert 0.01 < document["relative_error"] < 1
        assert document["verified"]["max_error"] == pytest.approx(document["relative_error"], rel=1e-3)


def test_terms_that_cancel_are_measured_by_the_terms(in_folder: Path) -> None:
    document = json.loads(
        succeed(
            "merge", "a.safetensors:1.1", "a.safetensors:-1.1", "--verify", "--json", "-o", "out.safetensors"
        ).stdout
    )
    assert document["verified"]["max_error"] <= 4 * EPS


@pytest.mark.parametrize("arguments", [merge for merge, _ in MERGES], ids=str)
def test_a_wrong_result_never_gets_its_name(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One element of each kind of result is off by a tenth of all on its way to the file."""
    from lycotool.ops import _merge_adapters
    from lycotool.ops._common import as_bytes

    def spoilt(tensor: Tensor) -> memoryview:
        if tensor.numel() > 1:
            tensor = tensor.clone()
            tensor.view(-1)[0] += 0.1 * tensor.norm()
        return as_bytes(tensor)

    monkeypatch.setattr(_merge_adapters, "as_bytes", spoilt)
    before = sorted(Path().iterdir())
    result = run("merge", *arguments, "--verify", "-o", "out.safetensors")

    assert result.exit_code == 10, result.stderr
    assert "verification failed for" in result.stderr
    assert sorted(Path().iterdir()) == before


def test_a_plan_verifies_nothing(in_folder: Path) -> None:
    plan = json.loads(succeed("merge", "a.safetensors", "b.safetensors", "--verify", "-n", "--json").stdout)
    assert plan["verified"] is None


# --- sd-scripts' merges ---------------------------------------------------------------------------


def kohya(files: Sequence[tuple[dict[str, Tensor], float]], *, concat: bool) -> dict[str, Tensor]:
    """``merge_lora_models`` of sd-scripts 48d368f for one module, from its description, in float64."""
    ups, downs = [], []
    first = float(files[0][0][f"{UNET}.alpha"])
    for tensors, ratio in files:
        root = math.sqrt(float(tensors[f"{UNET}.alpha"]) / first)
        ups.append(tensors[f"{UNET}.lora_up.weight"].double() * abs(root * ratio))
        downs.append(tensors[f"{UNET}.lora_down.weight"].double() * (root * ratio))
    return {
        f"{UNET}.lora_up.weight": torch.cat(ups, 1) if concat else sum(ups[1:], ups[0]),
        f"{UNET}.lora_down.weight": torch.cat(downs, 0) if concat else sum(downs[1:], downs[0]),
        f"{UNET}.alpha": torch.tensor(first),
    }


@pytest.mark.parametrize("concat", [False, True])
def test_kohya_repeats_sd_scripts(concat: bool) -> None:
    a, b = read(Path("a.safetensors")), read(Path("b.safetensors"))
    options = ("--compat", "kohya", *(["--concat"] if concat else []))
    succeed("merge", "a.safetensors:0.5", "b.safetensors:-0.8", *options, "-o", "out.safetensors")

    found, expected = read(Path("out.safetensors")), kohya([(a, 0.5), (b, -0.8)], concat=concat)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (found[key].double() - tensor).abs().max() <= 4 * EPS * float(tensor.abs().max())


def delta(tensors: dict[str, Tensor]) -> Tensor:
    up, down = (tensors[f"{UNET}.lora_{side}.weight"].double() for side in ("up", "down"))
    return float(tensors[f"{UNET}.alpha"]) / down.shape[0] * (up @ down)


def test_kohya_squares_a_ratio_and_keeps_its_sign(in_folder: Path) -> None:
    """0.5 gives a quarter; two alike at 1 with --concat give half their sum."""
    a, b = delta(read(Path("a.safetensors"))), delta(read(Path("b.safetensors")))
    for ratio in (0.5, -0.8, 1.5):
        succeed("merge", f"a.safetensors:{ratio}", "--compat", "kohya", "-f", "-o", "out.safetensors")
        expected = ratio * abs(ratio) * a
        assert (delta(read(Path("out.safetensors"))) - expected).abs().max() <= 8 * EPS * float(
            expected.abs().max()
        )
    succeed(
        "merge",
        "a.safetensors",
        "b.safetensors",
        "--compat",
        "kohya",
        "--concat",
        "-f",
        "-o",
        "out.safetensors",
    )
    expected = (a + b) / 2
    assert (delta(read(Path("out.safetensors"))) - expected).abs().max() <= 32 * EPS * float(
        expected.abs().max()
    )


def test_kohya_reads_a_missing_alpha_as_the_rank(in_folder: Path) -> None:
    b = read(Path("b.safetensors"))
    write(Path("b.safetensors"), {k: t for k, t in b.items() if not k.endswith("alpha")})
    succeed("merge", "a.safetensors", "b.safetensors", "--compat", "kohya", "-o", "out.safetensors")

    expected = kohya(
        [(read(Path("a.safetensors")), 1.0), (b | {f"{UNET}.alpha": torch.tensor(2.0)}, 1.0)], concat=False
    )
    found = read(Path("out.safetensors"))
    for key, tensor in expected.items():
        assert (found[key].double() - tensor).abs().max() <= 4 * EPS * float(tensor.abs().max())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("base.safetensors", "a.safetensors"), 2, "is for merging adapters"),
        (("a.safetensors", "b.safetensors", "--method", "ties", "--density", "0.5"), 2, "has no --method"),
        (("a.safetensors", "b.safetensors", "--rank", "2"), 2, "has no --rank"),
        (("a.safetensors", "b.safetensors", "--te", "0.5"), 2, "has no --te"),
        (("a.safetensors:te=0.5", "b.safetensors"), 2, "knows one ratio of an adapter"),
        (("a.safetensors", "b.safetensors", "--base", "base.safetensors"), 2, "has no --base"),
        (("a.safetensors", "b.safetensors", "--rebuild"), 2, "has no --rebuild"),
        (("a.safetensors", "loha.safetensors"), 5, "sd-scripts cannot merge"),
        (("a.safetensors", "wide.safetensors"), 5, "ranks differ: [2, 3]"),
        (("a.safetensors", "zero.safetensors"), 0, None),
        (("a.safetensors", "dotted.safetensors"), 5, "names that sd-scripts does not read"),
        (("zero.safetensors", "a.safetensors"), 5, "no root of alpha 1 / 0"),
        (("a.safetensors", "minus.safetensors"), 5, "no root of alpha -1 / 1"),
    ],
    ids=str,
)
def test_kohya_is_refused_where_it_is_not_defined(
    arguments: tuple[str, ...], code: int, message: str | None
) -> None:
    write(Path("wide.safetensors"), lora(UNET, 40, 30, rank=3))
    write(Path("zero.safetensors"), lora(UNET, 40, 30, alpha=0.0))
    dotted = {
        "unet.down.a.lora_A.weight": torch.randn(2, 30),
        "unet.down.a.lora_B.weight": torch.randn(40, 2),
    }
    write(Path("dotted.safetensors"), dotted)
    write(Path("minus.safetensors"), lora(UNET, 40, 30, alpha=-1.0))
    result = run("merge", *arguments, "--compat", "kohya", "-o", "out.safetensors")

    if message is None:  # an alpha of 0 beside another contributes nothing there either
        assert result.exit_code == 0, result.stderr
        return
    assert result.exit_code == code, result.stderr
    assert message in result.stderr
    assert not Path("out.safetensors").exists()


def test_concat_alone_is_no_option(in_folder: Path) -> None:
    result = run("merge", "a.safetensors", "b.safetensors", "--concat")

    assert result.exit_code == 2
    assert "`--concat` is a mode of `--compat kohya`" in result.stderr
