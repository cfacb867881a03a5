"""Latents of images: the VAE's posterior is kept, and sampled anew at each use.

``latent = mean + std · noise``, unscaled. The noise is a function of seed, step and sample.
Images are encoded one at a time, so that what is computed never depends on what else happened
to be missing from a cache: a resumed run sees the same bits.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lycotool.distributed import Gather
from lycotool.errors import BadInputError, NumericError, UsageError
from lycotool.lazy import torch
from lycotool.training.data.buckets import size_ids
from lycotool.training.data.cache_folder import CacheFolder, key_of
from lycotool.training.data.dataset import Batch, Dataset, Sample
from lycotool.training.data.faults import Findings
from lycotool.training.data.images import fitted, load_image, to_pixels
from lycotool.training.data.options import Size
from lycotool.training.randomness import torch_generator, uniforms

if TYPE_CHECKING:
    from PIL import Image

#: The noise a posterior is sampled with; index: step, example, repeat.
POSTERIOR = "posterior"
#: Where an image is cropped with `random_crop`; index: step, example, repeat.
CROP = "crop"

#: Pixels ``(B, 3, H, W)`` in [-1, 1] to mean and standard deviation, each ``(B, C, h, w)``.
Encode = Callable[["torch.Tensor"], "tuple[torch.Tensor, torch.Tensor]"]

#: Posteriors of one message between ranks: 16 MiB at 1024x1024.
_MESSAGE = 32

#: Images decoded at once, and how many may wait for the VAE.
_READERS, _AHEAD = 8, 16


@dataclass(frozen=True, slots=True)
class Posterior:
    """The VAE's answer for one image, each ``(C, h, w)``, float32."""

    mean: torch.Tensor
    std: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return 2 * self.mean.nbytes

    def to(self, device: torch.device | str) -> Posterior:
        """The same on a device."""
        return Posterior(self.mean.to(device), self.std.to(device))


#: An example, and whether it is mirrored.
View = tuple[int, bool]


def images_to_cache(dataset: Dataset) -> list[int]:
    """The examples that are cropped in a fixed place.

    In the order of buckets, so that the VAE meets few changes of shape.
    """
    order = sorted(range(len(dataset.examples)), key=lambda index: (dataset.examples[index].bucket, index))
    return [index for index in order if not dataset.options_of(index).random_crop]


class LatentCache:
    """Gives batches of latents; what it does not hold it reads or encodes.

    Made by :func:`cache_latents`.

    Attributes
    ----------
    notes
        What was odd about entries on disk, one sentence each.
    encoded
        How many images went through the VAE so far.
    """

    def __init__(self, dataset: Dataset, encode: Encode, *, key: str, folder: CacheFolder | None) -> None:
        self.dataset = dataset
        self.encoded = 0
        self._encode = encode
        self._key = key
        self._folder = folder
        self._held: dict[View, Posterior] = {}
        self._contents: dict[Path, str] = {}
        self._device: torch.device | str = "cpu"

    @property
    def notes(self) -> tuple[str, ...]:
        """What was odd about entries on disk, one sentence each."""
        return tuple(self._folder.notes) if self._folder is not None else ()

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return sum(posterior.nbytes for posterior in self._held.values())

    def load(self) -> None:
        """Hold every entry that is on disk in memory, too."""
        for index in images_to_cache(self.dataset):
            for view in self._views(index):
                self._held[view] = self._posterior(view)

    def to(self, device: torch.device | str) -> None:
        """Move what is held to a device, where batches are given from now on."""
        self._device = device
        self._held = {view: posterior.to(device) for view, posterior in self._held.items()}

    def sample(self, batch: Batch, *, seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents of a batch, drawn from their posteriors.

        Returns
        -------
        latents
            ``(B, C, h, w)``, float32, unscaled.
        size_ids
            ``(B, 6)``, int64: original height and width, crop top and left, target height and
            width, for SDXL.
        """
        means, stds, noises, sizes = [], [], [], []
        for sample in batch.samples:
            crop = self._crop(sample, seed, step)
            posterior = self._of(sample, crop)
            generator = torch_generator(seed, POSTERIOR, step, sample.example, sample.repeat)
            means.append(posterior.mean.to(self._device))
            stds.append(posterior.std.to(self._device))
            noises.append(torch.randn(posterior.mean.shape, generator=generator))
            example = self.dataset.examples[sample.example]
            ids = size_ids(example.size, example.placement, crop, flipped=sample.flipped)
            sizes.append(ids.numbers)
        noise = torch.stack(noises).to(self._device)
        latents = torch.addcmul(torch.stack(means), torch.stack(stds), noise)
        return latents, torch.tensor(sizes, dtype=torch.int64, device=self._device)

    def fill(
        self, images: Sequence[int], *, hold: bool, advance: Callable[[int], None] = lambda images: None
    ) -> None:
        """Encode what is missing of these examples; keep it in memory, or only on disk.

        Raises
        ------
        BadInputError
            Naming every image that cannot be decoded.
        NumericError
            If the VAE gives NaN for an image.
        """
        missing: dict[int, list[View]] = {}
        for index in images:
            for view in self._views(index):
                stored = self._stored(view)
                if stored is None:
                    missing.setdefault(index, []).append(view)
                elif hold:
                    self._held[view] = stored
            if index not in missing:
                advance(1)
        findings = Findings()
        for index, image in self._decoded(list(missing)):
            if isinstance(image, BadInputError):
                findings.broken(image)
                continue
            for view in missing[index]:
                posterior = self._encoded(index, to_pixels(image, flipped=view[1]))
                if hold:
                    self._held[view] = posterior
                self._store(view, posterior)
            advance(1)
        findings.raise_faults("the data set")

    def exchange(self, gather: Gather) -> None:
        """Hold what others hold, too: a few views of each at a time, so that messages stay small."""
        mine = [(view, posterior.to("cpu")) for view, posterior in self._held.items()]
        for start in range(0, max(gather(len(mine))), _MESSAGE):
            for part in gather(mine[start : start + _MESSAGE]):
                for view, posterior in part:
                    self._held.setdefault(view, posterior.to(self._device))

    def _views(self, index: int) -> list[View]:
        return [(index, flipped) for flipped in (False, True)[: 1 + self.dataset.options_of(index).flip_aug]]

    def _crop(self, sample: Sample, seed: int, step: int) -> Size:
        placement = self.dataset.examples[sample.example].placement
        if not self.dataset.options_of(sample.example).random_crop:
            return placement.centre
        draws = uniforms(2, seed, CROP, step, sample.example, sample.repeat)
        left, top = (int(draw * (spare + 1)) for draw, spare in zip(draws, placement.spare, strict=True))
        return left, top

    def _of(self, sample: Sample, crop: Size) -> Posterior:
        if self.dataset.options_of(sample.example).random_crop:
            return self._encoded(sample.example, self._pixels(sample.example, crop, flipped=sample.flipped))
        return self._posterior((sample.example, sample.flipped))

    def _posterior(self, view: View) -> Posterior:
        """From memory, from disk, or encoded now."""
        found = self._held.get(view) or self._stored(view)
        if found is None:
            index, flipped = view
            centre = self.dataset.examples[index].placement.centre
            found = self._encoded(index, self._pixels(index, centre, flipped=flipped))
            self._store(view, found)
        return found

    def _encoded(self, index: int, pixels: torch.Tensor) -> Posterior:
        with torch.no_grad():
            mean, std = self._encode(pixels[None])
        if not bool((mean.isfinite() & std.isfinite()).all()):
            raise NumericError(
                "the VAE gives NaN or infinity for this image",
                path=self.dataset.examples[index].path,
                hint="SDXL's own VAE does in float16: use bf16 or float32 for it, or a VAE made for float16",
            )
        self.encoded += 1
        return Posterior(mean[0].float().to(self._device), std[0].float().to(self._device))

    def _pixels(self, index: int, crop: Size, *, flipped: bool) -> torch.Tensor:
        return to_pixels(self._image(index, crop), flipped=flipped)

    def _image(self, index: int, crop: Size) -> Image.Image:
        example = self.dataset.examples[index]
        image = load_image(example.path)
        if image.size != example.size:
            raise BadInputError(
                f"the image changed: it has {image.size[0]}x{image.size[1]} pixels now", path=example.path
            )
        return fitted(image, example.placement, crop, self.dataset.options_of(index).resize_interpolation)

    def _decoded(self, images: Sequence[int]) -> Iterator[tuple[int, Image.Image | BadInputError]]:
        """Examples and their pictures, decoded ahead by threads, or what was wrong with them."""

        def decode(index: int) -> Image.Image | BadInputError:
            try:
                return self._image(index, self.dataset.examples[index].placement.centre)
            except BadInputError as error:
                return error

        waiting: deque[tuple[int, Future[Image.Image | BadInputError]]] = deque()
        with ThreadPoolExecutor(_READERS, "lycotool-images") as pool:
            for index in images:
                waiting.append((index, pool.submit(decode, index)))
                if len(waiting) > _AHEAD:  # pictures are large: not all at once
                    first, future = waiting.popleft()
                    yield first, future.result()
            for index, future in waiting:
                yield index, future.result()

    def _entry(self, view: View) -> str:
        """The name of an entry: everything its data depends on."""
        index, flipped = view
        example = self.dataset.examples[index]
        placement = example.placement
        if example.path not in self._contents:
            self._contents[example.path] = _content_hash(example.path)
        return key_of(
            "latents",
            self._contents[example.path],
            self._key,
            placement.bucket,
            placement.resized,
            placement.centre,
            flipped,
            self.dataset.options_of(index).resize_interpolation,
        )

    def _stored(self, view: View) -> Posterior | None:
        if self._folder is None:
            return None
        tensors = self._folder.read(self._entry(view))
        if tensors is None:
            return None
        return Posterior(tensors["mean"].to(self._device), tensors["std"].to(self._device))

    def _store(self, view: View, posterior: Posterior) -> None:
        if self._folder is not None:
            about = {"lycotool.image": self.dataset.examples[view[0]].path.name}
            tensors: Mapping[str, torch.Tensor] = {"mean": posterior.mean, "std": posterior.std}
            self._folder.write(self._entry(view), tensors, about)


def cache_latents(
    dataset: Dataset,
    encode: Encode,
    *,
    key: str,
    where: Literal["memory", "disk", "none"] = "memory",
    folder: Path | None = None,
    rank: int = 0,
    ranks: int = 1,
    gather: Gather = lambda value: [value],
    advance: Callable[[int], None] = lambda images: None,
) -> LatentCache:
    """Encode a data set.

    Parameters
    ----------
    encode
        The VAE. It is kept, for what is cropped at random or was damaged on disk.
    key
        What its answer depends on: a hash of its weights, and its dtype.
    where
        ``memory``: the ranks tell each other what they encoded, and each holds everything.
        ``disk``: they read entries when they need them. ``none``: images are encoded at each use.
    folder
        For ``disk``.
    rank, ranks
        The ranks share the work: of :func:`images_to_cache`, ``i`` is rank ``i mod ranks``'s.
    gather
        Gives everyone's value to each rank, and so waits for all.
    advance
        Told the number of this rank's images that became ready.

    Raises
    ------
    UsageError
        If ``disk`` has no folder, or a folder has no use.
    BadInputError
        Naming every image that cannot be decoded.
    NumericError
        If the VAE gives NaN for an image.
    """
    if (folder is not None) != (where == "disk"):
        raise UsageError(
            "`cache_latents` on disk needs a folder"
            if where == "disk"
            else f"`cache_dir` has no use with `{where}`"
        )
    cache = LatentCache(dataset, encode, key=key, folder=None if folder is None else CacheFolder(folder))
    if where == "memory":
        cache.fill(images_to_cache(dataset)[rank::ranks], hold=True, advance=advance)
        if ranks > 1:
            cache.exchange(gather)
    elif where == "disk":
        cache.fill(images_to_cache(dataset)[rank::ranks], hold=False, advance=advance)
        gather(None)
    return cache


def _content_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()
