"""The contracts of the families, for anybody's class: what every norm, strategy, learner, scenario and so on must keep.

    from fednorm.testing import check_norm
    check_norm("mypackage.mynorm")          # the import path of a module with a SPEC
    check_norm(MyNorm)                      # or the class itself

Each raises :class:`AssertionError` with a sentence on the first thing that is broken, or the error of fednorm that a
user would see. Each ends with a small real run on the embedded digits, made twice: the same numbers must come out.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fednorm.adaptation import Adaptation, Adapter, Knowledge
from fednorm.adaptation._scoring import fresh, refined, rows_in_order
from fednorm.cards import ADAPTATIONS, DATA, LEARNERS, MODELS, NORMS, SCENARIOS, STRATEGIES
from fednorm.config import DataConfig, merge, resolve
from fednorm.data.benchmarks import Reader
from fednorm.data.domain import Split
from fednorm.errors import FedNormError
from fednorm.federation.plan import norm_plan
from fednorm.models import make_model
from fednorm.norm_contract import CHECKS as CHECKS_OF_LAYERS
from fednorm.norm_contract import Case
from fednorm.rng import torch_stream
from fednorm.roles import RoleRule

FEDERATED: Mapping[str, Any] = {
    "data": {"train_per_client": 24, "test_per_domain": 12},
    "model": {"width": 4},
    "train": {"batch_size": 8, "learning_rate": 0.05},
    "rounds": {"num_rounds": 2},
}
"""A federation that takes a second."""

CONTINUAL: Mapping[str, Any] = {
    "kind": "continual",
    "scenario": {"num_experiences": 2, "train_per_experience": 24, "test_per_experience": 12},
    "model": {"width": 4},
    "train": {"batch_size": 8, "epochs": 1},
    "evaluate": {"probe_images": 0, "train_images": 8},
}
"""A stream that takes a second."""


SHAPES: tuple[tuple[int, ...], ...] = ((3, 8, 3, 4), (3, 8, 5), (5, 8))
"""Inputs on which a norm's layers are checked: maps, sequences, features."""


def check_norm(norm: Any) -> None:
    """Check a normalization method.

    Its layers keep all of :mod:`fednorm.norm_contract`, on maps, sequences and features: shape, type and layout of an
    input stay, gradients are finite and what the card says of them, no other sample is looked at unless the card says
    so, and there is no tensor that it does not declare. A federation and a stream train with it, twice to the same
    bits.

    Args:
        norm: Its name, import path, class or card.

    Raises:
        AssertionError: Something is broken; the sentence says what.
        FedNormError: fednorm refuses it.
    """
    reference = NORMS.add(norm)
    card = NORMS[reference]
    made = card.made()
    for inputs, check in itertools.product(SHAPES, CHECKS_OF_LAYERS.values()):
        check(Case(card, made, inputs))
    model = make_model(card.tried_on, made, num_classes=10, width=4)
    plan = norm_plan(model, RoleRule())
    assert len(plan.entries) == len(model.state_dict()), "every entry of the state dict has a kind"
    _check_card(card)
    own = {"norm": {"name": reference}, "model": {"name": card.tried_on}}
    _check_runs(own, own)


def check_model(model: Any) -> None:
    """Check an architecture: it maps images to as many logits as asked for, and trains in both worlds."""
    reference = MODELS.add(model)
    card = MODELS[reference]
    for num_classes in (3, 10):
        network = make_model(reference, NORMS["group_norm"].made(), num_classes=num_classes)
        logits = network(torch.zeros(2, 3, card.input_size, card.input_size))
        assert tuple(logits.shape) == (2, num_classes), f"model {card.name}: logits of shape {tuple(logits.shape)}"
    first, again = (make_model(reference, NORMS["batch_norm"].made(), num_classes=10, seed=3) for _ in range(2))
    pairs = zip(first.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs), f"model {card.name}: one seed gives two sets of weights"
    _check_card(card)
    own = {"model": {"name": reference, "width": 0}}
    few = {"scenario": {"train_per_experience": 8}, **own}
    _check_runs({"data": {"train_per_client": 8}, "rounds": {"num_rounds": 1}, **own}, few)


def check_strategy(strategy: Any) -> None:
    """Check a federated strategy: its plan covers the model, and a run that was cut short goes on to the same bits."""
    reference = STRATEGIES.add(strategy)
    card = STRATEGIES[reference]
    _check_card(card)
    _check_runs({"strategy": {"name": reference}}, None)
    values = merge(FEDERATED, {"strategy": {"name": reference}})
    with tempfile.TemporaryDirectory() as folder:
        whole = _run(values, Path(folder) / "whole")
        _run(values, Path(folder) / "cut", stop_after=1)
        resumed = _run(values, Path(folder) / "cut")
        assert whole == resumed, f"strategy {card.name}: a run that was cut short ends with other numbers"


def check_learner(learner: Any) -> None:
    """Check a learner: it trains on streams, and a run that was cut short goes on to the same bits."""
    reference = LEARNERS.add(learner)
    card = LEARNERS[reference]
    _check_card(card)
    values = merge(CONTINUAL, {"learner": {"name": reference}})
    with tempfile.TemporaryDirectory() as folder:
        whole = _run(values, Path(folder) / "whole")
        assert whole == _run(values, Path(folder) / "again"), f"learner {card.name}: one seed gives two results"
        _run(values, Path(folder) / "cut", stop_after=1)
        resumed = _run(values, Path(folder) / "cut")
        assert whole == resumed, f"learner {card.name}: a run that was cut short ends with other numbers"


def check_scenario(scenario: Any) -> None:
    """Check a scenario: its experiences have images and labels, shared by nobody, and are the same for one seed."""
    reference = SCENARIOS.add(scenario)
    card = SCENARIOS[reference]
    _check_card(card)
    first, again, other = (card.stream(DataConfig(), image_size=8, seed=seed) for seed in (1, 1, 2))
    assert first.digest() == again.digest(), f"scenario {card.name}: one seed gives two streams"
    del other
    assert len(first) >= 1, f"scenario {card.name} has no experience"
    for place, experience in enumerate(first):
        assert experience.number == place, f"scenario {card.name}: experience {place} is numbered {experience.number}"
        for name, split in (("training", experience.train), ("test", experience.test)):
            assert len(split), f"scenario {card.name}: experience {place} has no {name} images"
            images, labels = split.batch(torch.arange(min(4, len(split))))
            assert (images.dtype, images.shape[1]) == (torch.uint8, 3), f"scenario {card.name}: images are uint8 RGB"
            below = first.num_classes
            assert 0 <= int(labels.min()) <= int(labels.max()) < below, (
                f"scenario {card.name}: labels are 0 to {below - 1}"
            )
    _check_runs(None, {"scenario": {"name": reference}}, without_scenario=True)


def check_data(data: Any) -> None:
    """Check a benchmark: every domain has training and test images and labels below the number of classes."""
    reference = DATA.add(data)
    card = DATA[reference]
    _check_card(card)
    loaded = card.load(Reader(DataConfig(name=reference), 8))
    names = [domain.name for domain in loaded.domains]
    assert len(names) == len(set(names)) > 0, f"benchmark {card.name}: domains have names of their own; got {names}"
    for domain, split in itertools.product(loaded.domains, ("train", "test")):
        part = getattr(domain, split)
        assert len(part), f"benchmark {card.name}: domain {domain.name} has no {split} images"
        images, labels = part.batch(torch.arange(min(4, len(part))))
        assert (images.dtype, images.ndim) == (torch.uint8, 4), f"benchmark {card.name}: images are uint8 (N, 3, H, W)"
        assert 0 <= int(labels.min()) <= int(labels.max()) < loaded.num_classes, f"benchmark {card.name}: labels"
    _check_runs({"data": {"name": reference}}, None)


def check_adaptation(adaptation: Any) -> None:
    """Check a method of test-time adaptation.

    It gives finite logits without gradients for every batch, one image alone and a class at a time too, the same for
    the same images; the trained network stays as it is, and no global random generator is drawn from. What it has
    learned on training clients has the names and shapes that it began with. A card that asks for running statistics
    refuses a network without any. A federation and a stream have the same numbers with it as without, and twice the
    same scores under it.

    Args:
        adaptation: Its name, import path, class or card.

    Raises:
        AssertionError: Something is broken; the sentence says what.
        FedNormError: fednorm refuses it.
    """
    reference = ADAPTATIONS.add(adaptation)
    card = ADAPTATIONS[reference]
    _check_card(card)
    for batch_size, order, reset in (
        (8, "shuffled", "each"),
        (1, "class_sorted", "batch"),
        (8, "class_sorted", "never"),
    ):
        _check_adapting(card, {"batch_size": batch_size, "order": order, "reset": reset})
    if card.statistics:
        model = make_model("cnn", NORMS["group_norm"].made(), num_classes=4, image_size=8, width=4)
        try:
            card.made().check(model)
        except FedNormError:
            pass
        else:
            raise AssertionError(
                f"adaptation {card.name}: its card needs running statistics, and it takes a network without"
            )
    for base in (FEDERATED, CONTINUAL):
        results = []
        for methods in ([], [reference], [reference]):
            with tempfile.TemporaryDirectory() as folder:
                results.append(
                    _run(merge(base, {"evaluate": {"adaptation": methods}}), Path(folder), also="adaptation")
                )
        without, once, again = (result or () for result in results)
        assert once == again, f"adaptation {card.name}: one configuration and seed gave two results"
        assert without[:2] == once[:2], f"adaptation {card.name}: a run has other numbers with it than without"


def _check_adapting(card: Any, composition: Mapping[str, Any]) -> None:
    """Check what an adaptation does to a small network, with batches of one composition."""
    what, how = f"adaptation {card.name} ({', '.join(map(str, composition.values()))})", card.made(composition)
    model = make_model("cnn", NORMS["batch_norm"].made(), num_classes=4, image_size=8, width=4, seed=1)
    draw = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (21, 3, 8, 8), generator=draw, dtype=torch.uint8)
    split = Split(images, torch.arange(21) % 4, torch.arange(21))
    how.check(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state, knowledge = torch.get_rng_state(), how.initial(model)
    if how.rounds_of_learning:
        learned = refined(how, model, knowledge, split, 1, "contract")
        shapes = [{key: tuple(tensor.shape) for key, tensor in each.items()} for each in (knowledge, learned)]
        assert shapes[0] == shapes[1], f"{what}: it has learned other tensors than it began with"
        knowledge = learned
    once, again = (list(_predictions(how, model, knowledge, split)) for _ in range(2))
    for logits in (*once, *again):
        assert logits.ndim == 2, f"{what}: logits have the shape (images, classes); got {tuple(logits.shape)}"
        assert logits.shape[1] == 4, f"{what}: logits of 4 classes have the shape {tuple(logits.shape)}"
        assert logits.isfinite().all(), f"{what}: logits are not finite"
        assert not logits.requires_grad, f"{what}: logits still hang on the graph of gradients; detach them"
    sizes = [len(logits) for logits in once]
    assert sum(sizes) == 21, f"{what}: of 21 images in batches of {how.batch_size} it gave logits of {sizes}"
    pairs = zip(once, again, strict=True)
    assert all(torch.equal(one, other) for one, other in pairs), f"{what}: the same images gave two predictions"
    changed = [key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])]
    assert not changed, f"{what}: it changed the trained network ({', '.join(changed[:3])}), not its copy"
    assert torch.equal(torch.get_rng_state(), state), f"{what}: it drew from PyTorch's global random generator"


def _predictions(how: Adaptation, model: torch.nn.Module, knowledge: Knowledge, split: Split) -> Iterator[torch.Tensor]:
    """Yield the logits of a split's batches, as an evaluation has them."""
    adapter: Adapter | None = None
    for rows in torch.split(rows_in_order(split, how.order, torch_stream(1, "contract")), how.batch_size):
        if adapter is None or how.reset == "batch":
            adapter = how.begin(fresh(model), knowledge)
        yield adapter(split.inputs(rows)[0])


CHECKS = {
    "norm": check_norm,
    "model": check_model,
    "strategy": check_strategy,
    "learner": check_learner,
    "scenario": check_scenario,
    "data": check_data,
    "adaptation": check_adaptation,
}
"""The families' contracts by the noun that ``fednorm new`` takes."""


def _check_card(card: Any) -> None:
    assert card.summary.strip(), f"{card.name}: the card has a summary, one sentence"
    for option in card.declared.values():
        assert option.default is not None or option.type is not Any, f"{card.name}: option {option.name} has no type"
    json.dumps(card.options)


def _check_runs(
    federated: Mapping[str, Any] | None, continual: Mapping[str, Any] | None, *, without_scenario: bool = False
) -> None:
    """Run small runs twice, and ask for the same numbers."""
    stream = {key: value for key, value in CONTINUAL.items() if not (without_scenario and key == "scenario")}
    bases = ((FEDERATED, federated), (stream, continual))
    for base, values in bases:
        if values is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            once, again = (_run(merge(base, values), Path(folder) / name) for name in ("once", "again"))
        assert once == again, f"one configuration and seed gave two results: {values}"


class _Stop:
    """Stops a run after so many rounds or experiences, as Ctrl-C would."""

    def __init__(self, after: int) -> None:
        self.left = after

    def begin(self, *_: Any) -> None:
        """Begin."""

    def step(self, _: int) -> None:
        """Go on."""

    def round(self, _: Any) -> None:
        """Stop after the last round that is wanted."""
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt

    experience = round


def _run(values: Mapping[str, Any], runs: Path, stop_after: int = 0, also: str = "") -> tuple[Any, ...] | None:
    """Run a configuration and return what identifies its final tensors, its final numbers, and what else is asked for.

    Args:
        values: The configuration.
        runs: The folder of its record.
        stop_after: Rounds or experiences after which it is stopped; 0 for never. Nothing is returned then.
        also: A key of the result whose value is returned too.
    """
    import hashlib

    from safetensors.torch import load_file

    config = resolve(values)
    observer: Any = _Stop(stop_after) if stop_after else None
    if config.kind == "federated":
        from fednorm.federation.simulate import simulate
    else:
        from fednorm.streams.simulate import simulate  # type: ignore[assignment]
    try:
        result = simulate(config, runs=runs, observer=observer)
    except KeyboardInterrupt:
        return None
    digest = hashlib.sha256()
    for file in sorted(Path(result["run"]).glob("*.safetensors")):
        for key, tensor in sorted(load_file(file).items()):
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)} {tensor.flatten().tolist()}".encode())
    return digest.hexdigest(), result["final"], *([result.get(also)] if also else [])
