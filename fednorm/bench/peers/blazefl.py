"""BlazeFL: FedAvg of its ``contrib``, one client after the other.

https://github.com/blazefl/blazefl. It sends tensors as they lie in memory and takes PyTorch's default layout alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import redirect_stderr
from copy import deepcopy
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn

from fednorm.bench.case import Case
from fednorm.bench.meter import Cost, ProcessWatch, RoundClock, cost
from fednorm.bench.peers import Setting, require_peer, setting_of


def run(case: Case) -> Cost:
    """Run a case in BlazeFL.

    Raises:
        ConfigError: It is not installed.
    """
    require_peer("blazefl")
    from blazefl.contrib import FedAvgBaseClientTrainer, FedAvgBaseServerHandler

    setting = setting_of(case, torch.contiguous_format)
    with redirect_stderr(StringIO()), ProcessWatch(descendants=False) as watch:  # progress bars
        clock = RoundClock()
        images = _Images(setting)
        of_both = {"model_selector": _Models(setting), "model_name": case.model, "dataset": images, "device": "cpu"}
        settings = {"num_clients": case.clients, "batch_size": case.batch_size, "seed": case.seed, **of_both}
        server = FedAvgBaseServerHandler(global_round=case.rounds + 1, sample_ratio=1.0, **settings)
        trainer = FedAvgBaseClientTrainer(epochs=1, lr=setting.learning_rate, **settings)
        while not server.if_stop():
            images.round += 1
            trainer.local_process(server.downlink_package(), sorted(server.sample_clients()))
            for package in trainer.uplink_package():
                server.load(package)
            server.get_summary()
            clock.tick()
        tensors = {key: tensor.clone() for key, tensor in server.model.state_dict().items()}
    return cost(clock.wall, clock.cpu, watch.memory, tensors)


class _Models:
    """Gives out the case's network."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting

    def select_model(self, model_name: str) -> nn.Module:  # noqa: ARG002 - BlazeFL's method
        return deepcopy(self._setting.model)


class _Images:
    """A partitioned data set whose loaders are lists of batches in the case's order.

    Attributes:
        round: The present round, the first of which is 1.
    """

    def __init__(self, setting: Setting) -> None:
        self._setting, self.round = setting, 0

    def get_dataloader(self, type_: Any, cid: int | None, **_: Any) -> Iterator[tuple[Tensor, Tensor]]:
        if type_ == "train" and cid is not None:
            return self._setting.batches(cid, self.round)
        images, labels = self._setting.test
        return zip(torch.split(images, 64), torch.split(labels, 64), strict=True)
