"""CLIP token ids, with no network: the merge table ships with lycotool.

Ids equal those of transformers' ``CLIPTokenizer`` and, on text that needs no repair of its
encoding or of HTML entities, of open_clip's. In text for a second encoder ``!`` is the token
``!</w>`` (256) it was trained with; transformers' tokenizer of SD 2.x makes it the padding.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lycotool.errors import UsageError
from lycotool.lazy import torch

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

BOS, EOS = 49406, 49407

#: Tokens of one pass through a text encoder, between BOS and EOS.
WINDOW = 75

_MERGES = Path(__file__).parent / "assets" / "clip_merges.txt.gz"

_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """Captions to token ids of one text encoder.

    Parameters
    ----------
    pad
        What fills a window: ``eos`` for SD 1.x and SDXL's first encoder, ``zero`` for SD 2.x
        and SDXL's second one.
    """

    def __init__(self, pad: Literal["eos", "zero"]) -> None:
        self.pad = EOS if pad == "eos" else 0
        self._backend = _backend()

    def words(self, caption: str) -> list[int]:
        """The ids of a caption, without BOS, EOS and padding, however many there are."""
        return list(self._backend.encode(caption, add_special_tokens=False).ids)

    def lengths(self, captions: Sequence[str]) -> list[int]:
        """How many tokens each caption has."""
        return [
            len(encoding) for encoding in self._backend.encode_batch_fast(captions, add_special_tokens=False)
        ]

    def ids(self, caption: str, max_length: int = WINDOW) -> torch.Tensor:
        """Windows of 77 ids.

        Tokens past ``max_length`` are cut. The caption is tokenised once and cut into windows;
        each, an empty one too, is BOS, its tokens, EOS, padding. Source: sd-scripts
        ``library/train_util.py`` ``get_input_ids``.

        Returns
        -------
        torch.Tensor
            int64, shape ``(max_length / 75, 77)``.

        Raises
        ------
        UsageError
            If ``max_length`` is not 75, 150 or 225.
        """
        if max_length not in (WINDOW, 2 * WINDOW, 3 * WINDOW):
            raise UsageError(f"`max_token_length` is {max_length}, expected 75, 150 or 225")
        words = self.words(caption)[:max_length]
        windows = []
        for start in range(0, max_length, WINDOW):
            window = [BOS, *words[start : start + WINDOW], EOS]
            window.extend([self.pad] * (WINDOW + 2 - len(window)))
            windows.append(window)
        return torch.tensor(windows, dtype=torch.int64)


@lru_cache(maxsize=1)
def merges() -> tuple[tuple[str, str], ...]:
    """CLIP's 48 894 merges, most important first."""
    lines = gzip.decompress(_MERGES.read_bytes()).decode().splitlines()
    return tuple((first, second) for first, second in (line.split(" ") for line in lines))


@lru_cache(maxsize=1)
def vocabulary() -> dict[str, int]:
    """Token to id: 256 bytes, the same at the end of a word, the merges, BOS and EOS."""
    letters = [chr(code) for code in _byte_letters()]
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens.extend(first + second for first, second in merges())
    tokens.extend(["<|startoftext|>", "<|endoftext|>"])
    return {token: number for number, token in enumerate(tokens)}


def _byte_letters() -> list[int]:
    """A printable character for every byte: itself where it is one, the others from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [*printable, *range(256, 256 + 256 - len(printable))]


@lru_cache(maxsize=1)
def _backend() -> Backend:
    try:
        from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    except ImportError:
        raise UsageError(
            "training needs the package tokenizers", hint="`pip install 'lycotool[train]'`"
        ) from None
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary(),
            merges=list(merges()),
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token="<|endoftext|>",
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    return backend
