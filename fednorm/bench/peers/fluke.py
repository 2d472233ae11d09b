"""fluke: FedAVG of its clients and its server, in one process.

https://github.com/makgyver/fluke.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from fednorm.bench.case import NUM_CLASSES, Case
from fednorm.bench.meter import Cost, ProcessWatch, RoundClock, cost
from fednorm.bench.peers import Setting, require_peer, setting_of


def run(case: Case) -> Cost:
    """Run a case in fluke.

    Raises:
        ConfigError: It is not installed.
    """
    require_peer("fluke")
    setting = setting_of(case)
    with ProcessWatch(descendants=False) as watch:
        clock = RoundClock()
        algorithm = _algorithm(setting, clock)
        algorithm.run(case.rounds + 1, 1.0)
        tensors = {key: tensor.clone() for key, tensor in algorithm.server.model.state_dict().items()}
    return cost(clock.wall, clock.cpu, watch.memory, tensors)


def _algorithm(setting: Setting, clock: RoundClock) -> Any:
    from fluke import FlukeENV
    from fluke.algorithms.fedavg import FedAVG
    from fluke.client import Client
    from fluke.config import OptimizerConfigurator
    from fluke.evaluation import ClassificationEval
    from fluke.server import Server

    case = setting.case
    environment = FlukeENV()
    environment.set_evaluator(ClassificationEval(eval_every=1, n_classes=NUM_CLASSES))
    environment.set_eval_cfg(pre_fit=False, post_fit=False, locals=False, server=True)
    loader = _loader_class()
    optimizer = OptimizerConfigurator({"name": torch.optim.SGD, "lr": setting.learning_rate})
    clients = [
        Client(
            index=number,
            train_set=loader(setting, number),
            test_set=None,
            optimizer_cfg=optimizer,
            loss_fn=torch.nn.CrossEntropyLoss(),
            local_epochs=1,
        )
        for number in range(case.clients)
    ]
    server = Server(deepcopy(setting.model), _test_loader(setting), clients, weighted=True)
    algorithm = FedAVG(case.clients, None, {}, clients=clients, server=server)
    algorithm.set_callbacks(_clock_class()(clock))
    return algorithm


def _test_loader(setting: Setting) -> Any:
    from fluke.data import FastDataLoader

    images, labels = setting.test
    return FastDataLoader(images, labels, num_labels=NUM_CLASSES, batch_size=64, skip_singleton=False)


def _loader_class() -> Any:
    from fluke.data import FastDataLoader

    class Ordered(FastDataLoader):  # type: ignore[misc]
        """fluke's loader, which goes through its images in the case's order."""

        def __init__(self, setting: Setting, client: int) -> None:
            data = setting.clients[client]
            super().__init__(
                data.train_images,
                data.train_labels,
                num_labels=NUM_CLASSES,
                batch_size=setting.case.batch_size,
                skip_singleton=False,
            )
            self._setting, self._client, self._round = setting, client, 0

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            self._round += 1
            return self._setting.batches(self._client, self._round)

    return Ordered


def _clock_class() -> Any:
    from fluke.utils import FederationObserver

    class Ticks(FederationObserver):  # type: ignore[misc]
        """Reads the clocks at the end of each round."""

        def __init__(self, clock: RoundClock) -> None:
            self._clock = clock

        def end_round(self, round: int) -> None:  # noqa: ARG002 - fluke's method
            self._clock.tick()

    return Ticks
