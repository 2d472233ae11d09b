"""A method's identity card as text: what its file declares, in the order in which somebody wants to know it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fednorm.cards import STRATEGIES
from fednorm.roles import Kind
from fednorm.spec import NormSpec

Row = dict[str, Any]

STRATEGIES_SHOWN: Mapping[str, str] = {"fedavg": "FedAvg", "fedbn": "FedBN", "silobn": "SiloBN"}
"""Strategies under which a norm's card says what becomes of each tensor: share all, keep norms, keep statistics."""

BOUNDARY: Mapping[str, str] = {
    "keep": "kept",
    "reset": "reset",
}
"""What an experience's boundary does with a tensor, in a word or two."""

FACTS: Mapping[str, tuple[str, str]] = {
    "normalizes": ("its layers normalize activations", "no layer normalizes activations"),
    "scale_invariant": (
        "the scale of the weight before it does not matter",
        "the scale of the weight before it matters",
    ),
    "batch_coupled": ("in training a sample's output depends on its batch", "every sample for itself"),
    "coupled_in_evaluation": ("in evaluation too", ""),
    "train_eval_differ": ("evaluation computes something else than training", "evaluation computes what training does"),
    "exact_backward": ("", "the backward pass is not the derivative of the forward pass"),
    "has_momentum": ("train.momentum is its momentum", ""),
    "adaptive": ("the step's length does not grow with the gradient", ""),
    "personalised": ("each client is tested with a model of its own", ""),
    "pooled": ("one client has the images of all", ""),
    "statistics": ("it takes a network with running statistics", ""),
    "joint": ("is given all experiences at once", ""),
}
"""What a card's facts mean, where they are so and where not; empty for what goes without saying."""


def roles_of_tensors(card: NormSpec) -> dict[str, dict[str, str]]:
    """Return, for each tensor of a norm, its role under each of :data:`STRATEGIES_SHOWN`."""
    rules = {name: STRATEGIES[name].make.rule for name in STRATEGIES_SHOWN}
    return {
        key: {name: rule[tensor.kind].value for name, rule in rules.items()} for key, tensor in card.tensors.items()
    }


def roles_of_kinds(rule: Any) -> dict[str, str]:
    """Return the kinds to which a strategy's rule gives another role than shared."""
    return {kind.value: rule[kind].value for kind in Kind if kind in rule.roles}


def text_of(card: Row) -> str:
    """Return a card, or a section of the configuration, as lines."""
    lines = [f"{card['name']} ({card['what']})", "", card.get("about") or card["summary"], ""]
    lines += _identity(card)
    return "\n".join(lines).strip()


def _identity(card: Row) -> Iterator[str]:
    if "citation" in card:
        yield f"In short: {card['summary']}"
    if card.get("reconstruction"):
        yield f"Reconstruction, unverified: {card['reconstruction']}"
    if card.get("citation"):
        yield f"Paper: {cited(card['citation'])}"
    if card.get("options"):
        yield "Options: " + ", ".join(f"{key} = {value}" for key, value in card["options"].items())
    facts = [told for name, pair in FACTS.items() if name in card and (told := pair[0 if card[name] else 1])]
    if facts:
        yield f"Facts: {'; '.join(facts)}."
    yield from _tensors(card)
    if card.get("roles"):
        yield "Roles: " + ", ".join(f"{kind} {role}" for kind, role in card["roles"].items()) + "; all else shared"
    if card.get("defaults"):
        yield f"Brings along: {card['defaults']}"
    yield from (f"Differs: {deviation}" for deviation in card.get("deviations", []))
    yield from (f"Verified: {verified}" for verified in card.get("verified", []))
    if "verified" in card and not card["verified"]:
        yield "Verified: by its family's contract alone."
    if card.get("note"):
        yield card["note"]


def cited(citation: Mapping[str, Any]) -> str:
    """Return a citation as a line."""
    parts = [citation["authors"], citation["title"], citation["where"], str(citation["year"])]
    arxiv = f" https://arxiv.org/abs/{citation['arxiv']}" if citation["arxiv"] else ""
    return ". ".join(part.rstrip(".") for part in parts if part) + f".{arxiv}"


def _tensors(card: Row) -> Iterator[str]:
    if "tensors" not in card:
        return
    if not card["tensors"]:
        yield "Tensors: none of its own."
        return
    for key, tensor in card["tensors"].items():
        roles = ", ".join(f"{title} {tensor['roles'][name]}" for name, title in STRATEGIES_SHOWN.items())
        yield f"Tensor {key}: {tensor['kind']}; {roles}; at a boundary {BOUNDARY.get(tensor['carry'], tensor['carry'])}"
