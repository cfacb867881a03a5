"""``lycotool merge``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, cast

import typer

from lycotool.cli import _options as opt
from lycotool.cli._errors import reported
from lycotool.cli._groups import given, with_options
from lycotool.cli._output import Output
from lycotool.cli._report import show_merge, show_replay
from lycotool.errors import UsageError

EPILOG = """Examples:

lycotool merge model.safetensors style.safetensors:0.8 character.safetensors

lycotool merge a.safetensors:0.6 b.safetensors:0.4:te=0 -o ab.safetensors

lycotool merge a.safetensors b.safetensors:0.7:density=0.3 --method ties --density 0.5 --rank 32

lycotool merge --recipe mix.toml --lambda 0.8

lycotool merge --replay mix.safetensors --inputs-dir loras"""

_METHOD, _RANKS, _OUTPUT, _COMPUTE, _RECIPES = "Method", "Ranks", "Output", "Computing", "Recipes"

METHODS = Literal[
    "exact",
    "svd",
    "ties",
    "dare",
    "dare-ties",
    "magnitude-prune",
    "della",
    "breadcrumbs",
    "slerp",
    "nuslerp",
]


class _Files:
    output: opt.OutputOption = None
    force: opt.ForceOption = False
    dtype: opt.DtypeOption = "keep"
    metadata: Annotated[
        Literal["first", "union", "none"] | None,
        typer.Option("--metadata", help="Whose metadata an adapter merge keeps.", rich_help_panel=_OUTPUT,
                     show_default="first"),
    ] = None  # fmt: skip
    title: Annotated[
        str | None,
        typer.Option("--title", metavar="TEXT", rich_help_panel=_OUTPUT, show_default="the output's name",
                     help="modelspec.title of a checkpoint."),
    ] = None  # fmt: skip
    shard_size: opt.ShardSizeOption = None
    verify: opt.VerifyOption = False
    strict: opt.StrictOption = False
    dry_run: opt.DryRunOption = False
    json_output: opt.JsonOption = False
    quiet: opt.QuietOption = False


class _Method:
    method: Annotated[
        METHODS | None,
        typer.Option(
            "--method", metavar="METHOD", rich_help_panel=_METHOD, show_default="exact, or svd with a rank",
            help="How the changes w·ΔW become one. exact: their sum. svd: the sum, truncated. ties: trim, elect "
            "signs, average what agrees. dare: drop at random, rescale, add. dare-ties: drop as dare, then elect "
            "as ties. magnitude-prune: keep the largest, add. della: drop by magnitude rank, then elect as ties. "
            "breadcrumbs: leave out the largest and the smallest, add. slerp: along the arc from the first (t 0) "
            "to the second (t 1). nuslerp: slerp with the strengths as shares.",
        ),
    ] = None  # fmt: skip
    density: Annotated[
        float | None,
        typer.Option("--density", metavar="0..1", rich_help_panel=_METHOD, show_default="none",
                     help="Share of each layer's elements to keep; one adapter's own: `FILE:density=0.3`. For ties, "
                     "dare, dare-ties, magnitude-prune, della and breadcrumbs, which need it."),
    ] = None  # fmt: skip
    gamma: Annotated[
        float | None,
        typer.Option("--gamma", metavar="0..1", rich_help_panel=_METHOD, show_default="0.01",
                     help="breadcrumbs: share of the largest elements to leave out; its own: `FILE:gamma=0.02`."),
    ] = None  # fmt: skip
    epsilon: Annotated[
        float | None,
        typer.Option("--epsilon", metavar="0..1", rich_help_panel=_METHOD, show_default="0.15",
                     help="della: elements are kept with a probability from density - epsilon (smallest of a row) "
                     "to density + epsilon (largest); its own: `FILE:epsilon=0.1`."),
    ] = None  # fmt: skip
    scale: Annotated[
        float | None,
        typer.Option("--lambda", metavar="X", rich_help_panel=_METHOD, show_default="1",
                     help="Factor of the combined change; not for exact, svd, slerp and nuslerp."),
    ] = None  # fmt: skip
    normalize: Annotated[
        Literal["none", "count", "weight"] | None,
        typer.Option("--normalize", rich_help_panel=_METHOD, show_default="count where signs are elected, else none",
                     help="Divide by nothing, by how many adapters agree, or by the sum of their strengths."),
    ] = None  # fmt: skip
    consensus: Annotated[
        Literal["total", "frequency"] | None,
        typer.Option("--consensus", rich_help_panel=_METHOD, show_default="total",
                     help="Elected sign: of the sum, or of the majority. For ties, dare-ties and della."),
    ] = None  # fmt: skip
    t: Annotated[
        float | None,
        typer.Option("--t", metavar="0..1", rich_help_panel=_METHOD, show_default="0.5",
                     help="slerp: how far from the first to the second."),
    ] = None  # fmt: skip
    along: Annotated[
        Literal["whole", "rows", "columns"] | None,
        typer.Option("--along", rich_help_panel=_METHOD, show_default="whole",
                     help="nuslerp: turn each layer's weight as one vector, or its rows or columns."),
    ] = None  # fmt: skip
    seed: Annotated[
        int | None,
        typer.Option("--seed", metavar="N", rich_help_panel=_METHOD, show_default="0",
                     help="For dare, dare-ties and della; recorded in the metadata."),
    ] = None  # fmt: skip

    compat: Annotated[
        Literal["none", "kohya"],
        typer.Option("--compat", rich_help_panel=_METHOD,
                     help="kohya: what sd-scripts' merge_lora.py makes of plain LoRAs, for old recipes. It weighs both "
                     "factors, so that one adapter at w becomes w·|w|·ΔW (0.5 gives 0.25), and adds factors, which "
                     "mixes the adapters; alpha is the first's. Takes no method, rank or block weights."),
    ] = "none"  # fmt: skip
    concat: Annotated[
        bool,
        typer.Option("--concat", rich_help_panel=_METHOD,
                     help="With `--compat kohya`, its --concat: ranks side by side under the first alpha, so that each "
                     "change counts w·|w|·r/Σr (two alike at 1 give half their sum)."),
    ] = False  # fmt: skip


class _Ranks:
    rank: Annotated[
        int | None,
        typer.Option("--rank", metavar="N", rich_help_panel=_RANKS, show_default="what is exact",
                     help="Truncate the merged adapter to LoRA factors of this rank; with `--size` or `--error`, "
                     "the most they choose."),
    ] = None  # fmt: skip
    conv_rank: Annotated[
        int | None,
        typer.Option("--conv-rank", metavar="N", rich_help_panel=_RANKS, show_default="--rank",
                     help="Rank of kernels larger than 1."),
    ] = None  # fmt: skip
    size: Annotated[
        str | None,
        typer.Option("--size", metavar="SIZE", rich_help_panel=_RANKS, show_default="none",
                     help="Largest size of the file, 32MB (decimal) or 30MiB (binary); ranks are spread where they save most."),
    ] = None  # fmt: skip
    error: Annotated[
        float | None,
        typer.Option("--error", metavar="0..1", rich_help_panel=_RANKS, show_default="none",
                     help="Relative error of the whole file; ranks as small as it allows."),
    ] = None  # fmt: skip


class _Strengths:
    te: opt.TeOption = 1.0
    unet: opt.UnetOption = 1.0
    lbw: opt.LbwOption = None
    lbw_rule: opt.LbwRuleOption = None


class _Computing:
    rebuild: Annotated[
        bool,
        typer.Option("--rebuild", help="Merge what the rules refuse, by rebuilding the weight change.",
                     rich_help_panel=_COMPUTE),
    ] = False  # fmt: skip
    base_checkpoint: Annotated[
        str | None,
        typer.Option("--base", metavar="CKPT", rich_help_panel=_COMPUTE, show_default="none",
                     help="Checkpoint for algorithms whose change depends on it."),
    ] = None  # fmt: skip
    vae: opt.VaeOption = None
    device: opt.DeviceOption = "auto"
    allow_pickle: opt.PickleOption = False


class _Reading:
    alpha_zero: opt.AlphaZeroOption = "zero"
    dora_strength: opt.DoraStrengthOption = "linear"
    dylora_block_size: opt.DyloraBlockOption = 1
    legacy_loha_cp: opt.LohaCpOption = False
    glora_old_scale: opt.GloraScaleOption = "twice"


class _Recipe:
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", metavar="FILE.toml", rich_help_panel=_RECIPES, show_default="none",
                     help="Read inputs and options from a TOML file: `inputs = [\"base.safetensors\", "
                     "\"style.safetensors:0.7\"]` and options by their names, as `method = \"ties\"`. What the command "
                     "line says wins; relative paths start at the file's folder."),
    ] = None  # fmt: skip
    replay: Annotated[
        str | None,
        typer.Option("--replay", metavar="OUTPUT", rich_help_panel=_RECIPES, show_default="none",
                     help="Merge again what OUTPUT's metadata say it was merged from, and compare the bytes (exit code "
                     "10). Inputs must have the hashes recorded. Without `-o` writes OUTPUT-replayed."),
    ] = None  # fmt: skip
    inputs_dir: Annotated[
        list[str] | None,
        typer.Option("--inputs-dir", metavar="DIR", rich_help_panel=_RECIPES,
                     show_default="OUTPUT's folder, then this one",
                     help="Where `--replay` looks for the inputs first; can be given several times."),
    ] = None  # fmt: skip


#: Options that say how to report, or where to find what to merge.
_OTHERS = frozenset({"json", "quiet", "help", "recipe", "replay", "inputs-dir"})


@reported
@with_options(_Files, _Method, _Ranks, _Strengths, _Recipe, _Computing, _Reading)
def merge(
    context: typer.Context,
    base: Annotated[
        str | None, typer.Argument(metavar="BASE", help="A checkpoint, or an adapter (`FILE:W`).")
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Argument(metavar="ADAPTER[:W]", help="Adapters, each with its strength."),
    ] = None,
    **options: object,
) -> None:
    """Merge adapters into a checkpoint, or adapters into one adapter.

    By default the result is exact: W + Σ w·ΔW for a checkpoint, one adapter equal to Σ w·ΔW
    for adapters. `--method` combines the changes otherwise; strengths, `--te`, `--unet` and
    block weights are the adapters' weights in it. Algorithms the registry's rules refuse end
    with exit code 9; `--rebuild` overrides. The metadata record inputs, hashes and options, so
    that `--replay` gives the same bytes. Prints the path that was written.
    """
    from lycotool.ops._merge_options import merge_options
    from lycotool.ops._recipe import Recipe, read_recipe
    from lycotool.ops.merge import merge as run
    from lycotool.ops.replay import replay

    out = Output(json=bool(options["json_output"]), quiet=bool(options["quiet"]))
    explicit, defaults = given(context)
    named = [text for text in (base, *(adapters or ())) if text is not None]
    values = {name: value for name, value in explicit.items() if name not in _OTHERS}
    if explicit.get("replay") is not None:
        _check_replay(explicit, named)
        folders = cast("list[str]", explicit.get("inputs-dir") or [])
        with out.progress() as bar:
            again = replay(str(explicit["replay"]), folders, values, progress=bar)
        show_replay(out, again, str(explicit["replay"]))
        return
    if "inputs-dir" in explicit:
        raise UsageError("`--inputs-dir` goes with `--replay`")
    recipe = Recipe() if explicit.get("recipe") is None else read_recipe(str(explicit["recipe"]))
    if named:
        recipe = Recipe(tuple(opt.weighted(text, methods=True) for text in named), recipe.values)
    if not recipe.inputs:
        raise UsageError("missing argument BASE", hint="name what to merge, or a `--recipe` that does")
    plain = {name: value for name, value in defaults.items() if name not in _OTHERS}
    chosen = merge_options({**plain, **recipe.values, **values})
    known = recipe.checked_hashes(allow_pickle=chosen.allow_pickle)
    with out.progress() as bar:
        result = run(recipe.inputs[0], recipe.inputs[1:], chosen, progress=bar, known_hashes=known)
    show_merge(out, result)


def _check_replay(explicit: Mapping[str, object], named: Sequence[str]) -> None:
    """Refuse what would change the result that is to be made again.

    Raises
    ------
    UsageError
        Naming it.
    """
    from lycotool.ops._merge_options import OPTIONS

    if named:
        raise UsageError("`--replay` knows its inputs: name none", hint="`--inputs-dir` says where they are")
    for name in explicit:
        if name == "recipe" or (name in OPTIONS and OPTIONS[name].changes_result):
            raise UsageError(f"`--replay` makes the same file again: --{name} does not go with it")
