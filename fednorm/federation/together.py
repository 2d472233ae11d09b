"""Scores of many clients' images on one small network, in passes over several clients, to the bits of one at a time.

A small network takes as long for one client's images as for many clients'. But a matrix product of few rows adds up in
another order than one of many: where it does is a matter of the processor, its library and the layers' shapes. So
each shape of a pass is tried once, on a network of this architecture whose every tensor has been drawn: where the pass
gives each client's logits to the bit, it is made, and where it does not, clients are scored one by one. Either way the
scores are those of one by one, and nothing depends on which clients are asked.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fednorm.data.domain import Split
from fednorm.federation.cohort.batches import Images
from fednorm.federation.scores import Scores
from fednorm.federation.untouched import known
from fednorm.federation.workbench import Workbench
from fednorm.norms import spec_of
from fednorm.rng import torch_stream

IMAGES, PIXELS = 128, 2**19
"""The most images, and pixels of them, of a pass over several clients: more take more memory and save nothing."""

SMALL = 2**20
"""Parameters up to which a network is small: a pass takes its time for calls, and not for arithmetic."""

LEAST = 4
"""Clients from which a pass is made together."""

log = logging.getLogger("fednorm")


class Together:
    """Scores clients together where that changes no bit.

    Args:
        bench: The run's workbench, on whose model all of them are scored.
    """

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self._most = min(IMAGES, PIXELS // bench.federation.image_size**2)
        self._can = _can(bench)
        self._same: dict[tuple[int, int], bool] = {}

    def scores(self, splits: Sequence[Split]) -> list[Scores | None]:
        """Return each split's scores, None where it is to be scored alone. The model is in evaluation mode."""
        found: list[Scores | None] = [None] * len(splits)
        for count, places in self._passes(splits):
            if self._may(count, len(places), splits[places[0]]):
                for place, scores in zip(places, self._scored([splits[p] for p in places], count), strict=True):
                    found[place] = scores
        return found

    def _passes(self, splits: Sequence[Split]) -> Iterator[tuple[int, list[int]]]:
        """Yield how many images each client of a pass has, and the places of its clients."""
        by_count: dict[int, list[int]] = {}
        for place, split in enumerate(splits if self._can else ()):
            by_count.setdefault(len(split), []).append(place)
        for count, places in by_count.items():
            if not 0 < count <= self._bench.config.evaluate.batch_size:  # it is in several passes by itself
                continue
            clients = self._most // count
            for start in range(0, len(places), max(clients, 1)):
                own = places[start : start + clients]
                if len(own) >= LEAST:
                    yield count, own

    def _may(self, count: int, clients: int, split: Split) -> bool:
        """Return whether a pass over so many clients with so many images each has the bits of each of them alone."""
        if (count, clients) not in self._same:
            images, _ = split.inputs(torch.zeros(1, dtype=torch.int64))
            try:
                same = _tried(self._bench.model, images, count, clients)
            except Exception as error:  # whatever a network does that cannot be copied, or is not for drawn weights
                log.debug("clients are scored one by one: %s", error)
                same = False
            self._same[count, clients] = same
        return self._same[count, clients]

    @torch.no_grad()
    def _scored(self, splits: Sequence[Split], count: int) -> Iterator[Scores]:
        images = Images(splits, self._bench.trainee.device)
        batch, labels = (each.flatten(0, 1) for each in images.read(torch.arange(count).expand(len(splits), -1)))
        # As each client's own are laid out, also where they come from several arrays.
        logits = self._bench.model(batch.contiguous(memory_format=torch.channels_last))
        hits = (logits.argmax(1) == labels).view(-1, count).sum(1).tolist()
        log_p = torch.split(functional.log_softmax(logits, 1), count)
        for own, of_own, hit in zip(log_p, torch.split(labels, count), hits, strict=True):
            loss = functional.nll_loss(own, of_own, reduction="sum").item()
            yield {"num-examples": count, "loss": loss / count, "accuracy": hit / count}


def _can(bench: Workbench) -> bool:
    """Return whether the network is one whose passes may be made together, as far as can be told without a trial."""
    config, model = bench.config, bench.model
    if bench.trainee.device.type != "cpu" or config.compile or config.amp != "none" or not known(model):
        return False
    if sum(parameter.numel() for parameter in model.parameters()) > SMALL:
        return False
    specs = [spec_of(module) for module in model.modules()]
    return not any(spec is not None and spec.coupled_in_evaluation for spec in specs)


@torch.no_grad()
def _tried(model: nn.Module, image: Tensor, count: int, clients: int) -> bool:
    """Return whether the logits of a pass are each client's own, on a network and images that are drawn.

    Nothing of the run is used: at its beginning weights may be 0, and hide what they will not hide later.
    """
    generator = torch_stream(0, "together")
    drawn = copy.deepcopy(model).eval()

    def log_p(of_images: Tensor) -> Tensor:
        return functional.log_softmax(drawn(of_images), 1)

    for parameter in drawn.parameters():
        if parameter.ndim > 1 and parameter[0].numel() > 1:
            nn.init.normal_(parameter, 0.0, (2 / parameter[0].numel()) ** 0.5, generator)
        elif parameter.is_floating_point():
            nn.init.uniform_(parameter, 0.5, 1.5, generator)
    images = torch.randn((clients * count, *image.shape[1:]), generator=generator, dtype=image.dtype)
    if image.ndim == 4 and image.is_contiguous(memory_format=torch.channels_last):
        images = images.contiguous(memory_format=torch.channels_last)
    together = log_p(images)
    telling = len(set(together.flatten().tolist())) > together.numel() / 2 and bool(together.isfinite().all())
    return telling and all(
        torch.equal(log_p(own.clone()), of_own)
        for own, of_own in zip(torch.split(images, count), torch.split(together, count), strict=True)
    )
