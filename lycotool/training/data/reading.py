"""From a folder, dataset file or metadata file to a :class:`Dataset`; no torch, no pixels.

Only headers of images are read. Everything that is wrong is looked for first and reported in
one error, with counts and names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from lycotool.errors import BadInputError, UsageError
from lycotool.training.data.buckets import place
from lycotool.training.data.dataset import Dataset, Example, Subset
from lycotool.training.data.dataset_file import file_sources, is_dataset_file
from lycotool.training.data.faults import Findings
from lycotool.training.data.folders import folder_sources, note_foreign_files
from lycotool.training.data.images import image_size
from lycotool.training.data.metadata import metadata_source
from lycotool.training.data.options import DataOptions, Size
from lycotool.training.data.sources import Source
from lycotool.training.data.tokens import Tokenizer
from lycotool.training.randomness import shuffled

#: Which images are set aside; index: subset.
VALIDATION = "validation"

#: Headers read at once: what hides a network disk's delay.
_READERS = 8

#: A crop that takes more than this part of an image is worth a warning.
_LARGE_CROP = 1 / 3


def read_dataset(source: str, options: DataOptions) -> Dataset:
    """Read what there is to train on.

    Parameters
    ----------
    source
        A folder of images, of ``10_name`` folders or with a ``metadata.jsonl``; a dataset file
        (``.toml``, ``.json``); a metadata file (``.jsonl``, ``.json``).
    options
        With a resolution: see :meth:`DataOptions.for_family`.

    Raises
    ------
    UsageError
        If the source does not exist, or an option would have no effect on it.
    BadInputError
        If there is no image, or any image or caption cannot be used: all are named.
    """
    if options.resolution is None:
        raise UsageError("`resolution` is not set")
    findings = Findings()
    sources = [*_sources(Path(source), options, findings), *_regularisation(source, options, findings)]
    sizes = _sizes(sources, findings)
    sets = [_examples(number, one, sizes, findings) for number, one in enumerate(sources)]
    findings.raise_faults(source)
    for one, examples in zip(sources, sets, strict=True):
        if not examples:
            findings.warnings.append(f"{one.place} has no images")
    if not any(examples for one, examples in zip(sources, sets, strict=True) if not one.options.is_reg):
        raise BadInputError(
            "no images found" if not any(sets) else "there are only regularisation images",
            path=source,
            hint="images are .png, .jpg, .jpeg, .webp, .bmp, .tif, .tiff, .avif, .jxl",
        )
    idle = [sentence for one in sources for sentence in one.options.idle()]
    if options.prior_loss_weight != 1 and not any(one.options.is_reg for one in sources):
        idle.append("`prior_loss_weight` has no effect: there are no regularisation images")
    findings.warnings.extend(dict.fromkeys(idle))
    subsets = tuple(Subset(one.place, one.options, one.group) for one in sources)
    training, held_out = _split(sources, sets)
    if not any(part for one, part in zip(sources, training, strict=True) if not one.options.is_reg):
        raise UsageError("`validation_split` leaves no image to train on", path=source)
    balanced = _balanced(subsets, training, findings)
    _note_crops(balanced, findings)
    _note_long_captions(balanced, options.max_token_length, findings)
    return Dataset(subsets, balanced, tuple(findings.warnings), _validation(subsets, held_out, source))


def _sources(path: Path, options: DataOptions, findings: Findings) -> list[Source]:
    root = None if options.image_root is None else Path(options.image_root)
    if path.is_dir():
        metadata = path / "metadata.jsonl"
        if metadata.is_file():
            return [metadata_source(metadata, options, findings, folder=root)]
        _refuse_root(path, options)
        note_foreign_files(path, findings)
        return folder_sources(path, options, findings)
    if not path.exists():
        raise UsageError("does not exist", path=path)
    if is_dataset_file(path):
        _refuse_root(path, options)
        return file_sources(path, options, findings)
    if path.suffix.lower() in (".jsonl", ".json"):
        return [metadata_source(path, options, findings, folder=root)]
    raise UsageError(
        "is no data set",
        path=path,
        hint="expected a folder, a dataset file (.toml) or a metadata file (.jsonl, .json)",
    )


def _refuse_root(path: Path, options: DataOptions) -> None:
    if options.image_root is not None:
        raise UsageError("`image_root` has no effect: this is no metadata file", path=path)


def _regularisation(source: str, options: DataOptions, findings: Findings) -> list[Source]:
    """The sources of ``reg_data_dir``."""
    if options.reg_data_dir is None:
        return []
    if Path(source).is_file() and is_dataset_file(Path(source)):
        raise UsageError(
            "`reg_data_dir` has no effect beside a dataset file",
            path=source,
            hint="use `is_reg = true` in a subset",
        )
    folder = Path(options.reg_data_dir)
    if not folder.exists():
        raise UsageError("the folder of `reg_data_dir` does not exist", path=folder)
    found = folder_sources(folder, replace(options, is_reg=True, num_repeats=1), findings)
    if not any(one.entries for one in found):
        raise BadInputError("no regularisation images found", path=folder)
    return found


def _sizes(sources: Sequence[Source], findings: Findings) -> Mapping[Path, Size]:
    """The size of every image that can be read; the others are faults."""
    paths = list(dict.fromkeys(entry.path for one in sources for entry in one.entries))

    def measured(path: Path) -> Size | BadInputError:
        try:
            return image_size(path)
        except BadInputError as error:
            return error

    sizes = {}
    with ThreadPoolExecutor(_READERS, "lycotool-images") as pool:
        for path, size in zip(paths, pool.map(measured, paths), strict=True):
            if isinstance(size, BadInputError):
                findings.broken(size)
            else:
                sizes[path] = size
    return sizes


def _examples(number: int, source: Source, sizes: Mapping[Path, Size], findings: Findings) -> list[Example]:
    """The usable examples of a source; what is wrong with the others is noted."""
    options = source.options
    weight = options.prior_loss_weight if options.is_reg else 1.0
    found = []
    uncaptioned = []
    for entry in source.entries:
        caption = options.class_tokens if entry.caption is None else entry.caption
        if not caption:
            kind = "empty" if entry.caption == "" else "missing"
            if not options.allow_missing_captions:
                findings.fault(
                    (f"{kind} caption", f"{kind} captions"),
                    entry.path,
                    hint="write the captions, give `class_tokens` for missing ones, or set `allow_missing_captions`",
                )
                continue
            uncaptioned.append(entry.path.name)
        if entry.path not in sizes:
            continue
        size = sizes[entry.path]
        try:
            placement = place(size, options)
        except UsageError as error:
            findings.fault(
                ("image too small", "images too small"), entry.path, error.message, hint=error.hint
            )
            continue
        found.append(Example(entry.path, size, caption or "", number, placement, options.num_repeats, weight))
    findings.warn(("image is", "images are"), uncaptioned, f" trained without a caption in {source.place}")
    return found


Sets = Sequence[Sequence[Example]]


def _split(sources: Sequence[Source], sets: Sets) -> tuple[Sets, Sets]:
    """Each subset's training and validation part; regularisation images are never set aside."""
    training, held_out = [], []
    for number, (one, examples) in enumerate(zip(sources, sets, strict=True)):
        part = 0.0 if one.options.is_reg else one.options.validation_split
        count = round(len(examples) * part)
        order = shuffled(range(len(examples)), one.options.validation_seed, VALIDATION, number)
        aside = set(order[:count])
        training.append([example for i, example in enumerate(examples) if i not in aside])
        held_out.append([example for i, example in enumerate(examples) if i in aside])
    return training, held_out


def _validation(subsets: Sequence[Subset], sets: Sets, source: str) -> Dataset | None:
    """The examples set aside, each once and as it is.

    Raises
    ------
    UsageError
        If ``validation_split`` is set but sets nothing aside.
    """
    if not any(sets):
        if any(subset.options.validation_split for subset in subsets):
            raise UsageError("`validation_split` sets no image aside: there are too few", path=source)
        return None
    plain = [
        replace(
            subset,
            options=replace(
                subset.options,
                num_repeats=1,
                flip_aug=False,
                random_crop=False,
                shuffle_caption=False,
                caption_dropout_rate=0.0,
                caption_dropout_every_n_epochs=0,
                caption_tag_dropout_rate=0.0,
                token_warmup_step=0,
            ),
        )
        for subset in subsets
    ]
    examples = [replace(example, repeats=1) for examples in sets for example in examples]
    return Dataset(tuple(plain), tuple(examples))


def _balanced(subsets: Sequence[Subset], sets: Sets, findings: Findings) -> tuple[Example, ...]:
    """All examples, with as many regularisation images per epoch as others, as sd-scripts has.

    In each dataset regularisation images are taken in order with their repeats until there are
    as many as training images; then each is repeated once more, in order, until there are.
    """
    wanted: dict[int, int] = defaultdict(int)
    for subset, examples in zip(subsets, sets, strict=True):
        if not subset.options.is_reg:
            wanted[subset.group] += sum(example.repeats for example in examples)
    repeats: dict[tuple[int, int], int] = {}
    pool = [
        (number, position)
        for number, examples in enumerate(sets)
        if subsets[number].options.is_reg
        for position in range(len(examples))
    ]
    for group, target in wanted.items():
        members = [member for member in pool if subsets[member[0]].group == group]
        repeats.update(_repeats(members, [sets[n][p].repeats for n, p in members], target))
    unused = [str(sets[n][p].path.name) for n, p in pool if (n, p) not in repeats]
    findings.warn(
        ("regularisation image is", "regularisation images are"), unused, " more than needed, not used"
    )
    return tuple(
        replace(example, repeats=repeats[number, position]) if subsets[number].options.is_reg else example
        for number, examples in enumerate(sets)
        for position, example in enumerate(examples)
        if not subsets[number].options.is_reg or (number, position) in repeats
    )


def _repeats(
    members: Sequence[tuple[int, int]], own: Sequence[int], target: int
) -> dict[tuple[int, int], int]:
    taken: dict[tuple[int, int], int] = {}
    count = 0
    for member, times in zip(members, own, strict=True):
        if count >= target:
            return taken
        taken[member] = times
        count += times
    if taken and count < target:
        rounds, rest = divmod(target - count, len(members))
        for position, member in enumerate(members):
            taken[member] += rounds + (position < rest)
    return taken


def _note_crops(examples: Sequence[Example], findings: Findings) -> None:
    large = []
    for example in examples:
        width, height = example.placement.resized
        if 1 - example.bucket[0] * example.bucket[1] / (width * height) > _LARGE_CROP:
            large.append(f"{example.path.name} ({example.size[0]}x{example.size[1]})")
    findings.warn(("image loses", "images lose"), large, " more than a third to the crop")


def _note_long_captions(examples: Sequence[Example], limit: int, findings: Findings) -> None:
    """Name images whose caption is cut; before prefix, dropout and the like."""
    lines = [(example.path.name, line) for example in examples for line in example.caption.split("\n")]
    # A token has a byte at least, so that most captions need not be looked at.
    candidates = [(name, line) for name, line in lines if len(line.encode()) > limit]
    if not candidates:
        return
    lengths = Tokenizer("eos").lengths([line for _, line in candidates])
    long = [f"{name} ({n})" for (name, _), n in zip(candidates, lengths, strict=True) if n > limit]
    more = "" if limit == 225 else ", which `max_token_length` may raise"
    findings.warn(
        ("caption has", "captions have"), long, f" more than {limit} tokens{more}; the rest is not read"
    )
