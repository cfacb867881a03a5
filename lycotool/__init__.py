"""lycotool: train, merge, resize, extract, inspect, convert and bake LyCORIS/LoRA adapters."""

__version__ = "0.1.0"
