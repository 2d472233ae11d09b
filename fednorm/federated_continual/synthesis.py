"""Images out of a network: a generator is trained until a teacher takes what it draws for images of given classes.

Data-free distillation as Zhang et al. use it between experiences (TARGET, arXiv 2303.06937), after Yin et al., Dreaming
to Distill (DeepInversion, arXiv 1912.08795), and Fang et al., Up to 100x Faster Data-free Knowledge Distillation (arXiv
2112.06253). Of a batch x = G(z) with wanted classes y, teacher T and student S, all over the classes O met so far:

    loss    = w_y CE(T(x), y) + w_m sum_l d_l + w_s L_s                          minimised over G's weights and z
    d_l     = ||mean(h_l) - M_l|| + ||var(h_l) - V_l||
    L_s     = - mean over x of 1[argmax S(x) = argmax T(x)] KL(T(x) || S(x))
    student : KL(T(x) / tau || S(x) / tau) tau^2 on all images so far, tau = 20

h_l is what the teacher's layer l is given, (M_l, V_l) are the running means and variances that it has, mean and var
(biased) are over samples and positions, by channel. L_s rewards images on which the student is not yet as sure as the
teacher; it counts from the second batch on, when there is a student. Of each batch the images of the least loss are
kept, as 8-bit pixels. A network without running moments has no d_l.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fednorm.data.domain import taken
from fednorm.data.scaling import Scaling
from fednorm.errors import ConfigError, DivergedError
from fednorm.federated_continual.between import Images
from fednorm.rng import stream_seed, torch_seeded, torch_stream

STUDENT_TEMPERATURE = 20.0
STUDENT_RATE = 1e-3
LATENT_RATE = 0.01
BETAS = (0.5, 0.999)
LATENT = 256
"""Numbers that each image is drawn from."""

Moments = Mapping[str, tuple[Tensor, Tensor]]
"""Mean and variance, each of shape (C,), that a layer's input is to have, by the layer's path."""


def moment_distance(inputs: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Return how far a batch's moments are from given ones: ||mean(x) - mean||_2 + ||var(x) - var||_2, a scalar.

    Args:
        inputs: x, shape (N, C, ...); its moments are over all axes but the second, its variance is biased.
        mean: Shape (C,).
        var: Shape (C,).
    """
    values = inputs.transpose(0, 1).flatten(1)
    own_mean, own_var = values.mean(1), values.var(1, unbiased=False)
    distance: Tensor = torch.linalg.vector_norm(own_mean - mean) + torch.linalg.vector_norm(own_var - var)
    return distance


def divergence(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Return KL(softmax(targets / T) || softmax(logits / T)) of each sample, shape (N,), without a factor T^2.

    Args:
        logits: Of what learns, shape (N, K).
        targets: Of what teaches, shape (N, K).
        temperature: T.
    """
    own, wanted = (functional.log_softmax(each / temperature, 1) for each in (logits, targets))
    return functional.kl_div(own, wanted, reduction="none", log_target=True).sum(1)


def student_term(student: Tensor, teacher: Tensor) -> Tensor:
    """Return L_s of the logits of both, shape (N, K): less where they agree on the class and differ in how sure."""
    agree = student.argmax(1) == teacher.argmax(1)
    return -(divergence(student, teacher, 1.0) * agree).mean()


class Generator(nn.Module):
    """Draws images of any size from latent numbers, in [0, 1]: a linear layer and three convolutions at rising size.

    Args:
        shape: Channels, height and width of an image.
        width: Channels of its last hidden layer.
    """

    def __init__(self, shape: tuple[int, int, int], width: int) -> None:
        super().__init__()
        channels, height, width_of_image = shape
        self.shape, self.grid = shape, (-(-height // 4), -(-width_of_image // 4))
        self.first = nn.Linear(LATENT, 2 * width * self.grid[0] * self.grid[1])
        self.blocks = nn.Sequential(
            nn.BatchNorm2d(2 * width),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, channels, 3, padding=1),
        )

    def forward(self, latent: Tensor) -> Tensor:
        """Return images, shape (N, C, H, W), of latent numbers, shape (N, LATENT)."""
        drawn: Tensor = self.blocks(self.first(latent).unflatten(1, (-1, *self.grid)))
        return drawn[:, :, : self.shape[1], : self.shape[2]].sigmoid()


class Among(nn.Module):
    """A network whose answers are among some classes; what it says of others, of which it knows nothing, is left out.

    Args:
        network: The network.
        classes: Those that it knows.
    """

    def __init__(self, network: nn.Module, classes: Sequence[int]) -> None:
        super().__init__()
        self.network, self.classes = network, list(classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits, shape (N, K), minus infinity for the other classes."""
        logits: Tensor = self.network(inputs)
        masked = torch.full_like(logits, -torch.inf)
        masked[:, self.classes] = logits[:, self.classes]
        return masked


@dataclass(frozen=True)
class Recipe:
    """How images are synthesized.

    Attributes:
        batches: How many batches of images.
        batch_size: Images in each.
        steps: Updates of the generator for each.
        label_weight: w_y.
        moment_weight: w_m.
        student_weight: w_s.
        student_steps: Updates of the student after each batch; without any there is no student.
        rate: Learning rate of the generator.
        width: Of the generator.
    """

    batches: int
    batch_size: int
    steps: int
    label_weight: float
    moment_weight: float
    student_weight: float
    student_steps: int
    rate: float
    width: int


@dataclass(frozen=True)
class Synthetic:
    """What came of it.

    Attributes:
        images: 8-bit pixels, shape (n, C, H, W), on the CPU.
        labels: The wanted class of each, on the CPU.
        logits: The teacher's over all K outputs, float32, shape (n, K), of the images as they are, on the CPU.
        student: The student, in evaluation mode; None where there is none.
        distance: Mean over batches of sum_l d_l, of the images as they are; None where there is no such term.
    """

    images: Tensor
    labels: Tensor
    logits: Tensor
    student: nn.Module | None
    distance: float | None


class Synthesis:
    """Draws images of a teacher.

    Args:
        teacher: In the modes that it is to answer in.
        student: Learns from the teacher; not used where the recipe has no steps for it.
        moments: What its layers' inputs are to have; empty for no such term.
        classes: Those to draw images of.
        images: What images are like.
        recipe: How.
        seed: Of the random streams ``names``.
        names: Likewise.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        moments: Moments,
        *,
        classes: Sequence[int],
        images: Images,
        recipe: Recipe,
        seed: int,
        names: tuple[str | int, ...],
    ) -> None:
        self.teacher, self.student, self.recipe = teacher.requires_grad_(False), student, recipe
        self.device = next(teacher.parameters()).device
        self.classes = torch.tensor(classes, device=self.device)
        self.scaling, self.scale = images.scaling, to_input(images.scaling, self.device)
        self.watched = Watched(teacher, moments)
        self.drawing = torch_stream(seed, *names, "draw")
        with torch_seeded(seed, *names, "generator"):
            self.generator = Generator(images.shape, recipe.width).to(self.device)
        self.optimizer = torch.optim.Adam(self.generator.parameters(), lr=recipe.rate, betas=BETAS)
        self.learning = torch.optim.Adam(student.parameters(), lr=STUDENT_RATE)
        self.seed = stream_seed(seed, *names, "student")
        self.pool: list[Tensor] = []
        self.labels: list[Tensor] = []

    def run(self) -> Synthetic:
        """Return the images.

        Raises:
            DivergedError: A batch's loss was no number from its first step on.
        """
        with self.watched.hooks():
            for number in range(self.recipe.batches):
                self._draw()
                self._teach(number)
            logits, distance = self._answers()
        learned = self.student.eval() if self.recipe.student_steps else None
        return Synthetic(torch.cat(self.pool), torch.cat(self.labels), logits, learned, distance)

    def loss(self, images: Tensor, places: Tensor) -> Tensor:
        """Return the loss of images in [0, 1], shape (N, C, H, W), and the places of their wanted classes in O."""
        recipe, inputs = self.recipe, self.scale(images)
        taught = self.teacher(inputs)[:, self.classes]
        loss = recipe.label_weight * functional.cross_entropy(taught, places)
        if self.watched.moments:
            loss = loss + recipe.moment_weight * self.watched.distance()
        if recipe.student_weight and recipe.student_steps and self.pool:
            self.student.eval()
            loss = loss + recipe.student_weight * student_term(self.student(inputs)[:, self.classes], taught)
        return loss

    def _draw(self) -> None:
        """Add one batch of images to the pool."""
        size = self.recipe.batch_size
        latent = torch.randn(size, LATENT, generator=self.drawing).to(self.device).requires_grad_()
        places = torch.randint(len(self.classes), (size,), generator=self.drawing).to(self.device)
        of_latent = torch.optim.Adam([latent], lr=LATENT_RATE, betas=BETAS)
        self.student.requires_grad_(False)
        least, best = float("inf"), None
        for _ in range(self.recipe.steps):
            drawn = self.generator(latent)
            loss = self.loss(drawn, places)
            if (value := loss.item()) < least:
                least, best = value, drawn.detach()
            self.optimizer.zero_grad(set_to_none=True)
            of_latent.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            of_latent.step()
        if best is None:
            raise DivergedError(
                f"The generator's loss is not a number from batch {len(self.pool) + 1} of {self.recipe.batches} on: "
                f"its terms are too large. Lower strategy.moment_weight (now {self.recipe.moment_weight:g}) or "
                f"strategy.generator_rate (now {self.recipe.rate:g})."
            )
        self.pool.append((255 * best).round().to(torch.uint8).cpu())
        self.labels.append(self.classes[places].cpu())

    def _teach(self, number: int) -> None:
        """Teach the student on what is in the pool."""
        if not self.recipe.student_steps:
            return
        pool, size = torch.cat(self.pool), self.recipe.batch_size
        self.student.train().requires_grad_(True)
        with torch_seeded(self.seed, number):
            for _ in range(self.recipe.student_steps):
                rows = torch.randint(len(pool), (size,), generator=self.drawing)
                inputs = self.scaling(taken(pool, rows).to(self.device))
                with torch.no_grad():
                    taught = self.teacher(inputs)[:, self.classes]
                logits = self.student(inputs)[:, self.classes]
                loss = STUDENT_TEMPERATURE**2 * divergence(logits, taught, STUDENT_TEMPERATURE).mean()
                self.learning.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                self.learning.step()

    @torch.no_grad()
    def _answers(self) -> tuple[Tensor, float | None]:
        """Return the teacher's logits of the pool's images as they are, and the mean distance of its moments."""
        logits, distances = [], []
        for batch in self.pool:
            logits.append(self.teacher(self.scaling(batch.to(self.device))).float().cpu())
            distances += [float(self.watched.distance())] if self.watched.moments else []
        return torch.cat(logits), sum(distances) / len(distances) if distances else None


class Watched:
    """The distances of what layers are given from the moments that they are to have.

    Args:
        model: The network.
        moments: By path of a layer.
    """

    def __init__(self, model: nn.Module, moments: Moments) -> None:
        self.moments = moments
        self._layers = {path: model.get_submodule(path) for path in moments}
        self._distances: dict[str, Tensor] = {}

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Look at what the layers are given within."""
        handles = [layer.register_forward_pre_hook(self._hook(path)) for path, layer in self._layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def distance(self) -> Tensor:
        """Return sum_l d_l of the last forward pass."""
        return torch.stack(list(self._distances.values())).sum()

    def _hook(self, path: str) -> Any:
        mean, var = self.moments[path]

        def look(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0].ndim < 2 or mean.shape != (inputs[0].shape[1],):
                raise ConfigError(
                    f"The generator's loss compares the moments of what layer {path!r} ({type(layer).__name__}) is "
                    f"given, by channel, with its running ones, which have shape {tuple(mean.shape)} for an input of "
                    f"shape {tuple(inputs[0].shape)}. Take norm batch_norm, or strategy.statistics = 'none'."
                )
            self._distances[path] = moment_distance(inputs[0], mean, var)

        return look


def to_input(scaling: Scaling, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return a function from images in [0, 1], floats of shape (N, C, H, W), to what a network is given of them."""
    mean, std = (torch.tensor(v[0], device=device)[:, None, None] for v in (scaling.mean, scaling.std))
    return lambda images: (images - mean) / std
