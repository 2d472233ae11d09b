"""Tables of federated results: a row a method, a column a domain; made from results, never typed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from fednorm.config import RunConfig
from fednorm.report._common import (
    SHORT,
    UNKNOWN,
    Result,
    Table,
    by_method,
    incomplete,
    name_of,
    percent,
    reconstructions,
    seeds,
)
from fednorm.report.captions import of_table, warnings_of
from fednorm.report.numbers import fixed

__all__ = ["Table", "accuracy_table", "curve_table", "evaluation_table", "plan_table"]


def accuracy_table(results: Sequence[Result]) -> Table:
    """Return the table of test accuracy by domain, over seeds where there are several.

    Args:
        results: Results of finished runs on the same data.
    """
    groups = by_method(results, name_of)
    domains = list(dict.fromkeys(domain for result in results for domain in result["final"]["per_domain"]))
    central = ("central",) if any(result["final"].get("central") for result in results) else ()
    rows = []
    for name, group in groups.items():
        cells = [percent([r["final"]["per_domain"].get(domain) for r in group]) for domain in domains]
        rows.append(
            (
                name,
                *cells,
                percent([r["final"]["mean"] for r in group]),
                percent([r["final"]["worst"] for r in group]),
                *(percent([r["final"].get("central", {}).get("accuracy") for r in group]) for _ in central),
                fixed(fmean(r["seconds"] for r in group), 0),
                fixed(fmean(map(_bytes_per_round, group)) / 1e6, 2),
            )
        )
    columns = ("method", *domains, "mean", "worst", *central, "seconds", "MB a round")
    return Table(
        f"Accuracy (%): {results[0]['data']['title']}",
        columns,
        tuple(rows),
        _notes(results, groups),
        of_table(groups),
        warnings_of(groups),
        ("mean", "worst", *central),
    )


def curve_table(results: Sequence[Result]) -> Table:
    """Return the mean accuracy over domains after every evaluated round: how far the last one can be trusted.

    Args:
        results: Results of finished runs on the same data.
    """
    groups = by_method(results, name_of)
    rounds = sorted({line["round"] for result in results for line in result["rounds"] if "mean" in line})
    rows = []
    for name, group in groups.items():
        curves = [{line["round"]: line["mean"] for line in result["rounds"] if "mean" in line} for result in group]
        rows.append((name, *(percent([curve.get(number) for curve in curves]) for number in rounds)))
    columns = ("mean accuracy after round", *map(str, rounds))
    title = f"Mean accuracy by round (%): {results[0]['data']['title']}"
    return Table(title, columns, tuple(rows), tuple(incomplete(groups)))


def evaluation_table(results: Sequence[Result]) -> Table:
    """Return the evaluation matrix: for each method and choice of statistics, the accuracy by domain."""
    rows: list[tuple[str, ...]] = []
    names = _names(results)
    domains = list(
        dict.fromkeys(
            domain
            for result in results
            for scores in evaluations(result["evaluation"]).values()
            for domain in scores.get("per_domain", {})
        )
    )
    for name_of_run, result in zip(names, results, strict=True):
        for kind, scores in evaluations(result["evaluation"]).items():
            name = f"{name_of_run}: {kind}"
            if "not_applicable" in scores:
                rows.append((name, *(UNKNOWN for _ in domains), UNKNOWN))
            else:
                cells = [percent([scores["per_domain"].get(domain)]) for domain in domains]
                rows.append((name, *cells, percent([scores["mean"]])))
    reasons = dict.fromkeys(
        f"–: {scores['not_applicable']}."
        for result in results
        for scores in evaluations(result["evaluation"]).values()
        if "not_applicable" in scores
    )
    reasons |= dict.fromkeys(incomplete({name: [result] for name, result in zip(names, results, strict=True)}))
    columns = ("evaluated under", *domains, "mean")
    title = f"Evaluation matrix (%): {results[0]['data']['title']}"
    return Table(title, columns, tuple(rows), tuple(reasons), first=("mean",))


def plan_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    """Return the norm plan, an entry of the state dict a row."""
    columns = ("entry", "layer", "norm", "kind", "role", "shape")
    rows = tuple(
        (e["key"], e["layer_type"], e["norm"] or UNKNOWN, e["kind"], e["role"], _shape(e["shape"])) for e in entries
    )
    return Table("Norm plan", columns, rows, first=("role", "kind"), texts=columns[1:5])


def _shape(sizes: Sequence[int]) -> str:
    return "×".join(map(str, sizes)) or "scalar"


def _names(results: Sequence[Result]) -> list[str]:
    """Return a name for each result that no other has: its group's, and the seed where the group has several."""
    names = {
        id(result): f"{name}, seed {result['config']['seed']}" if len(group) > 1 else name
        for name, group in by_method(results, name_of).items()
        for result in group
    }
    return [names[id(result)] for result in results]


def _tuned(result: Result) -> list[str]:
    """Return the learning rate, and whatever else of the training is not at its default."""
    train, defaults = result["config"]["train"], RunConfig.default_values("federated")["train"]
    told = [f"lr {train['learning_rate']:g}"]
    for key, value in train.items():
        if key in defaults and key not in ("learning_rate", "checkpoint_every") and value != defaults[key]:
            told.append(f"{SHORT.get(f'train.{key}', key)} {_text(value)}")
    return told


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _bytes_per_round(result: Result) -> float:
    lines = result["rounds"]
    return float(fmean(line["bytes_down"] + line["bytes_up"] for line in lines))


def _notes(results: Sequence[Result], groups: Mapping[str, Sequence[Result]]) -> tuple[str, ...]:
    tuned = {name: _tuned(group[0]) for name, group in groups.items()}
    own = {name: [text for text in texts if text not in name] for name, texts in tuned.items()}
    settings = "; ".join(f"{name}: {', '.join(texts)}" for name, texts in own.items() if texts)
    rounds = sorted({result["final"]["round"] for result in results})
    selection = results[0]["final"]["selection"]
    after = ", ".join(map(str, rounds))
    return (
        f"{seeds(results, groups)}; accuracy after round {after} ({selection}); wall clock.",
        *incomplete(groups),
        *_best_rounds(groups),
        *_central(results),
        *([f"Settings: {settings}."] if settings else []),
        *reconstructions(results),
        *results[0]["data"]["notes"],
    )


def _best_rounds(groups: Mapping[str, Sequence[Result]]) -> list[str]:
    """Return, for each method whose results tell it, the accuracy at the round that validation images chose."""
    sentences = []
    for name, group in groups.items():
        best = [result["final"]["best_round"] for result in group if result["final"].get("best_round")]
        if len(best) == len(group):
            chosen = ", ".join(str(each["round"]) for each in best)
            sentences.append(
                f"{name}, best round by validation images ({chosen}): mean {percent([b['mean'] for b in best])}."
            )
    return sentences


def _central(results: Sequence[Result]) -> list[str]:
    """Return what the column of the server's own images is; nothing where there is none."""
    counts = sorted({result["final"]["central"]["images"] for result in results if result["final"].get("central")})
    images = " or ".join(f"{count:,}" for count in counts)
    return [f"central: the shared model on the server's own {images} images (evaluate.central_dir)."] if counts else []


def evaluations(evaluation: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return a result's evaluations at the end by the normalization statistics each was made under, as text."""
    flat: dict[str, Mapping[str, Any]] = {}
    for kind, scores in evaluation.items():
        if "under" in scores:
            flat |= {f"{kind}, statistics of {name}": inner for name, inner in scores["under"].items()}
        else:
            flat[f"{kind}, {scores['with']} tensors" if "with" in scores else kind] = scores
    return flat
