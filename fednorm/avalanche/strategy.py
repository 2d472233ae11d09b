"""Any of fednorm's learners as an Avalanche strategy, for an Avalanche user's own script.

    from scenarios.learners.er_ace import ERACE          # ERACELearner, as a strategy
    Mine = strategy_of(MyLearner)                        # any learner of one's own

A strategy is an ``avalanche.training.templates.SupervisedTemplate`` and the learner that it is made of: ``train`` and
``eval`` work as in Avalanche, plugins and evaluators are called at Avalanche's own places, and what is learned is the
learner's to the last bit. What differs from Avalanche's own training loop: batches are cut out of arrays, without a
loader (:mod:`fednorm.avalanche.reading` has what experiences are read by). A plugin that replaces what is not there,
such as the loader, is refused (:mod:`fednorm.avalanche.foreign`).
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fednorm.avalanche.foreign import Plugins, require_model, require_plugins
from fednorm.avalanche.quietly import avalanche_imports
from fednorm.avalanche.reading import for_training, source_of
from fednorm.device import place_of
from fednorm.errors import DataError
from fednorm.streams.buffer import Samples
from fednorm.streams.learner import Learner

with avalanche_imports():
    from avalanche.training.plugins import EvaluationPlugin
    from avalanche.training.templates import SupervisedTemplate


class LearnerStrategy(SupervisedTemplate):  # type: ignore[misc]
    """What makes an Avalanche strategy of a learner; it stands before the learner's class among a strategy's bases."""

    method: ClassVar[type[Learner]]

    def _make(
        self,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        train_mb_size: int = 32,
        train_epochs: int = 1,
        eval_mb_size: int = 256,
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
        device: str | torch.device = "cpu",
        plugins: Sequence[Any] | None = None,
        evaluator: Any = None,
        eval_every: int = -1,
        peval_mode: str = "epoch",
        **learner: Any,
    ) -> None:
        """Be made.

        Args:
            model: The network.
            optimizer: Of its parameters.
            train_mb_size: New samples a step.
            train_epochs: Passes over each experience.
            eval_mb_size: Samples a forward pass of :meth:`eval`.
            criterion: Takes the cross-entropy's place in every loss: logits and labels to a scalar.
            device: Where the network is; samples are moved there.
            plugins: Avalanche plugins.
            evaluator: An Avalanche evaluation plugin; none by default.
            eval_every: As in Avalanche: after how many epochs (or iterations) ``eval_streams`` are evaluated; -1 for
                never.
            peval_mode: ``epoch`` or ``iteration``.
            **learner: What else :class:`~fednorm.streams.learner.Learner` takes, or the learner's own class.

        Raises:
            ConfigError: A plugin or a module of the network needs what fednorm's learners do not have.
        """
        require_model(model)
        shared: dict[str, Any] = {
            "model": model,
            "optimizer": optimizer,
            "criterion": criterion or nn.CrossEntropyLoss(),
            "train_mb_size": train_mb_size,
            "train_epochs": train_epochs,
            "eval_mb_size": eval_mb_size,
            "device": place_of(model, device),
        }
        own = {"plugins": plugins, "evaluator": evaluator or _silent(), "eval_every": eval_every}
        SupervisedTemplate.__init__(self, **shared, **own, peval_mode=peval_mode)
        require_plugins(self.plugins, scheduled=learner.get("schedule") is not None)
        self.method.__init__(self, **shared, **learner)
        self._changes = Plugins(self.plugins)

    # Avalanche's loop -------------------------------------------------------------------------------------------------

    def train(self, experiences: Any, eval_streams: Any = None, **kwargs: Any) -> Any:
        """Train on Avalanche experiences, as in Avalanche.

        Args:
            experiences: One, or several in order, of any benchmark whose data sets give samples and labels.
            eval_streams: What is evaluated in between, as often as ``eval_every`` says; nothing by default.
            **kwargs: Of Avalanche's loader ``shuffle`` and ``drop_last`` count; there is none for the others. Plugins
                are given all.

        Raises:
            DataError: An experience has no samples, or some that cannot be read.
            ConfigError: A plugin needs what fednorm's learners do not have.
        """
        require_plugins(self.plugins, scheduled=self.schedule is not None)
        self._changes = Plugins(self.plugins)
        # Avalanche's own default evaluates the training experiences as a stream; ours evaluates nothing.
        return super().train(experiences, [] if eval_streams is None else eval_streams, **kwargs)

    def eval(self, exp_list: Any, **kwargs: Any) -> Any:
        """Evaluate on experiences, as in Avalanche, under the model of the learner's ``for_evaluation``."""
        modes = {module: module.training for module in self.model.modules()}
        try:
            with self.for_evaluation():
                return super().eval(exp_list, **kwargs)
        finally:  # in the middle of training the network goes on as it was
            for module, training in modes.items():
                module.training = training

    def train_dataset_adaptation(self, **kwargs: Any) -> None:
        """Take the experience's data set, in Avalanche's transform group for training where it has such groups."""
        del kwargs
        self.adapted_dataset = for_training(self.experience)

    def make_train_dataloader(self, **kwargs: Any) -> None:
        """Do without a loader."""
        del kwargs
        self.dataloader = self._changes.no_loader

    def check_model_and_optimizer(self, **kwargs: Any) -> None:
        """Leave model and optimizer as they are: all K outputs are there from the start."""

    def _train_exp(self, experience: Any, eval_streams: Any = None, **kwargs: Any) -> None:
        del eval_streams
        self._changes.require_untouched(self)
        self._take(source_of(self, experience, self.adapted_dataset))
        self._learn(**kwargs)

    # What plugins make of a batch -------------------------------------------------------------------------------------

    def _before_step(self, new: Samples, **kwargs: Any) -> None:
        if self._changes.at_iteration:
            self._show(new, **kwargs)
        else:
            self.mbatch = [new.images, new.labels, torch.zeros_like(new.labels)]
            self._before_training_iteration(**kwargs)
        self._changes.require_untouched(self)

    def _show(self, new: Samples, **kwargs: Any) -> None:
        """Show plugins what Avalanche would show them of new samples, and take what they make of it."""
        images, labels = self.as_input(new.images, new.tasks).clone(), new.labels.clone()
        shown = images._version, labels._version
        self.mbatch = [images, labels, torch.zeros_like(labels)]
        self._before_training_iteration(**kwargs)
        self._require_count(len(new))
        if self.mbatch[0] is not images or images._version != shown[0]:
            self._changes.images[id(new)] = self.mbatch[0]
        if self.mbatch[1] is not labels or labels._version != shown[1]:
            self._changes.labels[id(new)] = self.mbatch[1]

    def _require_count(self, count: int) -> None:
        if len(self.mbatch[0]) != count or len(self.mbatch[1]) != count:
            raise DataError(
                f"A plugin made a batch of {count} samples one of {len(self.mbatch[0])}, with {len(self.mbatch[1])} "
                "labels. fednorm's learners know each sample's task and whether it is new, and take no others; use one "
                "of Avalanche's own strategies with fednorm.avalanche.NormPlugin."
            )


def strategy_of(learner: type[Learner], name: str | None = None, module: str | None = None) -> Any:
    """Return a learner's class as an Avalanche strategy's; a new class with every call.

    Args:
        learner: The learner's class.
        name: The name of the strategy's class; the learner's if None.
        module: The module that it is found in, under that name; the learner's if None.
    """

    def __init__(self: LearnerStrategy, **arguments: Any) -> None:
        """Take a template's arguments and the learner's, by name."""
        self._make(**arguments)  # Avalanche's templates refuse in __init__ what their own class does not know

    parts = {"__module__": module or learner.__module__, "__doc__": learner.__doc__, "__init__": __init__}
    return type(name or learner.__name__, (LearnerStrategy, learner), {**parts, "method": learner})


def make_strategy(module: str, name: str, learner: type[Learner]) -> Any:
    """Make a learner's strategy once and put it into a module, where pickles find it.

    Args:
        module: The module's name.
        name: The strategy's.
        learner: The learner's class.
    """
    names = vars(sys.modules[module])
    return names.setdefault(name, strategy_of(learner, name, module))


def _silent() -> Any:
    """Return an evaluation plugin that measures and says nothing; Avalanche warns where it is given none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No loggers specified", UserWarning)
        return EvaluationPlugin()
