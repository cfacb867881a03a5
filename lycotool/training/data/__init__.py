"""Data: from a folder, dataset file or metadata file to batches of latents and captions.

Each module is imported where it is used: the options alone are declared without what reads and
caches images.

>>> from lycotool.training.data.options import DataOptions
>>> DataOptions(flip_aug=True).for_family("sdxl").resolution
(1024, 1024)
"""
