"""Tables of continual results: every cell is one that the test writes out from the numbers it put in."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fednorm.report._common import evenly, name_of
from fednorm.report.stream_table import (
    average_table,
    drift_table,
    matrix_table,
    plasticity_table,
    stream_table,
)

Make = Callable[..., dict[str, Any]]
ADAB2N = {"name": "adab2n", "kappa": 0.4, "lambd": 0.01}


def test_one_seed_is_shown_without_an_interval(stream_result: Make) -> None:
    table = stream_table([stream_result(norm=ADAB2N)])
    assert table.title == "Accuracy (%): Split CIFAR-10 (5×2)"
    assert table.columns == (
        *("method", "average accuracy", "average incremental", "forgetting (max − last)", "forgetting (first − last)"),
        *("online accuracy", "train accuracy", "drift", "seconds"),
    )
    row = ("er_ace + adab2n (kappa=0.4, lambd=0.01)", "54.1", "61.2", "25.0", "20.5", "70.0", "90.0", "0.457", "34")
    assert table.rows == (row,)
    first, meanings, *rest = table.notes
    assert first == "Seed 1 (one seed, no interval); after the last experience, test images; wall clock."
    assert meanings.startswith("Forgetting: percentage points, mean over all experiences but the last; online: ")
    assert rest == [
        "Settings: digits_cnn, sgd, lr 0.03, batch 10, 1 epoch.",
        "er_ace, where its name does not tell: memory_size 500, passes joint, recalibrate false.",
        "A note.",
    ]


def test_several_seeds_get_mean_and_standard_deviation(stream_result: Make) -> None:
    scores, drifts = [0.5, 0.55, 0.63], [0.1, 0.25, 0.7]
    results = [
        stream_result(config={"seed": seed}, final={"average_accuracy": score, "drift": drift}, seconds=10.0 * seed)
        for seed, score, drift in zip((3, 1, 2), scores, drifts, strict=True)
    ]
    table = stream_table(results)
    (row,) = table.rows
    assert row[:2] == ("er_ace + batch_norm", f"{100 * np.mean(scores):.1f} ± {100 * np.std(scores, ddof=1):.1f}")
    assert row[2] == "61.2 ± 0.0"
    assert row[-2:] == (f"{np.mean(drifts):.3g} ± {np.std(drifts, ddof=1):.3g}", "20")
    assert table.notes[0].startswith("Seed 1, 2, 3 (n = 3 seeds, mean ± standard deviation); after the last")


def test_methods_with_fewer_seeds_are_said(stream_result: Make) -> None:
    results = [stream_result(), stream_result(norm=ADAB2N), stream_result(norm=ADAB2N, config={"seed": 2})]
    table = stream_table(results)
    assert [row[1] for row in table.rows] == ["54.1", "54.1 ± 0.0"]
    assert "(n = 1 to 2 seeds, mean ± standard deviation where n > 1)" in table.notes[0]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({}, "er_ace + batch_norm"),
        ({"learner": {"passes": "separate"}}, "er_ace + batch_norm (passes=separate)"),
        (
            {"learner": {"recalibrate": True}, "norm": {"name": "adab2n", "corrected": True, "kappa": 1.0}},
            "er_ace + adab2n (recalibrate, corrected, kappa=1)",
        ),
        (
            {"learner": {"name": "naive"}, "norm": {"name": "continual_norm", "affine": False}},
            "naive + continual_norm (affine=false)",
        ),
        (
            {"learner": {"name": "naive"}, "config": {"train": {"project": True, "l2_init": 1e-4}}},
            "naive + batch_norm (project, l2_init=0.0001)",
        ),
        ({"config": {"model": {"activation": "leaky_relu"}}}, "er_ace + batch_norm (activation=leaky_relu)"),
        ({"config": {"train": {"shrink": 0.9, "perturb": 0.01, "weight_decay": 0.1}}},
         "er_ace + batch_norm (shrink=0.9, perturb=0.01)"),
    ],
)  # fmt: skip
def test_a_method_is_called_by_what_is_not_at_its_default(
    stream_result: Make, arguments: dict[str, Any], name: str
) -> None:
    assert name_of(stream_result(**arguments)) == name


def test_a_setting_that_a_record_lacks_has_its_default(stream_result: Make) -> None:
    older = stream_result(config={"seed": 2})
    del older["config"]["train"]["project"]
    del older["config"]["model"]["activation"]
    assert name_of(older) == "er_ace + batch_norm"
    assert len(stream_table([stream_result(), older]).rows) == 1


def test_methods_of_one_name_are_told_apart_by_what_differs(stream_result: Make) -> None:
    rates = [stream_result(config={"train": {"learning_rate": rate, "checkpoint_every": 7}}) for rate in (0.1, 0.3)]
    table = stream_table([*rates, stream_result(norm={"name": "group_norm"}, config={"train": {"epochs": 5}})])
    assert [row[0] for row in table.rows] == [
        "er_ace + batch_norm lr 0.1",
        "er_ace + batch_norm lr 0.3",
        "er_ace + group_norm",
    ]
    settings = next(note for note in table.notes if note.startswith("Settings"))
    assert settings == (
        "Settings: digits_cnn, sgd, batch 10; er_ace + batch_norm lr 0.1: 1 epoch; er_ace + batch_norm lr 0.3: "
        "1 epoch; er_ace + group_norm: lr 0.03, 5 epochs."
    )


def test_settings_tell_what_is_not_at_its_default(stream_result: Make) -> None:
    train = {"optimizer": "adam", "weight_decay": 0.0005, "augment": "crop_flip", "agc": 0.08, "reset_optimizer": True}
    table = stream_table([stream_result(config={"train": train, "model": {"name": "resnet18", "width": 20}})])
    assert table.notes[2] == (
        "Settings: resnet18 of width 20, adam, lr 0.03, batch 10, 1 epoch, weight_decay 0.0005, agc 0.08, "
        "augment crop_flip, reset_optimizer true."
    )


def test_options_that_only_some_names_tell_are_said_once(stream_result: Make) -> None:
    results = [stream_result(), stream_result(learner={"passes": "separate", "memory_size": 200})]
    notes = [note for note in stream_table(results).notes if note.startswith("er_ace, where")]
    assert notes == ["er_ace, where its name does not tell: memory_size 500, passes joint, recalibrate false."]


def test_columns_without_a_value_are_left_out(stream_result: Make) -> None:
    final = {"drift": None, "forgetting_max_minus_last": None, "forgetting_first_minus_last": math.nan}
    table = stream_table([stream_result(norm={"name": "group_norm"}, final=final)])
    assert table.columns == (
        *("method", "average accuracy", "average incremental", "online accuracy", "train accuracy", "seconds"),
    )
    assert table.rows[0] == ("er_ace + group_norm", "54.1", "61.2", "70.0", "90.0", "34")
    assert table.notes[1].startswith("Online: every batch just before training on it for the first time; train: ")
    assert "drift" not in "".join(table.notes)


def test_what_was_not_measured_is_a_dash_and_never_a_number(stream_result: Make) -> None:
    group = stream_result(norm={"name": "group_norm"}, final={"drift": None, "average_accuracy": math.nan})
    some = [
        stream_result(config={"seed": seed}, final={"online_accuracy": online})
        for seed, online in ((1, None), (2, 0.5), (3, 0.7))
    ]
    rows = stream_table([group, *some]).rows
    assert (rows[0][1], rows[0][7]) == ("–", "–")
    assert rows[1][5] == f"60.0 ± {100 * np.std([0.5, 0.7], ddof=1):.1f} (n = 2)"
    one = [stream_result(config={"seed": seed}, final={"drift": drift}) for seed, drift in ((1, None), (2, 0.25))]
    assert stream_table(one).rows[0][7] == "0.25 (n = 1)"


def test_memorization_is_scored_on_training_images(memorized: Make) -> None:
    table = stream_table([memorized([0.9, 0.8])])
    assert table.columns == ("method", "online accuracy", "train accuracy", "seconds")
    assert table.notes[0] == (
        "Seed 1 (one seed, no interval); training images, because there is nothing to hold out on this stream; "
        "wall clock."
    )


def test_notes_of_all_results_are_shown_once(stream_result: Make) -> None:
    results = [stream_result(notes=("A.", "B.")), stream_result(config={"seed": 2}, notes=("B.", "C."))]
    assert stream_table(results).notes[-3:] == ("A.", "B.", "C.")


def test_matrix_has_a_row_for_each_experience_that_ended(stream_result: Make) -> None:
    table = matrix_table(stream_result(matrix=[[0.9, 0.125, None], [0.5, 0.582, math.nan], [0.25, 0.5, 1.0]]))
    assert table.title == "Accuracy matrix (%): Split CIFAR-10 (5×2)"
    assert table.columns == ("accuracy on experience", "1", "2", "3")
    assert table.rows == (
        ("after experience 1 (classes 0, 1)", "90.0", "12.5", "–"),
        ("after experience 2 (classes 2, 3)", "50.0", "58.2", "–"),
        ("after experience 3 (classes 4, 5)", "25.0", "50.0", "100.0"),
    )
    assert table.notes == ("er_ace + batch_norm, seed 1; test images.",)


def test_matrix_of_a_joint_learner_has_one_row(stream_result: Make) -> None:
    result = stream_result(learner={"name": "joint"}, matrix=[[0.9, 0.8, 0.7]] * 3)
    assert matrix_table(result).rows == (("after experience 3 (all experiences)", "90.0", "80.0", "70.0"),)
    assert average_table([result]).rows == (("joint + batch_norm", "–", "–", "80.0"),)


def test_matrix_of_many_experiences_shows_twenty(stream_result: Make) -> None:
    table = matrix_table(stream_result(matrix=[[(i + j) / 1000 for j in range(77)] for i in range(77)]))
    shown = [4 * i for i in range(20)]
    assert table.columns[1:] == tuple(str(number + 1) for number in shown)
    assert [row[1:] for row in table.rows] == [tuple(f"{(i + j) / 10:.1f}" for j in shown) for i in shown]
    assert table.rows[-1][0] == "after experience 77"
    assert table.notes[1] == "20 of 77 experiences, evenly spaced."


def test_average_accuracy_is_over_the_experiences_seen(stream_result: Make) -> None:
    matrix = [[0.9, 0.1, 0.1], [0.5, 0.6, 0.1], [0.3, 0.3, 0.6]]
    other = [[0.7, None, None], [None, 0.6, None], [0.1, 0.2, 0.3]]
    table = average_table([stream_result(matrix=matrix), stream_result(norm={"name": "group_norm"}, matrix=other)])
    assert table.title == "Average accuracy by experience (%): Split CIFAR-10 (5×2)"
    assert table.columns == ("average accuracy after", "1", "2", "3")
    assert table.rows == (("er_ace + batch_norm", "90.0", "55.0", "40.0"), ("er_ace + group_norm", "70.0", "–", "20.0"))
    assert table.notes == ()


def diagnostics(norms: dict[str, float | None], rates: dict[str, float | None]) -> dict[str, Any]:
    return {"weight_norm": norms, "effective_learning_rate": rates}


def test_plasticity_shows_accuracy_norms_and_rates(memorized: Make) -> None:
    first = diagnostics({"0": 2.0, "2": 8.0, "head": 1.0}, {"0": 0.01, "2": 0.0001, "head": 5.0})
    last = diagnostics({"0": 20.0, "2": 45.0, "head": 1.0}, {"0": 1e-4, "2": 4e-4, "head": 5.0})
    accuracies = [1 - i / 100 for i in range(37)]
    result = memorized(accuracies, diagnostics=[first, *([{}] * 35), last], final={"plasticity": 0.655})
    table = plasticity_table([result])
    assert table.columns == (
        "after experience",
        *map(str, (1, 5, 9, 13, 17, 21, 25, 29, 33, 37)),
        *("plasticity", "weight norm", "effective lr"),
    )
    assert table.rows == (
        (
            "naive + batch_norm",
            *("100.0", "96.0", "92.0", "88.0", "84.0", "80.0", "76.0", "72.0", "68.0", "64.0"),
            "65.5",
            f"{math.sqrt(2 * 8):.3g} → {math.sqrt(20 * 45):.3g}",  # the head is no hidden layer
            f"{math.sqrt(0.01 * 0.0001):.3g} → {math.sqrt(1e-4 * 4e-4):.3g}",
        ),
    )
    assert "geometric mean over hidden layers (all but the last), mean over seeds" in table.notes[1]


def test_plasticity_over_seeds(memorized: Make) -> None:
    """Two seeds: accuracies with their deviation, norms as a mean; a norm that is not known is a dash."""
    results = [
        memorized(
            [a, b],
            config={"seed": seed},
            diagnostics=[diagnostics({"0": n, "1": 1.0}, {"0": None, "1": 1.0}), diagnostics({"0": 6.0, "1": 1.0}, {})],
            final={"plasticity": b},
        )
        for seed, a, b, n in ((1, 0.9, 0.5, 2.0), (2, 0.7, 0.6, 4.0))
    ]
    (row,) = plasticity_table(results).rows
    assert row == (
        "naive + batch_norm",
        f"80.0 ± {100 * np.std([0.9, 0.7], ddof=1):.1f}",
        f"55.0 ± {100 * np.std([0.5, 0.6], ddof=1):.1f}",
        f"55.0 ± {100 * np.std([0.5, 0.6], ddof=1):.1f}",
        "3 → 6",
        "–",
    )


def test_a_rate_that_has_decayed_to_zero_is_zero(memorized: Make) -> None:
    ends = [diagnostics({"0": 2.0, "1": 1.0}, {"0": rate, "1": rate}) for rate in (0.5, 0.0)]
    assert plasticity_table([memorized([0.9, 0.8], diagnostics=ends)]).rows[0][-2:] == ("2 → 2", "0.5 → 0")


def test_plasticity_without_diagnostics_or_hidden_layers(memorized: Make) -> None:
    bare = memorized([0.9, 0.8])
    shallow = memorized([0.9, 0.8], norm={"name": "none"}, diagnostics=[diagnostics({"head": 2.0}, {"head": 1.0})] * 2)
    assert [row[-2:] for row in plasticity_table([bare, shallow]).rows] == [("–", "–")] * 2


def test_drift_has_a_row_for_each_layer(stream_result: Make) -> None:
    last = {"drift": {"bn1": 0.1234, "bn2": 20.0}}
    results = [
        stream_result(diagnostics=[{"drift": {"bn1": 9.0}}, last]),
        stream_result(config={"seed": 2}, diagnostics=[{}, {"drift": {"bn1": 0.3, "bn2": None}}]),
        stream_result(norm=ADAB2N, diagnostics=[{}, {"drift": {"bn1": 0.5, "bn3": 0.002}}]),
        stream_result(norm={"name": "group_norm"}, diagnostics=[{}, {"drift": {}}]),
    ]
    table = drift_table(results)
    assert table.columns == ("layer", "er_ace + batch_norm", "er_ace + adab2n (kappa=0.4, lambd=0.01)")
    assert table.rows == (
        ("bn1", f"0.212 ± {np.std([0.1234, 0.3], ddof=1):.3g}", "0.5"),
        ("bn2", "20 (n = 1)", "–"),
        ("bn3", "–", "0.002"),
    )


@given(st.integers(1, 3000), st.integers(2, 30))
def test_evenly_spaced_numbers_hold_both_ends(count: int, at_most: int) -> None:
    shown = evenly(count, at_most)
    assert (shown[0], shown[-1], len(shown)) == (0, count - 1, min(count, at_most))
    steps = np.diff(shown)
    assert not len(steps) or (steps.min() >= 1 and steps.max() - steps.min() <= 1)
