"""Put another VAE into a checkpoint, whichever of the two namings either has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from lycotool.errors import IncompatibleError
from lycotool.io.header import TensorInfo
from lycotool.io.store import Entry, TensorStore
from lycotool.models.families.table import Naming
from lycotool.models.families.vae import POINTWISE, current_name, levels_of, vae_table
from lycotool.ops._common import listed

#: What stands before a VAE's names in a checkpoint.
_PREFIXES = ("first_stage_model.", "vae.")

#: Parts of published VAE files that are no part of the model: the loss it was trained with.
_BESIDE = ("loss.", "model_ema.")


@dataclass(frozen=True, slots=True)
class _Vae:
    """A VAE's tensors by their names without a prefix."""

    keys: Mapping[str, str]
    prefix: str
    naming: Naming


def with_vae(store: TensorStore, vae: TensorStore) -> TensorStore:
    """The checkpoint with the tensors of another VAE in place of its own, each as that file stores it.

    Raises
    ------
    IncompatibleError
        If either has no VAE, or tensors are missing, unknown or of another shape; each is named.
    """
    ours, theirs = _find(store, bare=False), _find(vae, bare=True)
    if ours is None:
        raise IncompatibleError("has no VAE to replace", path=store.path)
    if theirs is None:
        raise IncompatibleError("has no VAE in the names of LDM or diffusers", path=vae.path)
    levels = levels_of(theirs.keys)
    renamed = {_renamed(name, ours.naming, theirs.naming, levels): key for name, key in theirs.keys.items()}
    faults = [f"{name}: not in {vae.path}" for name in ours.keys if name not in renamed]
    faults += [f"{theirs.prefix}{name}: not in {store.path}" for name in renamed if name not in ours.keys]
    shapes = [
        f"{name}: shape {list(vae.info(key).shape)}, expected {list(store.info(ours.keys[name]).shape)}"
        for name, key in renamed.items()
        if name in ours.keys and not _fits(name, vae.info(key).shape, store.info(ours.keys[name]).shape)
    ]
    if faults or shapes:
        raise IncompatibleError(
            "the VAE is not of the same kind as the checkpoint's", path=vae.path,
            details=listed([*faults, *shapes]),
        )  # fmt: skip
    entries = dict(store.entries)
    for name, key in renamed.items():
        place = ours.keys[name]
        was = store.entries[place]
        entries[place] = Entry(_Renamed(vae.entries[key], was.name, was.info.shape), was.name)
    return replace(store, entries=entries, opened=())


def _find(store: TensorStore, *, bare: bool) -> _Vae | None:
    """The VAE of a checkpoint, or the file that is one."""
    for prefix in (*_PREFIXES, "") if bare else _PREFIXES:
        keys = {
            current_name(key.removeprefix(prefix)): key
            for key in store.entries
            if key.startswith(prefix) and not key.removeprefix(prefix).startswith(_BESIDE)
        }
        if any(name.startswith("encoder.down_blocks.") for name in keys):
            return _Vae(keys, prefix, "diffusers")
        if any(name.startswith("encoder.down.") for name in keys):
            return _Vae(keys, prefix, "native")
    return None


def _renamed(name: str, naming: Naming, from_naming: Naming, levels: int) -> str:
    if naming == from_naming:
        return name
    path, dot, slot = name.rpartition(".")
    for found, site in vae_table(levels).find(path):
        if found == from_naming or site.path(from_naming) == path:
            return f"{site.path(naming)}{dot}{slot}"
    return name


def _fits(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether a shape is the one expected: as it is, or as a 1x1 convolution against a matrix."""
    if shape == expected:
        return True
    path = name.rpartition(".")[0]
    is_pointwise = path.endswith(POINTWISE) or "attentions.0." in path
    both = sorted((shape, expected), key=len)
    return is_pointwise and len(both[0]) == 2 and both[1] == (*both[0], 1, 1)


class _Renamed:
    """One tensor of a file under another's name and shape; the bytes are the same."""

    def __init__(self, entry: Entry, name: str, shape: tuple[int, ...]) -> None:
        self._entry = entry
        self.path = entry.file.path
        self.metadata: Mapping[str, str] = {}
        self.tensors: Mapping[str, TensorInfo] = {name: entry.info._replace(shape=shape)}

    def read_into(self, name: str, buffer: memoryview) -> None:
        """Fill ``buffer`` with the tensor's bytes."""
        self._entry.file.read_into(self._entry.name, buffer)

    def chunks(self, name: str) -> Iterator[memoryview]:
        """Yield the tensor's bytes in pieces."""
        return self._entry.file.chunks(self._entry.name)

    def close(self) -> None:
        """The VAE's file is closed by whoever opened it."""
