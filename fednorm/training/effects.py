"""What stands around an update, by section ``train`` and the norm: effects on the gradients and on the weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fednorm.config import RunConfig
from fednorm.errors import ConfigError
from fednorm.optim.agc import AdaptiveGradientClipping
from fednorm.optim.cbp import ContinualBackprop
from fednorm.optim.clip_norm import ClipNorm
from fednorm.optim.hyperspherical import Hyperspherical
from fednorm.optim.l2_init import L2Init
from fednorm.optim.l2_scales import L2Scales
from fednorm.optim.projection import WeightProjection
from fednorm.optim.redo import ReDo
from fednorm.optim.self_normalized_resets import SelfNormalizedResets
from fednorm.optim.weight_clipping import WeightClipping
from fednorm.spec import Norm

Effect = Callable[[], None]


def adjusting(config: RunConfig, model: nn.Module) -> tuple[Effect, ...]:
    """Return the effects between backward pass and update, in order: penalties, then clipping.

    Raises:
        ConfigError: One does not fit the network.
    """
    train, adjust = config.train, list[Effect]()
    if train.l2_init:
        adjust.append(L2Init(model.parameters(), train.l2_init))
    if train.l2_scales:
        adjust.append(L2Scales(model, train.l2_scales))
    if train.agc:
        adjust.append(AdaptiveGradientClipping(model, train.agc, layers=train.agc_on))
    if train.clip_norm:
        adjust.append(ClipNorm(model.parameters(), train.clip_norm))
    return tuple(adjust)


def following(config: RunConfig, norm: Norm, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Effect, ...]:
    """Return the effects after the update, in order: new units, then what bounds all weights.

    Raises:
        ConfigError: One does not fit the network, or another.
    """
    after = _renewing(config, model, optimizer)
    train = config.train
    projection = norm.after_update(model)
    if projection is None and train.project:
        projection = WeightProjection(model)
    if projection is not None and train.hyperspherical:
        raise ConfigError(
            f"train.hyperspherical gives every unit's weights length 1, and norm {config.norm.name!r} "
            f"{'with train.project' if train.project else ''} keeps the initial length of each layer's: one undoes the "
            "other. Leave one of the two out."
        )
    if projection is not None:
        after.append(projection)
    if train.weight_clip:
        after.append(WeightClipping(model, train.weight_clip))
    if train.hyperspherical:
        after.append(Hyperspherical(model))
    return tuple(after)


def _renewing(config: RunConfig, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Effect]:
    """Return the effects that make units new."""
    train, seed, effects = config.train, config.seed, list[Effect]()
    if train.redo_every:
        effects.append(ReDo(model, optimizer, every=train.redo_every, tau=train.redo_tau, seed=seed))
    if train.cbp_rate:
        maturity, decay = train.cbp_maturity, train.cbp_decay
        effects.append(
            ContinualBackprop(model, optimizer, rate=train.cbp_rate, maturity=maturity, decay=decay, seed=seed)
        )
    if train.snr_eta:
        effects.append(SelfNormalizedResets(model, optimizer, eta=train.snr_eta, longest=train.snr_longest, seed=seed))
    return effects
