"""Which clients' scores a result rests on, and which are missing.

A mean over whoever happens to answer is not a result: where clients fail, it is over other domains than the table
beside it. So a result says how many of its clients answered and who is missing, and with too few of them the run fails.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from fednorm.errors import DivergedError, IncompleteError
from fednorm.federation.replies import NOT_A_NUMBER, NOT_FINITE, Expected


@dataclass(frozen=True)
class Answers:
    """Who answered an evaluation, of those who hold images to score.

    Attributes:
        share: Share of the clients that answered, in [0, 1]; 1 where none has images.
        clients: Partition ids of those that did not.
        domains: Domains of which nobody answered.
    """

    share: float
    clients: tuple[int, ...]
    domains: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """Return what a result says of it: ``answered``, and ``missing`` where somebody is."""
        missing = {"clients": list(self.clients), "domains": list(self.domains)}
        return {"answered": self.share, **({"missing": missing} if self.clients else {})}


def answers(expected: Mapping[int, Expected], answered: Collection[int], *, held_out: bool = False) -> Answers:
    """Compare who answered with who should have.

    Args:
        expected: The run's clients, by partition id.
        answered: Partition ids of those that did.
        held_out: Whether the clients that never train were asked, and not the others.
    """
    asked = {pid: known for pid, known in expected.items() if known.scored and known.held_out == held_out}
    missing = tuple(sorted(pid for pid in asked if pid not in answered))
    there = {known.domain for pid, known in asked.items() if pid in answered}
    domains = tuple(dict.fromkeys(asked[pid].domain for pid in missing if asked[pid].domain not in there))
    return Answers(1 - len(missing) / len(asked) if asked else 1.0, missing, domains)


def require_answered(final: Mapping[str, Any], least: float, lines: Collection[Mapping[str, Any]], remedy: str) -> None:
    """Refuse to call something a result that rests on too few clients.

    Args:
        final: What would be the result's ``final``, with ``answered`` and ``missing``.
        least: ``rounds.min_answered``: the smallest share that is enough; below 1, somebody of each domain must have
            answered all the same; at 0 anything is enough.
        lines: The rounds' lines, the last one's ``rejected`` for the reasons.
        remedy: What helps, where losses became NaN.

    Raises:
        DivergedError: Those that are missing have losses that are not numbers.
        IncompleteError: They are missing for other reasons.
    """
    if enough(final, least):
        return
    missing = final["missing"]
    rejected = list(lines)[-1]["rejected"] if lines else []
    reasons = {r["client"]: r["reason"] for r in rejected if r["reason"].startswith("evaluation")}
    causes = "; ".join(f"client {pid}: {reasons.get(pid, 'no reply')}" for pid in missing["clients"][:3])
    whom = f"Nobody of {', '.join(missing['domains'])}" if missing["domains"] else "Not every client"
    text = (
        f"{whom if final['answered'] else 'No client'} could be evaluated after the last round ({causes}): "
        f"{100 * final['answered']:.0f} % of the clients answered"
    )
    if all(diverged(reasons.get(pid, "")) for pid in missing["clients"]):
        began = next((line["round"] for line in lines if any(diverged(r["reason"]) for r in line["rejected"])), "?")
        raise DivergedError(
            f"{text}: the federation diverged: {NOT_A_NUMBER} from round {began} on. The record keeps the rounds. "
            f"{remedy}"
        )
    raise IncompleteError(
        f"{text}, and rounds.min_answered asks for {100 * least:.0f} %, somebody of each domain among them. The record "
        "keeps the rounds. The same command again goes on from its checkpoint and evaluates once more; "
        "--set rounds.min_answered=0 takes what came as the result, which then says who is missing."
    )


def enough(final: Mapping[str, Any], least: float) -> bool:
    """Return whether ``final`` rests on enough clients; ``least`` as for :func:`require_answered`."""
    missing = final.get("missing")
    return not missing or not least or (final["answered"] >= least and not missing["domains"])


def diverged(reason: str) -> bool:
    """Return whether a reply was rejected for numbers that are none."""
    return NOT_A_NUMBER in reason or NOT_FINITE in reason
