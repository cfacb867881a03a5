"""Open a base model: a single file in LDM's or SGM's names, or a diffusers folder.

No name or config comes from a network. A file is checked whole, by its header, before any
weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lycotool.errors import BadInputError, IncompatibleError
from lycotool.io.open import open_component, open_store, read_json
from lycotool.io.store import TensorStore
from lycotool.lazy import torch
from lycotool.models.families.vae import current_name, levels_of, vae_table
from lycotool.models.layers import Param
from lycotool.training.bases import build, configs, detect, schedule, sources
from lycotool.training.bases.configs import Config, FamilyName
from lycotool.training.bases.model import BaseModel
from lycotool.training.bases.sources import Component, Shapes

#: Layers of OpenCLIP-H as published; SD 2 uses all but the last.
_OPENCLIP_H_LAYERS = 24

_UNKNOWN_LISTED = 3


@dataclass(frozen=True)
class _Part:
    """One network to be filled: the empty model and where its weights are."""

    model: torch.nn.Module
    component: Component
    store: TensorStore

    def check(self) -> None:
        self.component.check(build.parameter_shapes(self.model), self.store.shapes, self.store.path)

    def nbytes(self, dtype: torch.dtype) -> int:
        return dtype.itemsize * sum(parameter.numel() for parameter in self.model.parameters())

    def fill(self, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
        build.fill(self.model, dict(self.component.sources), self.store, dtype=dtype, device=device)
        return self.model


def load_base(
    path: str,
    *,
    prediction: str | None = None,
    unet_dtype: torch.dtype | None = None,
    vae_dtype: torch.dtype | None = None,
    te_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    vae: str | None = None,
    allow_pickle: bool = False,
    unet_device: Callable[[int], torch.device] | None = None,
) -> BaseModel:
    """Load a base model for training.

    Parameters
    ----------
    path
        A single file, a sharded index or a diffusers folder.
    prediction
        ``epsilon`` or ``v_prediction``; detected where the files tell it.
    unet_dtype, vae_dtype, te_dtype
        What the weights are rounded to; float32 if None. SDXL's own VAE gives NaN in float16.
    device
        Where the models go. ``meta`` reads no weights: the models have their structure only,
        which is enough to find targets and to count parameters.
    vae
        A VAE to use in place of the base's: a file in LDM's or diffusers' names, or a folder.
    allow_pickle
        Read pickles too, plain tensors only.
    unet_device
        Told the bytes of all weights, where those of the UNet are to wait; None is ``device``.

    Raises
    ------
    UsageError
        No such file, nothing tells what the model predicts, or a library is missing.
    IncompatibleError
        A model of a kind that cannot be trained.
    BadInputError
        Keys that are missing, left over or of another shape.
    """
    target = torch.device(device)
    with open_store(path, allow_pickle=allow_pickle) as store:
        is_folder = store.kind == "diffusers"
        shapes = store.shapes
        family = detect.detect_family(shapes, store.metadata, path=path, is_folder=is_folder)
        scheduler = _config_of(path, "scheduler", "scheduler_config.json") if is_folder else {}
        detect.check_scheduler(scheduler, path=path)
        predicts = detect.detect_prediction(family, shapes, store.metadata, scheduler, prediction, path=path)
        unet, unet_config = (_folder_unet if is_folder else _file_unet)(family, store)
        texts = [*(_folder_texts if is_folder else _file_texts)(family, store)]
        vae_store = store if vae is None else open_component(vae, allow_pickle=allow_pickle)
        with vae_store:
            image_part, latent_scale = _vae(family, vae_store, is_base=vae is None)
            parts = [unet, *texts, image_part]
            for part in parts:
                part.check()
            dtypes = [dtype or torch.float32 for dtype in (unet_dtype, vae_dtype, te_dtype)]
            nbytes = (
                unet.nbytes(dtypes[0])
                + image_part.nbytes(dtypes[1])
                + sum(t.nbytes(dtypes[2]) for t in texts)
            )
            for_unet = target if unet_device is None or target.type == "meta" else unet_device(nbytes)
            base = BaseModel(
                path=path,
                family=family,
                predicts=predicts,
                unet=unet.fill(dtypes[0], for_unet),
                text_encoders=[text.fill(dtypes[2], target) for text in texts],
                vae=image_part.fill(dtypes[1], target),
                unet_table=configs.unet_table(family, unet_config),
                latent_scale=latent_scale,
                base_alphas=schedule.from_scheduler_config(scheduler),
                unet_dtype=dtypes[0],
                vae_dtype=dtypes[1],
                te_dtype=dtypes[2],
                device=target,
                file=store.files[0] if store.kind == "file" else None,
                files=(*store.files, *(vae_store.files if vae is not None else ())),
                vae_path=vae,
                vae_file=vae_store.files[0] if vae is not None and vae_store.kind == "file" else None,
                warnings=(*store.warnings, *_about_unknown(shapes, is_folder=is_folder)),
            )
    return base


def _about_unknown(shapes: Shapes, *, is_folder: bool) -> Iterator[str]:
    """Say which tensors outside of all components are left alone."""
    known = (
        ("unet.", "vae.", "text_encoder.", "text_encoder_2.")
        if is_folder
        else (detect.UNET, detect.VAE, *(p for ps in detect.TEXT.values() for p in ps), *detect.BESIDE)
    )
    unknown = [key for key in shapes if not key.startswith(known)]
    if unknown:
        shown = ", ".join(unknown[:_UNKNOWN_LISTED]) + (", …" if len(unknown) > _UNKNOWN_LISTED else "")
        yield f"{len(unknown)} tensors are of no known component and are not used: {shown}"


# --- diffusers folders -----------------------------------------------------------------------


def _config_of(folder: str, component: str, name: str = "config.json") -> Config:
    path = Path(folder) / component / name
    if not path.is_file():
        raise BadInputError("this diffusers folder lacks the file", path=path)
    return dict(read_json(path))


def _folder_unet(family: FamilyName, store: TensorStore) -> tuple[_Part, Config]:
    config = configs.published(family)["unet"] | _config_of(store.path, "unet")
    place = f"{store.path}/unet/config.json"
    detect.check_unet_config(config, path=place)
    model = build.empty_unet(config, path=place)
    names = build.parameter_shapes(model)
    return _Part(model, Component("UNet", "unet.", sources.as_stored(names, "unet.")), store), config


def _folder_texts(family: FamilyName, store: TensorStore) -> Iterator[_Part]:
    for number, default in enumerate(configs.published(family)["text_encoders"]):
        component = "text_encoder" if number == 0 else f"text_encoder_{number + 1}"
        own = _config_of(store.path, component)
        config = {key: own.get(key, value) for key, value in default.items()}
        has_projection = number > 0
        model = build.empty_text_encoder(
            config, has_projection=has_projection, path=f"{store.path}/{component}/config.json"
        )
        yield _Part(model, _clip_component(model, store.shapes, f"{component}.", number), store)


# --- single files ----------------------------------------------------------------------------


def _file_unet(family: FamilyName, store: TensorStore) -> tuple[_Part, Config]:
    own = build.shapes_under(store.shapes, detect.UNET)
    config = configs.unet_config(family, own)
    if family == "sdxl":
        projection = store.shapes.get(detect.TEXT["sdxl"][1] + "text_projection")
        if projection is not None:
            config = configs.with_pooled_width(config, projection[-1])
    model = build.empty_unet(config, path=store.path)
    table = configs.unet_table(family, config)
    names = build.parameter_shapes(model)
    return _Part(
        model, Component("UNet", detect.UNET, sources.native(names, table, detect.UNET)), store
    ), config


def _file_texts(family: FamilyName, store: TensorStore) -> Iterator[_Part]:
    for number, (prefix, config) in enumerate(
        zip(detect.TEXT[family], configs.published(family)["text_encoders"], strict=True)
    ):
        own = build.shapes_under(store.shapes, prefix)
        if prefix.endswith(".transformer."):
            inner = {build.inside_text_model(key): shape for key, shape in own.items()}
            model = build.empty_text_encoder(
                configs.clip_config(config, inner), has_projection=False, path=store.path
            )
            yield _Part(model, _clip_component(model, store.shapes, prefix, number), store)
        else:
            yield _openclip_part(family, number, prefix, config, store)


def _clip_component(model: torch.nn.Module, shapes: Shapes, prefix: str, number: int) -> Component:
    """A text encoder in transformers' names, with or without the outer level."""
    names = build.parameter_shapes(model)
    outer = build.TEXT_MODEL if any(key.startswith(prefix + build.TEXT_MODEL) for key in shapes) else ""
    found = {
        name: Param(prefix + ("" if name.startswith("text_projection.") else outer) + name, shape)
        for name, shape in names.items()
    }
    return Component(f"text encoder {number + 1}", prefix, found)


def _openclip_part(family: FamilyName, number: int, prefix: str, config: Config, store: TensorStore) -> _Part:
    own = build.shapes_under(store.shapes, prefix)
    layers = {int(m[1]) for key in own if (m := re.match(r"transformer\.resblocks\.(\d+)\.", key))}
    count = len(layers)
    ignored: tuple[str, ...] = ()
    if family == "sd2" and (
        own.get("token_embedding.weight", (0, 0))[1] != 1024 or count == _OPENCLIP_H_LAYERS
    ):
        count -= 1
        ignored = (rf"transformer\.resblocks\.{count}\..*",)
    model = build.empty_text_encoder(
        configs.openclip_config(config, own, count), has_projection=family == "sdxl", path=store.path
    )
    found = sources.openclip(build.parameter_shapes(model), prefix)
    return _Part(model, Component(f"text encoder {number + 1}", prefix, found, ignored), store)


# --- VAE -------------------------------------------------------------------------------------


def _vae(family: FamilyName, store: TensorStore, *, is_base: bool) -> tuple[_Part, float]:
    shapes = store.shapes
    prefix = next((p for p in (detect.VAE, "vae.") if any(key.startswith(p) for key in shapes)), "")
    own = build.shapes_under(shapes, prefix)
    levels = levels_of(own)
    if not levels:
        raise IncompatibleError(
            "this base has no VAE" if is_base else "this is not a VAE of SD 1.x, SD 2.x or SDXL",
            path=store.path,
            hint="give one with `--vae`" if is_base else None,
        )
    config = _vae_config(family, store, own, prefix)
    if config.get("latents_mean") is not None or config.get("shift_factor"):
        raise IncompatibleError(
            "this VAE shifts its latents, which none of this family does", path=store.path
        )
    model = build.empty_vae(config, path=store.path)
    names = build.parameter_shapes(model)
    if any(key.startswith("encoder.down_blocks.") for key in own):
        stored = {current_name(key): key for key in own}
        found = {name: Param(prefix + stored.get(name, name), shape) for name, shape in names.items()}
    else:
        found = sources.native(names, vae_table(levels), prefix)
    return _Part(model, Component("VAE", prefix, found), store), float(config["scaling_factor"])


def _vae_config(family: FamilyName, store: TensorStore, own: Shapes, prefix: str) -> Config:
    """The config beside the weights, where there is one, else what the shapes tell."""
    default: Config = configs.published(family)["vae"]
    if prefix == "vae.":
        return default | _config_of(store.path, "vae")
    beside = store.files[0].parent / "config.json"
    if not prefix and beside.is_file():
        found = read_json(beside)
        # A folder of many models may have a config of another one.
        if found.get("_class_name") == "AutoencoderKL":
            return default | found
    return configs.vae_config(family, own)
