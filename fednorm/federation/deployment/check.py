"""A short federation on a folder's own scripts, and what each site has sent in it, as the sites wrote it down."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fednorm.config import RunConfig, resolve
from fednorm.errors import AggregationError, ConfigError, RecordError
from fednorm.federation.deployment.loopback import Loopback, loopback, read_run, sites_of
from fednorm.federation.deployment.sent import Sent, read_sent
from fednorm.federation.deployment.server import check_deployed
from fednorm.federation.deployment.submit import deploy

DRAWN = "image_folders"
"""The form of data of which images are drawn where the sites' folders are empty."""

LOOPBACK = ("127.0.0.1", "::1")
"""Where a check's processes may listen."""

WAIT = 180.0
"""Seconds to wait for the nodes, at most."""

TIMEOUT = 600.0
"""Seconds to wait for the answers of a round, at most."""

PARTS = ("train", "validation", "test")
"""What a record says of a client's images."""

IMAGES = 12
"""Of each class, where images are drawn."""


@dataclass(frozen=True)
class Checked:
    """What a check has seen.

    Attributes:
        sent: What each site has sent, by the type of the message.
        local: Keys of the norm plan that are the sites' own.
        image_size: Height and width of the images.
        drawn: Sites whose images were drawn, because their folders are empty.
        listening: Addresses on which the processes listened.
        result: The run's result.
    """

    sent: Mapping[str, Mapping[str, Sent]]
    local: tuple[str, ...]
    image_size: int
    drawn: tuple[str, ...]
    listening: tuple[str, ...]
    result: Mapping[str, Any]

    def leaks(self) -> list[str]:
        """Return what should not have left a site, or been reachable from elsewhere; nothing where all is well."""
        lines = [
            f"{site} sent {key} in answer to {message}: {why}"
            for site, messages in self.sent.items()
            for message, sent in messages.items()
            for key, (dtype, shape) in sent.tensors.items()
            if (why := self._why_not(site, key, dtype, shape))
        ]
        return lines + [f"a process listened on {address}" for address in self.listening if address not in LOOPBACK]

    def _why_not(self, site: str, key: str, dtype: str, shape: tuple[int, ...]) -> str:
        """Return why a site should not have sent a tensor; empty where it may."""
        if key.partition("/")[2] in self.local:
            return "the run's norm plan keeps it on the site"
        if shape[-3:] == (3, self.image_size, self.image_size):
            return f"it has the shape of images: {shape}"
        counts = [c[part] for c in self.result["data"]["clients"] if c["domain"] == site for part in PARTS]
        if "int" in dtype and len(shape) == 1 and shape[0] > 1 and shape[0] in counts:
            return "it has a whole number for each image, as labels are"
        return ""

    def document(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            "sites": {
                site: {message: sent.document() for message, sent in messages.items()}
                for site, messages in self.sent.items()
            },
            "local": list(self.local),
            "drawn": list(self.drawn),
            "listening": list(self.listening),
            "leaks": self.leaks(),
            "round_seconds": [line["seconds"] for line in self.result["rounds"]],
            "answered": self.result["final"].get("answered", 1.0),
        }


def check_folder(folder: Path, *, rounds: int = 1, on_line: Callable[[str], None] | None = None) -> Checked:
    """Run a folder's own SuperLink and nodes on this machine for a short federation, and see what the sites send.

    The run is ``run.toml``'s with fewer rounds. It happens in a copy; where a site's data folder is empty, drawn images
    take the place of its own.

    Args:
        folder: What ``fednorm deploy init`` has written.
        rounds: How many rounds.
        on_line: Called with each line of the run's log.

    Raises:
        ConfigError: The folder is none, or its run cannot be run.
        AggregationError: The SuperLink or a node did not start, or the run did not complete; with the ends of the logs.
    """
    config = read_run(folder)
    sites = sites_of(folder, config)
    values, own = config.to_dict(), config.rounds
    limits = {"num_rounds": rounds, "wait": min(own.wait, WAIT), "timeout": min(own.timeout, TIMEOUT)}
    config = resolve(values | {"rounds": values["rounds"] | limits})
    check_deployed(config)
    drawn: list[str] = []
    with tempfile.TemporaryDirectory(prefix="fednorm-check-") as scratch:
        with loopback(folder, Path(scratch), sites, lambda copy: drawn.extend(_draw(copy, sites, config))) as running:
            result = _run(running, config, sites, on_line)
            listening = running.listening()
        if left := running.tree.refresh():
            raise AggregationError(f"Processes were left: {', '.join(str(process.pid) for process in left)}.")
        sent = {site: _sent(running.folder, site) for site in sites}
        tensors = result["plan"]["tensors"]
    local = tuple(entry["key"] for entry in tensors if entry["role"] == "local")
    size = config.data.image_size or config.model.card.input_size
    return Checked(sent, local, size, tuple(drawn), tuple(sorted(listening)), result)


def _run(
    running: Loopback, config: RunConfig, sites: tuple[str, ...], on_line: Callable[[str], None] | None
) -> dict[str, Any]:
    try:
        result = deploy(config, running.superlink, runs=running.folder / "runs", on_line=on_line)
    except AggregationError as error:
        logs = [f"{name}.sh said at last:\n{running.log(name, 6)}" for name in sites if not _connected(running, name)]
        raise AggregationError("\n".join([str(error), *logs])) from error
    assert result is not None, "the SuperLink is on this machine"
    return result


def _connected(running: Loopback, name: str) -> bool:
    return "SuperNode ID" in running.log(name, 10_000)


def _sent(copy: Path, site: str) -> dict[str, Sent]:
    path = copy / "sent" / f"{site}.jsonl"
    if not path.exists():
        raise RecordError(
            f'{site}.sh names no sent-file "$PWD/sent/{site}.jsonl" in its node-config, where the site writes down '
            "what it sends. A folder that fednorm deploy init writes now has it."
        )
    return read_sent(path)


# Images where there are none ------------------------------------------------------------------------------------------


def _draw(copy: Path, sites: tuple[str, ...], config: RunConfig) -> list[str]:
    """Draw images for the sites whose folders are empty, in the copy; return whose they are.

    Raises:
        ConfigError: Only some of the folders are empty.
    """
    empty = [site for site in sites if not _holds_anything(copy / "data" / site)]
    if not empty or config.data.name != DRAWN:
        return []
    if len(empty) < len(sites):
        raise ConfigError(
            f"The data folder of {', '.join(empty)} is empty, and those of other sites are not: drawn images would not "
            "have their classes. Fill it, or empty all of them to try with drawn images."
        )
    draw = np.random.default_rng(0)
    for site in sites:
        link = copy / "data" / site
        link.unlink()
        for label in ("a", "b"):
            (link / label).mkdir(parents=True)
            for number in range(IMAGES):
                pixels = draw.integers(0, 255, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(link / label / f"{number}.png")
    return list(sites)


def _holds_anything(path: Path) -> bool:
    return path.is_dir() and any(path.iterdir())
