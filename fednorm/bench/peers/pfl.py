"""pfl-research: FederatedAveraging on its simulated backend, in one process.

https://github.com/apple/pfl-research. It averages parameters alone: where the network has batch
normalization, its running statistics are the last client's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fednorm.bench.case import Case
from fednorm.bench.meter import Cost, ProcessWatch, RoundClock, cost
from fednorm.bench.peers import Setting, require_peer, setting_of


def run(case: Case) -> Cost:
    """Run a case in pfl-research.

    Raises:
        ConfigError: It is not installed.
    """
    require_peer("pfl")
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByDatapoints
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam.base import NNTrainHyperParams
    from pfl.model.pytorch import PyTorchModel

    setting = setting_of(case)
    with ProcessWatch(descendants=False) as watch:
        clock = RoundClock()
        network = _Network(setting.model)
        model = PyTorchModel(network, torch.optim.SGD, torch.optim.SGD(network.parameters(), lr=1.0))
        rounds = _rounds_class()(setting, clock)
        users = FederatedDataset(rounds.user, get_user_sampler("minimize_reuse", list(range(case.clients))))
        often = case.rounds + 2  # users are evaluated in the first round, which is not timed, and never again
        FederatedAveraging().run(
            NNAlgorithmParams(case.rounds + 1, often, train_cohort_size=case.clients, val_cohort_size=0),
            SimulatedBackend(users, users, [WeightByDatapoints()]),
            model,
            NNTrainHyperParams(
                local_num_epochs=1, local_learning_rate=setting.learning_rate, local_batch_size=case.batch_size
            ),
            callbacks=[rounds],
            send_metrics_to_platform=False,  # which prints them
        )
        tensors = {key: tensor.detach().clone() for key, tensor in network.network.named_parameters()}
    return cost(clock.wall, clock.cpu, watch.memory, tensors)


class _Network(nn.Module):
    """The network, with the loss and the metrics that pfl asks of a model."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        self.train()
        return functional.cross_entropy(self.network(images), labels)

    @torch.no_grad()
    def metrics(self, images: Tensor, labels: Tensor) -> dict[str, Any]:
        from pfl.metrics import Weighted

        self.eval()
        logits = self.network(images)
        hits = int((logits.argmax(1) == labels).sum())
        loss = functional.cross_entropy(logits, labels, reduction="sum").item()
        return {"loss": Weighted(loss, len(labels)), "accuracy": Weighted(hits, len(labels))}


def _rounds_class() -> Callable[..., Any]:
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.pytorch import PyTorchTensorDataset
    from pfl.hyperparam.base import NNEvalHyperParams
    from pfl.metrics import Metrics

    class Rounds(TrainingProcessCallback):  # type: ignore[misc]
        """Makes users' data sets, in the order of the present round, and ends a round with an evaluation."""

        def __init__(self, setting: Setting, clock: RoundClock) -> None:
            self._setting, self._clock, self._round = setting, clock, 1
            self._test = PyTorchTensorDataset(setting.test)

        def user(self, client: int) -> Any:
            data, rows = self._setting.clients[client], self._setting.order(client, self._round)
            return PyTorchTensorDataset((data.train_images[rows], data.train_labels[rows]), user_id=str(client))

        def after_central_iteration(self, _: Any, model: Any, **__: Any) -> tuple[bool, Any]:
            model.evaluate(self._test, eval_params=NNEvalHyperParams(local_batch_size=64))
            self._round += 1
            self._clock.tick()
            return False, Metrics()

    return Rounds
