"""Which metadata keys mean what."""

from __future__ import annotations

from collections.abc import Mapping

#: Keys whose values are JSON in a string.
JSON_KEYS = frozenset({
    "ss_network_args", "ss_datasets", "ss_dataset_dirs", "ss_reg_dataset_dirs", "ss_bucket_info",
    "ss_tag_frequency", "lora_adapter_metadata", "lycoris_config", "lycotool.merge", "lycotool.bake",
    "lycotool.resize", "lycotool.extract", "lycotool.convert",
})  # fmt: skip

#: What tells of the data an adapter was trained on: `inspect --check` reports these, and they
#: are among what `--strip-training-data` takes out.
TRAINING_DATA = frozenset({
    "ss_datasets", "ss_dataset_dirs", "ss_reg_dataset_dirs", "ss_tag_frequency", "ss_bucket_info",
    "ss_num_train_images", "ss_num_reg_images", "ss_num_validation_images",
})  # fmt: skip

#: The ``ss_*`` keys that `--strip-training-data` leaves: what programs read to use the file.
#: sd-scripts' own minimum (``SS_METADATA_MINIMUM_KEYS`` in ``library/train_util.py``), and what
#: A1111 shows or sets by (``ss_output_name``, ``ss_clip_skip``), and the resolution.
KEPT_TRAINING_KEYS = frozenset({
    "ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha",
    "ss_network_args", "ss_output_name", "ss_clip_skip", "ss_resolution",
})  # fmt: skip

#: Other trainers' whole configuration, with the paths in it: OneTrainer's and ai-toolkit's.
CONFIGURATIONS = frozenset({"ot_config", "ot_revision", "ot_branch", "training_info"})


def is_training_data(key: str) -> bool:
    """Whether `--strip-training-data` takes a key out.

    Every ``ss_*`` key but :data:`KEPT_TRAINING_KEYS`, and :data:`CONFIGURATIONS`. The rest stays:
    ``modelspec.*`` is written to be published, ``sshs_*`` are hashes, ``lycotool.*`` and
    ``lora_adapter_metadata`` say how the tensors are to be read.
    """
    return (key.startswith("ss_") and key not in KEPT_TRAINING_KEYS) or key in CONFIGURATIONS


def stripped(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata without what :func:`is_training_data` names."""
    return {key: value for key, value in metadata.items() if not is_training_data(key)}
