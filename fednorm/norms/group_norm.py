"""Group normalization: per sample, over groups of channels and all positions.

Wu, He. Group Normalization. ECCV 2018. https://arxiv.org/abs/1803.08494

    y = (x - mean) / sqrt(var + eps) * weight + bias

Mean and biased variance are those of one sample and one group of C / num_groups channels, over (C / G, H, W);
``weight`` and ``bias`` are per channel. Train = eval; no running statistics; a batch of one works. An input (N, C)
is normalized over the features of each group.

Cost: PyTorch's fused kernel, batch normalization's on maps; on tokens, whose features stand side by side, two to five
times layer normalization's, for it copies them first.
Federated: no statistics to disagree about; both tensors are shared by FedAvg, local under FedBN's rule.
Continual: nothing is carried over but the learned scale and shift.
Differs from the paper: its default is 32 groups, for ImageNet's widths. Ours is 2, the count of the federated line of
work (FedWSQ, arXiv 2506.23516; HybridBN, arXiv 2505.21877), which divides every even width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fednorm import options
from fednorm.cards import Citation
from fednorm.errors import ConfigError, DataError
from fednorm.norms._features import require_features
from fednorm.roles import Kind
from fednorm.spec import Norm, NormSpec, TensorSpec


class OneChannelGroups(nn.GroupNorm):
    """Group normalization with a group for each channel: what is in a group are the positions of one channel."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized input, of the shape of ``x``.

        Raises:
            DataError: There is one position: every group is one number, and what is left of it is 0.
        """
        if x.numel() == x.shape[0] * self.num_channels:
            raise DataError(
                f"Group normalization with {self.num_groups} groups of {self.num_channels} channels meets an input of "
                f"shape {tuple(x.shape)}, one number a group: its mean is itself, and nothing is left of it. Take "
                "fewer groups, or larger images."
            )
        return super().forward(x)


def checked_groups(num_channels: int, num_groups: int, spatial_dims: int) -> int:
    """Return ``num_groups`` where it divides ``num_channels``, and a group of features has more than one of them.

    Raises:
        ConfigError: It does not, or has not; the message lists the numbers that do.
    """
    if num_channels % num_groups:
        valid = ", ".join(str(n) for n in range(1, num_channels + 1) if num_channels % n == 0)
        raise ConfigError(
            f"group normalization splits the channels evenly, but a layer has {num_channels} channels and num_groups "
            f"is {num_groups}. Set num_groups to one of {valid} (1 is layer_norm)."
        )
    if spatial_dims == 0 and num_groups == num_channels:
        if num_channels == 1:
            require_features("group_norm", num_channels, spatial_dims)
        valid = ", ".join(str(n) for n in range(1, num_channels // 2 + 1) if num_channels % n == 0)
        raise ConfigError(
            f"group normalization of features (N, C) with one feature a group leaves nothing of them: a layer has "
            f"{num_channels} features and num_groups is {num_groups}. Set num_groups to one of {valid}."
        )
    return num_groups


@dataclass(frozen=True, kw_only=True)
class GroupNorm(Norm):
    """Group normalization and its options.

    Attributes:
        num_groups: G, the number of groups; it must divide the number of channels of every layer.
        eps: Added to the variance, greater than 0.

    Raises:
        ConfigError: An option is out of range.
    """

    num_groups: int = 2
    eps: float = 1e-5

    def __post_init__(self) -> None:
        options.whole("group_norm", "num_groups", self.num_groups, at_least=1)
        options.number("group_norm", "eps", self.eps, above=0)

    def layer(self, num_channels: int, spatial_dims: int) -> nn.Module:
        """Return a group normalization over C channels; it takes any number of spatial axes.

        Raises:
            ConfigError: ``num_groups`` does not divide ``num_channels``, or features (N, C) have one a group.
        """
        groups = checked_groups(num_channels, self.num_groups, spatial_dims)
        return (OneChannelGroups if groups == num_channels else nn.GroupNorm)(groups, num_channels, eps=self.eps)


SPEC = NormSpec(
    name="group_norm",
    summary="y = (x - mean_g) / sqrt(var_g + eps) * weight + bias, moments per sample and group of channels.",
    citation=Citation(
        title="Group Normalization", authors="Wu, He", year=2018, arxiv="1803.08494", where="Equations 1, 2 and 7"
    ),
    make=GroupNorm,
    layers=(nn.GroupNorm,),
    tensors={"weight": TensorSpec(Kind.SCALE), "bias": TensorSpec(Kind.SHIFT)},
    deviations=("Two groups by default, as federated work has it; the paper's default is 32.",),
    verified=(
        "It is torch.nn.GroupNorm itself.",
        "The formula written out in float64, on drawn maps and features, with finite differences of its gradient.",
    ),
)
