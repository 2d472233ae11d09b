"""How a client trains, from the command line."""

from __future__ import annotations

from typing import Any

import pytest

FLAGS = ("--optimizer", "adam", "--schedule", "cosine", "--augment", "flip, rotate", "--local-epochs", "0.5")


@pytest.mark.slow
def test_a_federations_training_has_options_of_its_own(call: Any) -> None:
    train = call("federated", "--dry-run", "--json", *FLAGS).document["config"]["train"]
    keys = ("optimizer", "schedule", "augment", "local_epochs")
    assert [train[key] for key in keys] == ["adam", "cosine", "flip,rotate", 0.5]


def test_a_streams_training_has_them_too(call: Any) -> None:
    train = call("continual", "--dry-run", "--json", *FLAGS[:6]).document["config"]["train"]
    assert [train[key] for key in ("optimizer", "schedule", "augment")] == ["adam", "cosine", "flip,rotate"]


@pytest.mark.slow
def test_whole_epochs_are_one_run_however_they_are_written(call: Any) -> None:
    hashes = {
        call("federated", "--dry-run", "--json", *how).document["hash"]
        for how in (("--local-epochs", "2"), ("--local-epochs", "2.0"), ("--set", "train.local_epochs=2"))
    }
    assert len(hashes) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--optimizer", "adm"), ("adm", "Did you mean", "adam")),
        (("--schedule", "cosin"), ("train.schedule", "cosine")),
        (("--augment", "mirror"), ("train.augment", "flip", "'mirror'")),
        (("--augment", "flip,flip"), ("once",)),
        (("--local-epochs", "0"), ("train.local_epochs", "greater than 0")),
        (("--local-epochs", "nan"), ("train.local_epochs",)),
        (("--local-epochs", "inf"), ("train.local_epochs",)),
        (("--set", "train.rotate_degrees=200"), ("train.rotate_degrees", "[0, 180]")),
        (("--set", "data.normalize=imagenet"), ("data.normalize", "half, none, global, domain")),
        (("--set", "evaluate.best_round=true"), ("data.validation",)),
    ],
)
def test_a_mistake_in_them_is_a_sentence(
    arguments: tuple[str, ...], words: tuple[str, ...], call: Any, refused: Any
) -> None:
    refused(call("federated", *arguments), *words)
