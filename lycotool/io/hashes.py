"""The hashes the field stores in adapter metadata.

``sshs_model_hash`` is the SHA-256 of the data section. ``sshs_legacy_hash`` is the first
eight hex digits of the SHA-256 of bytes 0x100000 to 0x110000 of the file as
``safetensors.torch.save`` would write it with the ``ss_*`` metadata alone, so it depends on
the length of that header. Source: sd-scripts ``library/train_util.py``,
``precalculate_safetensors_hashes`` and ``addnet_hash_legacy``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

LEGACY_START, LEGACY_STOP = 0x100000, 0x110000

MODEL_HASH, LEGACY_HASH = "sshs_model_hash", "sshs_legacy_hash"

#: The data's SHA-256 in Stability's model metadata standard, with ``0x`` before it.
SPEC_HASH = "modelspec.hash_sha256"

#: What stands in the header until the data has been written; the real values are as long.
PLACEHOLDERS: Mapping[str, str] = {
    MODEL_HASH: "0" * 64,
    LEGACY_HASH: "0" * 8,
    SPEC_HASH: "0x" + "0" * 64,
}


class DataHasher:
    """Computes both hashes from the data section as it passes by.

    Parameters
    ----------
    legacy_header
        Length prefix and JSON of the header with ``ss_*`` metadata alone.
    """

    def __init__(self, legacy_header: bytes) -> None:
        import hashlib  # the names above are wanted to show a header too

        self._model = hashlib.sha256()
        self._legacy = hashlib.sha256()
        self._position = 0
        self._feed_legacy(memoryview(legacy_header))

    def update(self, data: memoryview) -> None:
        """Take the next bytes of the data section."""
        self._model.update(data)
        if self._position < LEGACY_STOP:
            self._feed_legacy(data)

    def _feed_legacy(self, data: memoryview) -> None:
        start = max(0, LEGACY_START - self._position)
        stop = max(0, LEGACY_STOP - self._position)
        self._legacy.update(data[start:stop])
        self._position += len(data)

    def metadata(self) -> dict[str, str]:
        """The values, under the names they are stored by."""
        return {
            MODEL_HASH: self._model.hexdigest(),
            LEGACY_HASH: self._legacy.hexdigest()[:8],
            SPEC_HASH: "0x" + self._model.hexdigest(),
        }


def legacy_hash(header: bytes, data: Iterable[memoryview]) -> str:
    """``sshs_legacy_hash`` alone, which reads no further than it has to.

    Parameters
    ----------
    header
        Length prefix and JSON of the header with ``ss_*`` metadata alone.
    data
        The data section in the reference's order of tensors, in pieces.
    """
    import hashlib

    digest, position = hashlib.sha256(), 0
    for piece in itertools.chain([memoryview(header)], data):
        digest.update(piece[max(0, LEGACY_START - position) : max(0, LEGACY_STOP - position)])
        position += len(piece)
        if position >= LEGACY_STOP:
            break
    return digest.hexdigest()[:8]
