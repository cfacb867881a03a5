"""The caption pipeline: cases worked out by hand with draws that are given, and sd-scripts' answers.

`captions.json` holds calls of sd-scripts' (48d368fa) ``process_caption`` whose ``random`` was
replaced by the draws used here: caption, options, seed, epoch, step of 20, and its answer.
20 000 such random calls agreed when the file was made.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lycotool.training.data import captions
from lycotool.training.data.buckets import Placement
from lycotool.training.data.captions import DROPOUT, LINE, SHUFFLE, TAG_DROPOUT, WILDCARD, caption_of
from lycotool.training.data.dataset import Dataset, Example, Sample, Subset
from lycotool.training.data.options import DataOptions

CALLS = json.loads((Path(__file__).parent / "captions.json").read_text("utf-8"))

#: A change of these breaks every resume.
FROZEN = ["c", "a, b", "b, c, d, g", "f, a"]


def dataset_of(caption, **options):
    example = Example(Path("a.png"), (64, 64), caption, 0, Placement((64, 64), (64, 64)), 1)
    return Dataset((Subset(Path(), DataOptions(**options)),), (example,))


def told(caption, *, epoch=0, step=0, total_steps=0, repeat=0, seed=0, **options):
    sample = Sample(0, repeat)
    return caption_of(
        dataset_of(caption, **options), sample, seed=seed, epoch=epoch, step=step, total_steps=total_steps
    )


@pytest.fixture
def given_draws(monkeypatch):
    """Make ``uniforms`` answer from lists by purpose, and ``shuffled`` turn its items round."""

    def give(draws):
        def uniforms(count, seed, purpose, *indices):
            assert len(draws[purpose]) == count
            return draws[purpose]

        def shuffled(items, seed, purpose, *indices):
            assert purpose == SHUFFLE
            return list(items)[::-1]

        monkeypatch.setattr(captions, "uniforms", uniforms)
        monkeypatch.setattr(captions, "shuffled", shuffled)

    return give


def test_nothing_set_leaves_a_caption_as_it_is():
    assert told("a,  b ,c") == "a,  b ,c"


def test_prefix_and_suffix_are_joined_with_one_space():
    assert told("cat", caption_prefix="photo of a", caption_suffix=", indoors") == "photo of a cat , indoors"


def test_empty_texts_count_as_none():
    options = {
        "caption_prefix": "",
        "caption_suffix": "",
        "secondary_separator": "",
        "keep_tokens_separator": "",
    }
    assert told("a, b", **options) == "a, b"


def test_only_the_first_line_is_used():
    assert told("first, line\nsecond") == "first, line"


@pytest.mark.parametrize(("draw", "expected"), [(0.29, ""), (0.3, "cat"), (0.9, "cat")])
def test_dropout(given_draws, draw, expected):
    given_draws({DROPOUT: [draw]})
    assert told("cat", caption_dropout_rate=0.3) == expected


def test_dropout_drops_prefix_and_suffix_too():
    assert told("cat", caption_dropout_rate=1.0, caption_prefix="a") == ""


def test_dropout_every_third_epoch_counts_from_one():
    dropped = [told("cat", epoch=epoch, caption_dropout_every_n_epochs=3) == "" for epoch in range(7)]
    assert dropped == [False, False, True, False, False, True, False]


def test_wildcards(given_draws):
    given_draws({WILDCARD: [0.0, 0.99, 0.5]})
    # Three wildcards: the first of two, the last of three, the second of two.
    text = "{red|blue} cat, {a|b|c}, {{kept}}, {x|y}"
    assert told(text, enable_wildcard=True) == "red cat, c, {kept}, y"


def test_wildcards_without_the_option_are_text():
    assert told("{red|blue} cat") == "{red|blue} cat"


def test_a_line_is_drawn_before_its_wildcards(given_draws):
    given_draws({LINE: [0.5], WILDCARD: [0.0]})
    assert told("one {a|b}\ntwo {c|d}", enable_wildcard=True) == "two c"


def test_the_prefix_belongs_to_the_first_line(given_draws):
    given_draws({LINE: [0.9], WILDCARD: []})
    assert told("one\ntwo", enable_wildcard=True, caption_prefix="p", caption_suffix="s") == "two s"


def test_shuffle(given_draws):
    given_draws({})
    assert told("a, b,c , d", shuffle_caption=True) == "d, c, b, a"


def test_keep_tokens(given_draws):
    given_draws({})
    assert told("a, b, c, d", shuffle_caption=True, keep_tokens=2) == "a, b, d, c"


def test_keep_tokens_separator(given_draws):
    given_draws({})
    text = "a, b ||| c, d, e ||| f, g"
    assert told(text, shuffle_caption=True, keep_tokens_separator="|||") == "a, b, e, d, c, f, g"
    assert told("a ||| b, c", shuffle_caption=True, keep_tokens_separator="|||") == "a, c, b"


def test_keep_tokens_counts_where_the_separator_is_absent(given_draws):
    given_draws({})
    options = {"shuffle_caption": True, "keep_tokens": 1, "keep_tokens_separator": "|||"}
    assert told("a, b, c", **options) == "a, c, b"


def test_the_separator_is_never_trained():
    assert told("a, b ||| c ||| d", keep_tokens_separator="|||") == "a, b, c, d"


@pytest.mark.parametrize(
    ("step", "expected"),
    # Free tags at step s of 10, from 1 to 5: floor(s * (5 - 1) / 10) + 1.
    [
        (0, "k, a"),
        (2, "k, a"),
        (3, "k, a, b"),
        (5, "k, a, b, c"),
        (9, "k, a, b, c, d"),
        (10, "k, a, b, c, d, e"),
    ],
)
def test_token_warmup(step, expected):
    text = "k, a, b, c, d, e"
    assert told(text, step=step, token_warmup_step=10, keep_tokens=1) == expected
    assert told(text, step=step, token_warmup_step=0.1, total_steps=100, keep_tokens=1) == expected


def test_token_warmup_from_two():
    assert told("a, b, c, d", step=0, token_warmup_step=10, token_warmup_min=2) == "a, b"


def test_warmup_takes_the_first_tags_and_shuffles_those(given_draws):
    given_draws({})
    text = "a, b, c, d, e"
    assert told(text, step=5, token_warmup_step=10, shuffle_caption=True) == "c, b, a"


def test_tag_dropout_follows_the_shuffle_and_spares_kept_tags(given_draws):
    given_draws({TAG_DROPOUT: [0.9, 0.1, 0.5]})
    # After the shuffle: d, c, b. The second is below 0.5.
    options = {"shuffle_caption": True, "keep_tokens": 1, "caption_tag_dropout_rate": 0.5}
    assert told("a, b, c, d", **options) == "a, d, b"


def test_secondary_separator_keeps_tags_together(given_draws):
    given_draws({})
    text = "a;;;b, c, d"
    assert told(text, shuffle_caption=True, secondary_separator=";;;") == "d, c, a,b"
    assert told(text, secondary_separator=";;;") == "a,b, c, d"


def test_another_caption_separator(given_draws):
    given_draws({})
    assert told("a b; c d; e", shuffle_caption=True, caption_separator=";") == "e, c d, a b"


def test_everything_at_once(given_draws):
    given_draws({DROPOUT: [0.5], LINE: [0.0], WILDCARD: [0.6], TAG_DROPOUT: [0.0, 0.9, 0.9]})
    text = "keep {a|b} ||| c;;;d, e, f ||| end\nother line"
    # prefix → dropout no → line 1, b → shuffle f, e, c;;;d → f dropped → separators.
    assert (
        told(
            text,
            caption_prefix="best,",
            caption_dropout_rate=0.1,
            enable_wildcard=True,
            keep_tokens_separator="|||",
            shuffle_caption=True,
            caption_tag_dropout_rate=0.2,
            secondary_separator=";;;",
        )
        == "best, keep b, e, c,d, end"
    )


@pytest.mark.parametrize(("text", "options", "seed", "epoch", "step", "answer"), CALLS)
def test_answers_are_sd_scripts(text, options, seed, epoch, step, answer):
    assert told(text, seed=seed, epoch=epoch, step=step, total_steps=20, **options) == answer


def test_real_draws_are_frozen():
    options = {"shuffle_caption": True, "caption_tag_dropout_rate": 0.3, "enable_wildcard": True}
    text = "a, b, c, d, {e|f|g}"
    assert [told(text, epoch=epoch, seed=7, **options) for epoch in range(4)] == FROZEN


def test_draws_depend_on_epoch_repeat_and_seed_and_not_on_the_step():
    options = {"shuffle_caption": True}
    text = ", ".join("abcdefghijkl")
    base = told(text, **options)
    assert told(text, step=9, **options) == base
    assert len({base, *(told(text, epoch=e, **options) for e in range(1, 4))}) == 4
    assert told(text, repeat=1, **options) != base
    assert told(text, seed=1, **options) != base
    assert sorted(base.split(", ")) == sorted(text.split(", "))


def test_rates_are_met():
    # Of 2 000 draws at 0.25 the count has a standard deviation of 19.4; five of those.
    dropped = sum(told("a", epoch=epoch, caption_dropout_rate=0.25) == "" for epoch in range(2000))
    assert abs(dropped - 500) < 97
    kept = sum(
        told("a, b", epoch=e, caption_tag_dropout_rate=0.25, keep_tokens=1) == "a, b" for e in range(2000)
    )
    assert abs(kept - 1500) < 97
