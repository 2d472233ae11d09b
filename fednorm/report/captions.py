"""What stands beneath a table on a terminal: one line, and what a reader must not miss; the rest is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fednorm.cards import NORMS, spelled
from fednorm.config import ALL_CLIENTS, of_which
from fednorm.records.result import result_of
from fednorm.report._common import Result, incomplete
from fednorm.study.statistics import LEVEL, METHODS

if TYPE_CHECKING:
    from fednorm.report.comparison import Comparison

NEVER_HIDDEN = ("Runs left out", "Missing from", "No difference is shown", "Reduced", "Departs", "Selected")
"""How sentences of a caption begin without which its numbers would mislead."""


DEPARTS = "*"
"""Marks a difference to a paper of runs that depart from their study."""


def reduction_of(results: Sequence[Result], studies: Iterable[Mapping[str, Any]]) -> float | None:
    """Return the factor by which all runs of these results are reduced; None where they are not, or not alike."""
    runs = ((run, study) for study in studies for key in ("runs", "selection_runs") for run in study.get(key, ()))
    of = {run: study.get("reduced") for run, study in runs}
    factors = {of.get(result["hash"]) for result in results}
    return factors.pop() if len(factors) == 1 else None


def of_departures(results: Sequence[Result], studies: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what a caption says of runs that are not what their study's file says."""
    hashes = {result["hash"] for result in results}
    factors = sorted({study["reduced"] for study in studies if study.get("reduced")})
    keys: dict[str, dict[str, None]] = {}
    for study in studies:
        for run, departs in (study.get("departs") or {}).items():
            for key, (own, original) in departs.items() if run in hashes else ():
                keys.setdefault(key, {})[f"{_written(own)}, not {_written(original)}"] = None
    told = "; ".join(f"{key} {' or '.join(values)}" for key, values in keys.items())
    said = (
        [f"Reduced to {', '.join(f'{factor:g}' for factor in factors)} by --reduce, to look at it."] if factors else []
    )
    beside = f"; beside the paper: {DEPARTS}" if any(study.get("paper") for study in studies) else ""
    return said + ([f"Departs from the study{beside}: {told}."] if told else [])


def _written(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def count_of(groups: Iterable[Sequence[Result]]) -> str:
    """Return how many seeds the groups of a table have: ``one seed, no interval`` or ``n = 3 seeds``."""
    counts = [len(group) for group in groups] or [0]
    if max(counts) <= 1:
        return "one seed, no interval"
    return f"n = {max(counts)} seeds" if min(counts) == max(counts) else f"n = {min(counts)} to {max(counts)} seeds"


def scored(results: Sequence[Result]) -> str:
    """Return on what, and after which round, results were scored, in a few words."""
    first = result_of(results[0])
    if first.memorizes:
        return "training images"
    split = f"{results[0]['config']['evaluate']['split']} images"
    rounds = sorted({result["final"]["round"] for result in results if "round" in result["final"]})
    after = f"after round {', '.join(map(str, rounds))}" if rounds else "after the last experience"
    whose = dict.fromkeys(of_which(result["config"]["evaluate"].get("clients", ALL_CLIENTS)) for result in results)
    return f"{split}{' or'.join(text or ' of all clients' for text in whose) if any(whose) else ''}, {after}"


def of_table(groups: Mapping[str, Sequence[Result]]) -> str:
    """Return the caption of a table of means and standard deviations over seeds."""
    results = [result for group in groups.values() for result in group]
    spread = "" if max(map(len, groups.values())) <= 1 else ", mean ± standard deviation"
    return f"{count_of(groups.values())}{spread}; {scored(results)}"


def of_comparison(comparison: Comparison) -> str:
    """Return the caption of a comparison: n, interval, what is scored."""
    groups = [method.results for method in comparison.methods]
    results = [result for group in groups for result in group]
    used = next((found.method for method in comparison.methods for found in method.scores.values()), "t")
    made = f"; {100 * LEVEL:g} % interval: {METHODS[used].rstrip('.')}" if max(map(len, groups)) > 1 else ""
    return f"{count_of(groups)}{made}; {scored(results)}"


def warnings_of(groups: Mapping[str, Sequence[Result]], sentences: Iterable[str] = ()) -> tuple[str, ...]:
    """Return what must not be missed: who is not in a table, what departs, which formula is a guess.

    Args:
        groups: The table's results, by method.
        sentences: A caption's sentences, of which those are taken that :data:`NEVER_HIDDEN` names.
    """
    told = [text for text in sentences if text.startswith(NEVER_HIDDEN) or "TEST images" in text]
    told += [text for text in incomplete(groups) if text not in told]
    guessed = dict.fromkeys(
        name
        for group in groups.values()
        for result in group
        if (name := spelled(str(result["config"]["norm"]["name"]))) in NORMS.built_in
        and NORMS.stated(name, "reconstruction", "")
    )
    if guessed:
        told.append(f"Reconstruction, unverified: {', '.join(guessed)} (fednorm explain NAME).")
    return (*told, *_of_privacy(groups))


def _of_privacy(groups: Mapping[str, Sequence[Result]]) -> Iterator[str]:
    """Yield what private methods have spent: no accuracy of theirs is told without it."""
    for label, group in groups.items():
        spent = [result["privacy"] for result in group if result.get("privacy")]
        if spent:
            known = [one["epsilon"] for one in spent if one["epsilon"] is not None]
            epsilon = f"epsilon {max(known):.3g} at most" if len(known) == len(spent) else "no finite epsilon"
            noise, clip, delta = (spent[0][key] for key in ("noise_multiplier", "max_grad_norm", "delta"))
            yield (
                f"Private training, {label}: {epsilon} at delta {delta:g} for an image (noise {noise:g}, gradients of "
                f"{clip:g} at most); simulated, with noise of the run's seed."
            )
