"""A page a card, and the table of all norms: everything from the methods' own files."""

from __future__ import annotations

import dataclasses
import sys
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from typing import Any

from _make import prose
from _make.blocks import DOCS
from _make.readme import built_in, file_of
from _make.results import costs
from fednorm.cards import FAMILIES, NORMS, STRATEGIES, Card, Option
from fednorm.federation.strategy import NormStrategy
from fednorm.roles import RoleRule
from fednorm.spec import NormSpec

RULES = ("fedavg", "fedbn", "silobn")
"""Strategies whose rules a norm's page shows its tensors under."""

LEADS: Mapping[str, str] = {
    "norms": "What stands after a convolution or a linear layer, or is done to its weight.",
    "strategies": "What a federation shares, and what stays on its clients.",
    "models": "Networks that are given a norm. Any of torchvision's, timm's or your own is one too.",
    "data": "What the domains are made of. Your own arrays, folders and datasets are data too.",
    "scenarios": "Streams of experiences.",
    "learners": "What trains on an experience.",
    "optimizers": "Of a client's or learner's steps.",
    "adaptations": "How a finished network goes on adapting to the unlabelled images that it is tested on.",
}
FACTS = ("predicts", "made", "input_size", "min_size", "width", "personalised", "pooled", "data", "note")


def pages() -> Iterator[tuple[str, str]]:
    """Yield the path, below the documentation's folder, and the text of every page that cards make."""
    for plural in FAMILIES:
        cards = built_in(plural)
        yield f"methods/{plural}/index.md", _index(plural, cards)
        for card in cards:
            yield f"methods/{plural}/{card.name}.md", page(plural, card)


def page(plural: str, card: Card) -> str:
    """Return a card's page: formula, text, paper, tensors, options, deviations, verification."""
    parts = [
        f"# {card.name}",
        prose.text(card.summary),
        _reconstruction(card),
        _formula(plural, card),
        *_figure(plural, card),
        _paper(card),
        _about(card),
        *(_tensors(card) if isinstance(card, NormSpec) else []),
        _options(plural, card),
        _facts(card),
        _list("Where we differ", card.deviations),
        _list("How it was verified", card.verified),
        f"Its file: [`{file_of(card)}`](../../../{file_of(card)}). On the command line: `fednorm explain {card.name}`.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _index(plural: str, cards: list[Card]) -> str:
    names = "\n".join(card.name for card in cards)
    rows = ["| | |", "| --- | --- |"]
    rows += [f"| [{card.name}]({card.name}.md) | {cell(card.summary)} |" for card in cards]
    table = norm_table() if plural == "norms" else "\n".join(rows)
    return f"# {plural.capitalize()}\n\n{LEADS[plural]}\n\n{table}\n\n```{{toctree}}\n:hidden:\n\n{names}\n```\n"


# Parts of a page ------------------------------------------------------------------------------------------------------


@cache
def formulas() -> Mapping[str, Mapping[str, str]]:
    """Return the formulas in LaTeX by family and name, as docs/methods/formulas.toml has them."""
    return tomllib.loads((DOCS / "methods/formulas.toml").read_text(encoding="utf-8"))


def _formula(plural: str, card: Card) -> str:
    latex = formulas().get(plural, {}).get(card.name, "").strip()
    return f"```{{math}}\n{latex}\n```" if latex else ""


def _figure(plural: str, card: Card) -> list[str]:
    if plural != "norms":
        return []
    about = (
        "Two domains, of which the second has another mean and spread in every channel, behind a convolution and this "
        "norm: a mixed batch in training, and the same batch in evaluation, as it is and after twenty training batches."
    )
    return [f"```{{figure}} ../../_made/norms/{card.name}.svg\n:alt: Distributions of activations\n\n{about}\n```"]


def _reconstruction(card: Card) -> str:
    if not card.reconstruction:
        return ""
    return f":::{{warning}}\n**Reconstruction, unverified.** {prose.text(card.reconstruction)}\n:::"


def _paper(card: Card) -> str:
    cited = card.citation
    if cited is None or (cited.arxiv and cited.arxiv in _docstring(card)):  # which cites it, and says more
        return ""
    at = ", ".join(part for part in (cited.where, str(cited.year)) if part)
    arxiv = f" [arXiv {cited.arxiv}](https://arxiv.org/abs/{cited.arxiv})." if cited.arxiv else ""
    return f"**Paper.** {prose.text(cited.authors)}. *{prose.text(cited.title)}*. {at}.{arxiv}"


def _about(card: Card) -> str:
    return prose.markdown(_docstring(card))


def _docstring(card: Card) -> str:
    module = sys.modules.get(card.origin) or import_module(card.origin)
    return module.__doc__ or ""


def rules() -> dict[str, RoleRule]:
    """Return the rules of the strategies in :data:`RULES`."""
    made = {name: STRATEGIES[name].make for name in RULES}
    assert all(issubclass(cls, NormStrategy) for cls in made.values())
    return {name: cls.rule for name, cls in made.items()}


def _tensors(card: NormSpec) -> list[str]:
    if not card.tensors:
        return ["## Tensors", "None: a network with this norm has no tensor of a normalization layer."]
    by_rule = rules()
    heads = ("tensor", "kind", "at an experience's boundary", *by_rule)
    rows = [_row(heads), _row(["---"] * len(heads))]
    for name, tensor in card.tensors.items():
        roles = (str(rule[tensor.kind]) for rule in by_rule.values())
        rows.append(_row([f"`{name}`", str(tensor.kind), str(tensor.carry), *roles]))
    about = "What each tensor is, and its role in a federation under three strategies."
    return ["## Tensors", about, "\n".join(rows)]


def _options(plural: str, card: Card) -> str:
    if not card.declared:
        return ""
    section = {"norms": "norm", "strategies": "strategy", "models": "model", "scenarios": "scenario"}.get(plural)
    section = section or {"learners": "learner", "data": "data", "optimizers": "train", "adaptations": ""}[plural]
    meanings = option_meanings(card)
    rows = [_row(("option", "type", "default", "")), _row(["---"] * 4)]
    for option in card.declared.values():
        rows.append(_row([f"`{option.name}`", type_of(option), code(option.default), cell(meanings[option.name])]))
    where = f"Keys of the section `[{section}]`" if section else "Keys of a table in `evaluate.adaptation`"
    return f"## Options\n\n{where}.\n\n" + "\n".join(rows)


def option_meanings(card: Card) -> dict[str, str]:
    """Return what each option means, as the docstrings of what the card makes say; empty where they do not."""
    told: dict[str, str] = {}
    maker = card.maker
    for cls in reversed(getattr(maker, "__mro__", (maker,))):
        told |= arguments(cls.__doc__ or "")
        if "__init__" in vars(cls):
            told |= arguments(cls.__init__.__doc__ or "")
    return {name: told.get(name, "") for name in card.declared}


def arguments(docstring: str) -> dict[str, str]:
    """Return the entries of a docstring's Attributes and Args."""
    import inspect
    import re

    found: dict[str, str] = {}
    name, within = "", False
    for line in inspect.cleandoc(docstring).split("\n"):
        if line in ("Args:", "Attributes:"):
            within = True
        elif line and not line.startswith(" "):
            within = False
        elif within and (entry := re.match(r"    (\w+)(?: \([^)]*\))?: (.*)", line)):
            name = entry[1]
            found[name] = entry[2]
        elif within and name and line.strip():
            found[name] += f" {line.strip()}"
    return found


def _facts(card: Card) -> str:
    rows = []
    fields = {field.name for field in dataclasses.fields(card)}
    for name in FACTS:
        value = getattr(card, name) if name in fields else None
        if value not in (None, "", (), False, 0) and not callable(value):
            rows.append(f"* {name.replace('_', ' ')}: {prose.text(str(_shown(value)))}")
    defaults = getattr(card, "defaults", None)
    if defaults:
        rows.append(f"* brings along: `{dict(defaults)}`")
    if isinstance(card, NormSpec):
        rows += [
            f"* batch-coupled: {_yes(card.batch_coupled)}",
            f"* train = eval: {_yes(not card.train_eval_differ)}",
            f"* scale-invariant: {_yes(card.scale_invariant)}",
        ]
    return "## Facts\n\n" + "\n".join(rows) if rows else ""


def _shown(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else value


def _list(title: str, sentences: tuple[str, ...]) -> str:
    return f"## {title}\n\n" + "\n".join(f"* {prose.text(s)}" for s in sentences) if sentences else ""


# The table of all norms -----------------------------------------------------------------------------------------------


def norm_table() -> str:
    """Return the overview of all norms: state, facts, roles, cost."""
    ratios = cost_ratios()
    heads = (
        "norm",
        "statistics it keeps",
        "batch-coupled",
        "train = eval",
        "scale-invariant",
        "local under fedbn",
        "local under silobn",
        "cost on maps",
        "cost on tokens",
        "paper",
    )
    rows = [_row(heads), _row(["---"] * len(heads))]
    for card in NORMS_BUILT_IN():
        rows.append(_row(_facts_of(card, ratios)))
    notes = (
        "Statistics: kinds of tensors that are estimated from data. Local: kinds that stay on the client under the "
        "strategy's rule; all others are shared. Cost: time of a forward and backward pass for a batch of "
        f"{COSTED}, on maps beside nn.BatchNorm2d (with a convolution where the method changes its weight), on tokens "
        "beside nn.LayerNorm (softmax attention for an attention), from [the measured "
        "table](../../trust/speed.md#every-norm); – has no layer there. "
        "† has a part that is a reconstruction, unverified."
    )
    return "\n".join(rows) + f"\n\n{notes}"


def NORMS_BUILT_IN() -> list[NormSpec]:
    """Return the norms that ship."""
    return [NORMS[name] for name in NORMS.built_in]


def _facts_of(card: NormSpec, ratios: Mapping[str, Mapping[str, str]]) -> list[str]:
    from fednorm.roles import STATISTICS, Role

    kinds = list(dict.fromkeys(tensor.kind for tensor in card.tensors.values()))
    local = {
        name: ", ".join(str(kind) for kind in kinds if rule[kind] is Role.LOCAL) or "–"
        for name, rule in rules().items()
    }
    cited = card.citation
    paper = "–"
    if cited is not None:
        paper = f"[{cited.arxiv}](https://arxiv.org/abs/{cited.arxiv})" if cited.arxiv else str(cited.year)
    return [
        f"[{card.name}]({card.name}.md){' †' if card.reconstruction else ''}",
        ", ".join(str(kind) for kind in kinds if kind in STATISTICS) or "none",
        _yes(card.batch_coupled),
        _yes(not card.train_eval_differ),
        _yes(card.scale_invariant),
        local["fedbn"],
        local["silobn"],
        *(ratios[kind].get(card.name, "–") for kind in ("maps", "tokens")),
        paper,
    ]


COSTED = 32
"""The batch for which the table of norms tells costs."""


def cost_ratios() -> dict[str, dict[str, str]]:
    """Return the time of a layer to that of PyTorch's own, by kind of input and norm, as it was measured."""
    cases = [case for case in costs()["cases"] if case["batch"] == COSTED]
    return {
        case["kind"]: {name: f"{cost['time_ratio']:.1f}×" for name, cost in case["norms"].items()} for case in cases
    }


# Cells ----------------------------------------------------------------------------------------------------------------


def cell(text: str) -> str:
    """Return text as a cell of a Markdown table."""
    return prose.text(text).replace("|", "\\|")


def code(value: Any) -> str:
    """Return a value as code in a cell."""
    return "–" if value in ("", (), None) else f"`{str(value).replace('|', chr(92) + '|')}`"


def type_of(option: Option) -> str:
    """Return an option's type as a reader writes it."""
    kind = option.type
    name = getattr(kind, "__name__", None) if isinstance(kind, type) else None
    return cell(name or str(kind).replace("typing.", ""))


def _row(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"
