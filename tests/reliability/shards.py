"""Group E: sharded checkpoints and what an index may name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from reliability.cases import Case, Expected, Maker, Row
from reliability.lab import BAD_INPUT, INCOMPATIBLE, OK, UNSAFE
from reliability.tensors import TEXT_WEIGHT, UNET_WEIGHT, State, checkpoint, numbers, stored

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
_VERBS = ("inspect", "check", "base", "extract", "fold")
_FIRST = {UNET_WEIGHT: checkpoint()[UNET_WEIGHT] + numbers(16, 16, seed=21)}
_SECOND = {TEXT_WEIGHT: checkpoint()[TEXT_WEIGHT] + numbers(16, 16, seed=22)}
_RIGHT: Mapping[str, object] = {UNET_WEIGHT: A, TEXT_WEIGHT: B}


def _index(weight_map: Mapping[str, object], total: int = 2048) -> bytes:
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}).encode()


def model(
    index: bytes,
    shards: Mapping[str, State] | None = None,
    also: Callable[[Path], object] = lambda folder: None,
) -> Maker:
    """A folder with shards and an index; what the index must not reach lies in ``secret``."""

    def make(folder: Path) -> str:
        (folder / "secret").mkdir()
        (folder / "secret" / "s.safetensors").write_bytes(stored(_FIRST, None))
        (folder / "model").mkdir()
        for name, state in (shards or {A: _FIRST, B: _SECOND}).items():
            (folder / "model" / name).write_bytes(stored(state, None))
        (folder / "model" / INDEX).write_bytes(index)
        also(folder / "model")
        return f"model/{INDEX}"

    return make


def _case(id: str, what: str, make: Maker, code: int, message: str = "", **more: object) -> Case:
    by_verb = {"fold": Expected.of(INCOMPATIBLE if code == OK else code)}
    return Case(id=id, what=what, make=make, expected=Expected.of(code, message), verbs=_VERBS,
                **{"by_verb": by_verb, **more})  # fmt: skip


def _elsewhere(shard: str) -> Maker:
    return model(_index({UNET_WEIGHT: shard, TEXT_WEIGHT: B}))


_TWICE = f'{{"weight_map":{{"{UNET_WEIGHT}":"{A}","{UNET_WEIGHT}":"../secret/s.safetensors","{TEXT_WEIGHT}":"{B}"}}}}'

ROWS: tuple[Row, ...] = (
    _case("E00", "a sound index", model(_index(_RIGHT)), OK),
    _case("E01", "a shard above the folder", _elsewhere("../secret/s.safetensors"), UNSAFE, "outside"),
    _case("E02", "a shard by its absolute path", _elsewhere("/etc/s.safetensors"), UNSAFE, "absolute"),
    _case("E03", "a shard is missing", _elsewhere("model-00003-of-00003.safetensors"), BAD_INPUT,
          "model-00003-of-00003"),
    _case("E04", "a tensor is not in its shard", model(_index({UNET_WEIGHT: A, TEXT_WEIGHT: A})), BAD_INPUT, "q_proj"),
    _case("E05", "a tensor the index does not list",
          model(_index({UNET_WEIGHT: A}), {A: _FIRST | _SECOND, B: _SECOND}), BAD_INPUT, "q_proj"),
    _case("E06", "one tensor in two shards",
          model(_index(_RIGHT), {A: _FIRST, B: {UNET_WEIGHT: torch.ones(16, 16)} | _SECOND}), BAD_INPUT, "to_q"),
    _case("E07", "a shard that is a number", model(_index({UNET_WEIGHT: 5, TEXT_WEIGHT: B})), BAD_INPUT, "weight_map"),
    _case("E08", "no weight_map", model(b'{"metadata":{}}'), BAD_INPUT, "weight_map"),
    _case("E09", "not JSON", model(b'{"weight_map":'), BAD_INPUT, "JSON"),
    _case("E10", "a shard that is a pickle", _elsewhere("evil.bin"), UNSAFE, r"\.bin"),
    _case("E11", "an index that names itself", _elsewhere(INDEX), BAD_INPUT, r"index\.json"),
    _case("E12", "a byte order mark", model(b"\xef\xbb\xbf" + _index(_RIGHT)), OK),
    _case("E13", "a shard that is a link out of the folder",
          model(_index({UNET_WEIGHT: "ln.safetensors", TEXT_WEIGHT: B}), {B: _SECOND},
                lambda folder: (folder / "ln.safetensors").symlink_to("../secret/s.safetensors")), UNSAFE, "symlink"),
    _case("E14", "a shard by URL", _elsewhere("http://127.0.0.1:9/x.safetensors"), UNSAFE, "http"),
    _case("E15", "a shard above the folder, in Windows' spelling", _elsewhere("..\\secret\\s.safetensors"), UNSAFE,
          "outside"),
    _case("E15d", "a shard on another drive", _elsewhere("D:s.safetensors"), UNSAFE, "absolute"),
    _case("E16", "an empty weight_map", model(_index({})), INCOMPATIBLE, "no tensors"),
    _case("E17", "a key twice in the index", model(_TWICE.encode()), BAD_INPUT, "duplicate"),
    _case("E18", "a wrong total_size", model(_index(_RIGHT, 7)), OK, "",
          by_verb={"inspect": Expected.of(OK, "total_size"), "base": Expected.of(OK, "total_size"),
                   "extract": Expected.of(OK, "total_size"), "fold": Expected.of(INCOMPATIBLE), "check": Expected((0, 10))}),
    _case("E19", "an index of 11 MB", model(_index(_RIGHT) + b" " * 11 * 2**20), BAD_INPUT, "larger"),
    _case("E21", "a shard whose name no file can have", _elsewhere("x" * 5000 + ".safetensors"), BAD_INPUT, "missing"),
    _case("E20", "a deeply nested index", model(b"[" * 200_000), BAD_INPUT, "JSON"),
)  # fmt: skip
