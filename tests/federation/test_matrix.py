"""The evaluation matrix, each number of it computed again from the clients' tensors with plain PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from flwr.app import Message
from safetensors.torch import load_file
from torch import Tensor, nn

from fednorm.config import resolve
from fednorm.data.domain import Client, Federation, Split
from fednorm.errors import ConfigError
from fednorm.federation.executors import Job
from fednorm.federation.grid import InProcessGrid
from fednorm.federation.simulate import plan, simulate
from fednorm.federation.workbench import Workbench
from fednorm.models import make_model
from fednorm.norms import make_norm

IMAGES = 23
DOMAINS = ("a", "a", "b", "c", "unseen")
TRAIN = (30, 20, 40, 25, 0)
TEST = (31, 40, 37, 35, 41)
TRAINING = (0, 1, 2, 3)
CLASSES = 4

State = dict[str, Tensor]


@cache
def federation() -> Federation:
    """Four classes of coarse patterns; domains differ in contrast, offset and noise."""
    draw = torch.Generator().manual_seed(1)
    patterns = torch.randint(0, 120, (CLASSES, 3, 8, 8), generator=draw)
    looks = {"a": (1.0, 0, 40), "b": (0.3, 150, 20), "c": (-1.0, 200, 60), "unseen": (0.5, 60, 60)}
    clients = []
    for pid, (domain, train, test) in enumerate(zip(DOMAINS, TRAIN, TEST, strict=True)):
        contrast, offset, noise = looks[domain]
        labels = torch.randint(0, CLASSES, (train + test,), generator=draw)
        noises = torch.randn((train + test, 3, 8, 8), generator=draw) * noise
        images = (patterns[labels] * contrast + offset + noises).clamp(0, 255).to(torch.uint8)
        parts = [
            Split(images, labels, torch.arange(start, stop)) for start, stop in ((0, train), (train, train + test))
        ]
        clients.append(Client(pid, domain, parts[0], Split(images, labels, torch.arange(0)), parts[1], not train))
    return Federation("patterns", CLASSES, 8, tuple(clients))


def values(strategy: str = "fedbn", norm: str = "batch_norm", **evaluate: Any) -> dict[str, Any]:
    evaluate = {"images": IMAGES, "kinds": ["own", "cross", "averaged", "pooled", "reestimated"], **evaluate}
    return {
        "model": {"width": 4},
        "strategy": {"name": strategy},
        "norm": {"name": norm},
        "train": {"learning_rate": 0.03, "batch_size": 8, "local_epochs": 6},
        "rounds": {"num_rounds": 2},
        "evaluate": evaluate,
    }


class Trained:
    """A finished run: its evaluation, the server's and the clients' tensors, and every message that was sent."""

    def __init__(self, strategy: str, norm: str, evaluate: tuple[tuple[str, Any], ...]) -> None:
        config = resolve(values(strategy, norm, **dict(evaluate)))
        self.messages: list[tuple[str, int]] = []
        job_of = InProcessGrid._job

        def noted(grid: InProcessGrid, message: Message) -> Job:
            job = job_of(grid, message)
            self.messages.append((job.kind, job.client))
            return job

        with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            patch.setattr(InProcessGrid, "_job", noted)
            self.result = simulate(config, runs=Path(folder), bench=Workbench(config, federation()))
            self.server = load_file(Path(self.result["run"]) / "model.safetensors")
            path = Path(self.result["run"]) / "clients.safetensors"
            clients = load_file(path) if path.exists() else {}
        self.evaluation = self.result["evaluation"]
        self.local: dict[int, State] = {}
        for key, tensor in clients.items():
            pid, name = key.split("/", 1)
            self.local.setdefault(int(pid), {})[name] = tensor

    def sent(self, message_type: str) -> list[int]:
        return [pid for kind, pid in self.messages if kind == message_type]


@cache
def _trained(strategy: str, norm: str, evaluate: tuple[tuple[str, Any], ...]) -> Trained:
    return Trained(strategy, norm, evaluate)


def trained(strategy: str = "fedbn", norm: str = "batch_norm", **evaluate: Any) -> Trained:
    return _trained(strategy, norm, tuple(evaluate.items()))


# The same numbers, by hand --------------------------------------------------------------------------------------------


def network(state: Mapping[str, Tensor]) -> nn.Module:
    model = make_model("digits_cnn", make_norm("batch_norm"), num_classes=CLASSES, image_size=8, width=4)
    model.load_state_dict(dict(state), strict=True)
    return model.eval()


def images(pid: int) -> tuple[Tensor, Tensor]:
    split = federation().clients[pid].test
    return split.images[split.index].float() / 127.5 - 1, split.labels[split.index]


@torch.no_grad()
def hits(model: nn.Module, pid: int) -> int:
    x, y = images(pid)
    return int((model(x).argmax(1) == y).sum())


@torch.no_grad()
def reestimated(state: Mapping[str, Tensor], pid: int) -> nn.Module:
    """Return the network with the moments of each layer's input, measured from the bottom up on unlabelled images."""
    model, x = network(state), images(pid)[0][:IMAGES]
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            seen: list[Tensor] = []
            handle = layer.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))  # type: ignore[misc]
            model(x)
            handle.remove()
            axes = [0, *range(2, seen[0].dim())]
            layer.running_mean = seen[0].mean(axes)
            layer.running_var = seen[0].var(axes, unbiased=False)  # what the layer divides by while it measures
    return model


def by_domain(models: Mapping[int, nn.Module]) -> dict[str, float]:
    domains = dict.fromkeys(DOMAINS[pid] for pid in models)
    return {
        d: sum(hits(m, p) for p, m in models.items() if DOMAINS[p] == d)
        / sum(TEST[p] for p in models if DOMAINS[p] == d)
        for d in domains
    }


def averaged(run: Trained) -> State:
    total = sum(TRAIN)
    first = run.local[0]
    return {
        key: sum(TRAIN[p] * run.local[p][key].double() for p in TRAINING).div(total).float()  # type: ignore[union-attr]
        if first[key].is_floating_point()
        else first[key]
        for key in first
    }


def pooled(run: Trained) -> State:
    """Return the local tensors with moments pooled: E[x^2] - E[x]^2 over the union of all clients' images."""
    state, total = averaged(run), sum(TRAIN)
    for key in [key for key in state if key.endswith("running_var")]:
        mean_key = key.replace("running_var", "running_mean")
        mean = sum(TRAIN[p] * run.local[p][mean_key].double() for p in TRAINING) / total
        square = sum(TRAIN[p] * (run.local[p][key].double() + run.local[p][mean_key].double() ** 2) for p in TRAINING)
        state[key] = (square / total - mean**2).float()
    return state


def check(scores: Mapping[str, Any], expected: Mapping[str, float]) -> None:
    assert scores["per_domain"] == pytest.approx(expected, abs=1e-12)
    assert scores["mean"] == pytest.approx(sum(expected.values()) / len(expected), abs=1e-12)
    assert scores["worst"] == pytest.approx(min(expected.values()), abs=1e-12)


methods = pytest.mark.parametrize("strategy", ["fedbn", "silobn"])


@pytest.mark.few(1)
@methods
def test_own_is_each_client_s_own_model(strategy: str) -> None:
    run = trained(strategy)
    check(run.evaluation["own"], by_domain({p: network(run.server | run.local[p]) for p in TRAINING}))
    assert run.result["final"]["per_domain"] == run.evaluation["own"]["per_domain"]


@methods
def test_cross_is_every_domain_under_each_client_s_tensors(strategy: str) -> None:
    run = trained(strategy)
    under = run.evaluation["cross"]["under"]
    assert list(under) == [f"{DOMAINS[p]} (client {p})" for p in TRAINING]
    for p in TRAINING:
        model = network(run.server | run.local[p])
        check(under[f"{DOMAINS[p]} (client {p})"], by_domain(dict.fromkeys(TRAINING, model)))


@methods
def test_averaged_and_pooled(strategy: str) -> None:
    run = trained(strategy)
    for kind, local in (("averaged", averaged(run)), ("pooled", pooled(run))):
        check(run.evaluation[kind], by_domain(dict.fromkeys(TRAINING, network(run.server | local))))


@methods
def test_reestimated_statistics_are_those_of_the_test_images(strategy: str) -> None:
    run = trained(strategy)
    scores = by_domain({p: _unbiased(run.server | run.local[p], p) for p in TRAINING})
    check(run.evaluation["reestimated"], scores)


def _unbiased(state: Mapping[str, Tensor], pid: int) -> nn.Module:
    """Return the re-estimated network, its variances unbiased as PyTorch's running variances are."""
    model = reestimated(state, pid)
    sizes: dict[nn.Module, int] = {}
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    handles = [
        m.register_forward_pre_hook(lambda m, inputs: sizes.update({m: inputs[0].numel() // inputs[0].shape[1]}))
        for m in layers
    ]
    with torch.no_grad():
        model(images(pid)[0][:IMAGES])
    for handle in handles:
        handle.remove()
    for layer in layers:
        assert layer.running_var is not None
        layer.running_var *= sizes[layer] / (sizes[layer] - 1)
    return model


@pytest.mark.parametrize(
    "fallback", ["averaged", *(pytest.param(name, marks=pytest.mark.slow) for name in ("pooled", "reestimated"))]
)
def test_an_unseen_domain_uses_the_named_fallback(fallback: str) -> None:
    run = trained(kinds=("own", "unseen"), fallback=fallback)
    scores = run.evaluation["unseen"]
    assert scores["with"] == fallback
    state = run.server | (pooled(run) if fallback == "pooled" else averaged(run))
    model = _unbiased(state, 4) if fallback == "reestimated" else network(state)
    check(scores, by_domain({4: model}))


def test_the_server_s_model_of_fedavg_is_tested_on_the_unseen_domain() -> None:
    run = trained("fedavg", kinds=("own", "unseen"))
    check(run.evaluation["unseen"], by_domain({4: network(run.server)}))
    assert "with" not in run.evaluation["unseen"]
    assert run.result["bytes_of_locals_for_evaluation"] == 0


@pytest.mark.slow
def test_the_data_tells_the_evaluations_apart() -> None:
    """Without this, a matrix that scored one model five times could pass."""
    run = trained()
    kinds = {kind: run.evaluation[kind] for kind in ("own", "averaged", "pooled", "reestimated")}
    kinds |= run.evaluation["cross"]["under"]
    for one, other in itertools.combinations(kinds.values(), 2):
        assert one["per_domain"] != other["per_domain"]
    fallbacks = ("averaged", "pooled", "reestimated")  # of SiloBN: FedBN's agree by chance on some kinds of CPU
    unseen = {trained("silobn", kinds=("own", "unseen"), fallback=f).evaluation["unseen"]["mean"] for f in fallbacks}
    assert len(unseen) > 1


# Who is asked for what ------------------------------------------------------------------------------------------------


def test_the_held_out_domain_never_trains() -> None:
    run = trained(kinds=("own", "unseen"), fallback="pooled")
    assert run.sent("train") == [0, 1, 2, 3] * 2
    assert 4 not in run.local
    assert 4 not in run.sent("query.local")
    assert [pid for pid in run.sent("evaluate") if pid == 4] == [4]
    for line in run.result["rounds"]:
        assert 4 not in line["sampled"]
        assert "unseen" not in line["per_domain"]


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("kinds", "asked"),
    [
        (("own",), False),
        (("own", "reestimated"), False),
        (("own", "cross", "averaged", "pooled"), True),
        (("averaged",), True),
    ],
)
def test_local_tensors_travel_once_and_only_when_they_are_asked_for(kinds: tuple[str, ...], asked: bool) -> None:
    run = trained(kinds=kinds)
    assert run.sent("query.local") == (list(TRAINING) if asked else [])
    first_query = run.messages.index(("query.local", 0)) if asked else len(run.messages)
    assert ("train", 0) not in run.messages[first_query:]
    of_locals = sum(tensor.nbytes for local in run.local.values() for tensor in local.values())
    assert run.result["bytes_of_locals_for_evaluation"] == (of_locals if asked else 0)


def test_one_model_for_all_has_no_cross_evaluation() -> None:
    evaluation = trained("fedavg").evaluation
    for kind in ("cross", "averaged", "pooled"):
        assert set(evaluation[kind]) == {"not_applicable"}
        assert "one model" in evaluation[kind]["not_applicable"]
    assert set(evaluation["reestimated"]) == {"per_domain", "mean", "worst"}


@pytest.mark.parametrize("strategy", [pytest.param("fedavg", marks=pytest.mark.slow), "fedbn"])
def test_statistics_that_are_not_there_are_neither_pooled_nor_estimated(strategy: str) -> None:
    evaluation = trained(strategy, "group_norm").evaluation
    assert evaluation["reestimated"] == {"not_applicable": "the network has no running statistics"}
    assert set(evaluation["pooled"]) == {"not_applicable"}
    assert ("per_domain" in evaluation["averaged"]) == (strategy == "fedbn")


# Refusals, before training --------------------------------------------------------------------------------------------


def refused(federation_: Federation, message: str, strategy: str, norm: str = "batch_norm", **evaluate: Any) -> None:
    config = resolve(values(strategy, norm, **evaluate))
    bench = Workbench(config, federation_)
    for act in (lambda: plan(config, bench), lambda: simulate(config, runs=None, bench=bench)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(InProcessGrid, "_job", lambda *_: pytest.fail("a client was asked"))
            with pytest.raises(ConfigError, match=message):
                act()


def only(pids: Iterable[int]) -> Federation:
    return Federation("some", CLASSES, 8, tuple(federation().clients[pid] for pid in pids))


@methods
def test_a_server_without_local_tensors_is_not_tested_on_an_unseen_domain(strategy: str) -> None:
    count = len(trained(strategy).local[0])
    message = rf"'{strategy}' keeps {count} tensors on the clients .*evaluate\.fallback = 'pooled'"
    refused(federation(), message, strategy, kinds=("unseen",))


def test_unseen_needs_a_domain_that_is_held_out() -> None:
    refused(only(TRAINING), r"no domain is held out.*data\.held_out to one of a, b, c", "fedavg", kinds=("unseen",))


@pytest.mark.parametrize("fallback", ["pooled", "reestimated"])
def test_a_fallback_that_would_do_nothing_is_refused(fallback: str) -> None:
    message = "has no running statistics. Use 'averaged'"
    refused(federation(), message, "fedbn", "group_norm", kinds=("unseen",), fallback=fallback)


def test_validation_images_that_nobody_holds_are_refused() -> None:
    refused(federation(), r"data\.validation holds no images back", "fedavg", kinds=("own",), split="validation")
