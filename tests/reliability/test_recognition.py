"""Recognition of modules and files, for everything the registry's layouts allow and what is near it."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, event, given, settings

from lycotool.algorithms import BY_METADATA, SLOT_NAMES
from lycotool.algorithms.base import MismatchError
from lycotool.algorithms.detection import Detected, detect
from lycotool.errors import LycotoolError
from lycotool.formats.keys import parse_keys
from lycotool.io.open import open_store
from lycotool.ops.inspect import InspectOptions, inspect
from reliability.strategies import (
    Module,
    Shapes,
    files,
    nearly_sound_modules,
    random_modules,
    sound_modules,
)

_SLOW_STRATEGY = [HealthCheck.too_slow, HealthCheck.filter_too_much]


def _told(shapes: Shapes, hint: str | None) -> Detected | str:
    """What is found, or why nothing is."""
    try:
        return detect(shapes, algorithm_hint=hint)
    except MismatchError as error:
        return str(error)


@settings(deadline=None, max_examples=400, suppress_health_check=_SLOW_STRATEGY)
@given(sound_modules())
def test_sound_modules_are_what_they_were_made_for(module: Module) -> None:
    """The layout drawn; or, where shapes alone cannot tell two layouts apart, an error that says both."""
    found = _told(module.shapes, module.hint)
    if isinstance(found, str):
        event("ambiguous")
        assert "fits both" in found
        assert module.layout.name in found
        return
    event(module.algorithm.name)
    assert found.layout.claims(module.shapes)
    assert found.sizes == found.layout.bind(module.shapes)
    if found.layout is not module.layout:
        assert found.layout.prefers is not None or module.layout.prefers is not None
    if module.algorithm.name not in BY_METADATA or found.layout is module.layout:
        assert found.algorithm.name == module.algorithm.name


@settings(deadline=None, max_examples=400, suppress_health_check=_SLOW_STRATEGY)
@given(nearly_sound_modules())
def test_nearly_sound_modules_are_refused_in_words_or_fit(module: Module) -> None:
    found = _told(module.shapes, module.hint)
    if isinstance(found, str):
        event("refused")
        assert found
        return
    event("fits")
    inner = {name: shape for name, shape in module.shapes.items() if name != found.dora_slot}
    assert found.layout.claims(inner)
    assert found.sizes == found.layout.bind(inner)


@settings(deadline=None, max_examples=200)
@given(random_modules())
def test_the_order_of_slots_does_not_matter(shapes: Shapes) -> None:
    found = [_told(dict(items), None) for items in (shapes.items(), reversed(shapes.items()))]
    kinds = [one.label if isinstance(one, Detected) else "refused" for one in found]
    assert kinds[0] == kinds[1]


@pytest.fixture(scope="module")
def file() -> Path:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "x.safetensors"


@functools.cache
def _options() -> InspectOptions:
    return InspectOptions(modules=True, blocks=True, check="all")


@settings(
    deadline=None, max_examples=120, suppress_health_check=[*_SLOW_STRATEGY, HealthCheck.data_too_large]
)
@given(data=files())
def test_inspect_accounts_for_every_tensor(file: Path, data: bytes) -> None:
    """Each is a recognised module's, a damaged one's, or named; and the report is the same twice."""
    file.write_bytes(data)
    try:
        report = inspect(str(file), _options())
    except LycotoolError as error:
        event(type(error).__name__)
        return
    assert report == inspect(str(file), _options())
    event(report.kind)
    if report.kind != "adapter":
        return
    with open_store(str(file)) as store:
        names = list(store.entries)
    keys = parse_keys(names, SLOT_NAMES)
    sorted_out = [key for module in keys.modules.values() for key in module.slots.values()]
    assert sorted([*sorted_out, *keys.orphans, *keys.unknown, *keys.embeddings]) == sorted(names)
    assert report.tensors == len(names)
    assert report.module_count + len(report.faults) == len(keys.modules)
    for name in (*keys.unknown, *keys.orphans):
        assert any(name in line for line in report.warnings), name
