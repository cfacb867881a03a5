"""What is measured beside what: inputs, commands, yardsticks and limits of each case."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.files import KINDS, groups_for, nbytes, transformer
from benchmarks.measure import ROOT, python
from benchmarks.peers import is_there

START, TORCH = "import typer, rich.table", "import torch"


@dataclass(frozen=True, slots=True)
class Settings:
    """The options of a run."""

    folder: Path
    device: str = "cpu"
    quick: bool = False
    gb: float = 8.0

    @property
    def devices(self) -> tuple[str, ...]:
        """Where what has both is measured."""
        return ("cpu",) if self.device == "cpu" else ("cpu", self.device)


@dataclass(frozen=True, slots=True)
class Command:
    """One process to be measured.

    Attributes
    ----------
    yardstick
        Whether others are compared with it.
    of
        Which rows are; all where none is named.
    output
        What it writes, which is removed before and after.
    once
        Whether one round is enough: what takes long and is only there to be compared with.
    gpu
        Whether to ask for its memory on the GPU.
    optional
        Whether the others are measured if it fails, as another's program may.
    """

    name: str
    argv: Sequence[str]
    yardstick: bool = False
    of: Sequence[str] = ()
    output: Path | None = None
    once: bool = False
    gpu: bool = False
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Limit:
    """What a row must not exceed: ``Σ factor · seconds of a yardstick + plus`` seconds, or bytes."""

    row: str
    text: str
    factors: Mapping[str, float] = field(default_factory=dict)
    plus: float = 0.0
    measure: str = "seconds"


@dataclass(frozen=True, slots=True)
class Case:
    """Commands measured in turn, round after round.

    Attributes
    ----------
    inputs
        Paths, and the arguments of :mod:`tests.benchmarks.files` or another child that make them.
    alone
        Children that time a computation by themselves and print JSON: by name.
    checks
        Children that say how right the results are; they run before anything is timed.
    absent
        What is not measured, and why.
    """

    name: str
    title: str
    commands: Sequence[Command]
    inputs: Mapping[Path, Sequence[str]] = field(default_factory=dict)
    limits: Sequence[Limit] = ()
    alone: Mapping[str, Sequence[str]] = field(default_factory=dict)
    checks: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    rounds: int = 3


def _made(kind: str, *arguments: object) -> list[str]:
    return python("benchmarks.files", kind, json.dumps([_plain(a) for a in arguments]))


def _peer(name: str, *arguments: object) -> list[str]:
    return python("benchmarks.peers", name, json.dumps([_plain(a) for a in arguments]))


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


def _code(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def _start() -> Command:
    return Command(START, _code("import typer, rich.table"), yardstick=True)


def _torch() -> Command:
    return Command(TORCH, _code("import torch"), yardstick=True)


def _copy(source: Path, target: Path, name: str = "cp") -> Command:
    script = 'cp "$1" "$2" && sync "$2"'
    return Command(name, ["sh", "-c", script, "sh", str(source), str(target)], yardstick=True, output=target)


def _lycotool(device: str, *arguments: object) -> list[str]:
    module = "lycotool" if device == "cpu" else "benchmarks.probe"
    return python(module, *arguments)


# --- start-up and headers ------------------------------------------------------------------

_TAB = "source '{script}'; COMP_WORDS=(lycotool merge --method ti); COMP_CWORD=3; _lycotool; echo ${{COMPREPLY[@]}}"


def start(settings: Settings) -> Case:
    """What a user waits for before anything happens."""
    adapter = settings.folder / "sd15-locon.safetensors"
    script = ROOT / "completions" / "lycotool.bash"
    helps = [Command(f"{name} --help".strip(), python("lycotool", *name.split(), "--help"))
             for name in ("", "merge", "train")]  # fmt: skip
    tab = Command("TAB", ["bash", "--norc", "-c", _TAB.format(script=script)])
    header = Command("inspect FILE", python("lycotool", "inspect", adapter))
    limits = [Limit(c.name, f"1.8 × {START}", {START: 1.8}) for c in (*helps, tab)]
    limits.append(Limit(header.name, f"2.2 × {START}", {START: 2.2}))
    return Case(
        "start",
        "start-up, and the header of an adapter with 354 modules",
        [_start(), *helps, tab, header],
        {adapter: _made("adapter", adapter, "locon", "sd15", 32, settings.quick)},
        limits,
        rounds=9,
    )


def inspect(settings: Settings) -> Case:
    """Folders of headers, and one file measured."""
    files = 100 if settings.quick else 1000
    alike, different = (settings.folder / name for name in ("alike", "different"))
    adapter = settings.folder / "sd15-locon.safetensors"
    some = max(1, files // 10)
    names = {alike: f"{files} files of {some} networks", different: f"{files} different files"}
    commands = [_start(), _torch()]
    limits = []
    for folder, name in names.items():
        if folder == different:
            commands += [
                Command("json.loads of those headers", _peer("headers", folder), yardstick=True),
                Command("safe_open of those files", _peer("safe-open", folder), yardstick=True, once=True),
            ]
        commands.append(Command(f"inspect, {name}", python("lycotool", "inspect", folder)))
        limits.append(Limit(commands[-1].name, "3 s", plus=3.0))
    commands.append(
        Command(
            f"inspect --json, {files} different files", python("lycotool", "inspect", different, "--json")
        )
    )
    commands.append(
        Command("inspect --stats FILE", python("lycotool", "inspect", adapter, "--stats", "--device", "cpu"))
    )
    return Case(
        "inspect",
        f"folders of {files} adapters with 999 tensors each, and `--stats`",
        commands,
        {
            alike: _made("folder", alike, files, some),
            different: _made("folder", different, files, files),
            adapter: _made("adapter", adapter, "locon", "sd15", 32, settings.quick),
        },
        limits,
    )


# --- adapters ------------------------------------------------------------------------------


def convert(settings: Settings) -> Case:
    """A file of 60 MB in another program's names."""
    source = settings.folder / "sd15-60mb.safetensors"
    out = settings.folder / "converted.safetensors"
    single = settings.folder / "sd15-one-module.safetensors"
    rank = 22  # over all layers of SD 1.5
    commands = [_torch(), _copy(source, out)]
    start = "convert, one module"
    for name, adapter, options in (
        (start, single, ()),
        ("convert", source, ()),
        ("convert --no-verify", source, ("--no-verify",)),
    ):
        argv = python("lycotool", "convert", adapter, "--to", "diffusers", "-q", "-o", out, *options)
        commands.append(Command(name, argv, output=out, yardstick=name == start))
    return Case(
        "convert",
        f"a LoCon of rank {rank} over SD 1.5 to diffusers, and of one module, which is start-up",
        commands,
        {
            source: _made("adapter", source, "locon", "sd15", rank, settings.quick),
            single: _made("adapter", single, "locon", "sd15", rank, settings.quick, 1),
        },
        [
            Limit("convert", f"{TORCH} + 1 s", {TORCH: 1.0}, 1.0),
            Limit("convert", f"{start} + 1 s", {start: 1.0}, 1.0),
        ],
    )


def merge(settings: Settings) -> Case:
    """Adapters into an adapter."""
    first, second = (settings.folder / f"sd15-{kind}.safetensors" for kind in ("locon", "loha"))
    out = settings.folder / "merged.safetensors"
    pair = [f"{first}:0.6", f"{first}:-0.4"]
    commands = [_torch(), _copy(first, out)]
    for name, inputs, options in (
        ("merge, two LoCon, exact", pair, ()),
        (
            "merge, LoCon and LoHa, ties to rank 32",
            [first, second],
            ("--method", "ties", "--density", "0.5", "--rank", "32"),
        ),
    ):
        argv = python("lycotool", "merge", *inputs, *options, "-q", "--device", "cpu", "-o", out)
        commands.append(Command(name, argv, output=out))
    if settings.device != "cpu":
        argv = _lycotool(settings.device, "merge", first, second, "--method", "ties", "--density", "0.5", "--rank", "32", "-q",
                         "--device", settings.device, "-o", out)  # fmt: skip
        commands.append(Command(f"merge, ties to rank 32, {settings.device}", argv, output=out, gpu=True))
    return Case(
        "merge",
        "adapters over SD 1.5 into one",
        commands,
        {
            path: _made("adapter", path, kind, "sd15", 32, settings.quick)
            for path, kind in ((first, "locon"), (second, "loha"))
        },
    )


def resize(settings: Settings) -> Case:
    """Smaller ranks: SD 1.5 on the CPU, SDXL on a GPU."""
    model, old, new = ("sd15", 32, 8) if settings.device == "cpu" else ("sdxl", 128, 32)
    source = settings.folder / f"{model}-rank{old}.safetensors"
    out = settings.folder / "resized.safetensors"
    argv = _lycotool(
        settings.device, "resize", source, "--rank", new, "-q", "--device", settings.device, "-o", out
    )
    ours = Command("resize", argv, output=out, gpu=settings.device != "cpu")
    plain = _peer("plain-resize", source, out, new, settings.device)
    return Case(
        "resize",
        f"{model}, rank {old} to {new}, on {settings.device}",
        [
            _torch(),
            _copy(source, out),
            ours,
            Command("QR loop, then save", plain, yardstick=True, output=out),
        ],
        {source: _made("adapter", source, "locon", model, old, settings.quick)},
        alone={
            "resize, computation alone": python("benchmarks.alone", "resize", source, new, settings.device, 3)
        },
        checks={"error of the file": [argv, python("benchmarks.alone", "error", source, out)]},
    )


def extract(settings: Settings) -> Case:
    """The difference of two checkpoints: SD 1.5 on the CPU, SDXL on a GPU."""
    model, rank = ("sd15", 16) if settings.device == "cpu" else ("sdxl", 64)
    base, tuned = (settings.folder / f"{model}-{name}.safetensors" for name in ("before", "after"))
    out = settings.folder / "extracted.safetensors"
    argv = _lycotool(settings.device, "extract", base, tuned, "--rank", rank, "-q", "--device", settings.device,
                     "-o", out)  # fmt: skip
    making = _made("pair", base, tuned, model, settings.quick, settings.device)
    commands = [
        _torch(),
        Command("read both files", _peer("read", base, tuned), yardstick=True),
        Command("extract", argv, output=out, gpu=settings.device != "cpu"),
    ]
    checks: dict[str, Sequence[Sequence[str]]] = {}
    if settings.device == "cuda" and (count := gpus()) > 1:
        shared = settings.folder / "extracted-by-all.safetensors"
        among = python("torch.distributed.run", "--standalone", "--nproc-per-node", count, "-m", "lycotool",
                       "extract", base, tuned, "--rank", rank, "-q", "-f", "--device", "cuda", "-o", shared)  # fmt: skip
        commands.append(Command(f"extract, on {count} GPUs", among, output=shared))
        same = _code(f"import filecmp; print(str(filecmp.cmp({str(out)!r}, {str(shared)!r}, False)).lower())")
        checks = {f"the bytes of one GPU are those of {count}": [argv, among, same]}
    return Case(
        "extract",
        f"the UNet of {model}, rank {rank}, on {settings.device}",
        commands,
        {tuned: making},
        alone={
            "extract, warm process": python(
                "benchmarks.alone", "extract", base, tuned, rank, settings.device, 2, out
            )
        },
        checks=checks,
        rounds=3 if settings.device != "cpu" else 1,
    )


def gpus() -> int:
    """How many GPUs there are, by their driver's tool: nothing here imports torch."""
    if shutil.which("nvidia-smi") is None:
        return 0
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout.count(
        "GPU "
    )


# --- checkpoints ---------------------------------------------------------------------------


def _bake(settings: Settings, model: str, title: str, *, plain: Sequence[str], rounds: int) -> Case:
    folder = settings.folder
    base, out, kept = (
        folder / f"{model}.safetensors",
        folder / "baked.safetensors",
        folder / "kept.safetensors",
    )
    keys = folder / f"{model}-keys.json"
    adapters = {kind: folder / f"{model}-{kind}.safetensors" for kind in KINDS}
    ranks = {kind: 16 if kind == "cp" else 32 for kind in KINDS}
    commands = [
        _torch(),
        _copy(base, out),
        Command("read the checkpoint", _peer("read", base), yardstick=True),
    ]
    checks: dict[str, Sequence[Sequence[str]]] = {}
    for device in settings.devices:
        ending = "" if device == "cpu" else f", {device}"
        for kind in KINDS if device == "cpu" else ("locon", "loha"):
            argv = _lycotool(device, "bake", base, adapters[kind], "-o", out, "-q", "--device", device)
            commands.append(Command(f"bake {kind}{ending}", argv, output=out, gpu=device != "cpu"))
    argv = python("lycotool", "merge", base, adapters["locon"], "-o", out, "-q", "--device", "cpu")
    commands.append(Command("merge locon", argv, output=out))
    for kind in plain:
        argv = _peer("plain-merge", base, adapters[kind], keys, kind, out)
        rows = [c.name for c in commands if kind in c.name.split(",")[0].split()]
        commands.append(
            Command(f"load all, add, save: {kind}", argv, yardstick=True, of=rows, output=out, once=True)
        )
        again = python("lycotool", "bake", base, adapters[kind], "-o", kept, "-q", "-f", "--device", "cpu")
        checks[f"bake {kind} beside the plain way"] = [argv, again, _peer("compare", out, kept)]
    names = [c.name for c in commands if c.name in ("bake locon", "merge locon")]
    limits = [Limit(name, f"3 × cp + {TORCH}", {"cp": 3.0, TORCH: 1.0}) for name in names]
    limits += [
        Limit(c.name, "1 GB of memory", plus=1e9, measure="rss") for c in commands if c.name == "bake locon"
    ]
    limits += [
        Limit(f"bake {kind}", "1.5 × bake locon", {"bake locon": 1.5}) for kind in KINDS if kind != "locon"
    ]
    return Case(
        f"bake-{model}",
        title,
        commands,
        {
            base: _made("checkpoint", base, model, settings.quick),
            keys: _made("keys", keys, model, settings.quick),
            **{
                path: _made("adapter", path, kind, model, ranks[kind], settings.quick)
                for kind, path in adapters.items()
            },
        },
        limits,
        checks=checks,
        rounds=rounds,
    )


def bake_sd15(settings: Settings) -> Case:
    """Adapters of several algorithms into SD 1.5."""
    return _bake(settings, "sd15", "354 modules into SD 1.5, 2.13 GB in float16", plain=KINDS, rounds=3)


def bake_sdxl(settings: Settings) -> Case:
    """Adapters of several algorithms into SDXL."""
    return _bake(settings, "sdxl", "794 modules into SDXL, 6.94 GB in float16", plain=(), rounds=2)


def peers(settings: Settings) -> Case:
    """What libraries need for the UNet of SD 1.5 alone and a LoRA of rank 32 on its attention blocks."""
    folder = settings.folder / "peer"
    out, ours = settings.folder / "fused", settings.folder / "fused.safetensors"
    absent = {
        name: f"{name} is not installed"
        for name in ("diffusers", "peft", "lycoris")
        if not (is_there(name) and is_there("diffusers"))
    }
    if "diffusers" in absent:
        return Case("peers", "libraries", [], absent=absent)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    titles = {
        "diffusers": "diffusers, fuse and save",
        "peft": "PEFT, merge and save",
        "lycoris": "lycoris-lora, merge and save",
    }
    argv = python(
        "lycotool", "bake", weights, folder / "lora.safetensors", "-o", ours, "-q", "--device", "cpu"
    )
    return Case(
        "peers",
        "the UNet of SD 1.5 alone, 1.72 GB, and a LoRA of rank 32 on its attention blocks",
        [
            _torch(),
            _copy(weights, ours),
            Command("bake", argv, output=ours),
            *(
                Command(title, _peer(name, folder, out), yardstick=True, output=out, optional=True)
                for name, title in titles.items()
                if name not in absent and (name != "peft" or is_there("peft"))
            ),
        ],
        {folder / "lora.safetensors": _peer("make-unet", folder, 32 if settings.quick else 320)},
        absent=absent,
        rounds=2,
    )


def sharded(settings: Settings) -> Case:
    """Three sizes of a transformer in shards, which shows what grows with the size and what does not."""
    commands: list[Command] = [_torch()]
    inputs: dict[Path, Sequence[str]] = {}
    limits: list[Limit] = []
    largest = 2.6 if settings.quick else settings.gb
    shares = [("bf16", 0.25), ("bf16", 0.5), ("bf16", 1.0), ("fp8", 0.5)]
    for kind, groups in dict.fromkeys((kind, groups_for(share * largest, kind)) for kind, share in shares):
        size = sum(map(nbytes, transformer(groups, kind).values())) / 1e9
        folder = settings.folder / f"{kind}-{groups}"
        inputs[folder] = _made("sharded", folder, groups, kind)
        out = settings.folder / "out-sharded"
        index = out / "out.safetensors.index.json"
        bake = python("lycotool", "bake", folder / "in.safetensors.index.json", folder / "lora.safetensors",
                      "--device", "cpu", "-q", "-o", index)  # fmt: skip
        name = f"bake {kind}, {size:.1f} GB"
        commands.append(Command(name, ["sh", "-c", 'mkdir "$0" && exec "$@"', str(out), *bake], output=out))
        limits.append(Limit(name, "4 GB of memory", plus=4e9, measure="rss"))
    return Case(
        "sharded",
        "a LoRA of rank 16 on every linear layer of Flux.1's shapes, in shards; inputs are holes",
        commands,
        inputs,
        limits,
        rounds=1,
    )


#: In the order they are run.
CASES: Mapping[str, Callable[[Settings], Case]] = {
    "start": start, "inspect": inspect, "convert": convert, "merge": merge, "bake-sd15": bake_sd15,
    "bake-sdxl": bake_sdxl, "resize": resize, "extract": extract, "sharded": sharded, "peers": peers,
}  # fmt: skip
