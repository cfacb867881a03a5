"""Commands whose help has a section for each panel, and whose parser speaks as every other error does."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import typer

from lycotool.cli._errors import report
from lycotool.cli._light import LightCommand, LightGroup
from lycotool.errors import UsageError

#: What other programs call a value, and what it is called here.
_ELSEWHERE: Mapping[str, tuple[str, ...]] = {
    "float": ("fp32",), "float32": ("fp32",), "f32": ("fp32",), "full": ("fp32",),
    "half": ("fp16",), "float16": ("fp16",), "f16": ("fp16",), "bfloat16": ("bf16",), "bfloat": ("bf16",),
    "fp8": ("fp8_e4m3fn", "fp8_e5m2"), "float8_e4m3fn": ("fp8_e4m3fn",), "float8_e5m2": ("fp8_e5m2",),
    "kohya": ("networks.lora", "lycoris.kohya"), "sd-scripts": ("networks.lora",), "lora": ("networks.lora",),
    "a1111": ("networks.lora",), "locon": ("locon.locon_kohya", "lycoris.kohya"), "comfy": ("comfyui",),
    "hf": ("diffusers",), "pwsh": ("powershell",), "oft": ("diag-oft",), "linear": ("exact",), "sum": ("exact",),
    "dare_linear": ("dare",), "dare_ties": ("dare-ties",), "fatal": ("error",),
}  # fmt: skip

#: How a value of a type is shown.
_VALUES = {"str": "TEXT", "int": "N", "float": "X"}

#: Pydantic's words for a type of value, and ours.
_TYPES = {"integer": "a whole number", "number": "a number"}


class GroupedCommand(LightCommand):
    """A command whose help has a section for each panel, and whose usage errors have a hint."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 - Typer's own, not public
        """Read the arguments; what cannot be read ends as every usage error does."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except typer.TyperException as error:
            _refuse(error, ctx, given)

    def format_options(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401 - Typer's own, not public
        """Write one section after the other, in the order they first appear."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                is_option = parameter.param_type_name == "option"
                panel = getattr(parameter, "rich_help_panel", None) or (
                    "Options" if is_option else "Arguments"
                )
                panels.setdefault(panel, []).append(
                    _tidy(record, is_option=is_option, width=formatter.width - 4)
                )
        for panel, records in panels.items():
            with formatter.section(panel):
                formatter.write_dl(records)


class CommandGroup(LightGroup):
    """The whole command line, whose usage errors have a hint too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 - Typer's own, not public
        """Read what stands before the command."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except typer.TyperException as error:
            if not given:  # the help, as an error
                raise
            _refuse(error, ctx, given)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:  # noqa: ANN401 - Typer's own, not public
        """Find the command, or say which was probably meant."""
        try:
            return super().resolve_command(ctx, args)
        except typer.TyperException:
            names = self.list_commands(ctx)
            hint = (
                _meant(args[0], names)
                or f"the commands are {', '.join(names)}; `lycotool --help` shows what each does"
            )
            _end(UsageError(f"no such command: {args[0]}", hint=hint), args)


def _tidy(record: tuple[str, str], *, is_option: bool, width: int) -> tuple[str, str]:
    """What stands left and right in the help.

    Arguments have no types of Python, defaults one pair of brackets, and choices that would not fit a line stand in the text.

    >>> _tidy(("BASE <str>", "A file.  [required]"), is_option=False, width=76)
    ('BASE', 'A file.  [required]')
    >>> _tidy(("--shell X", "Which.  [default: (found out)]"), is_option=True, width=76)
    ('--shell X', 'Which.  [default: found out]')
    >>> _tidy(("--shell <bash|zsh>", "Which."), is_option=True, width=10)
    ('--shell NAME', 'One of bash, zsh. Which.')
    """
    left, right = record
    choices = re.search(r"<([^>]*\|[^>]*)>$", left)
    if len(left) > width and choices is not None:
        left = f"{left[: choices.start()]}NAME"
        right = f"One of {', '.join(choices[1].split('|'))}. {right}"
    if not is_option:
        left = re.sub(r" <[^>]*>$", "", left)
    left = re.sub(r"<(?:list\[)?(str|int|float)\]?>$", lambda found: _VALUES[found[1]], left)
    return left, re.sub(r"\[default: \((.*)\)\]", r"[default: \1]", right)


def _refuse(error: typer.TyperException, ctx: Any, args: Sequence[str]) -> NoReturn:  # noqa: ANN401
    """End with a parser's error in our words."""
    _end(in_our_words(error, ctx, args), args)


def _end(error: UsageError, args: Sequence[str]) -> NoReturn:
    report(error, error.hint or "", as_json="--json" in args)
    raise typer.Exit(error.exit_code) from None


def in_our_words(error: typer.TyperException, ctx: Any, args: Sequence[str]) -> UsageError:  # noqa: ANN401
    """A parser's error with what was given, what was expected and what was probably meant."""
    command = " ".join(["lycotool", *ctx.command_path.split()[len(ctx.find_root().command_path.split()) :]])
    usage = " ".join([command, *ctx.command.collect_usage_pieces(ctx)]).replace("{", "").replace("}", "")
    see = f"`{command} --help` lists arguments and options, with examples"
    option = getattr(error, "option_name", None)
    parameter = getattr(error, "param", None)
    if hasattr(error, "possibilities"):
        return _unknown_option(str(option), _flags(ctx), args, see)
    if option is not None:
        if "does not take" in str(error):
            return UsageError(f"{option} takes no value", hint=see)
        return UsageError(f"{option} needs a value", hint=f"`{_shown(ctx, option)}`; {see}")
    message = str(getattr(error, "message", error)).rstrip(".")
    if parameter is not None:
        name = max(parameter.opts, key=len)
        is_option = parameter.param_type_name == "option"
        if hasattr(error, "param_type"):  # it is missing
            if is_option:
                return UsageError(f"{name} is needed", hint=f"`{_shown(ctx, name)}`; {see}")
            return UsageError(f"missing argument {parameter.metavar or name.upper()}", hint=f"usage: {usage}")
        return _bad_value(name, message, _value(parameter.opts, args) if is_option else None, see)
    if "unexpected extra argument" in message:
        extra = message.partition("argument(s) (")[2].rstrip(")") or message
        return UsageError(f"unexpected argument: {extra}", hint=f"usage: {usage}")
    return UsageError(message[:1].lower() + message[1:], hint=see)


def _unknown_option(option: str, known: Sequence[str], args: Sequence[str], see: str) -> UsageError:
    whole = next((text for text in args if text.startswith(option)), option)
    if not option.startswith("--") and re.search(r"[./\\:]", whole):
        return UsageError(
            f"no such option: {whole}", hint=f"a file whose name begins with `-` is written ./{whole}"
        )
    return UsageError(f"no such option: {option}", hint=_meant(option, known) or see)


def _bad_value(name: str, message: str, value: str | None, see: str) -> UsageError:
    """A value that is none of the choices, or not of the type."""
    message = message.removeprefix("Value error, ")
    given, separator, choices = message.partition(" is not one of ")
    found = f"{name} is {given}" if separator else f"{name} is {value!r}" if value is not None else name
    if separator:
        names = re.findall(r"'([^']*)'", choices)
        return UsageError(
            f"{found}, expected one of {', '.join(names)}", hint=_meant(given.strip("'"), names) or see
        )
    message = re.sub(r"^Input should be (a valid )?", "", message).partition(", unable to parse")[0]
    for theirs, ours in _TYPES.items():
        message = ours if message == theirs else message
    return UsageError(f"{found}, expected {message}", hint=see)


def _value(flags: Sequence[str], args: Sequence[str]) -> str | None:
    """The last value that was given for an option."""
    found = None
    for text, following in zip(args, [*args[1:], None], strict=True):
        flag, equals, value = text.partition("=")
        if flag in flags:
            found = value if equals else following
    return found


def _flags(ctx: Any) -> list[str]:  # noqa: ANN401
    found = []
    for parameter in ctx.command.get_params(ctx):
        if parameter.param_type_name == "option":
            found += [*parameter.opts, *parameter.secondary_opts]
    return [flag for flag in found if flag.startswith("--")]


def _shown(ctx: Any, flag: str) -> str:  # noqa: ANN401
    """An option as the help shows it."""
    for parameter in ctx.command.get_params(ctx):
        if flag in parameter.opts and (record := parameter.get_help_record(ctx)) is not None:
            return str(record[0]).rpartition(", ")[2]
    return flag


def _meant(given: str, known: Iterable[str]) -> str | None:
    """Which was probably meant.

    >>> _meant("tiess", ["exact", "ties"])
    'did you mean ties?'
    >>> _meant("float16", ["fp32", "fp16"])
    'did you mean fp16?'
    >>> _meant("--log", ["--algo", "--log-file", "--log-every"])
    'did you mean --log-file or --log-every?'
    >>> _meant("zzz", ["exact", "ties"])
    """
    import difflib

    known = list(known)
    near = [name for name in _ELSEWHERE.get(given.lower(), ()) if name in known]
    near = near or [name for name in known if name.lower() == given.lower()]
    near = near or [name for name in known if len(given) > 3 and name.startswith(given.lower())][:2]
    near = near or difflib.get_close_matches(given.lower(), known, 2, 0.6)
    if len(near) > 1 and given.lower() not in _ELSEWHERE:
        first, second = (difflib.SequenceMatcher(None, given.lower(), name).ratio() for name in near[:2])
        near = near[:1] if first - second > 0.05 else near
    return f"did you mean {' or '.join(near)}?" if near else None
