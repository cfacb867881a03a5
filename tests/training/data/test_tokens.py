"""CLIP ids against transformers, against ids open_clip gave, and windows against sd-scripts' rule.

`clip_ids.json` holds what open_clip 3.3.0's SimpleTokenizer (with ftfy 6) gave for each text.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from examples import many
from hypothesis import given
from hypothesis import strategies as st

from lycotool.errors import UsageError
from lycotool.training.data.tokens import BOS, EOS, Tokenizer, merges, vocabulary

CASES = [tuple(case) for case in json.loads((Path(__file__).parent / "clip_ids.json").read_text("utf-8"))]
LIGATURE = "ﬁne ½ ² ™"


@lru_cache(maxsize=1)
def clip():
    from transformers import CLIPTokenizer

    return CLIPTokenizer(vocab=vocabulary(), merges=list(merges()))


def test_the_table_is_openais():
    text = "".join(f"{first} {second}\n" for first, second in merges())
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "d308b7377a8ceaa9707a21614fe8c831b9196e197b7aeb69833359362907af02"
    )
    assert len(merges()) == 48894
    assert len(vocabulary()) == 49408
    assert vocabulary()["<|startoftext|>"] == BOS
    assert vocabulary()["<|endoftext|>"] == EOS


@pytest.mark.parametrize(("text", "ids"), [case for case in CASES if case[0] != LIGATURE])
def test_ids_are_open_clips(text, ids):
    assert Tokenizer("zero").words(text) == ids


def test_encodings_are_not_repaired():
    assert Tokenizer("eos").words("ﬁ") != Tokenizer("eos").words("fi")


@pytest.mark.parametrize("text", [case[0] for case in CASES])
def test_ids_are_transformers(text):
    assert Tokenizer("eos").words(text) == clip()(text, add_special_tokens=False).input_ids


@given(text=st.text(max_size=40))
@many
def test_ids_are_transformers_on_any_text(text):
    assert Tokenizer("eos").words(text) == clip()(text, add_special_tokens=False).input_ids


def windows_as_sd_scripts(words, length, pad):
    """A second writing of its rule: tokenise to length + 2, cut, and mend the ends by their values."""
    ids = [BOS, *words[:length], EOS]
    ids += [pad] * (length + 2 - len(ids))
    rows = []
    for start in range(1, length + 1, 75):
        row = [ids[0], *ids[start : start + 75], ids[-1]]
        if pad != EOS:
            if row[-2] not in (EOS, pad):
                row[-1] = EOS
            if row[1] == pad:
                row[1] = EOS
        rows.append(row)
    return rows


@given(
    count=st.integers(0, 240), length=st.sampled_from([75, 150, 225]), pad=st.sampled_from(["eos", "zero"])
)
@many
def test_windows_are_sd_scripts(count, length, pad):
    tokenizer = Tokenizer(pad)
    caption = " ".join(["cat"] * count)
    ids = tokenizer.ids(caption, length)
    assert ids.dtype == torch.int64
    assert ids.tolist() == windows_as_sd_scripts(tokenizer.words(caption), length, tokenizer.pad)


@pytest.mark.parametrize("count", [0, 1, 74, 75, 76, 149, 150, 151, 225, 226])
@pytest.mark.parametrize("pad", ["eos", "zero"])
def test_windows_at_their_edges(count, pad):
    tokenizer = Tokenizer(pad)
    caption = " ".join(["cat"] * count)
    for length in (75, 150, 225):
        expected = windows_as_sd_scripts(tokenizer.words(caption), length, tokenizer.pad)
        assert tokenizer.ids(caption, length).tolist() == expected


def test_one_window_is_transformers():
    caption = "a photo of a cat"
    rows = clip()(caption, padding="max_length", max_length=77, truncation=True).input_ids
    assert Tokenizer("eos").ids(caption).tolist() == [rows]


def test_an_exclamation_mark_is_not_padding():
    assert Tokenizer("zero").words("wow!") == [*Tokenizer("zero").words("wow"), 256]


def test_other_lengths_are_refused():
    with pytest.raises(UsageError, match="`max_token_length` is 77, expected 75, 150 or 225"):
        Tokenizer("eos").ids("a", 77)


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    import sys

    from lycotool.training.data import tokens

    tokens._backend.cache_clear()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UsageError, match="tokenizers") as error:
        Tokenizer("eos")
    assert error.value.hint == "`pip install 'lycotool[train]'`"
    monkeypatch.undo()
    tokens._backend.cache_clear()
