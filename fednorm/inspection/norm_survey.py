"""The survey of ``fednorm check --norms``: every registered norm on a list of other people's models, a row a norm.

The models are made on the meta device, and so are the steps: they show that shapes and types fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fednorm.cards import NORMS
from fednorm.errors import FedNormError
from fednorm.inspection.model import NormVerdict, check
from fednorm.inspection.strangers import load_model

MODELS = """
    torchvision:resnet18 torchvision:resnet50 torchvision:mobilenet_v2 torchvision:mobilenet_v3_small
    torchvision:densenet121 torchvision:vgg11_bn torchvision:efficientnet_b0 torchvision:convnext_tiny
    torchvision:vit_b_16 torchvision:swin_t timm:resnet26d timm:densenet121 timm:efficientnet_b0 timm:regnety_002
    timm:resnetv2_50d_gn timm:convnext_atto timm:vit_tiny_patch16_224 timm:swin_tiny_patch4_window7_224
"""
"""Of each way to write a normalization one or more: fused with its activation (timm's BatchNormAct2d and GroupNormAct),
as layers of maps, of tokens, and both."""

VALUES_NEEDED = "cannot be called on meta tensors"
"""What PyTorch says where a method looks at a value, as a count of batches, in a step that has none."""

Row = dict[str, Any]


def norm_survey(models: Iterable[str] | None = None, norms: Sequence[str] | None = None) -> Iterator[Row]:
    """Yield a row for each of some models, all of :data:`MODELS` by default.

    Args:
        models: Names as :func:`~fednorm.inspection.strangers.load_model` reads them.
        norms: Names; all that are registered if None.

    Yields:
        ``model``, and ``norms`` by name: ``layers``, ``inserted`` and ``convolutions`` (how many are replaced, put in
        and rebuilt), ``refusal`` and ``failure`` of a step (sentences, empty where there is none).
    """
    for name in MODELS.split() if models is None else models:
        try:
            model = load_model(name, device="meta")
            report = check(model, strategies=["fedavg"], norms=norms or NORMS.names)
        except FedNormError as error:
            yield {"model": name, "error": str(error), "norms": {}}
            continue
        kind = type(model).__name__  # one sentence of many models
        yield {"model": name, "norms": {verdict.name: _about(verdict, kind) for verdict in report.norms}}


def _about(verdict: NormVerdict, kind: str) -> Row:
    failure = "" if verdict.refusal or VALUES_NEEDED in verdict.step.failure else verdict.step.failure
    return {
        "layers": len(verdict.layers),
        "inserted": len(verdict.inserted),
        "convolutions": verdict.convolutions,
        "refusal": verdict.refusal.replace(kind, "model"),
        "failure": failure.replace(kind, "model"),
    }


HEAD = """# Every norm on other people's models

What `fednorm.convert(model, norm)` makes of models of torchvision and timm, for every norm. Made by
`fednorm check --norms --markdown`; [more models](models.md), for fewer norms.

* A number: layers that are replaced. **+ n**: layers that are put in besides, before nonlinearities. **(n)**:
  convolutions that are rebuilt, because the method standardizes their weights or needs their bias.
* **fails**: it is converted, and one step of training does not work; steps are of shapes and types alone here
  (PyTorch's meta device), which three methods that look at a count cannot make.
* A dash is a refusal. The sentences are below.
"""


def norm_page(rows: Iterable[Row]) -> str:
    """Return the survey as a page in Markdown: its table, then what is refused or fails, and why."""
    rows = list(rows)
    norms = list(dict.fromkeys(name for row in rows for name in row["norms"]))
    heads = ("norm", *(row["model"].removeprefix("torchvision:") for row in rows))
    lines = [HEAD, f"| {' | '.join(heads)} |", f"|---|{'--:|' * len(rows)}"]
    for norm in norms:
        mark = " †" if NORMS[norm].reconstruction else ""
        lines.append(f"| {norm}{mark} | {' | '.join(_cell(row['norms'].get(norm)) for row in rows)} |")
    notes = (
        ["", "† has a part that is a reconstruction, unverified.", ""] if any("†" in line for line in lines) else [""]
    )
    return "\n".join([*lines, *notes, "## What is refused or fails, and why", "", *_reasons(rows)])


def _cell(about: Mapping[str, Any] | None) -> str:
    if about is None or about["refusal"]:
        return "–"
    if about["failure"]:
        return "fails"
    parts = [str(about["layers"])]
    parts += [f"+ {about['inserted']}"] * bool(about["inserted"])
    parts += [f"({about['convolutions']})"] * bool(about["convolutions"])
    return " ".join(parts)


def _reasons(rows: Iterable[Row]) -> list[str]:
    """Return a line for each refusal or failure, with the models that it is said of."""
    models: dict[str, list[str]] = {}
    for row in rows:
        said = {norm: about["refusal"] or about["failure"] for norm, about in row["norms"].items()}
        said |= {"no norm": row["error"]} if "error" in row else {}
        for norm, sentence in said.items():
            if sentence:
                models.setdefault(f"**{norm}**: {' '.join(sentence.split())}", []).append(row["model"])
    return [f"* {sentence} ({', '.join(names)})" for sentence, names in models.items()] or ["* Nothing."]
