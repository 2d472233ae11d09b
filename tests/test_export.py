"""A trained model back: it scores what the run's own last evaluation scored, from a module and from every file."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fednorm
from fednorm.config import resolve
from fednorm.data import load_federation
from fednorm.data.domain import Split, pixels
from fednorm.errors import ConfigError, RecordError
from fednorm.export import export
from fednorm.federation.simulate import simulate
from fednorm.streams.workbench import ContinualWorkbench

NETS = """
from torch import nn

class Tied(nn.Module):
    '''Two layers of one weight.'''

    def __init__(self, num_classes, *, hidden: int = 8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, hidden, 3, stride=2), nn.BatchNorm2d(hidden), nn.ReLU())
        self.first = nn.Conv2d(hidden, hidden, 1)
        self.second = nn.Conv2d(hidden, hidden, 1)
        self.second.weight = self.first.weight
        self.head = nn.Linear(hidden, num_classes)

    def forward(self, images):
        return self.head(self.second(self.first(self.stem(images)).relu()).mean((2, 3)))
"""


@pytest.fixture(scope="module", autouse=True)
def _nets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("nets")
    (folder / "nets_to_export.py").write_text(NETS)
    sys.path.append(str(folder))
    yield
    sys.path.remove(str(folder))


def trained(strategy: str, runs: Path, model: str = "digits_cnn", **more: Any) -> dict[str, Any]:
    values = {
        "strategy": {"name": strategy},
        "model": {"name": model, **({"width": 4} if model == "digits_cnn" else {})},
        "data": {"train_per_client": 24, "image_size": 16},
        "train": {"learning_rate": 0.05, "batch_size": 8},
        "rounds": {"num_rounds": 2},
        **more,
    }
    return simulate(resolve(values), runs=runs)


def scored(model: Callable[[Tensor], Tensor], split: Split) -> float:
    hits = 0
    with torch.no_grad():
        for rows in torch.split(torch.arange(len(split)), 64):
            images, labels = split.batch(rows)
            hits += int((model(pixels(images)).argmax(1) == labels).sum())
    return hits / len(split)


@pytest.mark.few(2)
@pytest.mark.parametrize("strategy", ["fedbn", "silobn", "fedavg", "ditto", "fedavg_ft", "fedbabu", "fedrep", "local"])
@pytest.mark.parametrize("model", ["digits_cnn", "nets_to_export:Tied"])
def test_a_clients_model_scores_what_its_run_scored(strategy: str, model: str, tmp_path: Path) -> None:
    result = trained(strategy, tmp_path, model)
    config = resolve(result["config"])
    federation = load_federation(config.data, image_size=16, seed=config.seed)
    for client in federation.clients:
        loaded = fednorm.load_model(result["run"], client=client.partition_id)
        assert not loaded.training
        assert scored(loaded, client.test) == result["final"]["per_domain"][client.domain]
    if strategy == "fedavg":
        assert [scored(fednorm.load_model(result["run"]), c.test) for c in federation.clients] == list(
            result["final"]["per_domain"].values()
        )


@pytest.mark.few(1)
@pytest.mark.parametrize("options", [{}, {"recalibrate": True, "memory_size": 20}])
def test_a_streams_model_scores_what_its_last_evaluation_scored(options: dict[str, Any], tmp_path: Path) -> None:
    result = fednorm.continual(
        scenario="split_digits",
        learner="er",
        norm="adab2n" if not options else "batch_norm",
        config={
            "learner": options,
            "model": {"width": 4},
            "scenario": {"train_per_experience": 20},
            "train": {"epochs": 1},
            "evaluate": {"probe_images": 0},
        },
        runs=tmp_path,
    )
    assert (Path(result["run"]) / "evaluated.safetensors").exists() == bool(options)
    loaded = fednorm.load_model(result["run"])
    stream = ContinualWorkbench(resolve(result["config"])).stream
    assert [scored(loaded, experience.test) for experience in stream] == result["accuracy_matrix"][-1]
    with pytest.raises(ConfigError, match="one model and no clients"):
        fednorm.load_model(result["run"], client=0)


@pytest.mark.slow
def test_every_file_holds_that_model(tmp_path: Path) -> None:
    result = trained("fedbn", tmp_path / "runs", "nets_to_export:Tied", norm={"name": "group_norm", "num_groups": 2})
    loaded = fednorm.load_model(result["run"], client=3)
    about = export(result["run"], tmp_path / "m.pt2", 3)
    assert about == {
        "file": str(tmp_path / "m.pt2"),
        "run": result["run"],
        "model": "nets_to_export:Tied",
        "norm": "group_norm",
        "num_classes": 10,
        "image_size": 16,
        "client": 3,
    }
    for suffix in ("safetensors", "pt"):
        export(result["run"], tmp_path / f"m.{suffix}", 3)
    states = [load_file(tmp_path / "m.safetensors"), torch.load(tmp_path / "m.pt", weights_only=True)]
    for state in states:
        assert state.keys() == loaded.state_dict().keys()
        assert all(torch.equal(state[key], tensor) for key, tensor in loaded.state_dict().items())
    images = torch.linspace(-1, 1, 5 * 3 * 16 * 16).reshape(5, 3, 16, 16)
    torch.save((images, loaded(images).detach()), tmp_path / "pair.pt")
    code = """
import sys, torch
images, logits = torch.load("pair.pt")
program = torch.export.load("m.pt2").module()
for n in (1, 3, 5):
    torch.testing.assert_close(program(images[:n]), logits[:n], rtol=1e-4, atol=1e-5)
assert not [name for name in sys.modules if name.startswith(("fednorm", "nets_to_export"))]
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_mistakes_are_explained(tmp_path: Path) -> None:
    result = trained("fedbn", tmp_path / "runs", data={"train_per_client": 24, "image_size": 16, "held_out": "street"})
    run = Path(result["run"])
    clients = r"0 \(scans\), 1 \(photo\), 2 \(fonts\), 3 \(faint\), 4 \(street\)"
    for call, error, words in (
        (lambda: fednorm.load_model(run), ConfigError, f"fedbn keeps 25 tensors of digits_cnn.*{clients}"),
        (lambda: fednorm.load_model(run, client=5), ConfigError, f"There is no client 5 in .*{clients}"),
        (lambda: fednorm.load_model(run, client=4), ConfigError, "Client 4 of .* has no model: it was never trained"),
        (lambda: fednorm.load_model(tmp_path / "none"), RecordError, "There is no .*none"),
        (lambda: export(run, tmp_path / "m.onnx", 1), ConfigError, r"ends in .pt2, .safetensors or .pt; got .*m.onnx"),
    ):
        with pytest.raises(error, match=words):
            call()
    trained("fedavg", tmp_path / "runs")
    with pytest.raises(RecordError, match=r"holds 2 runs. Give the folder of one"):
        fednorm.load_model(tmp_path / "runs")
    (run / "clients.safetensors").unlink()
    with pytest.raises(ConfigError, match="on Flower's own runtime they stay in its processes"):
        fednorm.load_model(run, client=1)
    (run / "model.safetensors").write_bytes(b"\x08\0")
    with pytest.raises(RecordError, match=r"model.safetensors cannot be read"):
        fednorm.load_model(run, client=1)
    document = json.loads((run / "result.json").read_text())
    assert document["model"] == {"name": "digits_cnn", "num_classes": 10, "image_size": 16, "notes": []}


@pytest.mark.slow
def test_a_source_that_has_changed_is_said_and_one_that_fits_no_more_is_refused(tmp_path: Path) -> None:
    (tmp_path / "nets_that_change.py").write_text(NETS)
    shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
    script = """
import sys, warnings, fednorm
from fednorm.errors import RecordError
runs = sys.argv[1]
if sys.argv[2] == "train":
    config = {"data": {"train_per_client": 16, "image_size": 8}}
    print(fednorm.federated(model="nets_that_change:Tied", rounds=1, config=config, runs="runs")["run"])
else:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            print(type(fednorm.load_model(runs)).__name__)
        except RecordError as error:
            print(error)
    print([str(w.message) for w in caught if w.category is UserWarning])
"""

    def call(*arguments: str) -> str:
        command = [sys.executable, "-B", "-c", script, *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    run = call("-", "train")
    (tmp_path / "nets_that_change.py").write_text(NETS + "\n# another day\n")
    printed = call(run, "load")
    assert printed.startswith("Tied\n")
    assert "The source of model 'nets_that_change:Tied' is not what it was" in printed
    (tmp_path / "nets_that_change.py").write_text(NETS.replace("= 8", "= 9"))
    assert "do not fit model nets_that_change:Tied as it is built now" in call(run, "load")


def test_a_module_of_python_alone_is_run_and_loaded_in_its_process(tmp_path: Path) -> None:
    def net(num_classes: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 4, stride=4), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, num_classes))

    config = {"data": {"train_per_client": 16, "image_size": 8}}
    result = fednorm.federated(model=net, rounds=1, config=config, runs=tmp_path)
    assert result["config"]["model"]["name"].startswith("object:")
    assert isinstance(fednorm.load_model(result["run"]), nn.Sequential)
    again = fednorm.federated(model=net, rounds=1, config=config, runs=tmp_path)
    assert again == result  # read back: it is the same object
    other = fednorm.federated(model=lambda num_classes: net(num_classes), rounds=1, config=config, runs=tmp_path)
    assert other["run"] != result["run"]
    assert other["final"] == result["final"]  # the weights come from the seed, whatever the model is called
