"""Data: from a folder, dataset file or metadata file to batches of latents and captions.

>>> from lycotool.training.data import DataOptions
>>> DataOptions(flip_aug=True).for_family("sdxl").resolution
(1024, 1024)
"""

from lycotool.training.data.batches import plan_epoch, plan_validation
from lycotool.training.data.captions import caption_of
from lycotool.training.data.dataset import Batch, Dataset, Example, Sample, Subset
from lycotool.training.data.options import DataOptions, parse_resolution

__all__ = [
    "Batch",
    "DataOptions",
    "Dataset",
    "Example",
    "Sample",
    "Subset",
    "caption_of",
    "parse_resolution",
    "plan_epoch",
    "plan_validation",
]
