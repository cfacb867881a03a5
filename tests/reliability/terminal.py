"""Group F: text from files on a terminal."""

from __future__ import annotations

from pathlib import Path

from reliability.cases import Case, Elsewhere, Expected, Row
from reliability.container import content
from reliability.lab import BAD_INPUT, CHECK, OK, USAGE
from reliability.tensors import METADATA, good, numbers, stored

_VERBS = ("inspect", "json", "check", "edit", "resize", "merge", "bake", "convert")
_LOOKS = {"check": Expected((OK, CHECK))}

ESCAPES = {
    "ss_output_name": "\x1b[2J\x1b[H\x1b]0;pwned\x07 fake prompt # ",
    "ss_training_comment": "\x1b]8;;http://evil.example\x07click\x1b]8;;\x07",
    "modelspec.title": "\x1b]52;c;ZWNobyBwd25lZAo=\x07",
    "ss_bidi": "good\u202efdp.exe\u2066",
    "ss_cr": "OK\rFAIL\x9b31m\u2028",
    "\x1b[31mkey": "value",
}
MARKUP = {
    "ss_output_name": "[/bold]",
    "modelspec.title": "[link=file:///etc/passwd]click[/link]",
    "ss_training_comment": "[red]FAKE ERROR[/red] [blink] :warning:",
    "a[b": "]",
}
TITLES = {**METADATA, "modelspec.title": "../../../../tmp/executed", "ss_output_name": "../../executed"}
BROKEN = {
    "ss_network_dim": "four",
    "ss_network_alpha": "NaN",
    "ss_tag_frequency": "{not json",
    "ss_datasets": "[1, null, {}]",
    "ss_v2": "maybe",
    "ss_bucket_info": "[" * 100_000,
    "ss_network_args": '{"algo": ["lokr"]}',
}


def _with(metadata: dict[str, str]) -> Case:
    return content(lambda: stored(good(), metadata))  # type: ignore[return-value]


def _odd_name() -> bytes:
    state = good()
    state["\x1b[31mlora_unet_x\x1b[0m\n[error] all fine.lora_up.weight"] = numbers(2, 2)
    return stored(state)


def _odd_path(folder: Path) -> str:
    return "\x1b[31m\nlycotool: all fine\u202e.safetensors"


def _odd_file(folder: Path) -> str:
    name = "\x1b[31m\rx\u202e.safetensors"
    (folder / name).write_bytes(stored(good(), ESCAPES))
    return name


def _not_unicode(folder: Path) -> str:
    name = b"\xff\xfe.safetensors".decode("utf-8", "surrogateescape")
    (folder / name).write_bytes(stored(good()))
    return name


def _case(id: str, what: str, make: object, code: int = OK, message: str = "", **more: object) -> Case:
    return Case(id=id, what=what, make=make, expected=Expected.of(code, message),
                **{"verbs": _VERBS, "by_verb": _LOOKS, **more})  # fmt: skip


ROWS: tuple[Row, ...] = (
    _case("F01", "escape sequences and bidirectional overrides in metadata", _with(ESCAPES)),
    _case("F01t", "the same, with their tags", _with({**ESCAPES, "ss_tag_frequency": '{"\\u001b[1m": {"\\u202e": 3}}'}),
          verbs=("inspect", "json"), options=("--tags",)),
    _case("F02", "Rich markup in metadata", _with(MARKUP)),
    _case("F03", "an escape and a line break in a tensor's name", content(_odd_name), BAD_INPUT, "lora_down",
          by_verb={"inspect": Expected.of(OK), "json": Expected.of(OK), "check": Expected.of(CHECK),
                   "edit": Expected.of(OK)}),
    _case("F04", "a title that is a path", _with(TITLES)),
    _case("F05", "a metadata value of 9 MB", _with({**METADATA, "blob": "x" * 9_000_000}), seconds=20,
          verbs=("inspect", "json", "check", "resize", "merge")),
    _case("F06", "numbers and JSON in metadata that are none", _with(BROKEN)),
    *(
        _case(f"F06d{depth}", f"JSON {depth} levels deep in metadata",
              _with({**METADATA, "ss_network_args": "[" * depth + "]" * depth,
                     "ss_datasets": '{"a":' * depth + "1" + "}" * depth}), verbs=("inspect", "json", "check", "resize"))
        for depth in (40, 900, 5000)
    ),
    _case("F06s", "scales in metadata that are none", _with({"lora_adapter_metadata": "[]"}), BAD_INPUT,
          "lora_adapter_metadata", by_verb={"edit": Expected.of(OK)},
          decision="without the scales no module can be told, so `inspect` refuses too"),
    Elsewhere("F07", "`--json` on F01 to F03", "reliability/test_cases.py::test_case[F01-json]"),
    _case("F08", "an error that quotes a hostile path", _odd_path, USAGE, "no such file", by_verb={}),
    _case("F09", "a hostile file name", _odd_file),
    _case("F10", "a file name that is not Unicode", _not_unicode),
)  # fmt: skip
