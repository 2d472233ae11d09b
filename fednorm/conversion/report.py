"""What a conversion did, what it looked at and left, and what a reader of its results should know."""

from __future__ import annotations

from dataclasses import dataclass, field

from fednorm.spec import Norm

UNKNOWN = "it may normalize, by a formula that fednorm does not know"
DECLARED_NONE = "its class was declared to be no normalization layer"
NO_CONSTANT = "the method has no constant for this activation"
NOT_2D = "the method has a convolution in place of nn.Conv2d only"
DECLARE = (
    "Say what it is like, fednorm.declare({kind}, like=nn.LayerNorm), or that it is to be left, "
    "fednorm.declare({kind}, like=None)."
)
COMPUTED = "its weight is computed from others, and stays so"
_SHOWN = 8


@dataclass(frozen=True)
class Left:
    """A module that a conversion looked at and left as it is.

    Attributes:
        path: Where it stands.
        type: The name of its class.
        reason: Why it was left.
    """

    path: str
    type: str
    reason: str


@dataclass
class ConversionReport:
    """What a conversion did.

    Attributes:
        norm: The method that was put in.
        layers: Paths of the normalization layers that are the method's now: replaced, or the method's already.
        inserted: Paths of the activations before which a layer was put, in a network that had none.
        convolutions: Paths of the convolutions that are the method's now.
        activations: Paths of the activations that were multiplied by their constant, or replaced by the method's own.
        attentions: Paths of the attentions that are the method's now.
        residuals: Paths of the residual sums that are the method's now.
        left: What was looked at and left: layers that normalize by an unknown formula, convolutions and activations
            that the method has nothing for, weights that are computed from others before every forward pass (and
            stay so), classes that were declared to be no normalization layer.
        notes: What a reader of the results should know, one sentence each.
    """

    norm: Norm
    layers: list[str] = field(default_factory=list)
    inserted: list[str] = field(default_factory=list)
    convolutions: list[str] = field(default_factory=list)
    activations: list[str] = field(default_factory=list)
    attentions: list[str] = field(default_factory=list)
    residuals: list[str] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def unknown(self) -> str:
        """Return what to say of the layers whose formula is unknown; empty without any."""
        modules = [left for left in self.left if left.reason == UNKNOWN]
        if not modules:
            return ""
        kinds = list(dict.fromkeys(left.type for left in modules))
        return f"Left, for their formula is unknown: {_listed(modules)}. {DECLARE.format(kind=kinds[0])}"

    def write_notes(self, *, scales: bool) -> None:
        """Write the notes that follow from what was done and left.

        Args:
            scales: Whether the method scales activations.
        """

        def kinds(reason: str) -> str:
            return ", ".join(sorted({left.type for left in self.left if left.reason == reason}))

        if self.unknown():
            self.notes.append(self.unknown())
        computed = [left for left in self.left if left.reason == COMPUTED]
        if computed:
            self.notes.append(
                f"Weight norm, spectral norm, pruning or a parametrization is kept on {_listed(computed)}."
            )
        if self.norm.residual_alpha is not None:
            self.notes.append(
                "Residual scaling (alpha, beta, skip gains) is not applied: where a foreign model adds its branches is "
                "not visible. fednorm's own residual models have it."
            )
        if scales and not self.activations:
            self.notes.append("No activation module was found to scale; functional activations cannot be seen.")
        if kinds(NO_CONSTANT):
            self.notes.append(f"Left without a constant, for want of one: {kinds(NO_CONSTANT)}.")
        if kinds(NOT_2D):
            self.notes.append(f"Only nn.Conv2d is converted; left as they are: {kinds(NOT_2D)}.")


def _listed(modules: list[Left]) -> str:
    shown = ", ".join(f"{left.path or 'the model itself'} ({left.type})" for left in modules[:_SHOWN])
    return shown if len(modules) <= _SHOWN else f"{shown} and {len(modules) - _SHOWN} more"
