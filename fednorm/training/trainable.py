"""What of a network is trained: all of it, its normalization layers, its head; and the head alone before the rest.

Two protocols:

* **Only the normalization layers** (Frankle, Schwab, Morcos. Training BatchNorm and Only BatchNorm. ICLR 2021.
  https://arxiv.org/abs/2003.00152): ``train.trainable = "norm"`` trains the scales, shifts and gates of normalization
  layers and leaves all else at its initial value; running statistics follow the data as ever. The paper's code trains
  the output layer too unless told otherwise (``output_frozen``): that is ``"norm,head"``. Its scales begin as U(0, 1):
  ``train.scale_init = "uniform"`` (:mod:`fednorm.training.scale_init`).
* **Linear probe, then fine-tuning** (Kumar et al., arXiv 2202.10054; Tomihari, Sato, arXiv 2405.16747):
  ``train.linear_probe_rounds`` or ``train.linear_probe_epochs`` train the head first, on features that stand still, and
  then everything. ``"head"`` is the probe alone.

While the head alone is trained, all else is in evaluation mode: features that stand still are those of the running
statistics, and these stay as they are. (The paper fits a logistic regression to them; here the run's optimizer does.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fednorm.config import TrainConfig
from fednorm.config.trainable import ALL, HEAD, NORM
from fednorm.errors import ConfigError
from fednorm.norms import spec_of
from fednorm.norms._computed import ComputedWeight
from fednorm.recognition.places import HEAD as LAST_LAYER
from fednorm.recognition.places import head_of, keys_at, patterns_of
from fednorm.recognition.structure import normalizes, per_channel
from fednorm.recognition.tensor_kinds import declared_tensors
from fednorm.roles import LEARNED, NORMALIZATION, Kind

OF_NORMS = LEARNED & NORMALIZATION
"""The kinds that training normalization layers alone trains: scale, shift, gate."""


class Trainable:
    """Which parameters of a network are trained, and which are in training mode, now.

    Made before anything else is made of the network: parameters that the run never trains lose ``requires_grad`` here,
    and what had lost it before keeps that.

    Args:
        model: The network.
        train: Section ``train`` of the run.
        num_classes: K, the number of logits.

    Attributes:
        head: Keys of the head's entries in the state dict; empty where nobody asks for the head.
        frozen: Keys of the entries of the state dict that the run never changes.
        resting: Modules that stay in evaluation mode while the others train; a federated strategy's clients set them.

    Raises:
        ConfigError: There is no normalization layer to train, no head can be found, or nothing else would be trained
            after a linear probe.
    """

    def __init__(self, model: nn.Module, train: TrainConfig, num_classes: int) -> None:
        self._model = model
        self._parts = frozenset(train.trainable.split(","))
        self._probes = bool(train.linear_probe_rounds or train.linear_probe_epochs)
        self._probing = False
        self.resting: tuple[nn.Module, ...] = ()
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        asks = HEAD in self._parts or self._probes
        self.head = _head_keys(model, train, num_classes) if asks else frozenset()
        self._mode = Mode(model)
        self._of_head = [module for path, module in model.named_modules() if self._is_of_head(path, module)]
        given = {key for key, parameter in self._parameters.items() if parameter.requires_grad}
        self.learned = frozenset(given & self._chosen())
        self.frozen = self._never_changed()
        self._apply()
        if self._probes and not self.learned - self.head:
            raise ConfigError(
                f"A linear probe comes before the training of everything, and with train.trainable = "
                f"{train.trainable!r} nothing but the head of {type(model).__name__} is trained. Leave "
                "train.linear_probe_rounds and train.linear_probe_epochs at 0."
            )

    def _is_of_head(self, path: str, module: nn.Module) -> bool:
        own = [f"{path}.{name}" if path else name for name in module.state_dict()] if self.head else []
        return bool(own) and self.head.issuperset(own)

    def _chosen(self) -> frozenset[str]:
        if ALL in self._parts:
            return frozenset(self._parameters)
        return (_norm_keys(self._model) if NORM in self._parts else frozenset()) | self.head

    def _never_changed(self) -> frozenset[str]:
        if ALL in self._parts:
            return frozenset()
        if self._parts == {HEAD}:  # the statistics too: all layers but the head's are in evaluation mode
            return frozenset(self._model.state_dict()) - self.head
        return frozenset(self._parameters) - self.learned

    @property
    def active(self) -> frozenset[str]:
        """Keys of the parameters that are trained now."""
        return self.learned & self.head if self._probing else self.learned

    def set_probing(self, probing: bool) -> None:
        """Train the head alone from now on, or what the run trains; and set the modules' modes."""
        self._probing = probing and self._probes
        self._apply()
        self.train_mode()

    def _apply(self) -> None:
        if not self._probes and ALL in self._parts:
            return
        active = self.active
        for key, parameter in self._parameters.items():
            if key in self.learned or key in self.frozen:
                parameter.requires_grad_(key in active)
            if key not in active:
                parameter.grad = None

    def train_mode(self) -> None:
        """Put the network in training mode; where the head alone is trained, the head alone."""
        alone = self._probing or self._parts == {HEAD}
        self._mode.set(training=not alone)
        for module in self._of_head if alone else ():
            module.train()
        for module in self.resting:
            module.eval()

    def evaluation_mode(self) -> None:
        """Put the network in evaluation mode."""
        self._mode.set(training=False)

    @contextmanager
    def stage(self, probing: bool) -> Iterator[None]:
        """Train the head alone within the block, or what the run trains."""
        self.set_probing(probing)
        try:
            yield
        finally:
            self.set_probing(False)

    def head_norm(self, tensors: Mapping[str, Tensor]) -> float | None:
        """Return the Euclidean norm of all the head's parameters together.

        Args:
            tensors: Some entries of a state dict by key.

        Returns:
            None where the head is not, or not whole, among them.
        """
        keys = sorted(self.head & self._parameters.keys())
        if not keys or not tensors.keys() >= set(keys):
            return None
        # In one order whatever the layout: a checkpoint does not keep that.
        norms = [tensors[key].detach().cpu().double().contiguous().norm() for key in keys]
        return float(torch.stack(norms).norm())


class Mode:
    """Puts a network in training or evaluation mode where it is not: a client's turn asks for it several times.

    Args:
        model: The network; its modules are looked through once, here.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        modules = list(model.modules())
        self._computed = [module for module in modules if isinstance(module, ComputedWeight)]
        known = nn.Module.train, ComputedWeight.train
        plain = all(type(m).train in known and type(m).eval is nn.Module.eval for m in modules)
        self._modules = modules if plain else []  # one that does something at the change is always told

    def set(self, *, training: bool) -> None:
        """Put the network in a mode; weights that are kept while it evaluates are computed anew."""
        for module in self._computed:
            module.forget_weight()
        if not self._modules or any(module.training is not training for module in self._modules):
            self._model.train(training)


def kinds_of_norms(model: nn.Module) -> dict[str, Kind]:
    """Return the kind of every parameter of a normalization layer, by its key in the state dict."""
    found: dict[str, Kind] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        own = dict(module.named_parameters(recurse=False))
        spec, declared = spec_of(module), declared_tensors(type(module))
        kinds = {name: spec.tensors[name].kind for name in own if spec and name in spec.tensors} | dict(declared)
        if own and spec is None and not declared and per_channel(module) and normalizes(module):
            kinds = dict.fromkeys(own, Kind.SCALE)
        found |= {f"{path}.{name}" if path else name: kinds[name] for name in own if name in kinds}
    return found


def _norm_keys(model: nn.Module) -> frozenset[str]:
    """Return the keys of the learned tensors of normalization layers.

    Raises:
        ConfigError: There are none.
    """
    keys = frozenset(key for key, kind in kinds_of_norms(model).items() if kind in OF_NORMS)
    if not keys:
        raise ConfigError(
            "train.trainable = 'norm' trains the scales and shifts of normalization layers, and "
            f"{type(model).__name__} has none. Take a norm that has them, such as batch_norm (norm.name; for a network "
            "of your own fednorm.convert(model, 'batch_norm')), or train.trainable = 'all'."
        )
    return keys


def _head_keys(model: nn.Module, train: TrainConfig, num_classes: int) -> frozenset[str]:
    """Return the keys of the head.

    Raises:
        ConfigError: A pattern matches nothing, what it matches is not trained, or the last weight layer has not as many
            outputs as there are classes.
    """
    patterns = patterns_of(train.head)
    keys = keys_at(model, patterns)
    if patterns == (LAST_LAYER,):
        path = head_of(model)
        layer = model.get_submodule(path)
        outputs = layer.out_channels if isinstance(layer, _ConvNd) else getattr(layer, "out_features", 0)
        if outputs != num_classes:
            raise ConfigError(
                f"Which part of {type(model).__name__} is its head cannot be told: its last weight layer by module "
                f"order, {path or 'the model itself'!r}, has {outputs} outputs, and there are {num_classes} classes. "
                "Name the head: train.head, a module's path or a pattern over keys, such as 'classifier.*'."
            )
    if not keys & {key for key, parameter in model.named_parameters() if parameter.requires_grad}:
        raise ConfigError(
            f"train.head = {train.head!r} names no parameter of {type(model).__name__} that is trained. Name the "
            "head: a module's path or a pattern over keys, such as 'classifier.*'."
        )
    return keys
