"""Where each parameter of a model stands in a checkpoint.

The names come from the static tables of :mod:`lycotool.models.families`. Loading is strict:
what the model has and the checkpoint lacks, what the checkpoint has more, and what has
another shape are errors that list the keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lycotool.errors import BadInputError
from lycotool.models.families.table import ModuleTable, Site
from lycotool.models.families.text_encoders import CLIP
from lycotool.models.layers import Param

Shapes = Mapping[str, tuple[int, ...]]

#: Keys inside a component that hold nothing to train or to compute with, as regular expressions.
IGNORED: tuple[str, ...] = (
    # A buffer of transformers before 4.31.
    r".*\bposition_ids",
    # CLIP's temperature and, in CLIP-L, the projection that Stable Diffusion does not use.
    r"logit_scale",
    r"text_projection(\.weight)?",
    # OpenCLIP's mask, a buffer.
    r"attn_mask",
    # Parts of training a VAE.
    r"loss\..*",
    r"model_ema\..*",
)

#: OpenCLIP's parameters that are no layer's, by the module that transformers has for them.
_BARE = frozenset({"positional_embedding"})
_PROJECTION = "text_projection"

#: Faults listed at most.
_LISTED = 20


@dataclass(frozen=True)
class Component:
    """One model of a base: what it is called in errors, and where its keys are.

    Parameters
    ----------
    label
        ``UNet``, ``VAE``, ``text encoder 1``.
    prefix
        What its keys begin with in the checkpoint.
    sources
        Parameter name to place in the checkpoint. A place that does not exist is a missing key.
    ignored
        Further keys without the prefix, as regular expressions, that may be there unused.
    """

    label: str
    prefix: str
    sources: Mapping[str, Param]
    ignored: tuple[str, ...] = ()

    def check(self, parameters: Shapes, shapes: Shapes, path: str) -> None:
        """Compare a model with the checkpoint.

        Parameters
        ----------
        parameters
            Names and shapes of the model's parameters.
        shapes
            Names and shapes of all tensors of the checkpoint.

        Raises
        ------
        BadInputError
            If anything is missing, left over or of another shape.
        """
        faults = []
        used = set()
        for name, shape in parameters.items():
            source = self.sources[name]
            used.add(source.key)
            if source.key not in shapes:
                faults.append(f"{source.key}: missing")
            elif not _same_shape(source, shape, shapes[source.key]):
                found, expected = list(shapes[source.key]), list(_stored_shape(source, shape))
                faults.append(f"{source.key}: has shape {found}, expected {expected}")
        unused = re.compile("|".join((*IGNORED, *self.ignored)))
        faults += [
            f"{key}: not a parameter of this model"
            for key in shapes
            if key.startswith(self.prefix)
            and key not in used
            and not unused.fullmatch(key.removeprefix(self.prefix))
        ]
        if faults:
            more = [f"and {len(faults) - _LISTED} more"] if len(faults) > _LISTED else []
            raise BadInputError(
                f"the {self.label} does not fit its model ({len(faults)} of {len(parameters)} keys)",
                path=path,
                details=[*dict.fromkeys(faults[:_LISTED]), *more],
                hint="the file is damaged, incomplete or of a kind that `train` does not know",
            )


def _stored_shape(source: Param, shape: tuple[int, ...]) -> tuple[int, ...]:
    if source.rows is not None:
        return (3 * shape[0], *shape[1:])
    return shape[::-1] if source.is_transposed else shape


def _same_shape(source: Param, shape: tuple[int, ...], stored: tuple[int, ...]) -> bool:
    """Whether the stored tensor has the parameter's shape, up to a kernel of one element."""
    expected = _stored_shape(source, shape)
    return stored == expected or (
        len(expected) == 2 and stored == (*expected, 1, 1) and not source.is_transposed
    )


def as_stored(names: Shapes, prefix: str) -> dict[str, Param]:
    """Sources of a model whose checkpoint has its own names."""
    return {name: Param(prefix + name, shape) for name, shape in names.items()}


def native(names: Shapes, table: ModuleTable, prefix: str) -> dict[str, Param]:
    """Sources of a UNet or a VAE in LDM's names.

    Parameters
    ----------
    names
        Names and shapes of the model's parameters, in diffusers' naming.
    """
    sources = {}
    for name, shape in names.items():
        path, _, leaf = name.rpartition(".")
        key = _site(table, path).path("native")
        sources[name] = Param(f"{prefix}{key}.{leaf}", shape)
    return sources


def openclip(names: Shapes, prefix: str) -> dict[str, Param]:
    """Sources of a text encoder in OpenCLIP's names.

    Parameters
    ----------
    names
        Names and shapes of the model's parameters, in transformers' naming inside ``text_model.``.
    """
    sources = {}
    for name, shape in names.items():
        path, _, leaf = name.rpartition(".")
        if path == _PROJECTION:
            sources[name] = Param(prefix + _PROJECTION, shape, is_transposed=True)
            continue
        site = _site(CLIP, path)
        module = str(site.rule.native).format(*site.indices)
        if site.part is not None:
            rows = site.part * shape[0], (site.part + 1) * shape[0]
            sources[name] = Param(f"{prefix}{module}_{leaf}", shape, rows)
        else:
            sources[name] = Param(prefix + (module if module in _BARE else f"{module}.{leaf}"), shape)
    return sources


def _site(table: ModuleTable, path: str) -> Site:
    """The one site that diffusers has at a path."""
    found = [site for naming, site in table.find(path) if naming == "diffusers"]
    if len(found) != 1:
        raise BadInputError(
            f"the module {path} of this model is not in lycotool's tables",
            hint="its config asks for a model of another design than Stable Diffusion 1, 2 and XL",
        )
    return found[0]


def unknown_keys(keys: Iterable[str], known: tuple[str, ...]) -> list[str]:
    """The keys that begin with none of the known prefixes."""
    return [key for key in keys if not key.startswith(known)]
