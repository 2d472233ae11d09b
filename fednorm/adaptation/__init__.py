"""Test-time adaptation: a trained network adapts to the unlabelled images that it is tested on; one file a method.

    [evaluate]
    adaptation = [
        "bn_alpha",
        { name = "tent", learning_rate = 0.001, batch_size = [1, 32, 128], order = ["shuffled", "class_sorted"] },
    ]

An evaluation of a finished network, and no training: labels are used for the score alone, the network itself is not
changed, and the run's other numbers are those that it has without. What all methods have in common, because all of them
depend on which images come together, are the size of a batch and the order in which images come.
"""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn

from fednorm.cards import Card, Option
from fednorm.options import one_of, whole

Knowledge = Mapping[str, Tensor]
"""What a method has learned on training images before it adapts anything, as named tensors."""

Adapter = Callable[[Tensor], Tensor]
"""A network that adapts itself: images (B, 3, H, W), as a network is given them, in; their logits (B, K) out."""

ORDERS = ("shuffled", "class_sorted", "as_given")
RESETS = ("each", "batch", "never")


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """How a network adapts while it is tested, with its options; a subclass's fields are options too.

    Attributes:
        batch_size: Images that come together, and that are adapted to together; 1 is one image at a time. The last
            batch may be smaller.
        order: How images come: ``shuffled``, by the run's seed; ``class_sorted``, all of a class before the next one's,
            as a camera may see them; ``as_given``, in the order of the data.
        reset: When adaptation begins anew from the trained network: with ``each`` client, and each experience of a
            stream; with every ``batch``; ``never``, so that on a stream it goes on from one experience's images to the
            next one's.

    Raises:
        ConfigError: An option is out of range.
    """

    method: ClassVar[str] = "adaptation"

    batch_size: int = 32
    order: Literal["shuffled", "class_sorted", "as_given"] = "shuffled"
    reset: Literal["each", "batch", "never"] = "each"

    def __post_init__(self) -> None:
        whole(self.method, "batch_size", self.batch_size, at_least=1)
        one_of(self.method, "order", self.order, ORDERS)
        one_of(self.method, "reset", self.reset, RESETS)

    def check(self, model: nn.Module) -> None:
        """Refuse a network that has nothing to adapt; asked once, before a run.

        Args:
            model: The network; it is not changed.

        Raises:
            ConfigError: There is nothing to adapt, or layers whose formula the method does not know.
        """
        raise NotImplementedError

    def begin(self, model: nn.Module, knowledge: Knowledge) -> Adapter:
        """Return what adapts to batches and predicts them, in the order in which they come.

        Args:
            model: A copy of the trained network, in evaluation mode, to be changed at will.
            knowledge: What :meth:`refine` has made of :meth:`initial`; empty for a method that learns nothing before.
        """
        raise NotImplementedError

    @property
    def passes(self) -> tuple[float, float]:
        """Passes over each image, with gradients and without, for an estimate of a run's time."""
        return 0.0, 1.0

    @property
    def rounds_of_learning(self) -> int:
        """Rounds in which training clients refine what the method must know before it adapts; by default none."""
        return 0

    def initial(self, model: nn.Module) -> dict[str, Tensor]:
        """Return what the method knows before it has learned anything, float32 tensors by name."""
        del model
        return {}

    def refine(
        self, model: nn.Module, knowledge: Knowledge, batches: Iterable[tuple[Tensor, Tensor]]
    ) -> dict[str, Tensor]:
        """Return what one training client makes of what is known, from labelled images of its own.

        Args:
            model: A copy of the trained network, in evaluation mode, to be changed at will.
            knowledge: What is known, not to be written to.
            batches: Images, as a network is given them, and their labels.
        """
        del model, batches
        return dict(knowledge)

    @property
    def options(self) -> dict[str, Any]:
        """The options of the method itself, without those that all have."""
        common = {field.name for field in fields(Adaptation)}
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in common}


@dataclass(frozen=True, kw_only=True)
class AdaptationSpec(Card):
    """The identity card of a method of test-time adaptation.

    Attributes:
        make: The :class:`Adaptation` subclass; its fields are the options.
        statistics: Whether it needs layers with running statistics; a network without any is refused.
        predicts: When a batch is predicted: ``before`` the step that it causes, ``after`` it.
    """

    make: type[Adaptation]
    statistics: bool = False
    predicts: Literal["before", "after"] = "after"

    expects: ClassVar[str] = "An adaptation is a subclass of fednorm.adaptation.Adaptation, or an AdaptationSpec."

    @classmethod
    def adopt(cls, method: Any, reference: str) -> Self | None:
        """Return the card that stands beside a subclass of :class:`Adaptation`, or one made for it."""
        if not inspect.isclass(method) or not issubclass(method, Adaptation):
            return None
        beside = vars(sys.modules[method.__module__]).values() if method.__module__ in sys.modules else ()
        own = next((card for card in beside if isinstance(card, cls) and card.make is method), None)
        return own or cls(name=reference, summary=(method.__doc__ or "").strip().partition("\n")[0], make=method)

    @property
    def maker(self) -> type[Adaptation]:
        """The method's class."""
        return self.make

    @cached_property
    def declared(self) -> Mapping[str, Option]:
        """The fields of the method's class, its own before those that all have."""
        hints = typing.get_type_hints(self.make)
        common = [field.name for field in fields(Adaptation)]
        ordered = sorted(fields(self.make), key=lambda field: field.name in common)
        return {field.name: Option(field.name, hints[field.name], field.default) for field in ordered}

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse options out of range."""
        self.made(options)

    def made(self, options: Mapping[str, Any] | None = None) -> Adaptation:
        """Return the method with the given options.

        Raises:
            ConfigError: An option is out of range.
        """
        return self.make(**(options or {}))
