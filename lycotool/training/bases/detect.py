"""Which kind of base model a checkpoint is, and what it predicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from lycotool.errors import IncompatibleError, UsageError
from lycotool.models.architecture import guess_checkpoint
from lycotool.training.bases.configs import FamilyName, Shapes

Prediction = Literal["epsilon", "v_prediction"]

UNET, VAE = "model.diffusion_model.", "first_stage_model."

#: Prefixes of the text encoders in single files.
TEXT: Mapping[FamilyName, tuple[str, ...]] = {
    "sd1": ("cond_stage_model.transformer.",),
    "sd2": ("cond_stage_model.model.",),
    "sdxl": ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."),
}

#: Beginnings of keys beside the components: EMA copies, the schedule's buffers, markers.
BESIDE: tuple[str, ...] = (
    "model_ema.", "betas", "alphas_cumprod", "sqrt_", "log_one_minus_alphas_cumprod", "posterior_",
    "lvlb_weights", "logvar", "global_step", "scale_factor", "denoiser.", "v_pred", "ztsnr",
    "cond_stage_model.logit_scale", "cond_stage_model.text_projection", "embedding_manager.",
)  # fmt: skip

_V_PRED, _ZERO_SNR = "v_pred", "ztsnr"

#: Keys of models trained with EDM's continuous noise levels (CosXL, Playground 2.5).
_EDM = ("edm_vpred.sigma_max", "edm_mean", "edm_std")

#: How ``modelspec.prediction_type`` and people write it.
_SPELLINGS: Mapping[str, Prediction] = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
    "vprediction": "v_prediction",
}

_NAMES: Mapping[FamilyName, str] = {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL"}

_KNOWN = "`train` knows SD 1.x, SD 2.x and SDXL, as single files and as diffusers folders"


@dataclass(frozen=True, slots=True)
class Predicts:
    """What the UNet predicts, where that is known from, and whether the last step is pure noise.

    ``is_assumed`` says that nothing tells, and it is what such models usually predict.
    """

    prediction: Prediction
    evidence: str
    zero_terminal_snr: bool = False
    is_assumed: bool = False


def detect_family(shapes: Shapes, metadata: Mapping[str, str], *, path: str, is_folder: bool) -> FamilyName:
    """The family of a single file or a diffusers folder.

    Raises
    ------
    IncompatibleError
        If it is a model that cannot be trained: another family, a refiner, an inpainting model.
    """
    family = _of_folder(shapes) if is_folder else _of_file(shapes)
    if family is None:
        raise IncompatibleError(_what_else(shapes, metadata), path=path, hint=_KNOWN)
    first = shapes.get("unet.conv_in.weight" if is_folder else f"{UNET}input_blocks.0.0.weight")
    if first is not None and first[1] != 4:
        kind = {9: "an inpainting model", 8: "an image-editing model", 5: "a depth model"}.get(first[1], "")
        raise IncompatibleError(
            f"this is {kind or 'a special model'} of {_NAMES[family]}: "
            f"its UNet reads {first[1]} channels, expected 4",
            path=path,
            hint=_KNOWN,
        )
    if any(key.startswith(_EDM) for key in shapes):
        raise IncompatibleError(
            f"this {_NAMES[family]} model is trained with EDM's noise levels, which `train` does not know",
            path=path,
        )
    return family


def _of_file(shapes: Shapes) -> FamilyName | None:
    if not any(key.startswith(UNET) for key in shapes):
        return None
    for family in ("sdxl", "sd2", "sd1"):
        if any(key.startswith(TEXT[family][-1]) for key in shapes):
            return family
    return None


def _of_folder(shapes: Shapes) -> FamilyName | None:
    if not any(key.startswith("text_encoder.") for key in shapes):
        return None
    if any(key.startswith("text_encoder_2.") for key in shapes):
        return "sdxl" if "unet.add_embedding.linear_1.weight" in shapes else None
    projections = [shape for key, shape in shapes.items() if key.endswith(".proj_in.weight")]
    if not projections or not any(key.startswith("unet.down_blocks.") for key in shapes):
        return None
    # SD 1 projects with a 1x1 convolution, SD 2 with a linear layer.
    return "sd1" if len(projections[0]) == 4 else "sd2"


def _what_else(shapes: Shapes, metadata: Mapping[str, str]) -> str:
    if any(".lora_" in key or key.startswith(("lora_", "lycoris_")) for key in shapes):
        return "this is an adapter, expected a base model"
    is_refiner_folder = any(key.startswith("text_encoder_2.") for key in shapes) and not any(
        key.startswith("text_encoder.") for key in shapes
    )
    if is_refiner_folder or any(key.startswith("conditioner.embedders.0.model.") for key in shapes):
        return "this is the SDXL refiner, which adapters are not trained on"
    if any(key.startswith(UNET + "input_blocks.") for key in shapes):
        return "this file has a UNet but no text encoder of SD 1.x, SD 2.x or SDXL"
    guess = guess_checkpoint(dict(shapes), metadata).name
    return (
        "this model's family is not known"
        if guess == "unknown"
        else f"this is {guess}, which cannot be trained yet"
    )


def detect_prediction(
    family: FamilyName,
    keys: Iterable[str],
    metadata: Mapping[str, str],
    scheduler: Mapping[str, object],
    given: str | None,
    *,
    path: str,
) -> Predicts:
    """What the UNet predicts: given, from metadata, marker keys or the scheduler's config.

    The weights do not tell it. SD 1.x and SDXL predict the noise unless something says
    otherwise; SD 2.x was published with both, so one of them must say.

    Raises
    ------
    UsageError
        If the given value is unknown, or nothing tells what an SD 2.x model predicts.
    """
    present = set(keys)
    zero = _ZERO_SNR in present or scheduler.get("rescale_betas_zero_snr") is True
    if given is not None:
        if given not in _SPELLINGS:
            raise UsageError(
                f"no such prediction type: {given!r}", hint="expected 'epsilon' or 'v_prediction'"
            )
        return Predicts(_SPELLINGS[given], "given", zero)
    said = metadata.get("modelspec.prediction_type", "").strip().lower()
    if said:
        return Predicts(_known(said, "metadata", path), f"its metadata says {said}", zero)
    if _V_PRED in present:
        return Predicts("v_prediction", f"it has the marker key {_V_PRED}", zero)
    told = scheduler.get("prediction_type")
    if told is not None:
        return Predicts(_known(told, "scheduler's config", path), f"its scheduler's config says {told}", zero)
    if family == "sd2":
        raise UsageError(
            "SD 2.x models predict noise or velocity, and nothing in this file tells which",
            path=path,
            hint="use `--prediction v_prediction` for the 768 models (2.0, 2.1), "
            "`--prediction epsilon` for the 512 ones (2-base, 2.1-base)",
        )
    evidence = f"the custom of {_NAMES[family]}, nothing says otherwise"
    return Predicts("epsilon", evidence, zero, is_assumed=True)


def _known(value: object, place: str, path: str) -> Prediction:
    if not isinstance(value, str) or value not in _SPELLINGS:
        raise UsageError(
            f"its {place} has the prediction type {value!r}, which `train` does not know",
            path=path,
            hint="if that is wrong, use `--prediction epsilon` or `--prediction v_prediction`",
        )
    return _SPELLINGS[value]


#: Settings of a UNet's config that make it another kind of model, and what kind.
_OTHER_KINDS: Mapping[str, str] = {
    "class_embed_type": "it reads class embeddings, as unCLIP models do",
    "num_class_embeds": "it reads class numbers, as upscalers do",
    "encoder_hid_dim": "it projects its text, as Kandinsky and DeepFloyd do",
    "time_cond_proj_dim": "it reads the guidance scale, as distilled LCM models do",
}


def check_unet_config(config: Mapping[str, object], *, path: str) -> None:
    """Refuse a diffusers folder whose UNet reads what this family's do not.

    Raises
    ------
    IncompatibleError
        With what it reads.
    """
    for key, why in _OTHER_KINDS.items():
        if config.get(key) is not None:
            raise IncompatibleError(f"this UNet cannot be trained: {why}", path=path, key=key, hint=_KNOWN)


def check_scheduler(config: Mapping[str, object], *, path: str) -> None:
    """Refuse a diffusers folder whose model was trained with noise of another kind.

    Raises
    ------
    IncompatibleError
        If its scheduler is one of EDM's or of flow matching.
    """
    name = str(config.get("_class_name", ""))
    if "EDM" in name or "FlowMatch" in name:
        raise IncompatibleError(
            f"its scheduler is {name}: it is trained with noise of a kind that `train` does not know",
            path=path,
        )
