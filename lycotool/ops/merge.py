"""merge: a checkpoint and adapters to a checkpoint, or adapters to one adapter.

A method combines the changes ``wᵢ·ΔWᵢ`` (never factors) to one: by default their sum, else
one of :mod:`lycotool.linalg.merging`, layer by layer. Into a checkpoint the combined change
is added (see :mod:`lycotool.ops.bake`). Adapters become one adapter. Its layers are, for the
sum, in the form that stays smallest:

1. a module of one adapter alone keeps its algorithm, its weight folded into one factor;
2. algorithms closed under addition keep their form (full, norm, (IA)³ of one axis, GLoRA);
3. whatever has exact low-rank factors becomes a LoRA of the summed ranks, with a CP core
   when all parts have one (LoHa by Khatri-Rao, LoKr by Kronecker products);
4. the rest becomes a full difference, from the base weight where an algorithm needs it.

Other methods give full differences. A rank, size or error makes LoRA factors of either.
Full differences are computed when the writer asks for them, so that memory is that of the
largest layer, not of the model. The registry's merge rules are obeyed unless ``rebuild``
overrides them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

from lycotool.devices import resolve_device
from lycotool.errors import RefusedError, UsageError
from lycotool.io.open import open_store
from lycotool.io.store import TensorStore
from lycotool.ops._adapter import Adapter, AdapterInput, AdapterModule, is_adapter, read_adapter
from lycotool.ops._bake_files import prepare
from lycotool.ops._common import NoProgress, Progress, check_suffix, default_name
from lycotool.ops._merge_adapters import AdapterMergeResult, merge_adapters
from lycotool.ops._merge_kohya import refuse_with_kohya
from lycotool.ops._merge_options import OPTIONS, MergeOptions, values_of
from lycotool.ops._methods import Combination, MethodOptions, resolve
from lycotool.ops._origin import Hashes, Origin
from lycotool.ops._quantised import dequantised
from lycotool.ops._strengths import StrengthOptions, Weighted, weigh
from lycotool.ops.bake import BakeResult, fold, open_adapters

__all__ = ["AdapterMergeResult", "MergeOptions", "merge"]


def merge(
    base: AdapterInput,
    adapters: Sequence[AdapterInput],
    options: MergeOptions,
    *,
    progress: Progress | None = None,
    known_hashes: Mapping[str, str] | None = None,
) -> BakeResult | AdapterMergeResult:
    """Merge ``adapters`` into ``base``, a checkpoint or an adapter.

    Parameters
    ----------
    known_hashes
        SHA-256 of inputs that have been computed already, by what the user named.

    Raises
    ------
    UsageError
        If options do not go together, or there is nothing to merge.
    RefusedError
        If a registry rule refuses an algorithm and ``options.rebuild`` is off.
    IncompatibleError
        If nothing matches, shapes differ, or an algorithm needs a base that is not given.
    """
    progress = progress or NoProgress()
    with ExitStack() as files:
        store = files.enter_context(open_store(base.path, allow_pickle=options.allow_pickle))
        into_adapter = is_adapter(store)
        opened = open_adapters(adapters, options, files, None if into_adapter else store)
        if into_adapter:
            adapter = read_adapter(store, reading=options.reading)
            adapter.require_sound()
            opened.insert(0, weigh(adapter, base, options.strengths))
        elif base != AdapterInput(base.path):
            raise UsageError("a checkpoint takes no strength", path=base.path)
        if not adapters and (not into_adapter or _is_idle(base, options)):
            raise UsageError(
                "there is nothing to merge", hint="name an adapter, or weigh this one's blocks with `--lbw`"
            )
        named = [base, *adapters] if into_adapter else adapters
        refuse_with_kohya(options, named, into_adapter=into_adapter)
        combination = resolve(options.method, named, truncated=options.ranks.truncates)
        options.ranks.check()
        ending = "" if store.kind == "diffusers" else ".safetensors"
        name = options.output or default_name([base.path, *(a.path for a in adapters)], ending)
        _look_at_output(name, store, opened, options, into_adapter=into_adapter)
        # Angles and spectra are float64. From here on the device is the one that is found.
        exacting = combination.is_dense or options.ranks.truncates
        options = replace(options, device=str(resolve_device(options.device, float64=exacting)))
        for weighted in opened:
            if not options.rebuild:
                _obey_rules(weighted.adapter)
        also = {
            option: files.enter_context(open_store(path, allow_pickle=options.allow_pickle))
            for option, path in (("base", options.base), ("vae", options.vae))
            if path is not None
        }
        checkpoint = None if into_adapter else store
        hashes = None if options.dry_run else files.enter_context(Hashes(known_hashes or {}))
        origin = Origin(_described(checkpoint, opened), also, _recorded(options, combination), hashes)
        if checkpoint is None:
            weights = dequantised(also["base"]) if "base" in also else None
            return merge_adapters(opened, weights, name, options, combination, origin, progress)
        return fold(
            checkpoint, opened, name, options, command="merge", progress=progress, combination=combination,
            origin_of_merge=origin, title=options.title,
        )  # fmt: skip


def _look_at_output(
    name: str, store: TensorStore, opened: Sequence[Weighted], options: MergeOptions, *, into_adapter: bool
) -> None:
    """Say what is wrong with the output before the device is looked for, which takes seconds.

    Raises
    ------
    UsageError
        If options are for the other kind of result.
    OutputError
        If it cannot be written.
    """
    if into_adapter:
        _refuse_checkpoint_options(options)
        check_suffix(name)
    else:
        _refuse_adapter_options(options)
    inputs = [path for source in (store, *(a.adapter.store for a in opened)) for path in source.files]
    shard_size = None if into_adapter else options.shard_size
    prepare(store, name, inputs, shard_size, force=options.force, dry=options.dry_run)


def _described(
    checkpoint: TensorStore | None, adapters: Sequence[Weighted]
) -> list[tuple[TensorStore, Mapping[str, object]]]:
    """The inputs in order, with what the recipe says of each beside its name."""
    first: list[tuple[TensorStore, Mapping[str, object]]] = [] if checkpoint is None else [(checkpoint, {})]
    return first + [(weighted.adapter.store, weighted.described) for weighted in adapters]


def _recorded(options: MergeOptions, combination: Combination) -> dict[str, object]:
    """The options that the result depends on, as a recipe has them.

    Factors for all adapters are part of what is said of each; the method and the seed of a
    random one are named even where they are the default. Results are equal to the bit on
    devices of one kind.
    """
    values = {name: value for name, value in values_of(options).items() if OPTIONS[name].changes_result}
    for name in ("te", "unet", "lbw", "base", "vae"):
        values.pop(name, None)
    if options.compat == "none":
        values["method"] = combination.method.name
    if combination.method.is_random:
        values["seed"] = combination.seed
    values["device"] = options.device.partition(":")[0]
    return values


def _is_idle(base: AdapterInput, options: MergeOptions) -> bool:
    """Whether an adapter alone would come out as it went in."""
    plain = base == AdapterInput(base.path) and options.strengths == StrengthOptions()
    return plain and options.method == MethodOptions() and not options.ranks.truncates


def _refuse_adapter_options(options: MergeOptions) -> None:
    """Refuse what only means something when the result is an adapter.

    Raises
    ------
    UsageError
        Naming the first such option.
    """
    _refuse(
        {
            "--rank, --conv-rank, --size or --error": options.ranks.truncates,
            "--base": options.base is not None,
            "--metadata": options.metadata is not None,
        },
        "BASE is a checkpoint here, it is for a result that is an adapter",
    )


def _refuse_checkpoint_options(options: MergeOptions) -> None:
    """Refuse what only means something when the result is a checkpoint.

    Raises
    ------
    UsageError
        Naming the first such option.
    """
    _refuse(
        {
            "--shard-size": options.shard_size is not None,
            "--vae": options.vae is not None,
            "--title": options.title is not None,
        },
        "BASE is an adapter here, it is for a result that is a checkpoint",
    )


def _refuse(given: Mapping[str, bool], reason: str) -> None:
    for name, is_given in given.items():
        if is_given:
            raise UsageError(f"{name}: {reason}")


def _obey_rules(adapter: Adapter) -> None:
    """Refuse what the registry says cannot be merged.

    Raises
    ------
    RefusedError
        Naming each rule, the number of modules it refuses, and the way on.
    """
    refused: dict[str, list[AdapterModule]] = {}
    for module in adapter.modules.values():
        if not module.detected.merge_rule.allowed:
            refused.setdefault(module.detected.label, []).append(module)
    if not refused:
        return
    rules = {label: modules[0].detected.merge_rule for label, modules in refused.items()}
    total = sum(len(modules) for modules in refused.values())
    details = [
        f"{label}: {len(modules)} modules: {rules[label].reason}" for label, modules in refused.items()
    ]
    raise RefusedError(
        f"{total} of {len(adapter.modules)} modules cannot be merged",
        path=adapter.path,
        details=details,
        hint=next(iter(rules.values())).remedy,
    )
