"""What a tensor is, and what becomes of it.

Three questions, three enumerations:

* :class:`Kind`: what is this tensor? Declared by the norm that owns it, by layer *type*, never by name.
* :class:`Role`: what does the federation do with it? Decided by a strategy, from kinds.
* :class:`Carry`: what does the boundary of an experience do with it?
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Self


class Kind(StrEnum):
    """What a tensor is."""

    WEIGHT = "weight"
    """A learned weight or bias outside any normalization layer, or the raw weight of a reparameterized one."""
    GAIN = "gain"
    """A learned gain that multiplies a reparameterized weight (scaled weight standardization)."""
    SCALE = "scale"
    """A learned scale of a normalization layer."""
    SHIFT = "shift"
    """A learned shift of a normalization layer."""
    MEAN = "mean"
    """A running mean."""
    VAR = "var"
    """A running variance."""
    QUADRATIC = "quadratic"
    """A running quadratic mean."""
    DEVIATION = "deviation"
    """A running mean absolute deviation."""
    COUNT = "count"
    """An integer that counts batches or steps."""
    GATE = "gate"
    """A learned mixture weight between statistics, or what a learned gate is computed with."""
    GRAD_STAT = "grad_stat"
    """A running statistic of gradients."""
    WINDOW = "window"
    """Recent statistics, kept one by one."""
    CONSTANT = "constant"
    """A buffer that training never writes: an index table, a filter, the mean that images are normalized with."""


LEARNED = frozenset({Kind.WEIGHT, Kind.GAIN, Kind.SCALE, Kind.SHIFT, Kind.GATE})
"""Kinds that gradients train; a server optimizer may touch these and no others."""

NORMALIZATION = frozenset(Kind) - {Kind.WEIGHT, Kind.GAIN, Kind.CONSTANT}
"""Kinds that live in a normalization layer."""

STATISTICS = NORMALIZATION - LEARNED
"""Kinds that are estimated from data rather than trained by gradients."""

NEVER_NEGATIVE = frozenset({Kind.VAR, Kind.QUADRATIC, Kind.DEVIATION})
"""Kinds that have no negative values."""

TRANSIENT = frozenset({Kind.GRAD_STAT, Kind.WINDOW})
"""Kinds that mean nothing beside weights other than those they were estimated with: an average over clients is none."""


class Role(StrEnum):
    """What the federation does with a tensor."""

    SHARED = "shared"
    """Sent, averaged, sent back."""
    LOCAL = "local"
    """Never leaves the client."""
    POOLED = "pooled"
    """Sent as a moment, combined by the law of total variance instead of averaged, sent back."""
    RESET = "reset"
    """Neither sent nor kept: starts from its initial value every round."""
    CONSTANT = "constant"
    """Neither sent nor kept, for it never changes: the same in every copy of the model, which is checked.

    Buffers that training never writes, and what a run does not train."""


class Carry(StrEnum):
    """What the boundary of an experience does with a tensor."""

    KEEP = "keep"
    """Goes on as it is: what was learned or estimated holds for the next experience until that changes it."""
    RESET = "reset"
    """Starts from its initial value: gradients' statistics and windows tell of the experience that has ended."""


@dataclass(frozen=True)
class RoleRule:
    """A strategy's map from what a tensor is, and where it stands, to its role.

    A place goes before a kind. What neither names has its usual role: it is shared, but for what is transient
    (:data:`TRANSIENT`), which begins anew every round; a constant is one in every strategy.

    Attributes:
        roles: The role of each kind that has not its usual one.
        why: What the rule is for, in the strategy's words; quoted when the rule would do nothing.
        local_modules: Patterns (:mod:`fednorm.recognition.places`) of what stays on its client, whatever it is:
            ``("head",)`` for the last weight layer.
        reset_modules: Patterns of what starts from its initial value every round.
        frozen: Keys of what the run never trains, ``train.trainable``; a constant, wherever it stands.
    """

    roles: Mapping[Kind, Role] = field(default_factory=dict)
    why: str = ""
    local_modules: tuple[str, ...] = ()
    reset_modules: tuple[str, ...] = ()
    frozen: frozenset[str] = frozenset()

    def __getitem__(self, kind: Kind) -> Role:
        """Return the role of a kind."""
        if kind is Kind.CONSTANT:
            return Role.CONSTANT
        return self.roles.get(kind, Role.RESET if kind in TRANSIENT else Role.SHARED)

    def overridden(self, roles: Mapping[Kind, Role]) -> Self:
        """Return this rule with some kinds' roles replaced."""
        return replace(self, roles={**self.roles, **roles})

    def freezing(self, keys: frozenset[str]) -> Self:
        """Return this rule with keys of the state dict that never change."""
        return replace(self, frozen=self.frozen | keys)

    def keeping(self, *patterns: str) -> Self:
        """Return this rule with more places whose tensors stay on their clients."""
        return replace(self, local_modules=(*self.local_modules, *patterns))
