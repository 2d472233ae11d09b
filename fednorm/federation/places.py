"""Which roles a strategy's rule gives to places in a model (:mod:`fednorm.recognition.places`)."""

from __future__ import annotations

from torch import nn

from fednorm.recognition.places import keys_at
from fednorm.roles import Role, RoleRule


def roles_at(model: nn.Module, rule: RoleRule) -> dict[str, Role]:
    """Return the roles that a rule gives to places, by key; where two meet, local goes before reset.

    Raises:
        ConfigError: A pattern matches nothing.
    """
    reset = dict.fromkeys(keys_at(model, rule.reset_modules), Role.RESET)
    return reset | dict.fromkeys(keys_at(model, rule.local_modules), Role.LOCAL)
