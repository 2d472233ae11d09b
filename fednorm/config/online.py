"""Online learning: one pass over each experience, small batches."""

from __future__ import annotations

from collections.abc import Mapping

from fednorm.config.run import RunConfig
from fednorm.errors import ConfigError

ONLINE: Mapping[str, int] = {"epochs": 1, "batch_size": 10}
"""Section ``train`` of online learning. See :func:`require_online`."""


def require_online(config: RunConfig) -> RunConfig:
    """Return a configuration that was asked for as online learning, whose ``train`` began as :data:`ONLINE`.

    Raises:
        ConfigError: It makes more than one pass over each experience.
    """
    epochs = config.train.epochs
    if epochs != 1:
        raise ConfigError(
            f"online=True / --online is one pass over each experience, and train.epochs is {epochs}. Leave one of the "
            "two out."
        )
    return config
