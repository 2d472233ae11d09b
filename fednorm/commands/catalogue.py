"""``fednorm list`` and ``fednorm explain``: what is there, from the methods' own cards."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from fednorm import config as configuration
from fednorm import continual_config
from fednorm.cli import out, print_json
from fednorm.data.benchmarks import BENCHMARKS
from fednorm.errors import canonical, unknown_name
from fednorm.models import MODELS, model_spec
from fednorm.norms import NORMS, norm_spec
from fednorm.registry import (
    learner_names,
    learner_spec,
    scenario_names,
    scenario_spec,
    strategy_names,
    strategy_spec,
)
from fednorm.spec import Citation
from fednorm.study.recipes import find_study, recipe_names

Row = dict[str, Any]

SECTIONS: Mapping[str, tuple[type[Any], ...]] = {
    "data": (configuration.DataConfig,),
    "model": (configuration.ModelConfig,),
    "train": (configuration.TrainConfig, continual_config.StreamTrainConfig),
    "rounds": (configuration.RoundConfig,),
    "evaluate": (configuration.EvaluateConfig, continual_config.StreamEvaluateConfig),
}
"""The sections' records: that of both kinds of run, or the federated one and the continual one."""


def _norms() -> list[Row]:
    return [{"name": name, "summary": norm_spec(name).summary} for name in NORMS]


def _strategies() -> list[Row]:
    return [{"name": name, "summary": strategy_spec(name).summary} for name in strategy_names()]


def _scenarios() -> list[Row]:
    return [{"name": name, "summary": scenario_spec(name).summary} for name in scenario_names()]


def _learners() -> list[Row]:
    return [{"name": name, "summary": learner_spec(name).summary} for name in learner_names()]


def _models() -> list[Row]:
    return [{"name": name, "summary": model_spec(name).summary} for name in MODELS]


def _data() -> list[Row]:
    return [{"name": b.name, "summary": b.summary, "note": b.note} for b in BENCHMARKS.values()]


def _studies() -> list[Row]:
    about = {name: configuration.read_config(find_study(name)).get("study", {}) for name in recipe_names()}
    return [{"name": name, "summary": table.get("title", "")} for name, table in about.items()]


LISTS: Mapping[str, Callable[[], list[Row]]] = {
    "norms": _norms,
    "strategies": _strategies,
    "models": _models,
    "data": _data,
    "scenarios": _scenarios,
    "learners": _learners,
    "studies": _studies,
}


def run_list(what: str, *, as_json: bool) -> None:
    """List the names of a kind with a line each."""
    what = canonical(what)
    if what not in LISTS:
        raise unknown_name("list", what, LISTS)
    rows = LISTS[what]()
    if as_json:
        return print_json({what: rows})
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        lines = [row.get("summary", ""), row.get("note", "")]
        out().print(f"{row['name']:<{width}}  {' '.join(line for line in lines if line)}", markup=False, soft_wrap=True)
    if not rows:
        out().print(f"There are no {what} yet.")
    return None


def run_explain(name: str, *, as_json: bool) -> None:
    """Explain one name, wherever it is registered."""
    name = canonical(name)
    makers: dict[str, Callable[[], Row]] = {
        **{section: lambda key=section: _section(key) for section in SECTIONS},  # type: ignore[misc]
        **{model: lambda key=model: _model(key) for model in MODELS},  # type: ignore[misc]
        **{norm: lambda key=norm: _norm(key) for norm in NORMS},  # type: ignore[misc]
        **{strategy: lambda key=strategy: _strategy(key) for strategy in strategy_names()},  # type: ignore[misc]
        **{scenario: lambda key=scenario: _scenario(key) for scenario in scenario_names()},  # type: ignore[misc]
        **{learner: lambda key=learner: _learner(key) for learner in learner_names()},  # type: ignore[misc]
        **{bench: lambda key=bench: _benchmark(key) for bench in BENCHMARKS},  # type: ignore[misc]
    }
    if name not in makers:
        raise unknown_name("norm, strategy, scenario, learner, model, benchmark or section", name, makers)
    card = makers[name]()
    if as_json:
        return print_json(card)
    out().print(_text(card), markup=False, soft_wrap=True)
    return None


def _norm(name: str) -> Row:
    spec = norm_spec(name)
    tensors = {key: {"kind": t.kind.value, "carry": t.carry.value} for key, t in spec.tensors.items()}
    facts = {
        "normalizes": spec.normalizes,
        "batch_coupled": spec.batch_coupled,
        "train_eval_differ": spec.train_eval_differ,
    }
    return _card("norm", name, spec.summary, spec.citation, f"fednorm.norms.{name}", _fields(spec.make)) | {
        "tensors": tensors,
        **facts,
        "deviations": list(spec.deviations),
    }


def _strategy(name: str) -> Row:
    spec = strategy_spec(name)
    card = _card("strategy", name, spec.summary, spec.citation, f"strategies.{name}", spec.options)
    return card | {"defaults": dict(spec.defaults), "personalised": spec.personalised}


def _scenario(name: str) -> Row:
    spec = scenario_spec(name)
    card = _card("scenario", name, spec.summary, spec.citation, f"scenarios.{name}", spec.options)
    return card | {"data": list(spec.data), "defaults": dict(spec.defaults)}


def _learner(name: str) -> Row:
    spec = learner_spec(name)
    card = _card("learner", name, spec.summary, spec.citation, f"scenarios.learners.{name}", spec.options)
    # A record of options documents its own and leaves the rest to the one that it extends.
    records = [cls for cls in reversed(spec.make.Options.__mro__) if dataclasses.is_dataclass(cls) and _fields(cls)]
    about = "\n\n".join([card["about"], *(inspect.getdoc(record) or "" for record in records)])
    return card | {"about": about.strip(), "deviations": list(spec.deviations)}


def _model(name: str) -> Row:
    spec = model_spec(name)
    card = _card("model", name, spec.summary, spec.citation, f"fednorm.models.{name}", {"width": spec.width})
    return card | {"input_size": spec.input_size, "deviations": list(spec.deviations)}


def _benchmark(name: str) -> Row:
    return {"what": "benchmark", "name": name, "summary": BENCHMARKS[name].summary, "note": BENCHMARKS[name].note}


def _section(name: str) -> Row:
    about = "\n\n".join(inspect.getdoc(section) or "" for section in SECTIONS[name])
    options = {key: value for section in reversed(SECTIONS[name]) for key, value in _fields(section).items()}
    return {"what": "section of the configuration", "name": name, "options": options, "about": about}


def _fields(cls: type[Any]) -> Row:
    return {
        field.name: field.default if field.default is not dataclasses.MISSING else None
        for field in dataclasses.fields(cls)
    }


def _card(what: str, name: str, summary: str, citation: Citation, module: str, options: Mapping[str, Any]) -> Row:
    about = inspect.cleandoc(import_module(module).__doc__ or "")
    return {
        "what": what,
        "name": name,
        "summary": summary,
        "citation": dataclasses.asdict(citation),
        "options": dict(options),
        "about": about,
    }


def _text(card: Row) -> str:
    lines = [f"{card['name']} ({card['what']})", "", card.get("about") or card["summary"], ""]
    if card.get("options"):
        lines.append("Options: " + ", ".join(f"{key} = {value}" for key, value in card["options"].items()))
    for key, tensor in card.get("tensors", {}).items():
        lines.append(f"Tensor {key}: {tensor['kind']}; at an experience's boundary: {tensor['carry']}")
    if card.get("defaults"):
        lines.append(f"Brings along: {card['defaults']}")
    lines.extend(f"Differs: {deviation}" for deviation in card.get("deviations", []))
    if card.get("note"):
        lines.append(card["note"])
    return "\n".join(lines).strip()
