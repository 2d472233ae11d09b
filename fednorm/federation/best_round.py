"""The round that is best on images held back from training (``evaluate.best_round``), reported beside the last."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fednorm.federation.matrix import by_domain, summarize
from fednorm.federation.round_report import ClientReport

EXAMPLES, ACCURACY = "validation-num-examples", "validation-accuracy"
"""Metrics of a client that scored its images held back as well."""


def held_back_scores(reports: Iterable[ClientReport]) -> dict[str, Any]:
    """Return ``validation``: the accuracy by domain on images held back, its mean and its worst; nothing without any.

    Args:
        reports: What the clients reported of an evaluated round.
    """
    scored = [
        (report.domain, report.metrics[EXAMPLES], report.metrics[ACCURACY])
        for report in reports
        if EXAMPLES in report.metrics and ACCURACY in report.metrics
    ]
    per_domain = by_domain(scored)
    return {"validation": summarize(per_domain)} if per_domain else {}


def best_round(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the round with the highest mean accuracy over domains on images held back, the first of equal ones.

    Test images have no say in it. Rounds in which fewer domains answered than in others are not candidates: their
    means are over other domains.

    Args:
        lines: Every round's line of the record.

    Returns:
        ``round``, ``validation_mean`` and, on the images that are scored, ``mean``, ``worst`` and ``per_domain``; None
        where no round was scored on both.
    """
    scored = [line for line in lines if line.get("validation") and line.get("per_domain")]
    most = max((_domains(line) for line in scored), default=(0, 0))
    candidates = [line for line in scored if _domains(line) == most]
    if not candidates:
        return None
    best = max(candidates, key=lambda line: line["validation"]["mean"])
    own = {key: best[key] for key in ("mean", "worst", "per_domain")}
    return {"round": best["round"], "validation_mean": best["validation"]["mean"], **own}


def _domains(line: Mapping[str, Any]) -> tuple[int, int]:
    return len(line["validation"]["per_domain"]), len(line["per_domain"])
