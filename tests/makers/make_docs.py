"""Make the generated parts and the examples of the documents again: ``python tests/makers/make_docs.py [PAGE…]``."""

import sys
import tempfile
from pathlib import Path

# As a program, this file is not part of a package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from documents import PAGES, comparable, executed, generated
from forked import lycotool_on_path

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, lycotool_on_path(Path(folder)) as environment:
        for page in map(Path, sys.argv[1:]) if sys.argv[1:] else PAGES:
            before = page.read_text(encoding="utf-8")
            after = executed(generated(before), environment)
            if comparable(after) != comparable(before):
                page.write_text(after, encoding="utf-8")
                print(page)
