"""Group B: sound containers with odd adapters in them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from reliability.cases import OUT, Case, Expected, Row
from reliability.container import tensors
from reliability.lab import BAD_INPUT, CHECK, INCOMPATIBLE, NUMERIC, OK, REFUSED
from reliability.tensors import TEXT, UNET, UNET_WEIGHT, State, checkpoint, good, numbers

VERBS = ("inspect", "check", "resize", "merge", "fold", "bake", "convert")
DOWN, UP, ALPHA = f"{UNET}.lora_down.weight", f"{UNET}.lora_up.weight", f"{UNET}.alpha"

_SHOWN = {"inspect": Expected.of(OK)}


def refused(
    id: str, what: str, change: Callable[[State], object], code: int, message: str, **more: object
) -> Case:
    """Commands that compute refuse it; `inspect` shows it, `inspect --check` ends with 10."""
    return _case(id, what, change, Expected.of(code, message), {"check": Expected.of(CHECK)}, more)


def taken(id: str, what: str, change: Callable[[State], object], message: str = "", **more: object) -> Case:
    """It is read, with a word where there is something to say."""
    return _case(id, what, change, Expected.of(OK, message), {"check": Expected((OK, CHECK))}, more)


def _case(
    id: str, what: str, change: Callable[[State], object], expected: Expected,
    check: dict[str, Expected], more: dict[str, object],
) -> Case:  # fmt: skip
    def state() -> State:
        tensors = good()
        replaced = change(tensors)
        return replaced if isinstance(replaced, dict) else tensors

    own = more.pop("by_verb", {})
    return Case(id=id, what=what, make=tensors(state), expected=expected, verbs=more.pop("verbs", VERBS),
                by_verb={**_SHOWN, **check, **own}, **more)  # fmt: skip


def put(**values: torch.Tensor) -> Callable[[State], object]:
    """Replace tensors of the first module."""
    names = {"down": DOWN, "up": UP, "alpha": ALPHA}
    return lambda state: state.update({names[name]: value for name, value in values.items()})


def drop(name: str) -> Callable[[State], object]:
    """Leave a tensor out."""

    def change(state: State) -> None:
        del state[name]

    return change


def _value(name: str, number: float) -> Callable[[State], object]:
    def change(state: State) -> None:
        state[name][3 % state[name].shape[0], 1] = number

    return change


def _loha(_: State) -> State:
    return {
        f"{module}.{name}": numbers(*shape, seed=seed)
        for seed, module in ((1, UNET), (2, TEXT))
        for name, shape in (
            ("hada_w1_a", (16, 4)), ("hada_w1_b", (4, 16)), ("hada_w2_a", (16, 4)), ("hada_w2_b", (4, 16)),
        )
    }  # fmt: skip


def _lokr(_: State) -> State:
    return {
        f"{module}.{name}": numbers(4, 4, seed=seed)
        for seed, module in ((1, UNET), (2, TEXT))
        for name in ("lokr_w1", "lokr_w2")
    }


def _tucker(state: State) -> None:
    module = "lora_unet_down_blocks_0_resnets_0_conv1"
    state |= {
        f"{module}.lora_down.weight": numbers(4, 16, 1, 1),
        f"{module}.lora_up.weight": numbers(16, 4, 1, 1),
        f"{module}.lora_mid.weight": numbers(4, 4, 3, 3),
        f"{module}.alpha": torch.tensor(4.0),
    }


def _two_dialects(state: State) -> None:
    path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    state |= {f"{path}.lora_A.weight": numbers(4, 16), f"{path}.lora_B.weight": numbers(16, 4)}


def _fp8(state: State) -> State:
    return {name: t.to(torch.float8_e4m3fn) if t.ndim else t for name, t in state.items()}


def _sparse_bias(dtype: torch.dtype, size: float, place: float = 0) -> Callable[[State], object]:
    """A sparse remainder of one number."""
    return lambda state: state.update(
        {
            f"{UNET}.bias_indices": torch.tensor([[place], [0]]).to(dtype),
            f"{UNET}.bias_values": torch.ones(1),
            f"{UNET}.bias_size": torch.tensor([size, size]).to(dtype),
        }
    )


def _dora(state: State) -> None:
    state |= {f"{module}.dora_scale": torch.ones(1, 16) for module in (UNET, TEXT)}


def _changes(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """What the output does to the first layer, in whatever form, and what the good adapter does."""
    written = load_file(folder / OUT)
    good_change = good()[UP] @ good()[DOWN]
    if UNET_WEIGHT in written:
        return written[UNET_WEIGHT] - checkpoint()[UNET_WEIGHT], good_change
    named = {re.sub(r".*to_q\.", "", name): tensor for name, tensor in written.items() if "to_q." in name}
    up = next(named[end] for end in ("lora_up.weight", "lora_B.weight") if end in named)
    down = next(named[end] for end in ("lora_down.weight", "lora_A.weight") if end in named)
    return up @ down * (named.get("alpha", torch.tensor(down.shape[0])) / down.shape[0]), good_change


def _is_turned(folder: Path) -> None:
    """As the good adapter with its sign turned, or the best of rank 2 of that, which is orthogonal to the rest."""
    change, good_change = _changes(folder)
    rank = torch.linalg.matrix_rank(change, rtol=1e-4)
    if rank == 2:
        assert abs(float((change * (good_change + change)).sum())) < 1e-5 * float(change.square().sum())
        assert float((change * good_change).sum()) < 0
    else:  # float32's rounding beside weights of about 1 is 6e-8, below 3 of them 2.4e-7
        torch.testing.assert_close(change, -good_change, rtol=1e-5, atol=3e-7)


def _cancels(folder: Path) -> None:
    """The good adapter and its negative: nothing but the rounding of four products."""
    change, good_change = _changes(folder)
    assert float(change.abs().max()) < 1e-6 * float(good_change.abs().max())


_REFUSED = Expected.of(REFUSED, "not mergeable|not resizable|--rebuild|--to lora")

ROWS: tuple[Row, ...] = (
    refused("B01", "alpha NaN", put(alpha=torch.tensor(float("nan"))), NUMERIC, "alpha"),
    refused("B02", "alpha infinite", put(alpha=torch.tensor(float("inf"))), NUMERIC, "alpha"),
    taken("B03", "alpha 0", put(alpha=torch.tensor(0.0)), "alpha 0"),
    taken("B04", "alpha negative", put(alpha=torch.tensor(-4.0)), after=_is_turned,
          verbs=("inspect", "check", "resize", "fold", "bake", "convert")),
    taken("B04m", "alpha negative, beside the same adapter with its sign", put(alpha=torch.tensor(-4.0)), after=_cancels,
          verbs=("merge",)),
    taken("B05", "alpha an integer", put(alpha=torch.tensor(4))),
    taken("B06", "alpha bfloat16", put(alpha=torch.tensor(4.0, dtype=torch.bfloat16))),
    taken("B07", "alpha of shape [1]", put(alpha=torch.tensor([4.0]))),
    refused("B08", "alpha of shape [2]", put(alpha=torch.tensor([4.0, 2.0])), BAD_INPUT, "alpha"),
    refused("B09", "alpha of shape [0]", put(alpha=torch.zeros(0)), BAD_INPUT, "alpha"),
    taken("B10", "alpha missing", drop(ALPHA), "alpha"),
    refused("B11", "lora_down missing", drop(DOWN), BAD_INPUT, "lora_down"),
    refused("B12", "lora_up missing", drop(UP), BAD_INPUT, "lora_up"),
    refused("B13", "the ranks of up and down differ", put(up=numbers(16, 8)), BAD_INPUT, "rank"),
    refused("B14", "rank 0", put(down=torch.zeros(0, 16), up=torch.zeros(16, 0)), BAD_INPUT, "rank 0"),
    refused("B15", "a NaN weight", _value(UP, float("nan")), NUMERIC, "NaN"),
    refused("B16", "an infinite weight", _value(UP, float("inf")), NUMERIC, "Inf"),
    taken("B17", "a module of zeros", put(up=torch.zeros(16, 4)), by_verb={"check": Expected.of(CHECK, "zero")}),
    refused("B18", "int8 weights without a scale", put(up=torch.ones(16, 4, dtype=torch.int8)), INCOMPATIBLE,
            "int8"),
    taken("B19", "fp8 weights", _fp8),
    refused("B20", "bool weights", put(up=torch.ones(16, 4, dtype=torch.bool)), BAD_INPUT, "bool"),
    refused("B21", "lora_down of one dimension", put(down=numbers(16)), BAD_INPUT, "lora_down"),
    refused("B22", "a convolution of three dimensions on a linear layer",
            put(down=numbers(4, 16, 1, 3, 3), up=numbers(16, 4, 1, 1, 1)), INCOMPATIBLE, "",
            by_verb={"resize": Expected.of(OK), "merge": Expected((INCOMPATIBLE, OK)), "check": Expected((OK, CHECK)),
                     "convert": Expected((OK, INCOMPATIBLE))}),
    refused("B23", "one module in two spellings", _two_dialects, INCOMPATIBLE, "both|same layer|mixes dialects"),
    taken("B24", "down fp16, up fp32", put(down=numbers(4, 16).half())),
    taken("B25", "an unknown tensor", lambda state: state.update({"mystery.tensor": numbers(3, 3)}),
          "mystery.tensor", by_verb={"convert": Expected.of(INCOMPATIBLE, "mystery.tensor")},
          decision="what a format cannot hold is an error of `convert` unless --drop"),
    refused("B25s", "an unknown tensor, --strict", lambda state: state.update({"mystery.tensor": numbers(3, 3)}),
            INCOMPATIBLE, "mystery.tensor", verbs=("resize", "merge", "fold", "bake"), options=("--strict",)),
    taken("B26", "DoRA", _dora, by_verb={
        "resize": Expected.of(REFUSED, "dora"), "merge": Expected.of(REFUSED, "dora"), "fold": Expected.of(REFUSED, "dora"),
        "convert": Expected((OK, INCOMPATIBLE), "")}),
    refused("B20s", "counts that are float8 numbers", _sparse_bias(torch.float8_e4m3fn, 16.0), BAD_INPUT,
            "F8_E4M3.*whole numbers"),
    refused("B15s", "an infinite count", _sparse_bias(torch.float32, float("inf")), NUMERIC, "bias_size.*inf",
            by_verb={"convert": Expected.of(INCOMPATIBLE, "sparse")}),
    refused("B15i", "a place that is NaN", _sparse_bias(torch.float32, 16.0, float("nan")), NUMERIC, "bias_indices.*NaN",
            by_verb={"convert": Expected.of(INCOMPATIBLE, "sparse")}),
    refused("B15o", "a place outside the layer", _sparse_bias(torch.int64, 16, 99), INCOMPATIBLE, "bias|sparse",
            verbs=("inspect", "merge", "fold", "bake", "convert")),
    refused("B15n", "a size of 2^20 by 2^20", _sparse_bias(torch.int64, 2**20), INCOMPATIBLE, "bias|sparse",
            verbs=("inspect", "merge", "fold", "bake", "convert")),
    taken("B27", "LoHa", _loha, by_verb={"resize": _REFUSED, "convert": Expected.of(INCOMPATIBLE, "loha")}),
    taken("B28", "a Tucker core", _tucker, by_verb={
        "convert": Expected((OK, INCOMPATIBLE), "")}),
    refused("B29", "1e6 saved as fp16", _value(UP, 1e6), NUMERIC, "65504", options=("--dtype", "fp16"),
            verbs=("resize", "merge", "convert")),
    refused("B29h", "a LoHa whose products overflow", lambda _: {name: 1e38 * t.sign() for name, t in _loha(_).items()},
            NUMERIC, "inf|NaN|overflow", verbs=("inspect", "check", "fold", "bake"),
            by_verb={"check": Expected.of(CHECK, "fp16-overflow")}),
    refused("B30", "values below the range of fp16", put(up=torch.full((16, 4), 3e-8)), CHECK, "",
            options=("--dtype", "fp16", "--verify"), verbs=("convert",)),
    taken("B30w", "the same without verification", put(up=torch.full((16, 4), 3e-8)), "underflow: off by",
          options=("--dtype", "fp16"), verbs=("resize",)),
    refused("B30s", "the same, --strict", put(up=torch.full((16, 4), 3e-8)), INCOMPATIBLE, "underflow: off by",
            options=("--dtype", "fp16", "--strict"), verbs=("resize", "convert")),
    refused("B31", "complex weights", put(up=torch.ones(16, 4, dtype=torch.complex64)), BAD_INPUT, "complex"),
    refused("B32", "no adapter key", lambda _: {"x": torch.zeros(1)}, INCOMPATIBLE, "no adapter",
            by_verb={"check": Expected((OK, CHECK))}),
    taken("B33", "an alpha without a module",
          lambda state: state.update({"lora_unet_ghost.alpha": torch.tensor(8.0)}), "ghost",
          by_verb={"convert": Expected.of(INCOMPATIBLE, "ghost")}),
    taken("B34", "another rank", lambda _: good(rank=8, alpha=8.0)),
    refused("B35", "another width", lambda _: good(width=32), INCOMPATIBLE, r"\d+ ?[x,×] ?\d+|\d+ in .* and \d+ in",
            verbs=("merge", "fold", "bake")),
    taken("B36", "LoKr", _lokr, by_verb={
        "resize": _REFUSED, "merge": _REFUSED, "fold": _REFUSED, "convert": Expected.of(INCOMPATIBLE, "lokr")}),
    taken("B37", "alpha 1e-40", put(alpha=torch.tensor(1e-40))),
    refused("B38", "no layer of the base fits", lambda _: {
        name.replace("down_blocks_0", "down_blocks_9").replace("layers_0", "layers_90"): t
        for name, t in good().items()}, INCOMPATIBLE, r"0 of \d+", verbs=("fold", "bake")),
    taken("B39", "some layers do not fit", lambda state: state.update({
        name.replace("down_blocks_0", "down_blocks_9"): t for name, t in good().items() if name.startswith(UNET)}),
          r"\d+ of \d+", verbs=("fold", "bake")),
    refused("B39s", "some layers do not fit, --strict", lambda state: state.update({
        name.replace("down_blocks_0", "down_blocks_9"): t for name, t in good().items() if name.startswith(UNET)}),
            INCOMPATIBLE, r"\d+ of \d+", verbs=("fold", "bake"), options=("--strict",)),
)  # fmt: skip
