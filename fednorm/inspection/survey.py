"""The survey of ``fednorm check --all``: torchvision's classifiers and many of timm's, on the meta device.

No values are computed: a step shows that shapes and types fit, not what it learns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from fednorm.errors import FedNormError
from fednorm.inspection.model import ModelReport, check
from fednorm.inspection.strangers import load_model
from fednorm.models._zoo import torchvision_names

STRATEGIES = ("fedavg", "fedbn", "silobn")
"""Strategies with a plan of their own; the server optimizers, FedProx and FedWon have FedAvg's."""

NORMS = ("batch_norm", "group_norm", "sws")
"""A norm with running statistics, one without, and one in the weights."""

TIMM = """
    beit_base_patch16_224 caformer_s18 cait_xxs24_224 coat_mini coatnet_nano_rw_224 convformer_s18 convit_tiny
    convmixer_768_32 convnext_atto convnextv2_atto cpubone_s0 crossvit_tiny_240 csatv2 cspnext_tiny darknet17
    davit_tiny deit3_small_patch16_224 deit_tiny_patch16_224 densenet121 dla34 dpn68 edgenext_xx_small
    efficientformer_l1 efficientformerv2_s0 efficientnet_b0 efficientvim_m1 efficientvit_b0 efficientvit_m0
    eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 flexivit_small focalnet_tiny_lrf gcvit_xxtiny ghostnet_050
    ghostnetv2_100 ghostnetv3_050 gmixer_24_224 gmlp_s16_224 halonet26t hardcorenas_a hgnet_tiny hgnetv2_b0
    hiera_tiny_224 hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v4 lcnet_050
    lcnetv2_small legacy_seresnet18 legacy_xception levit_128s lowformer_b0 mambaout_femto maxvit_nano_rw_256
    mixer_s32_224 mnasnet_small mobilenetv2_035 mobilenetv3_small_050 mobilenetv4_conv_small mobileone_s0
    mobilevit_xxs mobilevitv2_050 mvitv2_tiny nest_tiny nextvit_small nf_resnet26 nfnet_f0 pit_ti_224 poolformer_s12
    pvt_v2_b0 rdnet_tiny regnetx_002 regnety_002 repghostnet_050 repvgg_b0 repvit_m0_9 res2net50_26w_4s
    resmlp_12_224 resnest14d resnet26 resnet26d resnetblur18 resnetv2_18 resnetv2_50d_gn resnext26ts rexnet_100
    samvit_base_patch16 selecsls42 sequencer2d_s seresnet18 seresnext26t_32x4d shvit_s1 skresnet18 starnet_s050
    swiftformer_xs swin_s3_tiny_224 swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 swinv2_tiny_window8_256
    tf_efficientnet_b0 tiny_vit_5m_224 tinynet_e tnt_s_patch16_224 tresnet_m twins_svt_small visformer_tiny
    vit_relpos_small_patch16_224 vit_tiny_patch16_224 vitamin_small_224 volo_d1_224 vovnet39a xception41
    xcit_nano_12_p16_224
"""
"""One of each of timm's families, and some more."""

Row = dict[str, Any]


def surveyed() -> list[str]:
    """Return the names of the survey's models."""
    return [f"torchvision:{name}" for name in torchvision_names()] + [f"timm:{name}" for name in TIMM.split()]


def survey(names: Iterable[str] | None = None, *, steps: bool = True) -> Iterator[Row]:
    """Yield a row for each of some models, all of the survey's by default; see :func:`check_row`."""
    for name in surveyed() if names is None else names:
        yield check_row(name, steps=steps)


def check_row(name: str, *, steps: bool = True) -> Row:
    """Check one model on the meta device.

    Returns:
        ``model``, ``parameters``, ``layers`` (normalization layers by class), ``fedavg`` (entries that are averaged),
        ``constant``, ``fedbn`` and ``silobn`` (entries that stay local), and a number of layers replaced for each norm;
        None where it is refused. ``refusals``: what each refusal says. ``failures``: what each step that failed says.
    """
    try:
        model = load_model(name, device="meta")
        report = check(model, strategies=STRATEGIES, norms=NORMS, steps=steps)
    except FedNormError as error:
        return {"model": name, "error": str(error)}
    row = {
        "model": name,
        "parameters": report.parameters,
        "layers": {kind: count for kind, (count, _) in report.layers.items()},
        "constant": max((v.plan.get("constant", 0) for v in report.strategies if v.plan is not None), default=0),
        **_plans(report),
        **{v.name: None if v.refusal else len(v.layers) for v in report.norms},
        "refusals": {
            verdict: sentence.replace(type(model).__name__, "model")  # one sentence of many models
            for verdict, sentence in _sentences(report)
        },
    }
    if steps:
        failures = {v.name: v.step.failure for v in report.norms if not v.refusal and not v.step.ok}
        row["failures"] = failures if report.step.ok else {"the model itself": report.step.failure}
    return row


def _sentences(report: ModelReport) -> Iterator[tuple[str, str]]:
    yield from ((verdict.name, verdict.refusal) for verdict in report.strategies if verdict.refusal)
    yield from ((verdict.name, verdict.refusal) for verdict in report.norms if verdict.refusal)


def _plans(report: ModelReport) -> dict[str, int | None]:
    counted = {v.name: None if v.plan is None else v.plan for v in report.strategies}
    shown = {"fedavg": "shared", "fedbn": "local", "silobn": "local"}
    return {name: None if plan is None else plan[shown[name]] for name, plan in counted.items()}


COLUMNS = ("fedavg", "constant", "fedbn", "silobn", *NORMS)

HEAD = """# Models that are not ours

What strategies and conversions make of torchvision's classifiers and of some of timm's, one of each family and more.
Made by `fednorm check --all --markdown`; `fednorm check MODEL` says the same of one model, for every strategy and every
norm, with all sentences, and with steps of training on random values.

* **fedavg**: entries of the state dict that are sent and averaged. **constant**: entries that training never writes;
  they are never sent. **fedbn**, **silobn**: entries that stay on the client.
* **batch_norm**, **group_norm**, **sws**: how many layers `fednorm.convert(model, …)` replaces.
* **step**: which step of training fails, of the model itself or converted; steps are of shapes and types alone here
  (PyTorch's meta device).
* A dash is a refusal; the sentences are below.
"""


def markdown_page(rows: Iterable[Row]) -> str:
    """Return the survey as a page in Markdown: its table, then what was refused and why."""
    rows = list(rows)
    heads = ("model", "parameters", "normalization layers", *COLUMNS, "step")
    lines = [HEAD, f"| {' | '.join(heads)} |", f"|---|--:|---|{'--:|' * len(COLUMNS)}---|", *map(markdown_row, rows)]
    return "\n".join([*lines, "", "## What is refused or fails, and why", "", *_reasons(rows)])


def markdown_row(row: Row) -> str:
    """Return one line of the table."""
    if "error" in row:
        return f"| {_cell(row['model'])} | | {_cell(row['error'])} |{' |' * (len(COLUMNS) + 1)}"
    layers = ", ".join(f"{count} {_cell(kind)}" for kind, count in row["layers"].items()) or "none"
    cells = ["–" if row[key] is None else str(row[key]) for key in COLUMNS]
    step = "not run" if "failures" not in row else ", ".join(f"fails: {name}" for name in row["failures"]) or "works"
    return f"| {_cell(row['model'])} | {row['parameters']:,} | {layers} | {' | '.join(cells)} | {step} |"


def _cell(text: str) -> str:
    """Return text that stays in its cell."""
    return " ".join(text.split()).replace("|", "\\|")


def _reasons(rows: Iterable[Row]) -> list[str]:
    """Return a line for each refusal or failure, with the models that it is said of."""
    models: dict[str, list[str]] = {}
    for row in rows:
        for name, sentence in (*row.get("refusals", {}).items(), *row.get("failures", {}).items()):
            models.setdefault(f"**{name}**: {sentence}", []).append(row["model"])
    return [f"* {sentence} ({', '.join(names)})" for sentence, names in models.items()]
