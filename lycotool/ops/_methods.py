"""Which merge method a command uses, with what, for how many adapters; see :mod:`lycotool.linalg.merging`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lycotool.errors import UsageError
from lycotool.linalg.merging.base import Along, Change, Consensus, Method, Normalize, Settings, Stream
from lycotool.linalg.merging.methods import DEFAULTS, METHODS, methods_with
from lycotool.ops._adapter import AdapterInput

if TYPE_CHECKING:
    from torch import Tensor

#: A layer, as :func:`lycotool.ops._naming.places` names it.
Place = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodOptions:
    """A merge method by name and what it is told; None leaves a value to the method.

    ``method`` None is the plain sum: ``exact``, or ``svd`` when the result is to be truncated.
    ``density``, ``gamma`` and ``epsilon`` are for adapters that have none of their own.
    """

    method: str | None = None
    density: float | None = None
    gamma: float | None = None
    epsilon: float | None = None
    scale: float | None = None
    normalize: Normalize | None = None
    consensus: Consensus | None = None
    t: float | None = None
    along: Along | None = None
    seed: int | None = None

    def given(self) -> dict[str, object]:
        """The values that are not None, by the names of their options."""
        named: dict[str, object] = {
            "density": self.density, "gamma": self.gamma, "epsilon": self.epsilon, "lambda": self.scale,
            "normalize": self.normalize, "consensus": self.consensus, "t": self.t, "along": self.along,
            "seed": self.seed,
        }  # fmt: skip
        return {name: value for name, value in named.items() if value is not None}


#: Options an adapter may have of its own.
OWN_OPTIONS = ("density", "gamma", "epsilon")


@dataclass(frozen=True, slots=True)
class Combination:
    """A method ready to combine the changes of some adapters.

    Attributes
    ----------
    shares
        ``density``, ``gamma`` and ``epsilon`` of each adapter.
    """

    method: Method
    settings: Settings
    shares: tuple[Mapping[str, float], ...]
    seed: int

    @property
    def is_dense(self) -> bool:
        """Whether the changes themselves are needed, not only their factors."""
        return self.method.combine is not None

    def strength(self, weight: float) -> float:
        """The strength to compute a change at that has this weight."""
        return weight if self.method.strengths == "scale" else 1.0

    def combined(
        self, place: Place, part: str, changes: Mapping[int, Tensor], weights: Sequence[float]
    ) -> Tensor:
        """The combined change of one weight or bias.

        Parameters
        ----------
        place, part
            The layer and ``weight`` or ``bias``: random numbers depend on them, and on the
            adapter's position, alone.
        changes
            By the adapter's position, at :meth:`strength`. An adapter that is missing
            changes nothing here.
        weights
            Of every adapter.
        """
        if self.method.combine is None:
            raise TypeError(self.method.name)
        key = int.from_bytes(hashlib.sha256(repr((self.seed, place, part)).encode()).digest()[:8], "little")
        first = next(iter(changes.values()))
        # Without them, means of two and sums divided by all weights would not be those of all adapters.
        if self.method.adapters[1] is not None or self.settings.normalize == "weight":
            nothing = first.new_zeros(()).expand(first.shape)
            changes = {index: changes.get(index, nothing) for index in range(len(weights))}
        parts = [
            Change(
                tensor,
                weights[index],
                self.shares[index].get("density", 1.0),
                self.shares[index].get("gamma", 0.0),
                self.shares[index].get("epsilon", 0.0),
                Stream(key, index),
            )
            for index, tensor in sorted(changes.items())
        ]
        return self.method.combine(parts, self.settings)


def resolve(options: MethodOptions, adapters: Sequence[AdapterInput], *, truncated: bool) -> Combination:
    """Check that the options make sense together, and fill in what is left out.

    Raises
    ------
    UsageError
        If there is no such method, it does not take an option, needs one that is missing, or
        a value or the number of adapters is out of its range.
    """
    name = options.method or ("svd" if truncated else "exact")
    if name not in METHODS:
        raise UsageError(f"no such method: {name}", hint="one of " + ", ".join(METHODS))
    method = METHODS[name]
    if method.needs_rank and not truncated:
        raise UsageError(
            f"`--method {name}` truncates: it needs `--rank`, `--conv-rank`, `--size` or `--error`"
        )
    if truncated and name == "exact":
        raise UsageError(
            "`--method exact` keeps every rank, so `--rank`, `--conv-rank`, `--size` and `--error` do not go with it",
            hint="`--method svd` truncates",
        )
    given = options.given()
    for option in given:
        _check_taken(method, option, f"--{option}")
    for adapter in adapters:
        for option in OWN_OPTIONS:
            if getattr(adapter, option) is not None:
                _check_taken(method, option, option, path=adapter.path)
    _check_count(method, len(adapters))
    normalize = options.normalize or method.normalize
    if normalize == "count" and "consensus" not in method.options:
        raise UsageError(
            "`--normalize count` divides by the adapters that agree in sign, which "
            f"{name} does not ask for", hint="it goes with " + ", ".join(methods_with("consensus"))
        )  # fmt: skip
    settings = Settings(
        scale=_finite("lambda", options.scale),
        normalize=normalize,
        consensus=options.consensus or "total",
        t=_between("t", _value("t", options.t), 0, 1),
        along=options.along or "whole",
    )
    seed = int(_value("seed", options.seed))
    if not 0 <= seed < 2**63:
        raise UsageError(f"--seed is {seed}, expected a number from 0 to 2**63 - 1")
    return Combination(method, settings, tuple(_shares(method, options, a) for a in adapters), seed)


def _check_taken(method: Method, option: str, shown: str, *, path: str | None = None) -> None:
    if option not in method.options:
        raise UsageError(
            f"{method.name} takes no {shown}",
            path=path,
            hint=f"{shown} goes with `--method` " + ", ".join(methods_with(option)),
        )


def _check_count(method: Method, count: int) -> None:
    least, most = method.adapters
    if count < least or (most is not None and count > most):
        wanted = f"{least} adapters" if most == least else f"at least {least} adapters"
        raise UsageError(f"{method.name} combines {wanted}, not {count}")


def _shares(method: Method, options: MethodOptions, adapter: AdapterInput) -> Mapping[str, float]:
    """The adapter's own density and so on, or those of the command."""
    found: dict[str, float] = {}
    for name in OWN_OPTIONS:
        if name not in method.options:
            continue
        own = getattr(adapter, name)
        value = own if own is not None else getattr(options, name)
        if value is None and name in method.needs:
            raise UsageError(
                f"{method.name} needs `--{name}`, the share of each change's elements to keep",
                hint=f"such as `--{name} 0.5`, or `FILE:0.7:{name}=0.5` for one adapter",
            )
        found[name] = float(DEFAULTS[name] if value is None else value)
    if "density" in found:
        density = _between("density", found["density"], 0, 1)
        if density == 0:
            raise UsageError("density is 0: nothing would be left", path=adapter.path)
        _between("gamma", found.get("gamma", 0.0), 0, 1)
        epsilon = _between("epsilon", found.get("epsilon", 0.0), 0, 1)
        if density < 1 and not (density - epsilon > 0 and density + epsilon <= 1):
            raise UsageError(
                f"density {density:g} and epsilon {epsilon:g} make probabilities from {density - epsilon:g} to "
                f"{density + epsilon:g}, expected some above 0 and at most 1",
                path=adapter.path, hint="give a smaller `--epsilon`",
            )  # fmt: skip
    return found


def _value(name: str, given: float | None) -> float:
    return DEFAULTS[name] if given is None else given


def _finite(name: str, given: float | None) -> float:
    value = _value(name, given)
    if not math.isfinite(value):
        raise UsageError(f"--{name} is {value}, expected a finite number")
    return value


def _between(name: str, value: float, low: float, high: float) -> float:
    if not low <= value <= high:
        raise UsageError(f"{name} is {value:g}, expected a number from {low:g} to {high:g}")
    return value
