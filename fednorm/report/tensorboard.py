"""TensorBoard event files from records: a folder a run, so that TensorBoard compares runs as it always does.

    fednorm report RUNS --tensorboard EVENTS
    tensorboard --logdir EVENTS

A run's folder has every measured number by round or experience (``accuracy/mnist``, ``weight_norm/conv1``), its final
scores under ``final/``, and its configuration as text. An event's time is when the run reached it, as if it had ended
just now: the axis ``RELATIVE`` shows seconds of training.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from fednorm.report._common import Result
from fednorm.report.curves import steps
from fednorm.report.files import write_whole
from fednorm.report.frame import methods, numbers
from fednorm.report.text import file_name, printable

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

EVENTS = "events.out.tfevents.*"
"""What event files are called."""


def write_events(folder: Path, results: Sequence[Result]) -> int:
    """Write a folder of event files for each run; event files of an earlier call for the same run are replaced.

    Args:
        folder: Where to; made where it is not there. Runs' folders are called by method, seed and hash.
        results: Results of finished runs.

    Returns:
        How many runs were written.

    Raises:
        RecordError: The folder cannot be written.
    """
    from torch.utils.tensorboard.writer import SummaryWriter

    labels = methods(results)
    for result in results:
        label = labels[result["hash"]]
        place = folder / f"{file_name(label)}-seed{int(result['config']['seed'])}-{file_name(str(result['hash']), 12)}"
        with TemporaryDirectory(prefix="fednorm-events-") as scratch:
            with SummaryWriter(scratch) as writer:
                _write(writer, result, label)
            written = [(file.name, file.read_bytes()) for file in sorted(Path(scratch).glob(EVENTS))]
        old = [file for file in place.glob(EVENTS) if file.is_file() and not file.is_symlink()]
        for name, content in written:
            write_whole(place / name, content)
        for file in old:
            file.unlink()
    return len(results)


def _write(writer: SummaryWriter, result: Result, label: str) -> None:
    times = _times(result)
    writer.add_text("run", _described(result, label), walltime=times[0])
    for after, step, metric, domain, experience, layer, statistics, value in numbers(result):
        what = [metric, domain, None if experience is None else f"experience {experience}", layer, statistics]
        tag = "/".join(part for part in ("final" if after == "run" else None, *what) if part is not None)
        at = max(times) if step is None else step
        writer.add_scalar(tag, value, at, walltime=times[at])


def _times(result: Result) -> dict[int, float]:
    """Return when each round or experience ended, in seconds since the epoch; 0 is the start of the run."""
    ended = time.time()
    seconds = {number: float(line.get("seconds") or 0.0) for number, line in steps(result)}
    left = sum(seconds.values())
    times = {0: ended - left}
    for number, took in seconds.items():
        left -= took
        times[number] = ended - left
    return times


def _described(result: Result, label: str) -> str:
    """Return a run's method, data and configuration in the Markdown that TensorBoard shows."""
    config = json.dumps(result["config"], indent=1).replace("\n", "\n    ")
    return f"{_escaped(label)}\n\n{_escaped(result['data']['title'])}\n\n    {config}"


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]()#+!|<>-])", r"\\\1", printable(text))
