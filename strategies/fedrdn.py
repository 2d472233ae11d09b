"""FedRDN: every training image is normalized by random clients' input statistics, test images by their own client's.

Yan, Fu, Li, Xie, Ma, Yang, Zhu. A Simple Data Augmentation for Feature Distribution Skewed Federated
Learning. CVPR 2025. https://arxiv.org/abs/2306.09363. Official code: IAMJackYan/FedRDN, fedavg_with_preprocess.py.

    client k:  mean_k = mean over its training images of each one's mean,  std_k likewise of each one's std (n - 1)
    training:  x <- (x - mean_i) / std_j        i, j drawn for each image and apart, from the clients that train
    test:      x <- (x - mean_k) / std_k

The clients' means and stds, 3 and 3 numbers each, are sent once, before the first round (``query.measure``), and every
training message brings all of them along. The weights' part is FedAvg's, or FedBN's with ``roles = "fedbn"``. What
``train.augment`` does to an image comes first, as in the official code. A client without training images is tested by
the statistics of all others'.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Unpack

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor, nn

from fednorm.cards import Citation
from fednorm.config import choose
from fednorm.data.normalize import measured_by_image
from fednorm.data.scaling import Scaling
from fednorm.errors import ConfigError
from fednorm.federation.local import Local, Turn
from fednorm.federation.replies import EXTRA, UnfitReply
from fednorm.federation.spec import StrategySpec
from fednorm.federation.strategy import Common, NormStrategy
from fednorm.federation.wire import unpack
from fednorm.rng import torch_stream
from fednorm.roles import NORMALIZATION, Role, RoleRule

if TYPE_CHECKING:
    from fednorm.training.trainee import Trainee

MEANS, STDS = "input-means", "input-stds"
"""The settings of a training message that hold all clients' statistics, one client's channels after the other's."""

SECONDS = 600.0
"""How long to wait for the clients' statistics."""

FEDBN = RoleRule(dict.fromkeys(sorted(NORMALIZATION), Role.LOCAL), why="FedRDN with roles='fedbn'")


@dataclass(frozen=True)
class Drawn(Scaling):
    """A scaling whose groups are clients, of which each image is given a mean and a std.

    Attributes:
        draw: ``image``, for each image of a batch, or ``batch``, once for all of them.
        generator: Drawn from.
    """

    draw: str = "image"
    generator: torch.Generator = field(default_factory=torch.Generator, compare=False)

    def __call__(self, images: Tensor, groups: Tensor | None = None) -> Tensor:
        """Return what the network is given of images (uint8): (x / 255 - mean_i) / std_j."""
        del groups
        if images.dtype != torch.uint8:
            return images
        count, wanted = len(self.mean), len(images) if self.draw == "image" else 1
        of_mean, of_std = (torch.randint(count, (wanted,), generator=self.generator) for _ in range(2))
        floats = images.to(torch.float32, memory_format=torch.channels_last).div_(255)
        mean, std = self._rows(self.mean, of_mean, images), self._rows(self.std, of_std, images)
        return floats.sub_(mean.float()).div_(std.float())


class RandomlyScaled(Local):
    """Trains on images that are scaled as random clients' are."""

    def check(self, trainee: Trainee) -> None:
        """Refuse streams."""
        if trainee.config.kind == "federated_continual":
            raise ConfigError(
                "Strategy fedrdn draws from the input statistics of clients, which on streams change with every "
                "experience. Take strategy fedavg, and data.normalize = 'domain'."
            )

    def measure(self, turn: Turn) -> Mapping[str, Tensor]:
        """Return the mean and std of the client's training images, by channel."""
        own = measured_by_image([turn.client.train])
        return {
            MEANS: torch.tensor(own.mean[0], dtype=torch.float64),
            STDS: torch.tensor(own.std[0], dtype=torch.float64),
        }

    def begin(self, turn: Turn) -> None:
        """Scale training images anew; where no client's statistics came, by the client's own, as test images."""
        train = turn.client.train
        means, stds = (list(map(float, turn.config.get(key, ()))) for key in (MEANS, STDS))
        if not means:
            return
        channels = len(train.scaling.mean[0])
        mean, std = (tuple(zip(*[iter(values)] * channels, strict=True)) for values in (means, stds))
        generator = torch_stream(turn.trainee.config.seed, *turn.names, "fedrdn")
        scaling = Drawn(mean, std, self.strategy.draw, generator)
        turn.client = dataclasses.replace(turn.client, train=dataclasses.replace(train, scaling=scaling))


class FedRDN(NormStrategy):
    """Averages as FedAvg or FedBN, and tells clients all clients' input statistics.

    Args:
        model: The network.
        roles: ``fedavg`` averages every tensor, ``fedbn`` those outside normalization layers.
        draw: Whether a mean and a std are drawn for each ``image``, as the paper says, or each ``batch``, as the
            official code does.
        common: See :class:`~fednorm.federation.strategy.NormStrategy`.

    Raises:
        ConfigError: An option is none of these.
        RoleError: ``roles = "fedbn"`` on a network without normalization layers.
    """

    local = RandomlyScaled

    def __init__(
        self, model: nn.Module, *, roles: str = "fedavg", draw: str = "image", **common: Unpack[Common]
    ) -> None:
        choose("strategy.roles", roles, ("fedavg", "fedbn"))
        choose("strategy.draw", draw, ("image", "batch"))
        self.roles, self.draw = roles, draw
        super().__init__(model, **common)
        self._statistics: dict[str, list[float]] | None = None

    def role_rule(self) -> RoleRule:
        """Share everything, or keep normalization layers local."""
        return FEDBN if self.roles == "fedbn" else self.rule

    def client_config(self) -> Mapping[str, float | list[float]]:
        """Send the statistics of all clients that train."""
        return {key: values for key, values in (self._statistics or {}).items() if values}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask all clients that train for their statistics before the first round, and after a resumption."""
        if self._statistics is None:
            self.discover(grid)
            self._statistics = self._collected(grid, server_round)
        return super().configure_train(server_round, arrays, config, grid)

    def _collected(self, grid: Grid, server_round: int) -> dict[str, list[float]]:
        """Return the statistics in the order of partition ids; of a client that does not know, none are drawn."""
        content = RecordDict({"config": ConfigRecord({"server-round": server_round})})
        asked = [node for node in self.trainers if node.described]
        replies: Any = grid.send_and_receive(self._address(content, "query.measure", asked), timeout=SECONDS)
        collected: dict[str, list[float]] = {MEANS: [], STDS: []}
        for _, reply in self._in_order(replies, during="the exchange of input statistics"):
            try:
                of_client = _read(reply)
            except UnfitReply:
                continue
            for key, values in of_client.items():
                collected[key] += values
        return collected


def _read(reply: Message) -> dict[str, list[float]]:
    """Return a client's mean and std.

    Raises:
        UnfitReply: They are not there, not as many, not finite, or a std is not greater than 0.
    """
    tensors = unpack(reply.content.array_records[EXTRA]) if reply.has_content() and EXTRA in reply.content else {}
    values = {key: tensors[key].double().flatten() for key in (MEANS, STDS) if key in tensors}
    if len(values) < 2 or len(values[MEANS]) != len(values[STDS]) or not len(values[MEANS]):
        raise UnfitReply("expected the mean and the std of its images")
    if not torch.cat(list(values.values())).isfinite().all() or values[STDS].min() <= 0:
        raise UnfitReply("a mean or a std of its images is none")
    return {key: tensor.tolist() for key, tensor in values.items()}


SPEC = StrategySpec(
    name="fedrdn",
    summary="Training images are normalized by random clients' mean and std, test images by their own client's.",
    citation=Citation(
        title="A Simple Data Augmentation for Feature Distribution Skewed Federated Learning",
        authors="Yan, Fu, Li, Xie, Ma, Yang, Zhu",
        year=2025,
        arxiv="2306.09363",
        where="official code IAMJackYan/FedRDN",
    ),
    make=FedRDN,
    own_scaling=True,
    deviations=(
        "A mean and a std are drawn for each image, as the paper has it; the official code draws them for each batch "
        "(draw = 'batch').",
        "Statistics are those of the training images as they are; the official code measures them augmented.",
    ),
    verified=(
        "The statistics and the scaling against the formulas written out in float64.",
        "A client's training against one in plain PyTorch on images that were scaled by hand.",
    ),
)
