"""The server's own images: scored right, under a name of their own; refused where there is no whole model or no fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional

from fednorm.config import resolve
from fednorm.errors import ConfigError, DataError, FedNormError
from fednorm.federation.simulate import plan, simulate
from fednorm.federation.workbench import Workbench
from fednorm.report.frame import records
from fednorm.report.table import accuracy_table

VALUES: dict[str, Any] = {
    "data": {"domains": ["photo", "scans"], "train_per_client": 12, "test_per_domain": 8},
    "model": {"width": 4},
    "train": {"batch_size": 6},
    "rounds": {"num_rounds": 3, "evaluate_every": 2},
}
DIGITS = tuple(map(str, range(10)))


def draw(folder: Path, classes: tuple[str, ...] = DIGITS, count: int = 3) -> Path:
    pixels = np.random.default_rng(5)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            image = pixels.integers(0, 255, (28, 28, 3), dtype=np.uint8)
            Image.fromarray(image).save(folder / name / f"{number}.png")
    return folder


def run_of(folder: Path | str, **sections: Any) -> Any:
    own = {"central": True, "central_dir": str(folder)}
    values = {**VALUES, "evaluate": own} | {key: {**VALUES.get(key, {}), **table} for key, table in sections.items()}
    return resolve(values)


@torch.no_grad()
def by_hand(result: dict[str, Any], config: Any, folder: Path) -> tuple[float, float]:
    """Return loss and accuracy of a run's last model on a folder, read by Pillow and scored in float64."""
    network = Workbench(config).model
    network.load_state_dict(load_file(Path(result["run"]) / "model.safetensors"), strict=False)
    network.double().eval()
    losses, hits = [], []
    for label, name in enumerate(DIGITS):
        for path in sorted((folder / name).glob("*.png")):
            pixels = torch.from_numpy(np.asarray(Image.open(path).convert("RGB"), dtype=np.float64))
            logits = network((pixels.permute(2, 0, 1) / 127.5 - 1)[None])
            losses.append(float(functional.cross_entropy(logits, torch.tensor([label]))))
            hits.append(int(logits.argmax()) == label)
    return float(np.mean(losses)), float(np.mean(hits))


def test_it_is_the_shared_model_s_score_on_every_image_of_the_folder(tmp_path: Path) -> None:
    folder = draw(tmp_path / "central")
    config = run_of(folder)
    result = simulate(config, runs=tmp_path / "runs")
    loss, accuracy = by_hand(result, config, folder)
    assert result["final"]["central"] == {
        "images": 30, "loss": pytest.approx(loss, rel=1e-5), "accuracy": pytest.approx(accuracy)
    }  # fmt: skip
    assert [("central" in line, "per_domain" in line) for line in result["rounds"]] == [
        (False, False),
        *[(True,) * 2] * 2,
    ]
    assert result["rounds"][-1]["central"] == result["final"]["central"] != result["rounds"][1]["central"]
    assert result["central"]["images"] == 30
    assert "central" not in result["final"]["per_domain"]
    table = accuracy_table([result])
    assert table.rows[0][table.columns.index("central")] == f"{100 * accuracy:.1f}"
    assert any("the server's own 30 images (evaluate.central_dir)" in note for note in table.notes)
    assert records([result]).filter(metric="central_accuracy")["value"].to_list()[-1] == accuracy


def test_a_run_s_bits_are_those_without_it_and_a_moved_folder_is_the_same_run(tmp_path: Path) -> None:
    folder = draw(tmp_path / "central")
    config = run_of(folder)
    models = [
        load_file(Path(simulate(each, runs=tmp_path / "runs")["run"]) / "model.safetensors")
        for each in (config, resolve(VALUES))
    ]
    assert all(torch.equal(tensor, models[1][key]) for key, tensor in models[0].items())
    assert run_of("/elsewhere").hash == config.hash != resolve(VALUES).hash


def test_of_train_and_test_folders_the_test_images_are_scored(tmp_path: Path) -> None:
    draw(tmp_path / "central/train", count=1)
    draw(tmp_path / "central/test", count=2)
    assert plan(run_of(tmp_path / "central"))["central"]["images"] == 20


@pytest.mark.parametrize(
    ("sections", "error", "message"),
    [
        ({"strategy": {"name": "fedbn"}}, ConfigError, r"fedbn keeps \d+ tensors on the clients .* no whole model"),
        ({"data": {"normalize": "global"}}, ConfigError, "images are scaled 'global', as measured on training images"),
        ({"evaluate": {"central": True}}, ConfigError, r"name their folder, on the server's machine"),
        ({"evaluate": {"central_dir": "x"}}, ConfigError, r"evaluate\.central is false"),
        ({"evaluate": {"central": True, "central_dir": "/no/such"}}, DataError, "is no folder on the server's machine"),
    ],
    ids=["local", "scaling", "no folder", "not asked for", "not there"],
)
def test_what_cannot_be_scored_is_refused_before_training(
    sections: dict[str, Any], error: type[FedNormError], message: str, tmp_path: Path
) -> None:
    folder = draw(tmp_path / "central", count=1)
    with pytest.raises(error, match=message):
        plan(run_of(folder, **sections))


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (DIGITS[:9], "has the classes 0, 1, 2"),
        ((*DIGITS, "owl"), "and this run has 0, 1, 2"),
        (("a/0", "b/0"), "holds folders of folders"),
    ],
    ids=["fewer", "others", "domains"],
)
def test_a_folder_that_does_not_fit_is_refused(classes: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        plan(run_of(draw(tmp_path / "central", classes, count=5)))


def test_streams_have_no_such_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.central.*federated runs"):
        resolve({"kind": "federated_continual", "evaluate": {"central": True, "central_dir": str(tmp_path)}})
