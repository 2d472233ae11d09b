"""NaP's projection: after every update each hidden weight goes back to the norm it started with.

Lyle, Zheng, Khetarpal, Martens, van Hasselt, Pascanu, Dabney. Normalization and effective learning rates in
reinforcement learning. NeurIPS 2024. https://arxiv.org/abs/2407.01800 (Algorithm 1, section 3.3, appendix D)

    W <- rho W / ||W||_F,     rho = ||W_initial||_F

for each hidden layer as a whole, not for each neuron. A normalization layer after W makes the network independent of
the scale of W, so the projection does not change its function; it keeps the norm, which gradients can only let grow,
from shrinking the effective learning rate. The output layer is not followed by a normalization layer and is never
projected, nor are biases. That holds for a normalization layer of any method whose card says that it is
scale-invariant (``dyt`` and ``seednorm`` are not, and are left alone), so batch_norm and adab2n networks are projected
as they are. Two things to know about other norms than ``nap``, which removes biases and has no statistics:
a bias before a norm that does not subtract it per channel (layer_norm, group_norm, rms_norm) breaks the independence;
and running statistics lag behind a projection, which is too little to matter after every update (``every`` = 1).

Scale and shift (s, m) of every normalization layer, after the same updates, by ``affine``:

* ``decay`` (default): (s, m) <- (alpha s + 1 - alpha, alpha m), towards their initial values; for any nonlinearity.
  The paper has it in all its continual experiments and does not state alpha.
* ``joint``: (s, m) <- sqrt(d) (s, m) / sqrt(|s|^2 + |m|^2), d the number of channels. Only where the next module is a
  nonlinearity with f(c x) = c f(x): the scale then passes through to the next layer. If that is normalized, nothing
  changes; if it is the output layer, which is free, it can take the scale up.
* ``free``: neither.

What ``joint`` does elsewhere. The last norm of a residual branch, and any other without a nonlinearity directly after
it (as :mod:`fednorm.optim.hidden` sees it), meets a sum instead: rescaling it would change how much of the branch goes
into the trunk. It decays instead, which is right for any network. A nonlinearity that is not homogeneous is refused.

Differs from the paper: the radius of (s, m) is sqrt(d), their norm at s = 1, m = 0, where the paper prints 1. Before a
normalized layer both are the same function; with 1, the initial network would change at the first update, by a factor
of sqrt(d) in the effective learning rate of (s, m) and in what the output layer is given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fednorm import options
from fednorm.errors import ConfigError
from fednorm.norms import spec_of
from fednorm.optim.hidden import (
    ACTIVATIONS,
    HOMOGENEOUS,
    HiddenLayer,
    Place,
    hidden_layers,
    in_order,
    is_scale_invariant,
)
from fednorm.roles import Kind

AFFINE = ("decay", "joint", "free")
"""The treatments of scale and shift."""

DECAY = 0.999
"""Default of alpha. An optimizer whose steps are at most lr per entry, as Adam's, then keeps |s - 1| and |m| below
lr / (1 - alpha): 0.1 at a learning rate of 1e-4, 1 at 1e-3."""

_SMALLEST_NORM = 1e-30
"""Tensors of zeros have no direction: their factor is finite, and they stay as they are."""

Group = tuple[Tensor, ...]
"""Tensors that share one radius."""


class WeightProjection:
    """Projects a model's hidden weights, and treats its scales and shifts; called after each update.

    Built on the initial parameters, whose norms are the radii, and before a checkpoint is loaded. Frozen parameters are
    left alone. Tensors that gradients do not train, and learned ones of other kinds (the task weights of adab2n), too.

    Args:
        model: The model.
        affine: ``decay``, ``joint`` or ``free``.
        decay: alpha in [0, 1], of each projection: 1 does nothing, 0 fixes scales at 1 and shifts at 0. For ``decay``,
            and for the layers that ``joint`` cannot treat.
        every: Project after each so many updates, 1 or more.

    Attributes:
        radii: rho of each projected layer, by its path.
        updates: How many updates have been seen.
        weights: The projected weights, a group of one tensor for each of the ``radii``.
        joint: Scales and shifts that share a radius, the root of the number of scales.
        scales: What decays to 1.
        shifts: What decays to 0.

    Raises:
        ConfigError: An option is out of range; no weight is hidden; an initial weight is zero or not finite;
            ``joint`` meets a nonlinearity that is not homogeneous.
    """

    def __init__(self, model: nn.Module, *, affine: str = "decay", decay: float = DECAY, every: int = 1) -> None:
        check_options("projection", affine, decay, every)
        hidden = _trained_hidden_layers(model)
        self.affine = affine
        self.decay = decay
        self.every = every
        self.updates = 0
        self.radii: dict[str, float] = {found.path: _initial_norm(found) for found in hidden}
        self.weights: list[Group] = [(found.layer.weight,) for found in hidden]
        self.joint: list[Group] = []
        self.scales: list[Tensor] = []
        self.shifts: list[Tensor] = []
        if affine != "free":
            self._take_affine(model)

    def _take_affine(self, model: nn.Module) -> None:
        """Sort the scales and shifts of the model's normalization layers by what is done to them."""
        seen: set[int] = set()
        for place in in_order(model):
            if id(place.module) in seen or not is_scale_invariant(place.module):
                continue
            seen.add(id(place.module))
            scales, shifts = _of_kind(place.module, Kind.SCALE), _of_kind(place.module, Kind.SHIFT)
            # A shift alone starts from 0 and has no radius to keep.
            if self.affine == "joint" and scales and _passes_scale_on(place):
                self.joint.append((*scales, *shifts))
            else:
                self.scales += scales
                self.shifts += shifts

    @torch.no_grad()
    def __call__(self) -> None:
        """Take note of an update, and project if it is due."""
        self.updates += 1
        if self.updates % self.every:
            return
        _rescale([*self.weights, *self.joint], [*self.radii.values(), *(g[0].numel() ** 0.5 for g in self.joint)])
        if self.scales:
            torch._foreach_mul_(self.scales, self.decay)
            torch._foreach_add_(self.scales, 1.0 - self.decay)
        if self.shifts:
            torch._foreach_mul_(self.shifts, self.decay)

    @property
    def counts(self) -> bool:
        """Whether the number of calls decides what a call does."""
        return self.every > 1

    def state_dict(self) -> dict[str, Tensor]:
        """Return ``updates`` and, as ``radius.PATH``, each layer's radius: int64 and float64, of no dimension."""
        radii = {f"radius.{path}": torch.tensor(rho, dtype=torch.float64) for path, rho in self.radii.items()}
        return {"updates": torch.tensor(self.updates), **radii}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state_dict` returned.

        Raises:
            ConfigError: It is the state of a projection of other layers.
        """
        if state.keys() != self.state_dict().keys():
            raise ConfigError(
                "The saved projection is of other layers: only one side has "
                f"{', '.join(sorted(state.keys() ^ self.state_dict().keys()))}. Build the same model with the same "
                "norm as the run that was saved."
            )
        self.updates = int(state["updates"])
        self.radii = {path: float(state[f"radius.{path}"]) for path in self.radii}


def check_options(method: str, affine: str, decay: float, every: int) -> None:
    """Require a treatment of scale and shift, alpha in [0, 1], and an interval of 1 or more.

    Raises:
        ConfigError: One is something else.
    """
    options.one_of(method, "affine", affine, AFFINE)
    options.number(method, "decay", decay, at_most=1)
    if decay < 0:
        raise ConfigError(f"{method}.decay is the share of the old value that is kept, 0 to 1; got {decay!r}.")
    options.whole(method, "every", every, at_least=1)


def _trained_hidden_layers(model: nn.Module) -> list[HiddenLayer]:
    hidden = [found for found in hidden_layers(model) if found.layer.weight.requires_grad]
    if not hidden:
        raise ConfigError(
            f"{type(model).__name__} has no weight to project: no trained nn.Linear or nn.Conv* whose output goes "
            "directly into a normalization layer (standardized weights, as those of sws, do not count). Without one, "
            "rescaling a weight would change what the network computes. Build the model with a norm, e.g. norm 'nap' "
            "or 'batch_norm', or put one in: fednorm.convert(model, 'nap')."
        )
    return hidden


def _initial_norm(found: HiddenLayer) -> float:
    weight = found.layer.weight
    if is_lazy(weight):
        raise ConfigError(
            f"Layer {found.path!r} does not know its shape yet. Run one forward pass through a model with lazy layers "
            "before projecting it."
        )
    norm = float(torch.linalg.vector_norm(weight.detach()))
    if not 0.0 < norm < math.inf:
        raise ConfigError(
            f"The weight of layer {found.path!r}, shape {tuple(weight.shape)}, has the initial norm {norm:g}; the "
            "projection keeps that norm, which must be finite and above 0. Initialize the layer, or freeze it "
            "(weight.requires_grad_(False)) to leave it out."
        )
    return norm


def _of_kind(norm: nn.Module, kind: Kind) -> list[Tensor]:
    """Return a normalization layer's own trained parameters of a kind."""
    spec = spec_of(norm)
    kinds = {} if spec is None else spec.tensors
    own = norm.named_parameters(recurse=False)
    return [tensor for name, tensor in own if tensor.requires_grad and name in kinds and kinds[name].kind is kind]


def _passes_scale_on(place: Place) -> bool:
    """Return whether a homogeneous nonlinearity comes directly after a normalization layer.

    Raises:
        ConfigError: Another nonlinearity comes there.
    """
    after = place.after.module if place.after else None
    if isinstance(after, ACTIVATIONS) and not isinstance(after, HOMOGENEOUS):
        raise ConfigError(
            f"affine = 'joint' rescales the scale and shift of layer {place.path!r}, and {type(after).__name__} comes "
            "after it: rescaling its input changes what the network computes. 'joint' is for nonlinearities with "
            f"f(c x) = c f(x) ({', '.join(kind.__name__ for kind in HOMOGENEOUS)}); take affine = 'decay' or 'free'."
        )
    return isinstance(after, HOMOGENEOUS)


def _rescale(groups: Sequence[Group], radii: Sequence[float]) -> None:
    """Bring the tensors of each group, seen as one vector, to the group's radius, in place."""
    tensors = [tensor for group in groups for tensor in group]
    norms = iter(torch._foreach_norm(tensors))
    factors = [reduce(torch.hypot, islice(norms, len(group))) for group in groups]
    torch._foreach_clamp_min_(factors, _SMALLEST_NORM)
    torch._foreach_reciprocal_(factors)
    torch._foreach_mul_(factors, radii)
    torch._foreach_mul_(tensors, [factor for factor, group in zip(factors, groups, strict=True) for _ in group])
