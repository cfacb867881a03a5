"""Data: from a folder, dataset file or metadata file to batches of latents and captions.

>>> from lycotool.training.data import DataOptions
>>> DataOptions(flip_aug=True).for_family("sdxl").resolution
(1024, 1024)
"""

from lycotool.training.data.batches import plan_epoch, plan_validation
from lycotool.training.data.captions import caption_of
from lycotool.training.data.dataset import Batch, Dataset, Example, Sample, Subset
from lycotool.training.data.latents import LatentCache, cache_latents, images_to_cache
from lycotool.training.data.options import DataOptions, parse_resolution
from lycotool.training.data.reading import read_dataset
from lycotool.training.data.texts import Text, TextCache
from lycotool.training.data.tokens import Tokenizer

__all__ = [
    "Batch",
    "DataOptions",
    "Dataset",
    "Example",
    "LatentCache",
    "Sample",
    "Subset",
    "Text",
    "TextCache",
    "Tokenizer",
    "cache_latents",
    "caption_of",
    "images_to_cache",
    "parse_resolution",
    "plan_epoch",
    "plan_validation",
    "read_dataset",
]
