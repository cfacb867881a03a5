"""Where every tensor of a command's inputs went: used, copied, or named in its report.

What went in and what came out is read here with the reference libraries; what the command says
of it is its ``--json`` document.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

State = Mapping[str, torch.Tensor]
Document = Mapping[str, object]

#: The tensors of the modules that the table's adapters have; a layer of its own for each.
_SLOT = re.compile(r"(.+)\.(lora_(up|down|mid|A|B)\.weight|alpha|dora_scale|hada_\w+|lokr_\w+)", re.DOTALL)


def contents(path: Path) -> State:
    """The tensors of a file, of a sharded checkpoint by its index, or of a pickle."""
    if path.name.endswith(".index.json"):
        shards = set(json.loads(path.read_text("utf-8-sig"))["weight_map"].values())
        return {name: tensor for shard in shards for name, tensor in contents(path.parent / shard).items()}
    try:
        return load(path.read_bytes())  # the reference opens no file whose name is not Unicode
    except SafetensorError:
        state = torch.load(path, weights_only=True)
        return state.get("state_dict", state)


def unaccounted(verb: str, inputs: Sequence[State], output: State, document: Document) -> list[str]:
    """What a run that succeeded used, copied or reported nowhere; one line each.

    Parameters
    ----------
    verb
        Of :data:`reliability.cases.VERBS`.
    inputs
        In the order of the command line.
    """
    said = set(_strings(document))
    match verb:
        case "edit":
            return _differing(inputs[0], output)
        case "resize":
            lost = [
                f"module {name}" for name in _modules(inputs[0]) if name not in said | set(_modules(output))
            ]
            return lost + _unnamed(inputs[0], output, said)
        case "convert":
            return [
                f"module {name}" for name in _modules(inputs[0]) if not any(name in text for text in said)
            ] + _unnamed(inputs[0], {}, said)
        case "merge":
            return _of_adapters(inputs, output, document, said) + _count(
                "modules of the output", len(_modules(output)), document["modules"]
            )
        case "fold" | "bake" | "base":
            return _of_checkpoint(inputs[0], output, document) + _of_adapters(inputs[1:], {}, document, said)
        case "extract" | "subtract":
            before, after = inputs
            changed = {name for name in before if not _is_same(before[name], after.get(name))}
            return [name for name in sorted(changed) if not said & {name, name.removesuffix(".weight")}]
    raise ValueError(verb)


def _of_adapters(adapters: Sequence[State], output: State, document: Document, said: set[str]) -> list[str]:
    """Modules that were matched, or are listed; and tensors that are no module's."""
    lost = []
    for state, told in zip(adapters, document["adapters"], strict=True):
        lost += _count("modules", len(_modules(state)), told["modules"])
        lost += _count("modules used or listed", told["modules"], told["matched"] + len(told["unmatched"]))
        lost += _unnamed(state, output, said)
    return lost


def _of_checkpoint(before: State, after: State, document: Document) -> list[str]:
    """Tensors that are there again; as many changed as the command says, or fewer."""
    changed = [name for name in before if not _is_same(before[name], after.get(name))]
    lost = [f"{name} is missing" for name in before.keys() - after.keys()]
    lost += _count("tensors", len(before), document["tensors"])
    return lost + ([] if len(changed) <= document["changed"] else [f"changed too: {changed}"])


def _modules(state: State) -> list[str]:
    """Names of modules: what has more than an alpha."""
    found: dict[str, set[str]] = {}
    for name in state:
        if (match := _SLOT.fullmatch(name)) is not None:
            found.setdefault(match[1], set()).add(match[2])
    return [name for name, slots in found.items() if slots != {"alpha"}]


def _unnamed(state: State, output: State, said: set[str]) -> list[str]:
    """Tensors of no module that are neither copied nor named."""
    modules = set(_modules(state))
    rest = [name for name in state if (match := _SLOT.fullmatch(name)) is None or match[1] not in modules]
    return [
        name
        for name in rest
        if not _is_same(state[name], output.get(name)) and not any(name in text for text in said)
    ]


def _differing(before: State, after: State) -> list[str]:
    return [name for name in before.keys() | after.keys() if not _is_same(before.get(name), after.get(name))]


def _is_same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Whether dtype, shape and bytes are the same."""
    if one is None or other is None or (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    first, second = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(first, second)


def _count(what: str, found: int, told: object) -> list[str]:
    return [] if found == told else [f"{found} {what}, {told} in the report"]


def _strings(document: object) -> Iterator[str]:
    """Every text in a document, keys of objects too."""
    if isinstance(document, str):
        yield document
    elif isinstance(document, Mapping):
        for key, value in document.items():
            yield key
            yield from _strings(value)
    elif isinstance(document, list):
        for value in document:
            yield from _strings(value)
