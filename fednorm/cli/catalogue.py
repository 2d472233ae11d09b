"""``fednorm explain``: what a method is, from its own card."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from importlib import import_module
from typing import Any

from fednorm.cards import FAMILIES, Card, is_path
from fednorm.cli.console import out, print_json
from fednorm.cli.explain import explained
from fednorm.cli.identity import roles_of_kinds, roles_of_tensors, text_of
from fednorm.errors import ConfigError, FedNormError, canonical
from fednorm.federation.spec import StrategySpec
from fednorm.spec import NormSpec
from fednorm.streams.learner import LearnerSpec

Row = dict[str, Any]


def run_explain(name: str, *, as_json: bool) -> None:
    """Explain one name, wherever it is registered, or what an import path names."""
    if explained(name, as_json=as_json):
        return None
    found = _described(name)
    if as_json:
        return print_json(found)
    out().print(text_of(found), markup=False, soft_wrap=True)
    return None


def _described(name: str) -> Row:
    """Return what the first family that has a name says of it."""
    if is_path(name):
        return _of_path(name)
    for family in FAMILIES.values():
        if canonical(name) in family.names:
            return _card(family.noun, family[name])
    raise AssertionError(name)  # fednorm.cli.explain has refused it


def _of_path(name: str) -> Row:
    reasons = []
    for family in FAMILIES.values():
        try:
            return _card(family.noun, family[name])
        except FedNormError as error:
            reasons.append(str(error))
    raise ConfigError(reasons[0])


def _card(what: str, card: Card) -> Row:
    """Return everything that a card declares, as plain values."""
    citation = dataclasses.asdict(card.citation) if card.citation else None
    named = {"what": what, "name": card.name, "summary": card.summary, "citation": citation}
    rest = {field.name: getattr(card, field.name) for field in dataclasses.fields(card) if field.name not in named}
    facts = {key: _plain(value) for key, value in rest.items() if key not in ("make", "load", "layers", "origin")}
    if isinstance(card, NormSpec):
        facts["tensors"] = {
            key: {**facts["tensors"][key], "roles": roles} for key, roles in roles_of_tensors(card).items()
        }
    elif isinstance(card, StrategySpec):
        facts["roles"] = roles_of_kinds(card.make.rule)
    return {**named, "options": _plain(card.options), "about": _about(card), **facts}


def _about(card: Card) -> str:
    """Return the text at the head of the method's file, and that of its options' records."""
    module = sys.modules.get(card.origin) or import_module(card.origin)
    about = [inspect.cleandoc(module.__doc__ or "")]
    if isinstance(card, LearnerSpec):
        # A record of options documents its own and leaves the rest to the one that it extends.
        records = [cls for cls in reversed(card.maker.__mro__) if dataclasses.is_dataclass(cls) and card.declared]
        about += [inspect.getdoc(record) or "" for record in records if dataclasses.fields(record)]
    return "\n\n".join(about).strip()


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, type):
        return value.__name__
    if hasattr(value, "items"):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list | frozenset) else value
