"""The caption a text encoder is given: sd-scripts' pipeline, in its order.

prefix and suffix → dropout → wildcards or first line → tags → warm-up → shuffle → tag dropout
→ secondary separator. Source: sd-scripts ``library/train_util.py`` ``process_caption``. Draws
are functions of seed, epoch, example and repeat, so they are the same after a resume and on
every number of ranks.

One difference: a ``keep_tokens_separator`` is always taken out of the caption. sd-scripts
leaves it in as text when nothing is shuffled or dropped, and trains on it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from lycotool.training.data.dataset import Dataset, Sample
from lycotool.training.data.options import DataOptions
from lycotool.training.randomness import shuffled, uniforms

#: Whether a caption is left out. All purposes here: index epoch, example, repeat.
DROPOUT = "caption dropout"
#: Which line of a caption of several.
LINE = "caption line"
#: Which alternative of each wildcard, from left to right.
WILDCARD = "caption wildcard"
#: The order of the tags.
SHUFFLE = "caption shuffle"
#: Whether each tag is left out, in the order after the shuffle.
TAG_DROPOUT = "caption tag dropout"

#: ``draws(count, purpose)``: numbers of [0, 1).
Draws = Callable[[int, str], list[float]]

# Braces that are text, while wildcards are looked for. Captions cannot contain them: they are
# not characters, only halves of one.
_OPEN, _CLOSE = "\ud800", "\udfff"


def caption_of(
    dataset: Dataset, sample: Sample, *, seed: int, epoch: int, step: int, total_steps: int = 0
) -> str:
    """The caption of one use of an example.

    Parameters
    ----------
    epoch
        Counted from 0; ``caption_dropout_every_n_epochs`` counts from 1.
    step
        For the tag warm-up only.
    total_steps
        Of the run, for a tag warm-up given as a part of it.
    """
    indices = epoch, sample.example, sample.repeat
    text = dataset.examples[sample.example].caption
    options = dataset.options_of(sample.example)
    if options.caption_prefix:
        text = f"{options.caption_prefix} {text}"
    if options.caption_suffix:
        text = f"{text} {options.caption_suffix}"
    if _dropped(options, seed, epoch, indices):
        return ""
    text = _one_line(text, options, seed, indices)
    text = _arranged(text, options, seed, indices, step, total_steps)
    if options.secondary_separator:
        text = text.replace(options.secondary_separator, options.caption_separator)
    return text


def _dropped(options: DataOptions, seed: int, epoch: int, indices: tuple[int, int, int]) -> bool:
    every = options.caption_dropout_every_n_epochs
    if every and (epoch + 1) % every == 0:
        return True
    rate = options.caption_dropout_rate
    return rate > 0 and uniforms(1, seed, DROPOUT, *indices)[0] < rate


def _one_line(text: str, options: DataOptions, seed: int, indices: tuple[int, int, int]) -> str:
    """The first line; with wildcards, a drawn one whose ``{a|b}`` are drawn, too."""
    lines = text.split("\n")
    if not options.enable_wildcard:
        return lines[0]
    line = lines[0]
    if len(lines) > 1:
        line = _pick(lines, uniforms(1, seed, LINE, *indices)[0])
    line = line.replace("{{", _OPEN).replace("}}", _CLOSE)
    pattern = re.compile(r"\{([^}]+)\}")
    draws = iter(uniforms(len(pattern.findall(line)), seed, WILDCARD, *indices))
    line = pattern.sub(lambda match: _pick(match[1].split("|"), next(draws)), line)
    return line.replace(_OPEN, "{").replace(_CLOSE, "}")


def _pick(choices: list[str], draw: float) -> str:
    return choices[int(draw * len(choices))]


def _arranged(
    text: str, options: DataOptions, seed: int, indices: tuple[int, int, int], step: int, total_steps: int
) -> str:
    """Tags in their drawn order and number; the text as it is if nothing touches its tags."""
    moves = options.shuffle_caption or options.token_warmup_step > 0 or options.caption_tag_dropout_rate > 0
    divider = options.keep_tokens_separator
    divided = divider is not None and divider != "" and divider in text
    if not moves and not divided:
        return text
    before, free, after = _parts(text, options)
    free = free[: _warmed_up(len(free), options, step, total_steps)]
    if options.shuffle_caption:
        free = shuffled(free, seed, SHUFFLE, *indices)
    rate = options.caption_tag_dropout_rate
    if rate > 0:
        draws = uniforms(len(free), seed, TAG_DROPOUT, *indices)
        free = [tag for tag, draw in zip(free, draws, strict=True) if draw >= rate]
    return ", ".join([*before, *free, *after])


def _parts(text: str, options: DataOptions) -> tuple[list[str], list[str], list[str]]:
    """Tags that stay in front, that may move, and that stay behind."""
    divider = options.keep_tokens_separator
    if divider and divider in text:
        before, free, after = (*text.split(divider, 2), "")[:3]
        return _tags(before, options), _tags(free, options), _tags(after, options)
    tags = [tag.strip() for tag in text.strip().split(options.caption_separator)]
    return tags[: options.keep_tokens], tags[options.keep_tokens :], []


def _tags(text: str, options: DataOptions) -> list[str]:
    return [tag.strip() for tag in text.split(options.caption_separator) if tag.strip()]


def _warmed_up(count: int, options: DataOptions, step: int, total_steps: int) -> int:
    """How many of ``count`` free tags are used at this step."""
    steps = options.token_warmup_step
    if steps < 1:
        steps = math.floor(steps * total_steps)
    if not steps or step >= steps:
        return count
    least = options.token_warmup_min
    return max(0, math.floor(step * ((count - least) / steps)) + least)
