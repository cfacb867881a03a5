"""Makes lycotool/training/data/assets/clip_merges.txt.gz from open_clip's wheel.

    pip download --no-deps open_clip_torch==3.3.0 -d /tmp/wheels
    python tests/makers/clip_merges.py /tmp/wheels/open_clip_torch-3.3.0-py3-none-any.whl

The wheel holds OpenAI's whole table of 262 145 lines; CLIP uses the 48 894 after the first.
"""

from __future__ import annotations

import gzip
import sys
import zipfile
from pathlib import Path

ASSET = Path(__file__).parents[2] / "lycotool/training/data/assets/clip_merges.txt.gz"
MERGES = 49_152 - 256 - 2


def trimmed(wheel: Path) -> str:
    """One merge a line, as `first second`."""
    with zipfile.ZipFile(wheel) as archive:
        table = gzip.decompress(archive.read("open_clip/bpe_simple_vocab_16e6.txt.gz")).decode()
    return "".join(line + "\n" for line in table.split("\n")[1 : MERGES + 1])


if __name__ == "__main__":
    ASSET.write_bytes(gzip.compress(trimmed(Path(sys.argv[1])).encode(), 9, mtime=0))
