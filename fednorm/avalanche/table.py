"""Every strategy of ``avalanche.training`` on a stream of fednorm's, as a table: ``python -m fednorm.avalanche.table``.

Each strategy is trained on three experiences of two classes, 24 images of 8x8 pixels each, and evaluated:

* on a benchmark that Avalanche's own generator makes of the same images (``nc_benchmark``),
* on ``to_avalanche(stream)``,
* there with a network of AdaB2N and ``NormPlugin``, where it counts as trained if psi has moved.
"""

from __future__ import annotations

import argparse
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fednorm.avalanche.benchmark import to_avalanche
from fednorm.avalanche.plugin import NormPlugin
from fednorm.avalanche.quietly import avalanche_imports
from fednorm.conversion.replacement import convert
from fednorm.data.domain import Split, pixels
from fednorm.rng import torch_seeded, torch_stream
from fednorm.streams.stream import Experience, Stream

with avalanche_imports():
    from avalanche import models, training
    from avalanche.benchmarks import nc_benchmark
    from avalanche.models.base_model import BaseModel
    from avalanche.models.packnet import PackNetModel
    from avalanche.training import supervised
    from avalanche.training.plugins import EvaluationPlugin
    from avalanche.training.templates.base import BaseTemplate

CLASSES, EXPERIENCES, SIZE, EACH = 6, 3, 8, 12

LEFT_OUT = {
    "AR1": "downloads the weights of a MobileNet",
    "LearningToPrompt": "downloads the weights of a vision transformer",
    "ExpertGateStrategy": "works on an AlexNet of 227x227 pixels",
    "AETraining": "trains an autoencoder, without classes",
    "VAETraining": "trains an autoencoder, without classes",
}
"""Strategies that are not run, and why."""


WITHOUT_NORM = {
    "CWRStar": "freezes all but the head after the first task",
    "MER": "each of its inner steps is over a batch of its own, which is taken for one task",
    "PNNStrategy": "its network has no norm",
    "PackNet": "takes networks without a norm only",
    "StreamingLDA": "does not train its network",
}
"""Strategies under which psi cannot move, and why."""


class Network(BaseModel, nn.Module):  # type: ignore[misc]
    """A small network with the parts that strategies ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )
        self.classifier = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, shape (n, K)."""
        logits: Tensor = self.classifier(self.features(x))
        return logits

    def get_features(self, x: Tensor) -> Tensor:
        """Return what the classifier is given, shape (n, 32)."""
        features: Tensor = self.features(x)
        return features


Convert = Callable[[nn.Module], nn.Module]
Settings = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How a strategy is made.

    Attributes:
        arguments: Beside those that all have.
        network: Makes the strategy's network of a :class:`Network`.
        task_labels: Whether it needs them.
        optimizer: Whether it takes an optimizer, and a criterion.
    """

    arguments: Callable[[nn.Module], Settings] = lambda _: {}
    network: Callable[[nn.Module], nn.Module] = lambda model: model
    task_labels: bool = False
    optimizer: bool = True
    criterion: bool = True


def _icarl(model: Any) -> Settings:
    return {
        "feature_extractor": model.features,
        "classifier": model.classifier,
        "memory_size": 30,
        "buffer_transform": None,
        "fixed_memory": True,
    }


def _generative(model: nn.Module) -> Settings:
    del model
    vae = models.MlpVAE((3, SIZE, SIZE), nhid=2, n_classes=CLASSES)
    strategy = training.VAETraining(
        model=vae,
        optimizer=torch.optim.SGD(vae.parameters(), lr=1e-4),
        train_mb_size=8,
        plugins=[supervised.strategy_wrappers.GenerativeReplayPlugin()],
        evaluator=EvaluationPlugin(),
    )
    return {"generator_strategy": strategy}


RECIPES: dict[str, Recipe] = {
    "AGEM": Recipe(lambda _: {"patterns_per_exp": 8, "sample_size": 8}),
    "BiC": Recipe(lambda _: {"mem_size": 30, "stage_2_epochs": 1, "val_percentage": 0.2}),
    "CWRStar": Recipe(lambda _: {"cwr_layer_name": "classifier"}),
    "CoPE": Recipe(lambda _: {"mem_size": 30, "n_classes": CLASSES, "p_size": CLASSES}),
    "Cumulative": Recipe(),
    "DER": Recipe(lambda _: {"mem_size": 30}, criterion=False),
    "ER_ACE": Recipe(lambda _: {"mem_size": 30, "batch_size_mem": 8}),
    # Each class needs a whole batch in memory, or Avalanche waits for one for ever.
    "ER_AML": Recipe(lambda model: {"feature_extractor": model.features, "mem_size": 60, "batch_size_mem": 8}),
    "EWC": Recipe(lambda _: {"ewc_lambda": 1.0}),
    "FeatureReplay": Recipe(lambda _: {"mem_size": 30, "batch_size_mem": 8}),
    "FromScratchTraining": Recipe(),
    "GDumb": Recipe(lambda _: {"mem_size": 30}),
    "GEM": Recipe(lambda _: {"patterns_per_exp": 8}),
    "GSS_greedy": Recipe(lambda _: {"mem_size": 30, "mem_strength": 2, "input_size": [3, SIZE, SIZE]}),
    "GenerativeReplay": Recipe(_generative),
    "ICaRL": Recipe(_icarl, criterion=False),
    "JointTraining": Recipe(),
    "LFL": Recipe(lambda _: {"lambda_e": 0.1}),
    "LwF": Recipe(lambda _: {"alpha": 1.0, "temperature": 2.0}),
    "MAS": Recipe(),
    "MER": Recipe(lambda _: {"mem_size": 30, "batch_size_mem": 4, "n_inner_steps": 2}),
    "MIR": Recipe(lambda _: {"mem_size": 30, "subsample": 8, "batch_size_mem": 4}),
    "Naive": Recipe(),
    "PNNStrategy": Recipe(
        network=lambda _: models.PNN(num_layers=1, in_features=3 * SIZE * SIZE, hidden_features_per_column=8),
        task_labels=True,
    ),
    "PackNet": Recipe(
        lambda _: {"post_prune_epochs": 1, "prune_proportion": 0.5, "train_epochs": 2},
        network=lambda _: PackNetModel(
            models.SimpleMLP(num_classes=CLASSES, input_size=3 * SIZE * SIZE, hidden_size=16, drop_rate=0.0)
        ),
        task_labels=True,
    ),
    "Replay": Recipe(lambda _: {"mem_size": 30}),
    "SCR": Recipe(
        lambda _: {"mem_size": 30, "batch_size_mem": 8, "augmentations": nn.Identity()},
        network=lambda model: models.SCRModel(feature_extractor=model.features, projection=nn.Linear(32, 16)),
        criterion=False,
    ),
    "StreamingLDA": Recipe(
        lambda _: {"input_size": 32, "num_classes": CLASSES},
        network=lambda model: model.get_submodule("features"),
        optimizer=False,
    ),
    "SynapticIntelligence": Recipe(lambda _: {"si_lambda": 0.1}),
}
"""How each strategy is made."""


@dataclass(frozen=True)
class Row:
    """A strategy's row: an empty text where it was trained and evaluated, else what went wrong.

    Attributes:
        strategy: The strategy's name.
        own: On Avalanche's own benchmark.
        ours: On fednorm's stream.
        norm: There with AdaB2N and NormPlugin; None where not tried.
    """

    strategy: str
    own: str
    ours: str
    norm: str | None


def strategies() -> list[str]:
    """Return the names of all strategies that ``avalanche.training`` offers."""
    found = {**vars(supervised), **vars(training)}
    kinds = {name: kind for name, kind in found.items() if inspect.isclass(kind) and issubclass(kind, BaseTemplate)}
    return sorted(name for name, kind in kinds.items() if kind.__module__.startswith("avalanche.training.supervised"))


def tiny_stream() -> Stream:
    """Return three experiences of two classes; class k is bright in row k."""
    generator = torch_stream(0, "avalanche table")
    count = 2 * EACH * CLASSES
    labels = torch.arange(count) % CLASSES
    images = torch.randint(0, 64, (count, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    for row, label in enumerate(labels.tolist()):
        images[row, :, label] += 128
    experiences = []
    for number in range(EXPERIENCES):
        here = (labels // 2 == number).nonzero().flatten()
        train, test = (Split(images, labels, rows) for rows in (here[: 2 * EACH], here[2 * EACH :]))
        nothing = Split(images, labels, here[:0])
        own = 2 * number, 2 * number + 1
        experiences.append(Experience(number, f"classes {own[0]}, {own[1]}", own, train, nothing, test))
    return Stream("tiny", CLASSES, SIZE, tuple(experiences), tuple(range(CLASSES)), classes_per_task=2)


def own_benchmark(stream: Stream, *, task_labels: bool) -> Any:
    """Return what Avalanche's own generator makes of a stream's images."""
    sets = []
    for name in ("train", "test"):
        parts = [getattr(experience, name) for experience in stream]
        images, labels = (torch.cat(each) for each in zip(*(p.batch(torch.arange(len(p))) for p in parts), strict=True))
        data = TensorDataset(pixels(images), labels)
        data.targets = labels.tolist()  # type: ignore[attr-defined]
        sets.append(data)
    return nc_benchmark(*sets, EXPERIENCES, task_labels=task_labels, fixed_class_order=list(range(CLASSES)))


def make(name: str, *, network: nn.Module, plugins: list[Any]) -> Any:
    """Return a strategy, with its network."""
    recipe = RECIPES[name]
    settings: Settings = recipe.arguments(network)
    if "feature_extractor" not in settings or name == "ER_AML":
        model = recipe.network(network)
        settings["slda_model" if name == "StreamingLDA" else "model"] = model
    else:
        model = network
    if recipe.optimizer:
        settings["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.05)
    if recipe.criterion:
        settings["criterion"] = nn.CrossEntropyLoss()
    common = {"train_mb_size": 8, "eval_mb_size": 16, "train_epochs": 1, "plugins": plugins}
    kind = getattr(training, name, None) or getattr(supervised, name)
    return kind, common | settings


def train(name: str, benchmark: Any, *, norm: str = "") -> nn.Module:
    """Train and evaluate a strategy; return its network.

    Args:
        name: The strategy.
        benchmark: The benchmark.
        norm: The network's norm, under which NormPlugin is among the plugins; batch normalization if empty.
    """
    with torch_seeded(1, name):
        network: nn.Module = Network()
        if norm:
            network = convert(network, norm)
        kind, settings = make(name, network=network, plugins=[NormPlugin()] if norm else [])
        strategy = kind(**settings, evaluator=EvaluationPlugin())
        if name == "JointTraining":
            strategy.train(benchmark.train_stream, eval_streams=[])
        else:
            for experience in benchmark.train_stream:
                strategy.train(experience, eval_streams=[])
        strategy.eval(benchmark.test_stream)
    trained: nn.Module = strategy.model
    return trained


def row(name: str, stream: Stream) -> Row:
    """Run a strategy three times."""
    labels = RECIPES[name].task_labels
    own = _said(lambda: train(name, own_benchmark(stream, task_labels=labels)))
    ours = _said(lambda: train(name, to_avalanche(stream, task_labels=labels)))
    norm = None
    if not ours and name not in WITHOUT_NORM:
        norm = _said(lambda: _require_moved(train(name, to_avalanche(stream, task_labels=labels), norm="adab2n")))
    return Row(name, own, ours, norm)


def _require_moved(network: nn.Module) -> None:
    weights = [parameter for path, parameter in network.named_parameters() if path.endswith("task_weight")]
    if not any(bool(weight.any()) for weight in weights):
        raise RuntimeError("psi has not moved")


def _said(run: Callable[[], Any]) -> str:
    with _quiet():
        try:
            run()
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")[:120]
    return ""


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Avalanche about itself
        yield


def table(names: list[str] | None = None) -> str:
    """Return the table as Markdown."""
    stream = tiny_stream()
    lines = [
        "# Avalanche's strategies on fednorm's streams",
        "",
        "Made by `python -m fednorm.avalanche.table`; a test holds it. Each strategy of `avalanche.training` is "
        "trained on three experiences and evaluated: on a benchmark of Avalanche's own generator, on "
        "`to_avalanche(stream)`, and there with a network of AdaB2N and `fednorm.avalanche.NormPlugin`, where psi must "
        "have moved.",
        "",
        "| strategy | Avalanche's benchmark | fednorm's stream | with adab2n and NormPlugin |",
        "|---|---|---|---|",
    ]
    for name in names or strategies():
        if name in LEFT_OUT:
            lines.append(f"| {name} | not run: {LEFT_OUT[name]} | – | – |")
            continue
        result = row(name, stream)
        norm = f"– ({WITHOUT_NORM.get(name, 'not tried')})" if result.norm is None else _cell(result.norm)
        cells = [_cell(result.own), _cell(result.ours), norm]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(problem: str) -> str:
    return problem.replace("|", "/") if problem else "yes"


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/avalanche.md"))
    out: Path = parser.parse_args().out
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(table(), encoding="utf-8")


if __name__ == "__main__":
    main()
