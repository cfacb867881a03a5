"""Every option of the data: one declaration each, with help, panel, level and sd-scripts' name.

The level says where an option may stand in a dataset file: ``subset`` options everywhere,
``dataset`` options in ``[general]`` and ``[[datasets]]``, ``run`` options only on the command
line. A lower place wins: subset, dataset, general, command line.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Literal, TypeVar

from lycotool.errors import UsageError
from lycotool.training.data.option_rules import check_buckets, check_ranges, idle_options

Level = Literal["run", "dataset", "subset"]

Value = TypeVar("Value")

#: Width and height, in pixels.
Size = tuple[int, int]

#: Pixels per side a family is trained at, by family and prediction type.
NATIVE_RESOLUTION = {
    ("sd1", "epsilon"): 512,
    ("sd1", "v_prediction"): 512,
    ("sd2", "epsilon"): 512,
    ("sd2", "v_prediction"): 768,
    ("sdxl", "epsilon"): 1024,
    ("sdxl", "v_prediction"): 1024,
}


def _option(
    default: Value, panel: str, level: Level, help: str, *, unit: str = "", kohya: str | None = None
) -> Value:
    metadata = {"help": help, "panel": panel, "level": level, "unit": unit}
    if kohya is not None:
        metadata["kohya"] = kohya
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataOptions:
    """What a run reads, and how. Each field's metadata has ``help``, ``panel``, ``level``, ``kohya``.

    Raises
    ------
    UsageError
        If a value is out of its range or two options contradict each other.
    """

    # Files
    num_repeats: int = _option(
        1,
        "Data",
        "subset",
        "Times each image is used per epoch; `10_name` folders have their own number.",
        kohya="dataset_repeats",
    )
    recursive: bool = _option(False, "Data", "run", "Also read images in subfolders without a repeat number.")
    image_root: str | None = _option(
        None, "Data", "run", "What names in a metadata file are relative to; default its own folder."
    )
    reg_data_dir: str | None = _option(
        None,
        "Data",
        "run",
        "Folder of regularisation images, or of `N_class` folders of them.",
        kohya="reg_data_dir",
    )
    prior_loss_weight: float = _option(
        1.0, "Data", "run", "Factor on the loss of regularisation images.", kohya="prior_loss_weight"
    )
    is_reg: bool = _option(False, "Data", "subset", "The images are regularisation images.", kohya="is_reg")
    validation_split: float = _option(
        0.0,
        "Data",
        "dataset",
        "Part of the images set aside for the validation loss, 0 to 1.",
        kohya="validation_split",
    )
    validation_seed: int = _option(
        0, "Data", "dataset", "Which images are set aside.", kohya="validation_seed"
    )

    # Batches and buckets
    resolution: tuple[int, int] | None = _option(
        None,
        "Buckets",
        "dataset",
        "Area of the training images: a side, or width and height; default the model's own.",
        unit="pixels",
        kohya="resolution",
    )
    batch_size: int = _option(
        1, "Buckets", "dataset", "Batch size of each GPU.", unit="images", kohya="train_batch_size"
    )
    enable_bucket: bool = _option(
        True,
        "Buckets",
        "dataset",
        "Keep aspect ratios: train in buckets of about the same area.",
        kohya="enable_bucket",
    )
    min_bucket_reso: int = _option(
        256, "Buckets", "dataset", "Shortest side of a bucket.", unit="pixels", kohya="min_bucket_reso"
    )
    max_bucket_reso: int | None = _option(
        None,
        "Buckets",
        "dataset",
        "Longest side of a bucket; default twice the resolution.",
        unit="pixels",
        kohya="max_bucket_reso",
    )
    bucket_reso_steps: int = _option(
        64,
        "Buckets",
        "dataset",
        "Bucket sides are multiples of this.",
        unit="pixels",
        kohya="bucket_reso_steps",
    )
    bucket_no_upscale: bool = _option(
        False,
        "Buckets",
        "dataset",
        "Never enlarge images; bucket sizes then follow the images.",
        kohya="bucket_no_upscale",
    )

    # Captions
    caption_extension: str | None = _option(
        None,
        "Captions",
        "subset",
        "Suffix of caption files; default `.txt`, then `.caption`.",
        kohya="caption_extension",
    )
    class_tokens: str | None = _option(
        None, "Captions", "subset", "Caption of images that have none.", kohya="class_tokens"
    )
    allow_missing_captions: bool = _option(
        False, "Captions", "run", "Train images whose caption is missing or empty with an empty caption."
    )
    caption_prefix: str | None = _option(
        None, "Captions", "subset", "Put before every caption, with a space.", kohya="caption_prefix"
    )
    caption_suffix: str | None = _option(
        None, "Captions", "subset", "Put after every caption, with a space.", kohya="caption_suffix"
    )
    caption_separator: str = _option(
        ",", "Captions", "subset", "What separates the tags of a caption.", kohya="caption_separator"
    )
    shuffle_caption: bool = _option(
        False, "Captions", "subset", "Shuffle the tags of a caption at each use.", kohya="shuffle_caption"
    )
    keep_tokens: int = _option(
        0,
        "Captions",
        "subset",
        "Tags at the start that stay in place and are never dropped.",
        unit="tags",
        kohya="keep_tokens",
    )
    keep_tokens_separator: str | None = _option(
        None,
        "Captions",
        "subset",
        "Instead: text such as `|||` between the fixed, free and fixed tags.",
        kohya="keep_tokens_separator",
    )
    secondary_separator: str | None = _option(
        None,
        "Captions",
        "subset",
        "Text such as `;;;` between tags that stay together.",
        kohya="secondary_separator",
    )
    enable_wildcard: bool = _option(
        False,
        "Captions",
        "subset",
        "Draw one of `{a|b|c}`, and one line of a caption of several.",
        kohya="enable_wildcard",
    )
    caption_dropout_rate: float = _option(
        0.0, "Captions", "subset", "Chance that a caption is left out, 0 to 1.", kohya="caption_dropout_rate"
    )
    caption_dropout_every_n_epochs: int = _option(
        0,
        "Captions",
        "subset",
        "Leave out all captions in every n-th epoch; 0 never.",
        unit="epochs",
        kohya="caption_dropout_every_n_epochs",
    )
    caption_tag_dropout_rate: float = _option(
        0.0, "Captions", "subset", "Chance that a tag is left out, 0 to 1.", kohya="caption_tag_dropout_rate"
    )
    token_warmup_min: int = _option(
        1,
        "Captions",
        "subset",
        "Tags used at the first step of the tag warm-up.",
        unit="tags",
        kohya="token_warmup_min",
    )
    token_warmup_step: float = _option(
        0,
        "Captions",
        "subset",
        "When all tags are used; below 1 a part of the run; 0 at once.",
        unit="steps",
        kohya="token_warmup_step",
    )
    max_token_length: Literal[75, 150, 225] = _option(
        75,
        "Captions",
        "run",
        "How much of a caption is read: 75, 150 or 225.",
        unit="tokens",
        kohya="max_token_length",
    )

    # Images
    flip_aug: bool = _option(
        False, "Images", "subset", "Mirror half of the images, drawn at each use.", kohya="flip_aug"
    )
    random_crop: bool = _option(
        False,
        "Images",
        "subset",
        "Crop at a random place at each use; excludes cached latents.",
        kohya="random_crop",
    )
    resize_interpolation: Literal["lanczos", "bicubic", "bilinear", "box", "area", "nearest"] = _option(
        "lanczos", "Images", "subset", "How images are resized.", kohya="resize_interpolation"
    )

    # Caches
    cache_latents: Literal["memory", "disk", "none"] = _option(
        "memory",
        "Caches",
        "run",
        "Where encoded images are kept; `none` encodes them at each use.",
    )
    cache_text: Literal["memory", "disk", "none"] = _option(
        "memory",
        "Caches",
        "run",
        "Where encoded captions are kept while no text encoder is trained.",
    )
    cache_dir: str | None = _option(None, "Caches", "run", "Folder of caches kept on disk.")

    def __post_init__(self) -> None:
        check_ranges(self)
        check_buckets(self)
        if self.cache_dir is not None and "disk" not in (self.cache_latents, self.cache_text):
            raise UsageError(
                "`cache_dir` has no effect: nothing is cached on disk",
                hint="set `cache_latents` or `cache_text` to disk",
            )
        if self.cache_latents == "disk" and self.random_crop:
            raise UsageError(
                "`random_crop` leaves nothing to cache on disk",
                hint="leave out `random_crop` or `cache_latents`",
            )

    def idle(self) -> list[str]:
        """Options that are set and change nothing beside the others; one sentence each.

        sd-scripts' files are full of such options, so they are no errors.
        """
        return idle_options(self)

    def for_family(self, family: str, prediction: str = "epsilon") -> DataOptions:
        """These options with a family's own resolution where none was chosen."""
        if self.resolution is not None:
            return self
        side = NATIVE_RESOLUTION[family, prediction]
        return replace(self, resolution=(side, side))


def levels() -> dict[str, Level]:
    """Option name to the level it belongs to."""
    return {entry.name: entry.metadata["level"] for entry in fields(DataOptions)}


def parse_resolution(text: str) -> Size:
    """``512``, ``768,512`` or ``768x512`` (width, height).

    Raises
    ------
    UsageError
        If the text is none of these.
    """
    parts = text.lower().replace("x", ",").split(",")
    try:
        sides = [int(part) for part in parts]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2):
        raise UsageError(
            f"`resolution` is `{text}`, expected a number of pixels, or width and height",
            hint="such as `512` or `768,512`",
        )
    return sides[0], sides[-1]
