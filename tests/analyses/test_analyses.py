"""The analyses: what each measures, on networks whose answer is known; and the documents and tables of all."""

from __future__ import annotations

import json
from functools import partial
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fednorm.analyses import ANALYSES, Setup, analyse, effective_rate, linear_probe, massive_activations, norm_only
from fednorm.analyses.analysis import Analysis, Column, Row
from fednorm.analyses.residual_stream import variances
from fednorm.analyses.trial import Images, Trial
from fednorm.errors import ConfigError, UnknownNameError
from fednorm.models import make_model
from fednorm.norms import make_norm
from fednorm.norms.residual_scale import ScaledResidual

SMALL: dict[str, Any] = {
    "model": {"name": "digits_cnn", "width": 4},
    "data": {"train_per_client": 16, "test_per_domain": 8},
    "train": {"batch_size": 8},
}


def images(*shape: int) -> Images:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator), torch.zeros(shape[0], dtype=torch.int64)


# What is measured ----------------------------------------------------------------------------------------------------


def test_a_turn_is_the_distance_of_two_directions() -> None:
    before = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    assert effective_rate.turn(before, 7 * before) == pytest.approx(0, abs=1e-12)
    assert effective_rate.turn(before, torch.tensor([[-4.0, 3.0]], dtype=torch.float64)) == pytest.approx(2**0.5)
    assert effective_rate.turn(before, -before) == pytest.approx(2)


def test_an_unprojected_weight_grows_and_a_projected_one_does_not() -> None:
    rows = list(effective_rate.rows(Setup(), 2))
    plain, projected = (next(row for row in rows if row.name == name) for name in ("sgd", "sgd, projected (NaP)"))
    free, held = plain.measure(1), projected.measure(1)
    assert free["growth"] > 1.002
    assert held["growth"] == pytest.approx(1, abs=1e-5)
    assert held["rate_last"] == pytest.approx(held["rate_first"], rel=1e-5)
    # The rate is lr / ||w||^2 at both ends, of one and the same first weights.
    assert free["rate_last"] == pytest.approx(free["rate_first"] / free["growth"] ** 2)
    assert free["rate_first"] == held["rate_first"]
    assert free["turn_first"] == pytest.approx(held["turn_first"], rel=1e-4)


class Chain(nn.Module):
    """n branches that are the identity, each scaled by lambda: every one multiplies the stream by 1 + lambda."""

    def __init__(self, branches: int, scale: float) -> None:
        super().__init__()
        self.sums = nn.ModuleList(ScaledResidual(scale) for _ in range(branches))

    def forward(self, h: Tensor) -> Tensor:
        for residual in self.sums:
            h = residual(h, h)
        return h


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.25])
def test_variances_of_a_stream_are_those_of_the_formula(scale: float) -> None:
    found = variances(Chain(4, scale), images(64, 5, 7))
    assert len(found) == 5
    assert [value / found[0] for value in found] == pytest.approx([(1 + scale) ** (2 * n) for n in range(5)], rel=1e-5)


def test_random_weights_are_two_of_every_filter() -> None:
    model = make_model("resnet18", make_norm("batch_norm"), num_classes=5, width=4, seed=1)
    masks, again, other = (norm_only.random_masks(model, seed) for seed in (1, 1, 2))
    convolutions = {f"{path}.weight" for path, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert masks.keys() == convolutions
    for key, mask in masks.items():
        assert set(mask.unique().tolist()) == {0.0, 1.0}
        assert mask.flatten(1).sum(1).tolist() == [2.0] * len(mask)
        assert torch.equal(mask, again[key])
    assert any(not torch.equal(mask, other[key]) for key, mask in masks.items())
    # As many numbers as batch normalization trains, layer by layer.
    scales = sum(p.numel() for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    assert sum(mask.sum().item() for mask in masks.values()) == scales
    assert {"head.weight", "head.bias"} & {
        key.replace("fc.", "head.") for key in norm_only.random_masks(model, 1, head=True)
    }


def test_only_the_chosen_weights_move() -> None:
    trial = Trial(Setup(), 1, {**SMALL, "model": {"name": "resnet18", "width": 4}, "norm": {"name": "batch_norm"}})
    masks = norm_only.random_masks(trial.model, 1)
    before = {key: p.detach().clone() for key, p in trial.model.named_parameters()}
    trial.fit(2, trial.images("train"), adjust=(partial(norm_only.keep_only, trial.model, masks),))
    for key, parameter in trial.model.named_parameters():
        moved = parameter.detach() != before[key]
        assert not (moved & (masks.get(key, torch.zeros(())) == 0)).any(), key
        assert bool(moved.any()) == (key in masks), key


@pytest.mark.slow
def test_a_probe_moves_no_feature_and_fine_tuning_does() -> None:
    rows = {row.name: row for row in linear_probe.rows(Setup(), 2)}
    probe, tuned = rows["linear probe"].measure(1), rows["fine-tuning"].measure(1)
    assert probe["moved"] == 0
    assert tuned["moved"] > 0
    assert probe["head_first"] == tuned["head_first"] == tuned["head_probed"] != tuned["head_last"]
    assert probe["head_probed"] == probe["head_last"] != probe["head_first"]


def test_features_are_what_the_head_is_given() -> None:
    model = make_model("mlp", make_norm("batch_norm"), num_classes=5, width=8, seed=1).eval()
    data = images(6, 3, 32, 32)
    features = linear_probe.features_of(model, data)
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    torch.testing.assert_close(head(features.float()), model(data[0]))


class Blocks(nn.Module):
    """Three blocks, of which the second makes one entry large."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Identity(), Spike(), nn.ReLU())

    def forward(self, h: Tensor) -> Tensor:
        outputs: Tensor = self.blocks(h)
        return outputs


class Spike(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        h = torch.full_like(h, 0.5)
        h[0, 0, 0] = -60.0
        return h


def test_the_largest_activation_is_told_against_the_median() -> None:
    assert massive_activations.largest(Blocks(), (torch.ones(2, 3, 4), torch.zeros(2))) == (120.0, 60.0, 2)


# Documents and tables ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_document_is_plain_and_its_table_has_means_and_deviations() -> None:
    setup = Setup(seeds=(1, 2))
    told: list[str] = []
    document = analyse("linear-probe", Setup(seeds=(1, 2), steps=1), on_line=told.append)
    assert json.loads(json.dumps(document)) == document
    assert (document["seeds"], document["steps"], len(told)) == (list(setup.seeds), 1, 3)
    table = ANALYSES["linear_probe"].table(document)
    scores = [100 * value for value in document["rows"][0]["values"]["accuracy"]]
    assert table.rows[0][table.columns.index("test accuracy (%)")] == f"{mean(scores):.1f} ± {stdev(scores):.1f}"
    assert any(note.startswith("1 steps, seeds 1, 2 (n = 2)") for note in table.notes)
    assert analyse("linear_probe", Setup(seeds=(2,), steps=1))["rows"][1]["values"] == {
        key: values[1:] for key, values in document["rows"][1]["values"].items()
    }


def test_cells() -> None:
    assert Column("a", "A", ".1f", 100).cell([0.5, 0.7]) == "60.0 ± 14.1"
    assert Column("a", "A", ".1f", 100).cell([0.5]) == "50.0"
    assert Column("a", "A").cell([None]) == "–"


def test_what_is_not_finite_is_not_a_number_of_the_document() -> None:
    row = Row("diverged", lambda seed: {"a": float("nan"), "b": float(seed)})
    columns = (Column("a", "A"), Column("b", "B", ".0f"))
    made = Analysis(
        name="own", title="T", about="Q?", papers=(), columns=columns, notes=(), steps=1, rows=lambda *_: iter([row])
    )
    document = made.run(Setup(seeds=(3,)), lambda _: None)
    assert document["rows"] == [{"name": "diverged", "values": {"a": [None], "b": [3.0]}}]
    assert made.table(document).rows == (("diverged", "–", "3"),)


@pytest.mark.slow
@pytest.mark.parametrize("name", ANALYSES)
def test_every_analysis_runs_and_repeats_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_only, "RATES", (0.03,))
    setup = Setup(seeds=(1,), steps=1)
    document = analyse(name, setup)
    assert json.loads(json.dumps(document)) == document
    assert (
        len(ANALYSES[name].table(document).rows) == len(document["rows"]) == len({r["name"] for r in document["rows"]})
    )
    for row in document["rows"]:
        assert row["values"].keys() == {column.key for column in ANALYSES[name].columns}
        assert all(len(values) == 1 for values in row["values"].values())
    assert analyse(name, setup) == document


def test_mistakes_are_told_in_words() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'norm_only'"):
        analyse("norm_onyl", Setup())
    with pytest.raises(ConfigError, match="seeds are one or more different numbers"):
        Setup(seeds=(1, 1))
    with pytest.raises(ConfigError, match="steps must be at least 1"):
        Setup(steps=-1)
