"""Every exit code of the contract, from the command line, and the state of the disk after it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import checkpoint, lora, run, write

MODULE = "lora_unet_down_a"


@dataclass
class Folder:
    """A folder with a checkpoint and an adapter to break."""

    path: Path

    def base(self, tensors: dict[str, torch.Tensor] | None = None) -> Path:
        return write(self.path / "base.safetensors", tensors or checkpoint())

    def adapter(self, tensors: dict[str, torch.Tensor]) -> Path:
        return write(self.path / "adapter.safetensors", tensors)

    def raw(self, name: str, content: bytes) -> Path:
        path = self.path / name
        path.write_bytes(content)
        return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    monkeypatch.chdir(tmp_path)
    return Folder(tmp_path)


def snapshot(path: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


Arguments = tuple[object, ...]


def missing_input(f: Folder) -> Arguments:
    return ("bake", f.base(), f.path / "absent.safetensors")


def unknown_option(f: Folder) -> Arguments:
    return ("bake", f.base(), f.adapter(lora()), "--no-such-option")


def infinite_strength(f: Folder) -> Arguments:
    return ("bake", f.base(), f"{f.adapter(lora())}:inf")


def unknown_suffix(f: Folder) -> Arguments:
    return ("bake", f.base(), f.adapter(lora()), "-o", f.path / "out.foo")


def no_such_device(f: Folder) -> Arguments:
    return ("bake", f.base(), f.adapter(lora()), "--device", "abacus")


def folder_of_nothing(f: Folder) -> Arguments:
    return ("bake", f.path, f.adapter(lora()))


def strength_on_checkpoint(f: Folder) -> Arguments:
    return ("merge", f"{f.base()}:0.5", f.adapter(lora()))


def html_page(f: Folder) -> Arguments:
    return ("bake", f.base(), f.raw("x.safetensors", b"<!DOCTYPE html><html>log in</html>" * 30))


def truncated(f: Folder) -> Arguments:
    whole = f.adapter(lora()).read_bytes()
    return ("bake", f.base(), f.raw("cut.safetensors", whole[:-1]))


def half_a_module(f: Folder) -> Arguments:
    tensors = {key: t for key, t in lora().items() if "lora_down" not in key}
    return ("bake", f.base(), f.adapter(tensors))


def ranks_differ(f: Folder) -> Arguments:
    return ("bake", f.base(), f.adapter({**lora(), f"{MODULE}.lora_up.weight": torch.randn(6, 3)}))


def rank_zero(f: Folder) -> Arguments:
    return ("bake", f.base(), f.adapter(lora(rank=0)))


def two_alphas(f: Folder) -> Arguments:
    return ("bake", f.base(), f.adapter({**lora(), f"{MODULE}.alpha": torch.ones(2)}))


def bool_weight(f: Folder) -> Arguments:
    tensors = {**lora(), f"{MODULE}.lora_up.weight": torch.ones(6, 2, dtype=torch.bool)}
    return ("bake", f.base(), f.adapter(tensors))


def evil_pickle(f: Folder) -> Arguments:
    torch.save({"a": torch.ones(1)}, f.path / "x.ckpt")
    return ("bake", f.path / "x.ckpt", f.adapter(lora()))


def no_module_matches(f: Folder) -> Arguments:
    return ("bake", f.base(), f.adapter(lora("lora_unet_elsewhere")))


def unmatched_strict(f: Folder) -> Arguments:
    return ("bake", f.base(), f.adapter({**lora(), **lora("lora_unet_elsewhere")}), "--strict")


def unknown_tensor_strict(f: Folder) -> Arguments:
    return ("bake", f.base(), f.adapter({**lora(), "mystery.tensor": torch.ones(1)}), "--strict")


def wrong_width(f: Folder) -> Arguments:
    return ("bake", f.base(), f.adapter(lora(width=7)))


def adapter_as_checkpoint(f: Folder) -> Arguments:
    return ("bake", f.adapter(lora()), write(f.path / "b.safetensors", lora()))


def checkpoint_as_adapter(f: Folder) -> Arguments:
    return ("bake", f.base(), write(f.path / "b.safetensors", checkpoint()))


def module_in_two_spellings(f: Folder) -> Arguments:
    twice = {f"{MODULE}.lora_A.weight": torch.randn(2, 5), f"{MODULE}.lora_B.weight": torch.randn(6, 2)}
    return ("bake", f.base(), f.adapter({**lora(), **twice}))


def layer_named_twice(f: Folder) -> Arguments:
    return ("bake", f.base(), f.adapter({**lora(), **lora("diffusion_model.down.a")}))


def int8_weight(f: Folder) -> Arguments:
    tensors = {**lora(), f"{MODULE}.lora_up.weight": torch.ones(6, 2, dtype=torch.int8)}
    return ("bake", f.base(), f.adapter(tensors))


def bias_on_layer_without_one(f: Folder) -> Arguments:
    base = {k: t for k, t in checkpoint().items() if not k.endswith("bias")}
    return ("bake", f.base(base), f.adapter({**lora(), f"{MODULE}.diff_b": torch.ones(6)}))


def ia3_of_another_width(f: Folder) -> Arguments:
    tensors = {f"{MODULE}.weight": torch.ones(9), f"{MODULE}.on_input": torch.tensor(0)}
    return ("bake", f.base(), f.adapter(tensors))


def adapters_of_other_widths(f: Folder) -> Arguments:
    return ("merge", f.adapter(lora()), write(f.path / "b.safetensors", lora(width=9)))


def dora_sum_without_base(f: Folder) -> Arguments:
    a = {**lora(), f"{MODULE}.dora_scale": torch.ones(6, 1)}
    return ("merge", f.adapter(a), write(f.path / "b.safetensors", lora()), "--rebuild")


def nan_alpha(f: Folder) -> Arguments:
    return ("bake", f.base(), f.adapter(lora(alpha=float("nan"))))


def nan_weight(f: Folder) -> Arguments:
    tensors = lora()
    tensors[f"{MODULE}.lora_up.weight"][0, 0] = float("nan")
    return ("bake", f.base(), f.adapter(tensors))


def overflow_on_save(f: Folder) -> Arguments:
    return ("bake", f.base(), f"{f.adapter(lora())}:1e30", "--dtype", "fp16")


def output_exists(f: Folder) -> Arguments:
    return ("bake", f.base(), f.adapter(lora()), "-o", f.raw("out.safetensors", b"old"))


def output_is_an_input(f: Folder) -> Arguments:
    base = f.base()
    return ("bake", base, f.adapter(lora()), "-o", base, "--force")


def output_in_no_folder(f: Folder) -> Arguments:
    return ("bake", f.base(), f.adapter(lora()), "-o", f.path / "absent" / "out.safetensors")


def loha_cp(f: Folder) -> Arguments:
    tensors = {f"{MODULE}.hada_t{i}": torch.randn(2, 2, 3, 3) for i in (1, 2)}
    tensors |= {f"{MODULE}.hada_w{i}_a": torch.randn(2, 6) for i in (1, 2)}
    tensors |= {f"{MODULE}.hada_w{i}_b": torch.randn(2, 5) for i in (1, 2)}
    base = {"model.diffusion_model.down.a.weight": torch.randn(6, 5, 3, 3)}
    return ("merge", f.base(base), f.adapter(tensors))


def lokr(f: Folder) -> Arguments:
    tensors = {f"{MODULE}.lokr_w1": torch.randn(2, 1), f"{MODULE}.lokr_w2": torch.randn(3, 5)}
    return ("merge", f.base(), f.adapter(tensors))


def dora(f: Folder) -> Arguments:
    return ("merge", f.base(), f.adapter({**lora(), f"{MODULE}.dora_scale": torch.ones(6, 1)}))


CASES: list[tuple[int, Callable[[Folder], Arguments], str]] = [
    (2, missing_input, "no such file"),
    (2, unknown_option, "no-such-option"),
    (2, infinite_strength, "finite"),
    (2, unknown_suffix, "format"),
    (2, no_such_device, "device"),
    (2, folder_of_nothing, "directory"),
    (2, strength_on_checkpoint, "strength"),
    (3, html_page, "HTML"),
    (3, truncated, r"truncated"),
    (3, half_a_module, "lora_down.weight missing"),
    (3, ranks_differ, "rank is 3 in lora_up.weight but 2 in lora_down.weight"),
    (3, rank_zero, "rank 0"),
    (3, two_alphas, "alpha"),
    (3, bool_weight, "bool"),
    (4, evil_pickle, "pickle"),
    (5, no_module_matches, "0 of 1 modules"),
    (5, unmatched_strict, "1 of 2 modules"),
    (5, unknown_tensor_strict, "mystery.tensor"),
    (5, wrong_width, "6x7"),
    (5, adapter_as_checkpoint, "is an adapter"),
    (5, checkpoint_as_adapter, "no adapter modules"),
    (5, module_in_two_spellings, "both"),
    (5, layer_named_twice, "same layer"),
    (5, int8_weight, "int8"),
    (5, bias_on_layer_without_one, "has none"),
    (5, ia3_of_another_width, "9 elements"),
    (5, adapters_of_other_widths, "columns differ: 5 in "),
    (5, dora_sum_without_base, "--base"),
    (6, nan_alpha, "alpha is nan"),
    (6, nan_weight, "NaN"),
    (6, overflow_on_save, "65504"),
    (7, output_exists, "exists"),
    (7, output_is_an_input, "same file"),
    (7, output_in_no_folder, "folder"),
    (9, loha_cp, "use_conv_cp is not mergeable"),
    (9, lokr, "LoKr is not mergeable"),
    (9, dora, "DoRA is not mergeable"),
]


@pytest.mark.parametrize(("code", "make", "message"), CASES, ids=lambda v: getattr(v, "__name__", None))
def test_exit_code(code: int, make: Callable[[Folder], Arguments], message: str, folder: Folder) -> None:
    arguments = make(folder)
    before = snapshot(folder.path)
    result = run(*arguments)
    assert result.exit_code == code, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert snapshot(folder.path) == before


@pytest.mark.parametrize(
    "make", [case[1] for case in CASES if case[1] is not unknown_option], ids=lambda make: make.__name__
)
def test_json_error(make: Callable[[Folder], Arguments], folder: Folder) -> None:
    result = run(*make(folder), "--json")
    error = json.loads(result.stderr.splitlines()[-1])["error"]
    assert error["exit_code"] == result.exit_code
    assert error["message"]


@pytest.mark.parametrize("make", [loha_cp, lokr], ids=lambda make: make.__name__)
def test_rebuild_overrides_the_rule(make: Callable[[Folder], Arguments], folder: Folder) -> None:
    result = run(*make(folder), "--rebuild")
    assert result.exit_code == 0, result.stderr
    assert Path(result.stdout.strip()).is_file()


def test_refusal_names_the_way_on(folder: Folder) -> None:
    result = run(*lokr(folder))
    assert "1 of 1 modules" in result.stderr
    assert "--rebuild" in result.stderr
    assert "lycotool bake" in result.stderr


def test_bug_is_exit_1_without_a_traceback(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("lycotool.ops.bake.bake", broken)
    result = run("bake", folder.base(), folder.adapter(lora()))
    assert result.exit_code == 1
    assert "internal error: ZeroDivisionError: oops" in result.stderr


@pytest.mark.parametrize(
    ("error", "code"), [(MemoryError(), 8), (KeyboardInterrupt(), 130)], ids=["memory", "ctrl-c"]
)
def test_other_endings(
    error: BaseException, code: int, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("lycotool.ops._bake_tensors._change", stop)
    base, adapter = folder.base(), folder.adapter(lora())
    before = snapshot(folder.path)
    result = run("bake", base, adapter)
    assert result.exit_code == code
    assert snapshot(folder.path) == before
