"""Values too small for the dtype they are saved in are told of, by every command that rounds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import checkpoint, lora, read, run, succeed, write
from training.runs import base_file, write_pictures

MODULE = "lora_unet_down_a"
WEIGHT = "model.diffusion_model.down.a.weight"
SD = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
UP, DOWN = f"{MODULE}.lora_up.weight", f"{MODULE}.lora_down.weight"

#: Half of float16's smallest value, 2^-24, and below: becomes zero.
TINY = 2.0**-26

HALF = ("--dtype", "fp16")


def tiny(name: str = MODULE, slot: str = "lora_up.weight", **more: object) -> dict[str, torch.Tensor]:
    """A LoRA one factor of which vanishes in float16."""
    tensors = lora(name, **more)
    return {**tensors, f"{name}.{slot}": tensors[f"{name}.{slot}"].sign() * TINY}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("underflow")
    torch.manual_seed(0)  # whichever test comes first
    base = checkpoint()
    write(folder / "base.safetensors", base)
    write(folder / "small.safetensors", {**base, WEIGHT: base[WEIGHT].sign() * TINY})
    write(folder / "tuned.safetensors", {**base, WEIGHT: base[WEIGHT] + base[WEIGHT].sign() * 2.0**-20})
    write(folder / "a.safetensors", lora())
    write(folder / "tiny.safetensors", tiny())
    two = {**tiny(), **tiny("lora_unet_up_b", width=7)}
    write(folder / "two.safetensors", two)
    write(folder / "faint.safetensors", {**lora(), UP: torch.randn(6, 2) * 1e-9})
    write(folder / "weak.safetensors", {key: t.half() for key, t in lora(alpha=2.0**-20).items()})
    write(folder / "sd.safetensors", tiny(SD, out=320, width=320))
    write(folder / "dylora.safetensors", tiny(), {"ss_network_module": "networks.dylora"})
    (folder / "slices").mkdir()
    return folder


#: Commands, the key they must name, how much of the worst tensor became zero, and further tensors that lose.
CASES = {
    "bake, a cast": (("bake", "small.safetensors", *HALF), WEIGHT, "30 of 30", ""),
    "bake, a change": (("bake", "small.safetensors", "a.safetensors:1e-9", *HALF), WEIGHT, "30 of 30", ""),
    "bake, float8": (("bake", "small.safetensors", "--dtype", "fp8_e5m2"), WEIGHT, "30 of 30", ""),
    "merge into a checkpoint": (("merge", "small.safetensors", "a.safetensors:1e-9", *HALF), WEIGHT, "30 of 30", ""),
    "merge, one alone": (("merge", "two.safetensors", "a.safetensors", *HALF), "lora_unet_up_b.lora_up.weight", "12 of 12", ""),
    "merge, factors": (("merge", "tiny.safetensors", "tiny.safetensors", *HALF), UP, "24 of 24", ""),
    "merge, a difference": (
        ("merge", "a.safetensors:1e-9", "a.safetensors:1e-9", "--method", "ties", "--density", "1", *HALF),
        f"{MODULE}.diff", "30 of 30", "",
    ),
    "merge, ranks": (("merge", "tiny.safetensors:1e-7", "a.safetensors:1e-16", "--rank", "1", *HALF), UP, "6 of 6", ""),
    "resize, truncated": (("resize", "faint.safetensors", "--rank", "1", *HALF), UP, "6 of 6", ""),
    "resize, carried": (("resize", "tiny.safetensors", "--rank", "2", *HALF), UP, "12 of 12", ""),
    "resize, several": (("resize", "two.safetensors", "--rank", "2", *HALF), "lora_unet_up_b.lora_up.weight", "12 of 12",
                        ", and 1 other tensor by less"),
    "resize, a slice": (("resize", "dylora.safetensors", "--split", "--unit", "1", *HALF, "-o", "slices"), UP, "6 of 6", ""),
    "extract, a difference": (("extract", "base.safetensors", "tuned.safetensors", "--algo", "full", "--dtype", "fp8_e4m3fn"),
                              f"{MODULE}.diff", "30 of 30", ""),
    "extract, factors": (("extract", "base.safetensors", "tuned.safetensors", "--rank", "1", "--dtype", "fp8_e4m3fn"),
                         UP, "6 of 6", ""),
    "extract, lokr": (("extract", "base.safetensors", "tuned.safetensors", "--algo", "lokr", "--dtype", "fp8_e4m3fn"),
                      None, None, ""),
    "convert": (("convert", "sd.safetensors", "--to", "diffusers", "--arch", "sd1", "--no-verify", *HALF), None, "640 of 640", ""),
}  # fmt: skip


def warned(stderr: str) -> list[str]:
    """The lines about underflow."""
    lines = [line for line in stderr.splitlines() if "underflow" in line]
    assert all(line.startswith("lycotool: warning: ") for line in lines)
    return lines


@pytest.fixture
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder as it was before and is afterwards."""
    monkeypatch.chdir(folder)
    before = set(folder.rglob("*"))
    yield folder
    for made in set(folder.rglob("*")) - before:
        made.unlink()


@pytest.mark.parametrize("case", CASES)
def test_what_vanishes_is_told_and_strictly_refused(case: str, in_folder: Path) -> None:
    arguments, key, count, more = CASES[case]
    before = sorted(in_folder.rglob("*"))
    output = () if "-o" in arguments else ("-o", "out.safetensors")
    strict = run(*arguments, *output, "--strict")
    assert strict.exit_code == 5, strict.stderr
    assert "`--strict` makes warnings errors" in strict.stderr
    assert "underflow" in strict.stderr
    assert sorted(in_folder.rglob("*")) == before

    plain = succeed(*arguments, *output)
    (line, *others) = warned(plain.stderr)
    assert len(others) == ("--split" in arguments)  # a line for each file
    if key is not None:
        assert f"{key}: underflow: off by 100 % of its norm in float" in line
        assert f", where {count} values become 0{more}; bf16 and fp32 have the range" in line
    document = json.loads(run(*arguments, *output, "--force", "--json").stdout)
    assert [text for text in document["warnings"] if "underflow" in text] == [
        text.removeprefix("lycotool: warning: ") for text in (line, *others)
    ]


def test_the_count_is_what_is_in_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    succeed("merge", "tiny.safetensors", "tiny.safetensors", *HALF, "-o", "counted.safetensors")
    saved = read(Path("counted.safetensors"))
    assert not saved[UP].any()
    assert saved[DOWN].all()


@pytest.mark.parametrize(
    "arguments",
    [
        ("bake", "small.safetensors", "a.safetensors", *HALF),  # the change is of the usual size
        ("bake", "small.safetensors", "a.safetensors:1e-9"),
        ("bake", "small.safetensors", "a.safetensors:1e-9", "--dtype", "bf16"),
        ("merge", "tiny.safetensors", "a.safetensors"),
        ("merge", "tiny.safetensors", "a.safetensors", "--dtype", "bf16"),
        ("resize", "tiny.safetensors", "--rank", "2"),
        ("resize", "weak.safetensors", "--rank", "1"),  # its alpha is small, not its factors
        ("extract", "base.safetensors", "tuned.safetensors", "--rank", "1", "--dtype", "bf16"),
    ],
)
def test_nothing_is_told_where_nothing_vanishes(
    arguments: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert not warned(succeed(*arguments, "-o", "quiet.safetensors", "--force", "--strict").stderr)


def test_what_is_copied_is_not_looked_at(tmp_path: Path) -> None:
    """A checkpoint in float16 is what it is; only what changes is rounded."""
    base = {key: (tensor.sign() * 2.0**-24).half() for key, tensor in checkpoint().items()}
    write(tmp_path / "base.safetensors", {**base, WEIGHT: torch.randn(6, 5).half()})
    write(tmp_path / "a.safetensors", lora())
    stderr = succeed(
        "bake", tmp_path / "base.safetensors", tmp_path / "a.safetensors", "-o", tmp_path / "o.safetensors"
    ).stderr
    assert not warned(stderr)


def test_an_alpha_folded_into_a_factor(tmp_path: Path) -> None:
    """Names without alphas have the scale in the factor, where float16 may not hold it."""
    up, down = torch.randn(6, 2).half(), torch.randn(2, 6).half()
    tensors = {"unet.down_a.lora_A.weight": down, "unet.down_a.lora_B.weight": up}
    write(tmp_path / "a.safetensors", tensors)
    kohya = {key: t.half() for key, t in lora("lora_unet_down_a", 6, 6, alpha=2.0**-27).items()}
    write(tmp_path / "b.safetensors", kohya)
    result = succeed(
        "merge",
        tmp_path / "a.safetensors:1e-9",
        tmp_path / "b.safetensors",
        *HALF,
        "-o",
        tmp_path / "o.safetensors",
    )
    assert warned(result.stderr), result.stderr


def test_training_tells_of_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of 1e-9: the factor that starts at zero vanishes in float16, and not in bfloat16."""
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "images")
    command = (
        "train", base_file("sd1"), "images", "--preset", "attn-only", "--no-train-te", "--lr", 1e-9, "--steps", 2,
        "--save-every-n-steps", 1, "--resolution", 16, "--min-bucket-reso", 16, "--bucket-reso-steps", 8,
        "--device", "cpu", "-o", "a.safetensors",
    )  # fmt: skip
    lines = warned(succeed(*command, "--save-dtype", "fp16").stderr)
    assert len(lines) == 2
    assert "a-step00000001.safetensors: " in lines[0]
    assert "a.safetensors: " in lines[1]
    assert all("lora_up.weight: underflow: " in line and " 100 % of its norm" in line for line in lines)
    assert not warned(succeed(*command, "--save-dtype", "bf16", "--fresh", "--force").stderr)


def test_strict_training_keeps_what_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exit code says that values vanished; the finished adapter is there, as without ``--strict``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    write_pictures(tmp_path / "images")
    command = (
        "train", base_file("sd1"), "images", "--preset", "attn-only", "--no-train-te", "--lr", 1e-9, "--steps", 1,
        "--resolution", 16, "--min-bucket-reso", 16, "--bucket-reso-steps", 8, "--device", "cpu",
    )  # fmt: skip
    strict = run(*command, "--strict", "-o", "a.safetensors")
    assert strict.exit_code == 5
    assert strict.stdout == ""
    assert "`--strict` makes warnings errors; the adapter is written all the same" in strict.stderr
    assert "a.safetensors: lora_unet_" in strict.stderr
    succeed(*command, "-o", "b.safetensors")
    one, other = read(Path("a.safetensors")), read(Path("b.safetensors"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    succeed(*command, "--strict", "--save-dtype", "bf16", "-o", "c.safetensors")
