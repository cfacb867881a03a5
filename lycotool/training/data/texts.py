"""What text encoders make of captions, kept by token ids.

Keyed by ids and not by caption, so shuffled, dropped and drawn captions use the cache: an
encoder runs for captions that have not been seen. Each caption is encoded by itself, so that
its values never depend on which others were missing: a resumed run sees the same bits.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from lycotool.distributed import Gather
from lycotool.lazy import torch
from lycotool.training.data.cache_folder import CacheFolder, key_of


class Encoded(Protocol):
    """What an encoder returns: ``hidden`` (B, T, C), ``pooled`` (B, C') or None."""

    @property
    def hidden(self) -> torch.Tensor:
        """``(B, T, C)``."""

    @property
    def pooled(self) -> torch.Tensor | None:
        """``(B, C')``, for SDXL."""


class Text(NamedTuple):
    """Encoded captions: ``hidden`` (B, T, C), ``pooled`` (B, C') or None."""

    hidden: torch.Tensor
    pooled: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.hidden.nbytes + (0 if self.pooled is None else self.pooled.nbytes)


#: Captions of one message between ranks: 10 MiB of SDXL's in 16 bits.
_MESSAGE = 32

#: Token ids, one tensor per encoder, each ``(B, ...)``.
Ids = Sequence["torch.Tensor"]


class TextCache:
    """Encoded captions by token ids, in memory up to a limit, and on disk.

    Parameters
    ----------
    encode
        The frozen encoders: ids with a batch of one to :class:`Encoded`.
    key
        What their answer depends on: a hash of their weights, and their dtype.
    clip_skip
        Part of the key.
    folder
        Where :meth:`fill` stores entries; None for memory alone.
    limit
        Bytes held in memory. The captions used longest ago leave first; a data set whose
        captions are shuffled would fill any memory.
    device
        Where entries are held and given.

    Attributes
    ----------
    encoded
        How many captions went through the encoders so far.
    """

    def __init__(
        self,
        encode: Callable[[list[torch.Tensor]], Encoded],
        *,
        key: str,
        clip_skip: int | None,
        folder: Path | None = None,
        limit: int = 2 * 2**30,
        device: torch.device | str = "cpu",
    ) -> None:
        self.encoded = 0
        self._encode = encode
        self._key = key
        self._clip_skip = clip_skip
        self._folder = None if folder is None else CacheFolder(folder)
        self._limit = limit
        self._device = device
        self._held: OrderedDict[str, Text] = OrderedDict()
        self._nbytes = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """What was odd about entries on disk, one sentence each."""
        return tuple(self._folder.notes) if self._folder is not None else ()

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return self._nbytes

    def get(self, ids: Ids) -> Text:
        """The encoded captions of a batch; those not known are encoded.

        Parameters
        ----------
        ids
            One tensor per encoder, captions along the first axis.

        Returns
        -------
        Text
            Detached, in the order of ``ids``.
        """
        texts = [self._one(row, store=False) for row in _rows(ids)]
        pooled = [text.pooled for text in texts if text.pooled is not None]
        return Text(torch.cat([text.hidden for text in texts]), torch.cat(pooled) if pooled else None)

    def fill(
        self,
        ids: Ids,
        *,
        rank: int = 0,
        ranks: int = 1,
        gather: Gather = lambda value: [value],
        advance: Callable[[int], None] = lambda captions: None,
    ) -> None:
        """Encode captions known beforehand, and store them if there is a folder.

        The ranks share the work, caption ``i`` is rank ``i mod ranks``'s; without a folder they
        tell each other what they encoded.
        """
        mine = list({self._entry(row): row for row in _rows(ids)}.values())[rank::ranks]
        for row in mine:
            self._one(row, store=True)
            advance(1)
        if self._folder is not None:
            gather(None)
        elif ranks > 1:
            self._exchange(mine, gather)

    def _exchange(self, mine: Sequence[list[torch.Tensor]], gather: Gather) -> None:
        """Hold what others encoded, too: a few captions of each at a time, so that messages stay small."""
        for start in range(0, max(gather(len(mine))), _MESSAGE):
            entries = map(self._entry, mine[start : start + _MESSAGE])
            for part in gather([(entry, self._held[entry]) for entry in entries if entry in self._held]):
                for entry, text in part:
                    if entry not in self._held:
                        self._hold(entry, text)

    def _one(self, row: list[torch.Tensor], *, store: bool) -> Text:
        entry = self._entry(row)
        if entry in self._held:
            self._held.move_to_end(entry)
            return self._held[entry]
        text = self._read(entry)
        if text is None:
            with torch.no_grad():
                made = self._encode(row)
            self.encoded += 1
            pooled = None if made.pooled is None else made.pooled.detach().to(self._device)
            text = Text(made.hidden.detach().to(self._device), pooled)
            if store and self._folder is not None:
                tensors = {"hidden": text.hidden} | ({} if pooled is None else {"pooled": pooled})
                self._folder.write(entry, tensors, {})
        self._hold(entry, text)
        return text

    def _hold(self, entry: str, text: Text) -> None:
        self._held[entry] = text
        self._nbytes += text.nbytes
        while self._nbytes > self._limit and len(self._held) > 1:
            self._nbytes -= self._held.popitem(last=False)[1].nbytes

    def _read(self, entry: str) -> Text | None:
        tensors = None if self._folder is None else self._folder.read(entry)
        if tensors is None:
            return None
        pooled = tensors.get("pooled")
        return Text(tensors["hidden"].to(self._device), None if pooled is None else pooled.to(self._device))

    def _entry(self, row: Sequence[torch.Tensor]) -> str:
        digest = hashlib.sha256()
        for ids in row:
            digest.update(ids.to("cpu", torch.int64).contiguous().numpy().tobytes())
        shapes = [list(ids.shape) for ids in row]
        return key_of("text", self._key, self._clip_skip, shapes, digest.hexdigest())


def _rows(ids: Ids) -> list[list[torch.Tensor]]:
    return [[encoder[row : row + 1] for encoder in ids] for row in range(len(ids[0]))]
