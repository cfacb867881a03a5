"""Whether a converted file says what the input says: ΔW of every module, read back from the file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lycotool.algorithms.base import MismatchError
from lycotool.errors import BadInputError, CheckError
from lycotool.formats.dialects import Dialect
from lycotool.io.open import open_store
from lycotool.lazy import torch
from lycotool.linalg.threads import side_by_side
from lycotool.ops._adapter import Adapter, read_adapter
from lycotool.ops._convert_forms import Form, read_form
from lycotool.ops._convert_plan import Target
from lycotool.ops._convert_render import Rendered
from lycotool.ops._verify import Claim, relative_difference, same_bits

if TYPE_CHECKING:
    from torch import Tensor

#: How many eps of the coarsest stored dtype a verified module may be off by: each factor is
#: rounded once, and products of two to four of them add up.
_ROUNDING = 4.0


@dataclass(slots=True)
class Made:
    """One module on its way out: where it comes from, and what it became."""

    target: Target
    sources: list[Form | int]
    form: Form
    change: list[str]
    is_exact: bool = True
    base: Tensor | None = None
    rendered: Rendered | None = None


def differences(
    path: Path, made: Sequence[Made], dialect: Dialect, *, source: str, every: bool
) -> dict[str, float]:
    """Relative difference of ΔW by module, of those that were looked at.

    Parameters
    ----------
    path
        What was written.
    source
        The input, for errors.
    every
        Look at modules too that were only given another name.

    Raises
    ------
    CheckError
        Naming the modules that differ by more than rounding.
    """
    with open_store(str(path)) as store:
        written = read_adapter(store)
        written.require_sound()
        found = side_by_side(lambda one: _difference(one, written, dialect, source=source, every=every), made)
    by_name = {
        one.target.name: difference
        for one, difference in zip(made, found, strict=True)
        if difference is not None
    }
    wrong = [
        f"{one.target.name}: {by_name[one.target.name]:.3g}"
        for one in made
        if one.is_exact and by_name.get(one.target.name, 0.0) > _allowed(one)
    ]
    if wrong:
        raise CheckError(
            f"{len(wrong)} modules do not say what the input says", path=source, details=wrong,
            hint="`--dtype fp32` keeps more digits",
        )  # fmt: skip
    return by_name


def _difference(one: Made, written: Adapter, dialect: Dialect, *, source: str, every: bool) -> float | None:
    """Relative difference of ΔW of one module; None where it needs no looking at.

    Raises
    ------
    CheckError
        If the written file does not have it.
    """
    module = written.modules.get(one.target.name)
    if module is None:
        raise CheckError("is not in the written file", path=written.path, key=one.target.name)
    form = read_form(written, module)
    if one.target.is_whole and isinstance(one.sources[0], Form) and same_bits(one.sources[0], form):
        return 0.0
    is_as_it_was = not one.change and one.target.is_whole and dialect.alpha == "stored"
    if is_as_it_was and not every:
        return None
    try:
        return relative_difference(list(_claims(one, form)))
    except MismatchError as error:
        raise BadInputError(str(error), path=source, key=one.target.name) from None


def _claims(one: Made, written: Form) -> Iterator[Claim]:
    """What the written module has to say, piece by piece."""
    target = one.target
    if len(one.sources) == 1 and isinstance(one.sources[0], Form):
        read = one.sources[0]
        rows = None if target.rows is None else torch.arange(*target.rows)
        if target.swaps_halves:
            rows = torch.arange(_height(read)).roll(_height(read) // 2)
        yield Claim(read, rows, written, None, one.base)
        return
    start = 0
    for source in one.sources:
        height = source if isinstance(source, int) else _height(source)
        yield Claim(
            None if isinstance(source, int) else source, None, written, torch.arange(start, start + height)
        )
        start += height


def _height(form: Form) -> int:
    """Rows of the layer, which everything that is split or fused knows."""
    return form.detected.layout.rows(form.detected.sizes) or 0


def _allowed(one: Made) -> float:
    """The relative difference that rounding to the stored dtypes can make."""
    dtypes = [t.dtype for t in one.rendered.tensors.values() if t.is_floating_point()] if one.rendered else []
    return _ROUNDING * max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
