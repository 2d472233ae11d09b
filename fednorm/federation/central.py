"""Images of the server's own: the shared model is scored where it is put together (``evaluate.central``).

A federation's server needs no data. Where somebody gives it a folder of images (``evaluate.central_dir``), no client's
among them, it evaluates the shared model on them after every evaluated round, itself, beside the clients'
evaluation: on any runtime, and in a deployment on the SuperLink's machine, which no image leaves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from flwr.app import ArrayRecord

from fednorm.cards import DATA
from fednorm.config import EvaluateConfig
from fednorm.data.benchmarks import Reader
from fednorm.data.classes import some
from fednorm.data.domain import Client, Domain, Federation, Split
from fednorm.data.moving import moved
from fednorm.data.normalize import FIXED, scaled
from fednorm.data.shards import SPLIT_WORDS
from fednorm.errors import ConfigError, DataError
from fednorm.federation.client import score
from fednorm.federation.wire import unpack

if TYPE_CHECKING:
    from fednorm.federation.workbench import Workbench

LAYOUT = "DIR/CLASS/*.png (or DIR/{train,test}/CLASS/*.png, of which the test images are scored)"


@dataclass(frozen=True, eq=False)
class Central:
    """The server's own images.

    Attributes:
        split: All of them.
        digest: What identifies them: 16 hexadecimal digits.
    """

    split: Split
    digest: str

    def about(self) -> dict[str, Any]:
        """Return what the record says of them."""
        return {"images": len(self.split), "digest": self.digest}

    def scores(self, bench: Workbench, arrays: ArrayRecord) -> dict[str, float]:
        """Return the number of images, and mean ``loss`` and ``accuracy`` of the shared model on them.

        Args:
            bench: The run's workbench; its model is written to, as by any client's turn.
            arrays: The server's tensors.
        """
        bench.write({**bench.initial, **unpack(arrays)})
        measured = score(bench, self.split)
        return {"images": len(self.split), "loss": measured["loss"], "accuracy": measured["accuracy"]}


def require_folder(evaluate: EvaluateConfig) -> Path | None:
    """Return the folder of the server's own images; None where a run has none.

    Raises:
        ConfigError: One of the two keys is there without the other.
        DataError: It is no folder.
    """
    if not evaluate.central:
        if evaluate.central_dir:
            raise ConfigError(
                "evaluate.central_dir names images for the server, and evaluate.central is false: they would not be "
                "looked at. Set evaluate.central = true, or leave the folder out."
            )
        return None
    if not evaluate.central_dir:
        raise ConfigError(
            "evaluate.central lets the server score the shared model on images of its own: name their folder, on the "
            f"server's machine, with evaluate.central_dir; {LAYOUT}."
        )
    try:
        folder = Path(evaluate.central_dir).expanduser()
        there = folder.is_dir()
    except (OSError, RuntimeError, ValueError):  # too long a name, no such user, a NUL
        there = False
    if not there:
        raise DataError(
            f"evaluate.central_dir, {evaluate.central_dir[:200]!r}, is no folder on the server's machine. Expected "
            f"{LAYOUT}."
        )
    return folder


def central_of(bench: Workbench) -> Central | None:
    """Return the server's own images, read and held against the run; None where it has none.

    Raises:
        ConfigError: The server has no whole model, or images are scaled by what it cannot know.
        DataError: The folder is none, or its classes are not the run's.
    """
    folder = require_folder(bench.config.evaluate)
    if folder is None:
        return None
    _require_whole_model(bench)
    federation = bench.federation
    (split, own), names = _read(bench, folder), _classes(bench)
    if own != names:
        raise DataError(
            f"evaluate.central_dir, {folder}, has the classes {some(own)}, and this run has {some(names)}. The folders "
            "in it are called as the run's classes are, each of them there; one without images is empty."
        )
    split = scaled(split, FIXED[bench.config.data.normalize])
    none = replace(split, index=split.index[:0])
    held = Client(0, "central", none, none, split, held_out=True)
    digest = Federation("", federation.num_classes, federation.image_size, (held,)).digest()
    return Central(moved(split, bench.trainee.device), digest)


def _require_whole_model(bench: Workbench) -> None:
    config, local = bench.config, bench.plan.local
    if local:
        raise ConfigError(
            f"evaluate.central: strategy {config.strategy.name} keeps {len(local)} tensors on the clients ({local[0]}, "
            "…), so the server has no whole model to score on images of its own. Take a strategy that shares them, "
            "such as fedavg, or leave evaluate.central out."
        )
    if config.data.normalize not in FIXED or config.strategy.card.own_scaling:
        how = "by each client's own statistics" if config.strategy.card.own_scaling else repr(config.data.normalize)
        raise ConfigError(
            f"evaluate.central: images are scaled {how}, as measured on training images, and the server has none of "
            "the clients'. Take data.normalize = 'half' or 'none' and a strategy that leaves the scaling alone, or "
            "leave evaluate.central out."
        )


def _classes(bench: Workbench) -> tuple[str, ...]:
    """Return what the run's classes are called; numbers where its data does not name them."""
    return bench.federation.class_names or tuple(map(str, range(bench.federation.num_classes)))


def _read(bench: Workbench, folder: Path) -> tuple[Split, tuple[str, ...]]:
    """Return the images of a folder of classes, all of them or its test images where it has such, and the classes.

    Raises:
        DataError: It holds several domains, no images, or what is no image.
    """
    own = bench.config.data.replace(name="image_folders", dir=str(folder), domains=(), held_out="", download=False)
    found = DATA["image_folders"].read(Reader(own, bench.federation.image_size))
    if len(found.domains) != 1:
        raise DataError(
            f"evaluate.central_dir, {folder}, holds folders of folders ({some([d.name for d in found.domains])}), as "
            f"of several domains. Expected {LAYOUT}; name one of them."
        )
    return _scored(found.domains[0], folder), found.class_names


def _scored(domain: Domain, folder: Path) -> Split:
    words = {word for words in SPLIT_WORDS.values() for word in words}
    if any(path.name in words and path.is_dir() for path in folder.iterdir()):
        return domain.test
    return replace(domain.train, index=torch.cat([domain.train.index, domain.test.index]).sort().values)
