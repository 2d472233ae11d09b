"""Reference pages: the command line, every configuration key, what a result holds."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from _make import prose
from _make.methods import arguments, cell, code
from _make.results import summary
from fednorm.cards import FAMILIES
from fednorm.config import MACHINE, SECTION_VALUES, ModelChoice, RunConfig
from fednorm.config.run import IMMATERIAL, SECTIONS
from fednorm.config.schema import expected, kinds_of
from fednorm.records import formats, record

NAMED: Mapping[str, str] = {
    "model": "models",
    "norm": "norms",
    "strategy": "strategies",
    "scenario": "scenarios",
    "learner": "learners",
}
"""Sections that name a method, and the family it is of."""


def pages() -> Iterator[tuple[str, str]]:
    """Yield the path, below the documentation's folder, and the text of every page."""
    yield "reference/commands.md", commands()
    yield "reference/configuration.md", configuration()
    yield "reference/records.md", records()


# Commands -------------------------------------------------------------------------------------------------------------


def leaves() -> Iterator[tuple[str, Any]]:
    """Yield every command that does something, with the words that call it."""
    from typer.main import get_command

    from fednorm.cli.app import app

    def walk(words: str, command: Any) -> Iterator[tuple[str, Any]]:
        if hasattr(command, "commands"):
            for name, inner in command.commands.items():
                yield from walk(words if name == getattr(command, "unsaid", "") else f"{words} {name}", inner)
        else:
            yield words, command

    yield from walk("fednorm", get_command(app))


def commands() -> str:
    """Return the page of the command line."""
    parts = [
        "# Command line",
        "Results go to standard output, all else to standard error. With `--json` standard output holds one JSON "
        "document. A mistake ends with exit code 2 and a sentence that says what was expected, what came, and what to "
        "do.",
    ]
    for words, command in leaves():
        parts += [f"## {words}", prose.markdown(command.help or "")]
        arguments_ = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
        usage = " ".join([words, *(p.metavar or p.name.upper() for p in arguments_)])
        parts.append(f"```text\n{usage}{' [OPTIONS]' if options else ''}\n```")
        if command.params:
            parts.append("\n".join(["| | default | |", "| --- | --- | --- |", *map(_parameter, arguments_ + options)]))
    return "\n\n".join(parts) + "\n"


def _parameter(parameter: Any) -> str:
    names = ", ".join(f"`{name}`" for name in parameter.opts) if parameter.param_type_name == "option" else ""
    names = names or f"`{(parameter.metavar or parameter.name).upper()}`"
    default = parameter.default
    shown = "" if default in (None, False, (), []) or callable(default) else code(default)
    shown = "required" if parameter.required else shown
    return f"| {names} | {shown} | {cell(getattr(parameter, 'help', '') or '')} |"


# Configuration --------------------------------------------------------------------------------------------------------


def configuration() -> str:
    """Return the page of all configuration keys."""
    parts = [
        "# Configuration",
        "Every key of a run, from the schema that checks it. A key is set in a TOML file (`--config FILE.toml`), with "
        "`--set section.key=value`, or as `config={'section': {'key': value}}` from Python. `fednorm explain SECTION` "
        "prints the same.",
        "## At the top",
        _table(_top()),
    ]
    for name in dict.fromkeys(name for sections in SECTIONS.values() for name in sections):
        parts += [f"## \\[{name}\\]", _runs_of(name)]
        if name in NAMED:
            parts += [_method_section(name)]
        else:
            section = SECTION_VALUES[name]
            parts += [prose.markdown(inspect.getdoc(section) or ""), _table(_keys(name))]
    return "\n\n".join(parts) + "\n"


def _top() -> Iterator[tuple[str, str, str, str, str]]:
    meanings = arguments(RunConfig.__doc__ or "")
    defaults = RunConfig.defaults("federated")
    for key in ("kind", "seed", "threads", "workers", *MACHINE):
        value = getattr(defaults, key)
        yield f"`{key}`", type(value).__name__, code(value), "all", cell(meanings[key])


def _runs_of(name: str) -> str:
    runs = [kind for kind, sections in SECTIONS.items() if name in sections]
    return "Of every kind of run." if len(runs) == len(SECTIONS) else f"Of {' and '.join(runs)} runs."


def _method_section(name: str) -> str:
    family = FAMILIES[NAMED[name]]
    links = ", ".join(f"[{card}](../methods/{NAMED[name]}/{card}.md)" for card in family.built_in)
    default = getattr(RunConfig.defaults("federated"), name).name
    rows = [("`name`", "str", code(default), _runs_of(name)[3:-1], f"A {family.noun}'s name, or an import path.")]
    if name == "model":
        meanings = arguments(ModelChoice.__doc__ or "")
        extra = {"width": ("int", "0"), "activation": ("str", ""), "weights": ("str", "")}
        rows += [(f"`{k}`", kind, code(value), "all", cell(meanings[k])) for k, (kind, value) in extra.items()]
    own = f"Beside them stand the options of what is named: {links}."
    return f"{_table(rows)}\n\n{own}"


def _keys(name: str) -> Iterator[tuple[str, str, str, str, str]]:
    section = SECTION_VALUES[name]
    for key, info in section.model_fields.items():
        kinds = kinds_of(info)
        extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        default = code(info.default)
        if "continual" in extra and len(kinds) > 1:
            default += f"; {code(extra['continual'])} on streams"
        note = " *No number depends on it.*" if (name, key) in IMMATERIAL else ""
        runs = "all" if len(kinds) == len(SECTIONS) else ", ".join(kinds)
        yield f"`{key}`", _type(info), default, runs, cell(info.description or "") + note


def _type(info: Any) -> str:
    if get_origin(info.annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(info.annotation))
    kind = getattr(info.annotation, "__name__", str(info.annotation))
    words = expected(info, 0.5 if kind == "float" else 1)
    kind = "names" if kind == "tuple" else kind
    return cell(kind if words in ("an integer", "a finite number", "a string", "true or false") else f"{kind}, {words}")


def _table(rows: Any) -> str:
    heads = ["| key | type | default | runs | |", "| --- | --- | --- | --- | --- |"]
    return "\n".join([*heads, *(f"| {' | '.join(row)} |" for row in rows)])


# Records --------------------------------------------------------------------------------------------------------------


def records() -> str:
    """Return the page of what a record's folder and a result hold."""
    results = summary("demo").results
    first = {kind: next(r for r in results if r["kind"] == kind) for kind in ("federated", "continual")}
    first["federated_continual"] = {**first["federated"], **_beside_a_federation()}
    parts = [
        "# Records",
        prose.markdown(record.__doc__ or ""),
        "## Reading them",
        "`fednorm.load(FOLDER)` returns a data frame, a row a run ([how to](../how-to/read-records.md)); "
        "`fednorm report FOLDER --export numbers.parquet` writes every measured number. What is damaged, or of a newer "
        f"format than {formats.FORMAT}, is named and left out.",
    ]
    for kind, result in first.items():
        needed = formats.NEEDED[kind]
        parts += [
            f"## result.json of a {kind} run",
            "What it holds; **bold** is in every result, whatever the version.",
        ]
        rows = [f"| {f'**{key}**' if key in needed else key} | {cell(type_)} |" for key, type_ in _schema(result)]
        parts.append("\n".join(["| key | |", "| --- | --- |", *rows]))
    return "\n\n".join(parts) + "\n"


def _beside_a_federation() -> dict[str, Any]:
    """Return what the result of clients that learn on streams has beside a federation's: as it is measured, small."""
    import fednorm

    small = {"scenario": {"train_per_experience": 10}, "model": {"width": 4}}
    return dict(fednorm.federated(scenario="split_digits", learner="naive", clients=1, rounds=1, config=small))


def _schema(value: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted keys of a document and what stands there; configurations are told elsewhere."""
    for key, inner in value.items():
        name = f"{place}{key}"
        if name == "config":
            yield name, "the resolved configuration, every key"
        elif isinstance(inner, Mapping) and inner and not _is_by_name(name):
            yield from _schema(inner, f"{name}.")
        else:
            yield name, _words(inner)


def _is_by_name(place: str) -> bool:
    """Return whether a table's keys are names of domains, layers or tensors rather than words of the schema."""
    return place.split(".")[-1] in ("per_domain", "evaluation", "sources", "layers", "versions")


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a table by name"
    if isinstance(value, list):
        if value and isinstance(value[0], Mapping):
            return f"a list of tables with {', '.join(value[0])}"
        return f"a list of {_words(value[0])}" if value else "a list"
    return {bool: "true or false", int: "an integer", float: "a number", str: "text", type(None): "null"}[type(value)]
