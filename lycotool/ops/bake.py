"""bake: fold adapters of any algorithm into a checkpoint, one tensor at a time.

``W' = W + Σ sᵢ·ΔWᵢ``, every ``ΔWᵢ`` taken on the original ``W``, in float32, rounded once.
Tensors no adapter touches are copied byte for byte. float8 weights with scales beside them
are dequantised, changed, and requantised once with new scales of the same granularity.
Memory is that of the largest layer (at most six float32 copies of it; float64 to verify),
whatever the size of the model.

The work is :mod:`lycotool.ops._fold`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from lycotool.errors import IncompatibleError, UsageError
from lycotool.io.open import open_store
from lycotool.io.store import TensorStore
from lycotool.ops._adapter import AdapterInput, is_adapter
from lycotool.ops._common import (
    NoProgress,
    Progress,
    default_name,
    listed,
)
from lycotool.ops._fold import BakeOptions as BakeOptions
from lycotool.ops._fold import BakeResult as BakeResult
from lycotool.ops._fold import fold as fold
from lycotool.ops._fold import open_adapters as open_adapters
from lycotool.ops._strengths import StrengthOptions, Weighted


def bake(
    checkpoint: str,
    adapters: Sequence[AdapterInput],
    options: BakeOptions,
    *,
    progress: Progress | None = None,
) -> BakeResult:
    """Fold ``adapters`` into ``checkpoint``.

    Parameters
    ----------
    checkpoint
        A ``.safetensors`` file, a sharded index, a diffusers folder or ``-``.
    adapters
        With their strengths; all refer to the original weights. None where the options alone
        change something.

    Raises
    ------
    UsageError
        If there is nothing to do.
    IncompatibleError
        If the checkpoint is an adapter, no module matches, or shapes do not fit.
    CheckError
        If verification finds that the output is not what it must be.
    LycotoolError
        As the readers and writers it uses say.
    """
    if not adapters:
        _check_without_adapters(options)
    with ExitStack() as files:
        store = files.enter_context(open_store(checkpoint, allow_pickle=options.allow_pickle))
        if is_adapter(store):
            raise IncompatibleError(
                "this is an adapter, `bake` needs a checkpoint to fold adapters into",
                path=checkpoint,
                hint="`lycotool merge` adds adapters to an adapter",
            )
        opened = open_adapters(adapters, options, files, store)
        if options.unbake:
            _require_additive(opened)
        done = "-unbaked" if options.unbake else "-baked"
        name = options.output or default_name([checkpoint], done + _ending(store))
        return fold(store, opened, name, options, command="bake", progress=progress or NoProgress())


def _check_without_adapters(options: BakeOptions) -> None:
    """Demand that something is left to do, and nothing asked for that only adapters have.

    Raises
    ------
    UsageError
        If not.
    """
    if options.unbake or options.strengths != StrengthOptions():
        raise UsageError("`--unbake`, `--te`, `--unet` and block weights are for adapters, and none is named")
    if options.vae is None and options.shard_size is None and options.dtype == "keep":
        raise UsageError(
            "there is nothing to bake", hint="name an adapter, `--vae`, `--shard-size` or `--dtype`"
        )


def _require_additive(adapters: Sequence[Weighted]) -> None:
    """Refuse to take out changes that depended on the weights before.

    Raises
    ------
    IncompatibleError
        Naming every such module.
    """
    for weighted in adapters:
        modules = weighted.adapter.modules.values()
        dependent = [f"{m.name}: {m.detected.label}" for m in modules if m.detected.needs_base]
        if dependent:
            raise IncompatibleError(
                f"{len(dependent)} modules changed the weight by an amount that depended on it",
                path=weighted.adapter.path,
                details=listed(dependent),
                hint="only the checkpoint from before has those weights",
            )


def _ending(store: TensorStore) -> str:
    """A diffusers folder gives a folder, anything else one file."""
    return "" if store.kind == "diffusers" else ".safetensors"
