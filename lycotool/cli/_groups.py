"""Options declared in groups, for commands that have too many for one signature."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import get_type_hints

import typer


def with_options(*groups: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options that some classes declare.

    Each attribute of a class is one option: its annotation is what a parameter's would be,
    its value the default. The command takes them as keyword arguments, and usually reads
    them with :func:`given`.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(*args: object, **kwargs: object) -> None:
            command(*args, **kwargs)

        own = inspect.signature(command, eval_str=True)
        parameters = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        for group in groups:
            for name, hint in get_type_hints(group, include_extras=True).items():
                parameters.append(
                    inspect.Parameter(
                        name, inspect.Parameter.KEYWORD_ONLY, default=getattr(group, name), annotation=hint
                    )
                )
        run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
        return run

    return decorate


def given(context: typer.Context) -> tuple[dict[str, object], dict[str, object]]:
    """The values of a command's options by their long names: those that were given, and the defaults."""
    explicit: dict[str, object] = {}
    defaults: dict[str, object] = {}
    for parameter in context.command.params:
        name = parameter.name
        if name is None or name not in context.params:
            continue
        source = context.get_parameter_source(name)
        option = max(parameter.opts, key=len)
        if not option.startswith("--"):
            continue  # an argument
        chosen = explicit if source is not None and source.name == "COMMANDLINE" else defaults
        chosen[option.removeprefix("--")] = context.params[name]
    return explicit, defaults
