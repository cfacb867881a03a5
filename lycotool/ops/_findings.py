"""The checks of `inspect --check`, and what a finding is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

Severity = Literal["error", "warning", "info"]

#: Weakest first.
SEVERITIES: tuple[Severity, ...] = ("info", "warning", "error")


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding.

    Attributes
    ----------
    id
        Stable; :data:`CHECKS` lists them all.
    text
        What was found, in words.
    modules
        Modules, tensors or metadata keys concerned.
    remedy
        What to do about it; empty where nothing needs doing.
    """

    id: str
    severity: Severity
    text: str
    modules: tuple[str, ...] = ()
    remedy: str = ""


class Check(NamedTuple):
    """What a check reads beside the header, how severe its findings are, and what it finds."""

    reads: Literal["header", "hashes", "values", "changes"]
    severity: Severity
    finds: str


#: Every check there is.
CHECKS: Mapping[str, Check] = {
    "damaged-module": Check(
        "header", "error", "modules with tensors missing, foreign or of shapes that do not fit"
    ),
    "alpha-not-finite": Check("header", "error", "alphas that are NaN or infinite"),
    "orphan-alpha": Check("header", "error", "alphas whose module is not there"),
    "duplicate-layer": Check("header", "error", "two modules for one layer, in two spellings"),
    "unknown-tensor": Check("header", "warning", "tensors of no known algorithm"),
    "alpha-missing": Check(
        "header", "warning", "no alpha where the file's names call for one; read as the rank"
    ),
    "alpha-zero": Check("header", "warning", "alpha 0: no change for samplers, the rank for trainers"),
    "alpha-negative": Check("header", "warning", "a negative alpha"),
    "alpha-above-rank": Check("header", "info", "a scale above 1 (rs_lora, or a strength folded in)"),
    "rs-lora-not-folded": Check(
        "header", "warning", "trained with rs_lora, but alpha as it was given: √rank too weak"
    ),
    "rank-above-size": Check("header", "warning", "a rank above the smaller side of the matrix"),
    "dora-axis": Check("header", "warning", "DoRA, which programs normalise along different axes"),
    "mixed-spellings": Check("header", "warning", "key names of several programs in one file"),
    "no-loader": Check("header", "warning", "modules that no program in the table of loaders takes"),
    "pickle": Check("header", "warning", "a pickle, which can run code where it is loaded"),
    "metadata-conflict": Check("header", "warning", "a rank or alpha in the metadata that no tensor has"),
    "metadata-not-json": Check("header", "warning", "metadata that should be JSON and is not"),
    "private-path": Check("header", "warning", "folders of somebody's computer in the metadata"),
    "training-data": Check(
        "header", "info", "captions, folders and counts of the training data in the metadata"
    ),
    "stale-hash": Check("hashes", "warning", "a stored hash of other data"),
    "hash-of-nothing": Check("header", "warning", "a stored hash of an empty file"),
    "non-finite": Check("values", "error", "NaN or infinite values"),
    "fp16-overflow": Check("values", "warning", "values, alpha/rank included, beyond float16"),
    "fits-fp16": Check(
        "values", "info", "float32 values that are all float16 too: half the size for nothing"
    ),
    "dead-module": Check("changes", "warning", "modules that change nothing"),
    "wasted-rank": Check("changes", "info", "more than half of the ranks for the last 1 % of the energy"),
    "needs-base": Check("changes", "info", "changes that only `--base` lets be measured"),
}


def finding(id: str, text: str, modules: Iterable[str] = (), remedy: str = "") -> Finding:
    """A finding of a check, as severe as that is."""
    return Finding(id, CHECKS[id].severity, text, tuple(modules), remedy)


def worst(findings: Iterable[Finding]) -> Severity | None:
    """The highest severity among findings; None where there are none."""
    return max((f.severity for f in findings), key=SEVERITIES.index, default=None)
