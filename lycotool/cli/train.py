"""``lycotool train``. Its options are made from :mod:`lycotool.training.options`."""

from __future__ import annotations

import inspect
import sys
from typing import Annotated, Any

import typer

from lycotool.cli import _options as opt
from lycotool.cli._declared import parameters
from lycotool.cli._errors import reported
from lycotool.cli._output import Output
from lycotool.distributed import launched
from lycotool.errors import UsageError
from lycotool.launching import launch
from lycotool.training import config
from lycotool.training.declare import Declared

EPILOG = """Examples:

lycotool train model.safetensors images/ -o cat.safetensors

lycotool train model.safetensors images/ --algo lokr --dim 16 --factor 8 --steps 1000

lycotool train --config cat.toml --lr 1e-4 --dry-run"""

_CONFIG = "Configuration"

BaseArgument = Annotated[
    str | None, typer.Argument(metavar="BASE", help="A checkpoint: SD 1.x, SD 2.x or SDXL; a file or a diffusers folder.")
]  # fmt: skip
DatasetArgument = Annotated[
    str | None,
    typer.Argument(metavar="DATASET", help="A folder of captioned images, a dataset TOML or a metadata.jsonl."),
]  # fmt: skip
OutputOption = Annotated[
    str | None,
    typer.Option("-o", "--output", metavar="PATH", help="The adapter to write.", rich_help_panel="Output",
                 show_default="DATASET-ALGO.safetensors in the current folder"),
]  # fmt: skip
ConfigOption = Annotated[
    str | None,
    typer.Option("--config", metavar="FILE", help="Options as TOML; those given here win.", show_default="none", rich_help_panel=_CONFIG),
]  # fmt: skip
KohyaOption = Annotated[
    str | None,
    typer.Option("--kohya-config", metavar="FILE", rich_help_panel=_CONFIG, show_default="none",
                 help="A training config of sd-scripts (TOML or JSON), with its meaning; options given here win."),
]  # fmt: skip
PrintOption = Annotated[
    bool,
    typer.Option("--print-config", help="Print all options as TOML, and do nothing else.", rich_help_panel=_CONFIG),
]  # fmt: skip
StrictOption = Annotated[
    bool,
    typer.Option("--strict", rich_help_panel="Reports",
                 help="Make warnings errors (exit code 5), before a step is made; at the end those of values that vanish "
                 "in the finished adapter, which is written all the same."),
]  # fmt: skip
NetworkArgOption = Annotated[
    list[str] | None,
    typer.Option("--network-arg", metavar="KEY=VALUE", rich_help_panel="Network", show_default="none",
                 help="A network argument by the name sd-scripts or LyCORIS has for it; may be given several times."),
]  # fmt: skip


@reported
def train(
    base: str | None,
    dataset: str | None,
    output: str | None,
    force: bool,
    config_file: str | None,
    kohya_config: str | None,
    print_config: bool,
    network_arg: list[str] | None,
    dry_run: bool,
    strict: bool,
    json_output: bool,
    quiet: bool,
    **given: Any,  # noqa: ANN401 - one value per declared option
) -> None:
    """Train an adapter from a base model and captioned images.

    Works with nothing but BASE and DATASET; all the rest are options. No network is used. Ctrl-C
    saves and ends with 130; the same command goes on from there. Prints the path that was written.
    """
    from lycotool.cli._train_report import TrainProgress, show_train
    from lycotool.ops.train import check, processes
    from lycotool.ops.train import train as run

    values = _gathered(base, dataset, output, config_file, kohya_config, network_arg, given)
    options = config.build(values)
    if print_config:
        sys.stdout.write(config.to_toml(options))
        return
    place = launched()
    if place is None and not dry_run:
        count = processes(options)
        if count > 1:
            check(options, force=force)
            launch(count, sys.argv[1:])
            return
    speaks = place is None or place.rank == 0
    out = Output(json=json_output, quiet=quiet or not speaks)
    with TrainProgress(out) as progress:
        result = run(options, force=force, dry_run=dry_run, strict=strict, observer=progress)
    if speaks:
        show_train(out, result)


def _gathered(
    base: str | None,
    dataset: str | None,
    output: str | None,
    config_file: str | None,
    kohya_config: str | None,
    network_arg: list[str] | None,
    given: dict[str, Any],
) -> dict[str, Any]:
    """Values by option name: of the file, then of the command line."""
    if config_file is not None and kohya_config is not None:
        raise UsageError("--config and --kohya-config both say what to do", hint="give one")
    values: dict[str, Any] = {}
    if config_file is not None:
        values = config.read_config(config_file)
    elif kohya_config is not None:
        from lycotool.training.kohya_config import read_kohya_config

        values = read_kohya_config(kohya_config)
    known = config.all_options()
    own = {name: value for name, value in given.items() if value is not None and value != []}
    own |= {"base": base, "dataset": dataset, "output": output}
    for name, value in own.items():
        if name in known:
            values[name] = _value(known[name], value)
        elif value is not None:
            values[name] = value
    _add_network_arguments(values, network_arg or [], own)
    return values


def _value(entry: Declared, value: Any) -> Any:  # noqa: ANN401 - any option's
    try:
        return config.convert(entry, value)
    except UsageError as error:
        raise UsageError(f"{entry.flag} is {error.message}", hint=error.hint) from None


def _add_network_arguments(values: dict[str, Any], pairs: list[str], own: dict[str, Any]) -> None:
    """``--network-arg``: other names for options of the network."""
    from lycotool.training.network_options import parse_argument

    taken: dict[str, object] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise UsageError(f"--network-arg {pair!r} is not key=value")
        name, value = parse_argument(key.strip(), text.strip())
        before = taken.get(name, own.get(name))
        if before is not None and before != value:
            raise UsageError(f"{name} is given twice: {before} and {value}")
        taken[name] = value
    values.update(taken)


def _signature() -> inspect.Signature:
    """The options Typer is shown: those here, and one for each that is declared."""
    kind = inspect.Parameter.KEYWORD_ONLY
    fixed: list[tuple[str, Any, Any]] = [
        ("base", BaseArgument, None),
        ("dataset", DatasetArgument, None),
        ("output", OutputOption, None),
        ("force", opt.ForceOption, False),
        ("dry_run", opt.DryRunOption, False),
        ("config_file", ConfigOption, None),
        ("kohya_config", KohyaOption, None),
        ("print_config", PrintOption, False),
        ("strict", StrictOption, False),
        ("json_output", opt.JsonOption, False),
        ("quiet", opt.QuietOption, False),
        ("network_arg", NetworkArgOption, None),
    ]
    own = [inspect.Parameter(name, kind, default=default, annotation=hint) for name, hint, default in fixed]
    return inspect.Signature([*own, *parameters(config.all_options().values())])


train.__signature__ = _signature()  # type: ignore[attr-defined]
