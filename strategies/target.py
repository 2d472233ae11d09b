"""TARGET: between experiences the server draws images out of the network, and clients distil the network from them.

Zhang, Chen, Zhuang, Lyu. TARGET: Federated Class-Continual Learning via Exemplar-Free Distillation. ICCV 2023.
https://arxiv.org/abs/2303.06937. Official code: zj-jayzhang/Federated-Class-Continual-Learning, methods/target.py.

After each experience but the last, of w, what the server has, and O, the classes met so far:

    server:  x = G(z), the generator G and z trained so that w takes x for images of O:
             loss = w_y CE(f(x; w)_O, y) + w_m sum_l (||mean(h_l) - M_l|| + ||var(h_l) - V_l||) + w_s L_s
             t = f(x; w), the answers of the teacher
    client:  loss = CE(f(x_k)_N, y_k) + lambda mean over x of KL(softmax(t_O / T) || softmax(f(x)_O / T))

h_l is what w's layer l is given of a batch of x, (M_l, V_l) are its running mean and variance, L_s is the term of a
student (:mod:`fednorm.federated_continual.synthesis`). A client's loss is that of every step of the next experience, on
its own samples (x_k, y_k) and a batch of x; lambda = ``distillation``, N the experience's classes that are not in O. No
image of any client is kept or sent. The cross-entropy is over N alone, as in the official code; where a batch has
samples of other classes (from a memory, or as experiences share their classes), it is over all outputs.

Running statistics decide what x looks like, so ``statistics`` says whose they are:

    averaged   the server's, averaged over clients, as published
    pooled     the server's, pooled over clients by the law of total variance (as FedAvg's ``moments = "pool"``)
    client     those of one client, ``client``, which is asked for *all* of its local tensors after each experience.
               That gives away what FedBN and SiloBN keep on clients, so it is never done unless it is chosen; a site
               refuses unless its node allows it (``allow-statistics``)
    none       nobody's: the teacher normalizes by the moments of the drawn batch, and the term is left out

``keeps`` says what stays on clients: nothing, ``statistics`` (as SiloBN) or ``norm`` (as FedBN). Then the server has no
running statistics that could be averaged: choose ``client`` or ``none``. With ``none`` the teacher has initial values
for what the server lacks. A network without running moments (norm sws, GroupNorm) has no such term; the plan says so.

Synthetic images pass through a client's network in training mode, as in the official code: running statistics move with
them too. Images and answers travel to every client in every round; clients keep none of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional

from fednorm import options
from fednorm.cards import Citation
from fednorm.errors import ConfigError, IncompleteError
from fednorm.federated_continual.between import BetweenExperiences, Boundary, Images
from fednorm.federated_continual.synthesis import Among, Moments, Recipe, Synthesis, Synthetic, Watched, divergence
from fednorm.federation.local import Local, Passes, Turn
from fednorm.federation.spec import StrategySpec
from fednorm.federation.strategy import Common
from fednorm.rng import torch_stream
from fednorm.roles import NORMALIZATION, STATISTICS, Kind, Role, RoleRule
from fednorm.spec import HookedLayer

if TYPE_CHECKING:
    from fednorm.training.trainee import Trainee

IMAGES, ANSWERS, CLASSES = "images", "answers", "classes"
KEEPS: Mapping[str, RoleRule] = {
    "nothing": RoleRule(),
    "statistics": RoleRule(dict.fromkeys(sorted(STATISTICS), Role.LOCAL), why="TARGET with keeps='statistics'"),
    "norm": RoleRule(dict.fromkeys(sorted(NORMALIZATION), Role.LOCAL), why="TARGET with keeps='norm'"),
}
POOLED = RoleRule({Kind.MEAN: Role.POOLED, Kind.VAR: Role.POOLED}, why="TARGET with statistics='pooled'")
SOURCES = ("averaged", "pooled", "client", "none")


class Distilling(Local):
    """Adds the gradient of the distillation, and leaves old classes out of the cross-entropy."""

    @classmethod
    def passes(cls, options: Mapping[str, Any]) -> Passes:
        """Add a pass over as many synthetic images as a client's own, and the server's through teacher and student."""
        drawn = options["batches"] * options["batch"]
        return Passes(in_round=1.0, between=drawn * (2 * options["steps"] + options["student_steps"]))

    def check(self, trainee: Trainee) -> None:
        """Refuse layers that are told the task of each image, a loss of another kind, and a client that is not there.

        Raises:
            ConfigError: That is so.
        """
        learner = trainee.config.learner
        if not learner.card.make.by_cross_entropy:
            raise ConfigError(
                f"Strategy target distils beside a cross-entropy, and learner {learner.name} trains and classifies by "
                "something else. Take a learner such as naive or er, or strategy fedavg."
            )
        for path, layer in trainee.model.named_modules():
            if isinstance(layer, HookedLayer) and type(layer).set_tasks is not HookedLayer.set_tasks:
                raise ConfigError(
                    f"Layer {path!r} ({type(layer).__name__}) is told the task of each image, and synthetic images are "
                    "of no task. Take strategy target with another norm, such as batch_norm, or norm "
                    f"{trainee.config.norm.name} with another strategy."
                )
        clients = trainee.config.grid.clients
        if self.strategy.statistics == "client" and self.strategy.client >= clients:
            raise ConfigError(
                f"strategy.client = {self.strategy.client} is to give its statistics, and the run has the clients 0 to "
                f"{clients - 1} (grid.clients). Name one of them."
            )

    def begin(self, turn: Turn) -> None:
        """Take the images and the teacher's answers, if there are any yet."""
        extra, device = turn.extra, next(turn.model.parameters()).device
        self.images = extra.get(IMAGES)
        if self.images is not None:
            self.answers, self.old = extra[ANSWERS].to(device), extra[CLASSES].bool().to(device)
            self.drawing = torch_stream(turn.trainee.config.seed, *turn.names, "synthetic")

    def criterion(self, turn: Turn, classes: Sequence[int]) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the cross-entropy over the outputs of classes that are new in this experience."""
        old = set() if self.images is None else set(self.old.nonzero().flatten().tolist())
        return partial(of_new_classes, turn.trainee.loss, [label for label in classes if label not in old])

    def adjust(self, turn: Turn) -> None:
        """Add the distillation's gradient, of a batch of synthetic images."""
        if self.images is None or not self.strategy.distillation:
            return
        size = min(self.strategy.replay_batch or turn.trainee.config.train.batch_size, len(self.images))
        rows = torch.randperm(len(self.images), generator=self.drawing)[:size]
        inputs = turn.client.train.scaling(self.images[rows].to(self.answers.device))
        logits, taught = turn.model(inputs)[:, self.old], self.answers[rows.to(self.answers.device)][:, self.old]
        term = self.strategy.distillation * divergence(logits, taught, self.strategy.temperature).mean()
        term.backward()


def of_new_classes(
    loss: Callable[[Tensor, Tensor], Tensor], classes: Sequence[int], logits: Tensor, labels: Tensor
) -> Tensor:
    """Return a loss over the outputs of new classes alone; over all where a label is of another.

    Args:
        loss: Of logits and labels.
        classes: The new classes.
        logits: Shape (B, K).
        labels: Shape (B,).
    """
    new = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
    new[list(classes)] = True
    if not new[labels].all():
        return loss(logits, labels)
    return loss(logits[:, new], (new.cumsum(0) - 1)[labels])


class TARGET(BetweenExperiences):
    """Averages, and lets clients distil the last experience's network from images that the server drew out of it.

    Args:
        model: The network, with its initial values.
        statistics: Whose running statistics the images are drawn by: ``averaged``, ``pooled``, ``client`` or ``none``.
        client: The client that is asked for its own, with ``client``.
        keeps: What stays on clients: ``nothing``, ``statistics`` (as SiloBN) or ``norm`` (as FedBN).
        distillation: lambda, the weight of the clients' distillation, 0 or more.
        temperature: T of the clients' distillation, greater than 0.
        replay_batch: Synthetic images in each step of a client; 0 for as many as of its own (``train.batch_size``).
        batches: Batches of synthetic images that are drawn after each experience.
        batch: Images in each, 2 or more.
        steps: Updates of the generator for each.
        label_weight: w_y, 0 or more.
        moment_weight: w_m, 0 or more.
        student_weight: w_s, 0 or more.
        student_steps: Updates of the student after each batch; 0 for no student, and no such term.
        generator_rate: Learning rate of the generator (Adam).
        generator_width: Of the generator.
        common: See :class:`~fednorm.federation.strategy.NormStrategy`.

    Raises:
        ConfigError: An option is out of range, or the server would lack what ``statistics`` asks for.
        RoleError: The network has nothing of what is to be pooled or kept.
    """

    local = Distilling

    def __init__(  # noqa: PLR0913 - by name only
        self,
        model: nn.Module,
        *,
        statistics: str = "averaged",
        client: int = 0,
        keeps: str = "nothing",
        distillation: float = 25.0,
        temperature: float = 2.0,
        replay_batch: int = 0,
        batches: int = 10,
        batch: int = 256,
        steps: int = 10,
        label_weight: float = 0.5,
        moment_weight: float = 10.0,
        student_weight: float = 1.0,
        student_steps: int = 40,
        generator_rate: float = 0.002,
        generator_width: int = 64,
        **common: Unpack[Common],
    ) -> None:
        options.one_of("strategy", "statistics", statistics, SOURCES)
        options.one_of("strategy", "keeps", keeps, KEEPS)
        for name, value, least in (
            ("client", client, 0), ("replay_batch", replay_batch, 0), ("batches", batches, 1), ("batch", batch, 2),
            ("steps", steps, 1), ("student_steps", student_steps, 0), ("generator_width", generator_width, 1),
        ):  # fmt: skip
            options.whole("strategy", name, value, at_least=least)
        for name, weight in (
            ("distillation", distillation), ("label_weight", label_weight), ("moment_weight", moment_weight),
            ("student_weight", student_weight),
        ):  # fmt: skip
            options.number("strategy", name, weight)
            if weight < 0:
                raise ConfigError(f"strategy.{name} is the weight of a term, 0 or more; got {weight:g}.")
        options.number("strategy", "temperature", temperature, above=0)
        options.number("strategy", "generator_rate", generator_rate, above=0)
        if replay_batch == 1:
            raise ConfigError("strategy.replay_batch must be 2 or more, to estimate a variance, or 0; got 1.")
        if keeps != "nothing" and statistics == "pooled":
            raise ConfigError(_lacking(f"strategy.keeps = {keeps!r} leaves them on clients", statistics))
        self.statistics, self.client, self.keeps = statistics, client, keeps
        self.distillation, self.temperature, self.replay_batch = distillation, temperature, replay_batch
        self.recipe = Recipe(
            batches, batch, steps, label_weight, moment_weight, student_weight, student_steps, generator_rate,
            generator_width,
        )  # fmt: skip
        super().__init__(model, **common)
        self._require_statistics()
        self._network = copy.deepcopy(model)
        self._like: Images | None = None
        self._held: dict[str, Tensor] = {}

    def role_rule(self) -> RoleRule:
        """Keep on clients what is to stay there; pool the moments where that was asked for."""
        return POOLED if self.statistics == "pooled" else KEEPS[self.keeps]

    def _require_statistics(self) -> None:
        """Refuse to draw images by what the server does not have, and to ask a client for what it does not keep.

        Raises:
            ConfigError: That is so.
        """
        local = self.plan.local
        if local and self.statistics in ("averaged", "pooled"):
            raise ConfigError(_lacking(f"{len(local)} tensors stay on clients ({local[0]} first)", self.statistics))
        if self.statistics == "client" and not local:
            raise ConfigError(
                "strategy.statistics = 'client' asks a client for what it keeps to itself, and this network's clients "
                "keep nothing. Take strategy.keeps = 'statistics' or 'norm', or strategy.statistics = 'averaged'."
            )

    @property
    def term(self) -> tuple[str, ...]:
        """The layers whose running moments the generator's loss compares; none where that term is absent."""
        if self.statistics == "none" or not self.recipe.moment_weight:
            return ()
        return tuple(self.plan.by_key[mean].layer for mean, _ in self.plan.moments())

    # Before a run -----------------------------------------------------------------------------------------------------

    def meet(self, images: Images) -> None:
        """Take down what the images are like; pass two of noise through the network, to see that the term can be taken.

        Raises:
            ConfigError: Each experience scales its images in its own way, or a layer's moments are of something else
                than what it is given.
        """
        if len(images.scaling.mean) > 1:
            raise ConfigError(
                "A synthetic image is of no experience, and data.normalize = 'domain' scales each one's images in its "
                "own way. Take 'half', 'none' or 'global'."
            )
        self._like = images
        network = copy.deepcopy(self._network).eval()
        watched = Watched(network, self._moments(network))
        noise = torch.rand(2, *images.shape, generator=torch_stream(self.seed, "target", "noise"))
        with torch.no_grad(), watched.hooks():
            network(noise)

    def about_between(self) -> dict[str, Any]:
        """Return how many images travel, and whose statistics they are drawn by."""
        count, layers = self.recipe.batches * self.recipe.batch_size, len(self.term)
        why = "the network has no running moments"
        if self.statistics == "none":
            why = "strategy.statistics = 'none'"
        elif not self.recipe.moment_weight:
            why = "strategy.moment_weight = 0"
        source = f"client {self.client}'s own" if self.statistics == "client" else self.statistics
        text = (
            f"the term of running moments is of {layers} layers, {source}" if layers else f"no term of moments: {why}"
        )
        return {
            "images": count,
            "bytes": self.bytes_of_images,
            "statistics": self.statistics,
            "layers": layers,
            "text": f"TARGET: {count} synthetic images from the second experience on, "
            f"{self.bytes_of_images / 1e6:.2f} MB to each client in each round; {text}",
        }

    @property
    def bytes_of_images(self) -> int:
        """The bytes of the images and answers that each client of a round is sent, from the second experience on."""
        if self._like is None:
            return 0
        channels, height, width = self._like.shape
        of_one = channels * height * width + 4 * self._like.num_classes
        return self.recipe.batches * self.recipe.batch_size * of_one + self._like.num_classes

    @property
    def extra_bytes(self) -> int:
        """The bytes beside the plan's tensors, those of images that are still to be drawn included."""
        return super().extra_bytes + (0 if self._held else self.bytes_of_images)

    # Rounds -----------------------------------------------------------------------------------------------------------

    def extra_to_send(self) -> Mapping[str, Tensor]:
        """Send the images, the teacher's answers and the classes that they are of."""
        return self._held

    def state_dict(self) -> dict[str, Tensor]:
        """Return what is sent beside the plan's tensors."""
        return dict(self._held)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take it back."""
        if state and set(state) != {IMAGES, ANSWERS, CLASSES}:
            raise ConfigError(
                f"The checkpoint's synthetic images do not fit TARGET: it has {', '.join(sorted(state))}."
            )
        self._held = dict(state)

    # Between experiences ----------------------------------------------------------------------------------------------

    def between(self, boundary: Boundary) -> dict[str, Any]:
        """Draw the next experience's synthetic images, and return how good they are."""
        assert self._like is not None
        teacher, student = (copy.deepcopy(self._network).to(boundary.device) for _ in range(2))
        teacher.load_state_dict({**teacher.state_dict(), **boundary.tensors, **self._asked(boundary)})
        teacher.eval()
        if self.statistics == "none":
            for path in self.plan.estimating:
                teacher.get_submodule(path).train()
        synthesis = Synthesis(
            teacher,
            student,
            self._moments(teacher),
            classes=boundary.classes,
            images=self._like,
            recipe=self.recipe,
            seed=self.seed,
            names=("target", boundary.time),
        )
        made = synthesis.run()
        old = torch.zeros(self._like.num_classes, dtype=torch.uint8)
        old[list(boundary.classes)] = 1
        self._held = {IMAGES: made.images, ANSWERS: made.logits, CLASSES: old}
        return _measured(made, boundary)

    def _moments(self, network: nn.Module) -> Moments:
        """Return what the generator's loss compares with, by layer."""
        state, layers = network.state_dict(), set(self.term)
        return {
            self.plan.by_key[mean].layer: (state[mean].clone(), state[var].clone())
            for mean, var in self.plan.moments()
            if self.plan.by_key[mean].layer in layers
        }

    def _asked(self, boundary: Boundary) -> Mapping[str, Tensor]:
        """Return the local tensors of the client that is to give them.

        Raises:
            IncompleteError: It has none, or does not answer.
        """
        if self.statistics != "client":
            return {}
        own = boundary.ask(self.client)
        if own is None:
            raise IncompleteError(
                f"Client {self.client} (strategy.client) is to give its running statistics after experience "
                f"{boundary.time + 1}, and has none, as it has not trained. Name another client."
            )
        return own


def _lacking(what: str, statistics: str) -> str:
    return (
        f"strategy.statistics = {statistics!r} draws images by running statistics that the server has, and {what}. "
        "Take strategy.statistics = 'client', which asks one client (strategy.client) for its own and so gives away "
        "what is private otherwise, or 'none', which draws images without."
    )


def _measured(made: Synthetic, boundary: Boundary) -> dict[str, Any]:
    """Return how good synthetic images are, as far as can be measured."""
    classes = torch.tensor(boundary.classes)
    sure = functional.softmax(made.logits[:, classes], 1)
    measured: dict[str, Any] = {
        "images": len(made.images),
        "teacher_confidence": float(sure.amax(1).mean()),
        "as_wanted": float((classes[sure.argmax(1)] == made.labels).float().mean()),
    }
    if made.distance is not None:
        measured["moment_distance"] = made.distance
    if made.student is not None:
        measured["student_accuracy"] = boundary.score(Among(made.student, boundary.classes))
    return measured


SPEC = StrategySpec(
    name="target",
    summary="The server draws images out of each experience's network by its running statistics; clients distil it.",
    citation=Citation(
        title="TARGET: Federated Class-Continual Learning via Exemplar-Free Distillation",
        authors="Zhang, Chen, Zhuang, Lyu",
        year=2023,
        arxiv="2303.06937",
        where="ICCV 2023; official code zj-jayzhang/Federated-Class-Continual-Learning, methods/target.py",
    ),
    make=TARGET,
    needs_experiences=True,
    deviations=(
        "One generator is trained on through all batches; the official code adapts a copy for each batch and moves the "
        "first by the sum of their gradients. Moments are those of each batch alone, not averaged over batches.",
        "The student learns after every batch and enters the loss from the second on; in the official settings for "
        "CIFAR-100 (10 batches, after a warm-up of 20) it never does. It has Adam, and 40 steps a batch, not 400.",
        "Synthetic images are not augmented, neither for the teacher nor on clients, so that the teacher's answers can "
        "travel in the place of the teacher.",
        "A step has as many synthetic images as own ones; the official code goes once through the synthetic ones in "
        "each pass. There they are sent once for each experience, here with every round.",
    ),
    verified=(
        "The moments' term, the distillation and the student's term against formulas in float64.",
        "A client's step against one written out in plain PyTorch.",
    ),
)
