"""Group G: arguments, arithmetic, resources."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from reliability.cases import OUT, Case, Elsewhere, Expected, Row
from reliability.lab import NUMERIC, OK, USAGE, Setting
from reliability.tensors import TEXT, UNET, State


def _is_named(name: str) -> object:
    def make(folder: Path) -> str:
        return name

    return make


def _case(id: str, what: str, verbs: tuple[str, ...], options: tuple[str, ...], code: int, message: str = "",
          x: str = "good.safetensors", **more: object) -> Case:  # fmt: skip
    return Case(id=id, what=what, make=_is_named(x), expected=Expected.of(code, message), verbs=verbs,
                options=options, **more)  # fmt: skip


def _delta(state: State, module: str) -> torch.Tensor:
    up, down = (state[f"{module}.lora_{end}.weight"].double() for end in ("up", "down"))
    return (up @ down) * (state[f"{module}.alpha"].double() / down.shape[0])


def _is_times(factor: float) -> object:
    """The output is so many times the good adapter, to float32's rounding of sums of four products."""

    def check(folder: Path) -> None:
        written, before = load_file(folder / OUT), load_file(folder / "good.safetensors")
        for module in (UNET, TEXT):
            expected = factor * _delta(before, module)
            assert torch.allclose(_delta(written, module), expected, rtol=1e-6, atol=1e-9)

    return check


_NO_CUDA = Setting(env={"CUDA_VISIBLE_DEVICES": ""})
_WRITERS = ("resize", "merge", "fold", "bake", "convert", "subtract", "edit")

ROWS: tuple[Row, ...] = (
    _case("G01", "rank 0", ("resize", "subtract"), ("--rank", "0"), USAGE, "rank"),
    _case("G02", "rank -1", ("resize", "subtract"), ("--rank", "-1"), USAGE, "rank"),
    _case("G03", "rank 9999", ("resize",), ("--rank", "9999"), OK, "",
          decision="ranks are kept as they are, and the report lists them"),
    _case("G04", "sv_fro 5", ("resize",), ("--method", "sv_fro", "--param", "5"), USAGE, "1"),
    _case("G04n", "sv_fro nan", ("resize",), ("--method", "sv_fro", "--param", "nan"), USAGE, ""),
    _case("G05", "strength nan", ("merge", "bake", "fold"), (), USAGE, "finite", x="good.safetensors:nan"),
    _case("G05i", "strength inf", ("merge", "bake", "fold"), (), USAGE, "finite", x="good.safetensors:inf"),
    _case("G05t", "a factor nan", ("merge", "bake", "fold"), ("--te", "nan"), USAGE, "finite|nan"),
    _case("G05u", "a factor of its own inf", ("merge", "bake", "fold"), (), USAGE, "finite|inf",
          x="good.safetensors:unet=inf"),
    _case("G05l", "a block weight nan", ("bake", "fold"), ("--lbw", ",".join(["nan"] * 17)), USAGE, "finite|nan"),
    _case("G05e", "an error nan", ("resize", "subtract"), ("--error", "nan"), USAGE, ""),
    _case("G05s", "a size below nothing", ("resize", "subtract"), ("--size", "-1MB"), USAGE, "size"),
    _case("G06", "strength 1e30 as fp16", ("merge", "bake", "fold"), ("--dtype", "fp16"), NUMERIC, "65504",
          x="good.safetensors:1e30"),
    _case("G07", "ratios apart from the files they are for", ("merge", "fold", "bake"), ("--ratios", "0.5"), USAGE,
          "ratios", decision="strengths are written at the files, so that their number cannot differ"),
    _case("G07b", "block weights for fewer blocks than there are", ("fold", "bake"), ("--lbw", "1,0.5,0.25"), USAGE,
          r"\b3\b"),
    _case("G08", "an output without a suffix", _WRITERS, ("-o", "folder"), USAGE, "format",
          by_verb={"edit": Expected((USAGE, OK))}),
    _case("G09", "--device cuda without CUDA", ("resize", "bake", "subtract"), ("--device", "cuda"), USAGE, "CUDA",
          setting=_NO_CUDA, seconds=20),
    Elsewhere("G10", "a GPU out of memory", "reliability/test_resources.py::test_gpu_memory_runs_out"),
    Elsewhere("G11", "memory runs out", "reliability/test_resources.py::test_memory_ladder"),
    _case("G12", "one adapter at half its strength", ("merge",), (), OK, x="good.safetensors:-0.5",
          after=_is_times(0.5)),
    _case("G14", "an adapter minus itself", ("merge",), (), OK, x="good.safetensors:-1", after=_is_times(0.0)),
    _case("G15", "the same file twice", ("merge",), (), OK, after=_is_times(2.0)),
    Elsewhere("G13", "concatenation of halves is the whole", "conformance/test_sums.py::test_joined_factors_are_the_sum"),
    Elsewhere("G16", "memory of `bake`", "reliability/test_resources.py::test_memory_is_what_is_documented"),
    Elsewhere("G17", "memory of `merge`", "reliability/test_resources.py::test_memory_is_what_is_documented"),
    Elsewhere("G18", "one thread, two and four", "reliability/test_resources.py::test_threads_give_the_same_bytes"),
    Elsewhere("G19", "casts beyond the range", "reliability/test_cases.py::test_case[B29-merge]"),
)  # fmt: skip
