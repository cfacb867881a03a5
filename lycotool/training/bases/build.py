"""Empty models of diffusers and transformers, and filling them from a checkpoint.

Nothing here knows a hub: classes are built from configs at hand, on the meta device, and
filled tensor by tensor.
"""

from __future__ import annotations

import importlib
import inspect
from functools import partial
from types import ModuleType

from lycotool.errors import BadInputError, UsageError
from lycotool.io.prefetch import prefetched
from lycotool.io.store import TensorStore
from lycotool.lazy import torch
from lycotool.models.layers import Param
from lycotool.training.bases.configs import Config
from lycotool.training.bases.sources import Shapes

#: The level that transformers 5.6 took out of ``CLIPTextModel``, and all files have.
TEXT_MODEL = "text_model."

#: CLIP's special tokens; many published configs have wrong ones from before transformers 4.31.
SPECIAL_TOKENS = {"bos_token_id": 49406, "eos_token_id": 49407}

_READ_AHEAD_BYTES, _READERS = 512 * 2**20, 2


def library(name: str) -> ModuleType:
    """A library of the extra ``train``.

    Raises
    ------
    UsageError
        If it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            f"training needs {name}, which cannot be imported: {error}",
            hint="pip install 'lycotool[train]'",
        ) from None


def empty_unet(config: Config, *, path: str) -> torch.nn.Module:
    """A ``UNet2DConditionModel`` on the meta device."""
    return _empty("UNet2DConditionModel", config, path)


def empty_vae(config: Config, *, path: str) -> torch.nn.Module:
    """An ``AutoencoderKL`` on the meta device."""
    return _empty("AutoencoderKL", config, path)


def _empty(name: str, config: Config, path: str) -> torch.nn.Module:
    kind = getattr(library("diffusers"), name)
    said = config.get("_class_name", name)
    own = {key: value for key, value in config.items() if not key.startswith("_")}
    unknown = own.keys() - inspect.signature(kind.__init__).parameters
    if said != name or any(own[key] not in (None, False) for key in unknown):
        raise BadInputError(
            f"its config is for {said}" + (f" with {', '.join(sorted(unknown))}" if unknown else ""),
            path=path,
            hint=f"expected a config of {name}, as this version of diffusers knows it",
        )
    try:
        with torch.device("meta"):
            model = kind.from_config({key: own[key] for key in own.keys() - unknown})
    except (TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise BadInputError(f"no {name} can be built from its config: {error}", path=path) from error
    assert isinstance(model, torch.nn.Module)
    return model


def empty_text_encoder(config: Config, *, has_projection: bool, path: str) -> torch.nn.Module:
    """A CLIP text encoder on the meta device."""
    transformers = library("transformers")
    kind = transformers.CLIPTextModelWithProjection if has_projection else transformers.CLIPTextModel
    try:
        with torch.device("meta"):
            model = kind(transformers.CLIPTextConfig(**(config | SPECIAL_TOKENS)))
    except (TypeError, ValueError, AttributeError) as error:
        raise BadInputError(f"no {kind.__name__} can be built from its config: {error}", path=path) from error
    assert isinstance(model, torch.nn.Module)
    return model


def inside_text_model(name: str) -> str:
    """A text encoder's path in every version of transformers: without the outer level."""
    return name.removeprefix(TEXT_MODEL)


def parameter_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, the names of text encoders without the outer level."""
    return {inside_text_model(name): tuple(value.shape) for name, value in model.named_parameters()}


def fill(
    model: torch.nn.Module,
    sources: dict[str, Param],
    store: TensorStore,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Give an empty model its memory and its weights, rounded once to ``dtype``.

    On the meta device there are none.

    The sources must have been checked against the store.
    """
    # Not the class's own `to`, which talks about modules to be kept in float32.
    torch.nn.Module.to(model, dtype=dtype)
    model.requires_grad_(False).eval()
    if device.type == "meta":
        return
    model.to_empty(device=device)
    wanted: dict[str, list[tuple[torch.Tensor, Param]]] = {}
    for name, parameter in model.named_parameters():
        source = sources[inside_text_model(name)]
        wanted.setdefault(source.key, []).append((parameter, source))
    for key, tensor in prefetched(
        sorted(wanted, key=lambda key: (str(store.entries[key].file.path), store.info(key).start)),
        partial(store.tensor, pinned=device.type == "cuda"),
        lambda key: store.info(key).nbytes,
        window=_READ_AHEAD_BYTES,
        workers=_READERS,
    ):
        with torch.no_grad():
            moved = tensor.to(device, non_blocking=True)  # rounded there, where that is fast
            for place, source in wanted[key]:
                place.copy_(source.view(moved).reshape(place.shape))
    _fill_buffers(model)


def _fill_buffers(model: torch.nn.Module) -> None:
    """Compute what no file holds: the numbers of the positions."""
    for name, buffer in model.named_buffers():
        if not name.endswith("position_ids"):
            raise BadInputError(f"{type(model).__name__} has a buffer {name} that no file tells")
        buffer.copy_(torch.arange(buffer.shape[-1], device=buffer.device).expand_as(buffer))


def shapes_under(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    """The shapes of one component, with its prefix taken off."""
    return {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
