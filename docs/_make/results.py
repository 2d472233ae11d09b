"""The results' tables, made from the summaries in ``.records``: a page a study, and the README's answers so far."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from _make import readings
from _make.blocks import DOCS, ROOT, filled, names
from fednorm.analyses import analysis_of
from fednorm.bench.norms import norms_table
from fednorm.cli.report import tables
from fednorm.records.results import Loaded, load
from fednorm.report.comparison import Comparison, Method, comparisons
from fednorm.report.numbers import ends, percent, signed

PAGES = DOCS / "results"
CURVE = "-curve"
"""How the block ends that also shows how accuracy went."""
ANALYSIS = "analysis-"
"""How the block begins that shows the table of an analysis, a file of :data:`ANALYSES`."""
ANALYSES = ROOT / ".records/analyses"
SPEED = DOCS / "trust/speed.md"
COSTS = ROOT / ".records/bench/norms.json"
"""What ``fednorm bench layers --json`` printed."""

READING = "-reading"
"""How the block ends that says how a study's results are read."""


@cache
def summary(name: str) -> Loaded:
    """Return what a summary in ``.records`` holds."""
    return load([ROOT / ".records" / f"{name}.json"])


def compared(name: str, against: str = "") -> list[Comparison]:
    """Return the comparisons of a summary, with the study's own baseline or another method's label."""
    loaded = summary(name)
    return comparisons(loaded.results, studies=loaded.studies, baseline=against or None)


def tables_of(name: str, *, curve: bool = False) -> str:
    """Return the tables of a summary in Markdown, as ``fednorm report .records/NAME.json --markdown`` prints them."""
    loaded = summary(name)
    made = [table.markdown() for table in tables(loaded.results, curve=curve, studies=loaded.studies)]
    if curve:  # only what the page does not show without
        plain = {table.markdown() for table in tables(loaded.results, studies=loaded.studies)}
        made = [table for table in made if table not in plain]
    return "\n\n".join(made)


def analysis(name: str) -> str:
    """Return the table of an analysis in Markdown, as ``fednorm analyse FILE --markdown`` prints it."""
    document = json.loads((ANALYSES / f"{name}.json").read_text(encoding="utf-8"))
    return analysis_of(name).table(document).markdown()


@cache
def costs() -> dict[str, Any]:
    """Return what every norm costs, as ``fednorm bench layers`` has measured it."""
    document: dict[str, Any] = json.loads(COSTS.read_text(encoding="utf-8"))
    return document


def pages() -> Iterator[tuple[Path, str]]:
    """Yield the results' pages, and that on speed, and what they say with their tables made anew."""
    made = [path.stem for path in sorted(ANALYSES.glob("*.json"))]
    for path in sorted(PAGES.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        blocks = {
            name: tables_of(name.removesuffix(CURVE), curve=name.endswith(CURVE))
            for name in names(text)
            if (ROOT / f".records/{name.removesuffix(CURVE)}.json").exists()
        }
        blocks |= {name: readings.reading(name.removesuffix(READING)) for name in names(text) if name.endswith(READING)}
        blocks |= {ANALYSIS + name: analysis(name) for name in made if ANALYSIS + name in names(text)}
        yield path, filled(text, blocks)
    yield SPEED, filled(SPEED.read_text(encoding="utf-8"), {"bench_norms": norms_table(costs()).markdown()})


def shown() -> dict[str, Path]:
    """Return the page that shows each summary's tables, by the summary's name."""
    return {
        name: path
        for path in sorted(PAGES.glob("*.md"))
        for name in names(path.read_text(encoding="utf-8"))
        if not name.endswith((CURVE, READING)) and not name.startswith(ANALYSIS)
    }


# The README's answers -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A question that a study of ours has an answer to.

    Attributes:
        text: The question.
        study: The study's name, also that of its summary in ``.records`` and of its page.
        method: The label of the method that is asked about.
        against: What it is compared with: a label, or empty for the study's own baseline.
    """

    text: str
    study: str
    method: str
    against: str = ""


QUESTIONS = (
    Question("Digits of five domains: does FedBN beat FedAvg?", "digits_small", "fedbn"),
    Question(
        "What FedBN keeps beyond SiloBN, scale and shift: does it add anything?", "digits_small", "fedbn", "silobn"
    ),
    Question("Photographs (Office-Caltech-10): does FedBN beat FedAvg?", "answer_office", "fedbn"),
    Question(
        "Batches of 2: does FedWon beat FedAvg with GroupNorm?",
        "answer_digits_small_batch",
        "fedwon",
        "fedavg + group_norm (num_groups=8)",
    ),
    Question(
        "Labels skewed over ten clients: does FedWon beat FedAvg with BatchNorm?",
        "answer_label_skew",
        "fedwon data.alpha 0.1, rounds.fraction 1.0",
    ),
    Question("Online split CIFAR-10, ER-ACE: does AdaB²N beat BatchNorm?", "online_cifar10", "er_ace + adab2n"),
    Question(
        "Random labels, again and again: does NaP keep a network plastic?",
        "memorization_cifar10",
        "naive + nap (cosine over experience)",
        "naive + none (cosine over experience)",
    ),
)


def answers() -> str:
    """Return the README's table: a question a row, each number from a summary in ``.records``."""
    rows = [
        "| question | answer so far | accuracy (%) / the other's | difference [95 % interval], seeds ahead | command |",
        "| --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*rows, *map(_row, QUESTIONS)])


def _row(question: Question) -> str:
    loaded = summary(question.study)
    (side_by_side,) = comparisons(loaded.results, studies=loaded.studies, baseline=question.against or None)
    method = next(m for m in side_by_side.methods if m.label == question.method)
    other = next(m for m in side_by_side.methods if m.label == method.baseline)
    answer, difference = verdict(method, side_by_side)
    scores = " / ".join(percent(m.scores[side_by_side.headline].mean) for m in (method, other))
    command = f"`fednorm compare {question.study} --data-dir DIR`"
    page = f"docs/results/{question.study}.md"
    return f"| [{question.text}]({page}) | {answer} | {scores} | {difference} | {command} |"


def verdict(method: Method, compared: Comparison) -> tuple[str, str]:
    """Return what a paired difference answers, and the difference."""
    found = method.differences[compared.headline]
    if found.low is None or found.high is None:
        word = "ahead" if found.mean > 0 else "behind"
        return f"{word}; one seed", signed(found.mean)
    told = f"{signed(found.mean)} {ends(found.low, found.high)}, {found.better} of {found.n}"
    if found.low > 0:
        return "yes", told
    if found.high < 0:
        return "no, behind", told
    return "not shown", told


def command_lines(path: Path) -> list[str]:
    """Return the ``fednorm report`` commands that a page names for its tables."""
    return re.findall(
        r"^fednorm report (\.records/\S+\.json)(?: .*)? --markdown", path.read_text("utf-8"), re.MULTILINE
    )
