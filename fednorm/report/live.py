"""A run told to TensorBoard, Weights & Biases or MLflow while it goes: ``--log tensorboard``, or an observer.

    fednorm federated --log tensorboard --log mlflow        # into the folder logs; --log-dir names another
    fednorm compare STUDY --log tensorboard                 # each run of the study under its own name
    with fednorm.report.live.Live(["wandb"]) as live:
        live.end(fednorm.federated(strategy="fedbn", observer=live))

A round's or an experience's numbers have the names that ``fednorm report --tensorboard`` gives them (``mean``,
``accuracy/mnist``, ``weight_norm/conv1``), the final scores are under ``final/``. Nothing leaves the machine unless it
is asked to: W&B writes its files offline (``wandb sync`` sends them later) unless ``WANDB_MODE`` says otherwise, MLflow
writes to a folder unless ``MLFLOW_TRACKING_URI`` does. A tool that fails in the middle of a run is left out from there
on, with a warning: the run and its record go on.

A run that was cut short repeats what came after its last checkpoint, bit for bit. No tool has such a step twice:
TensorBoard's files say where the run goes on, so that what they had beyond is hidden; MLflow's run is asked what it
has, and for W&B, whose offline files are asked nothing, the last step is noted beside them.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from fednorm.config import RunConfig
from fednorm.errors import ConfigError, canonical
from fednorm.limits import require_path
from fednorm.report._common import flat
from fednorm.report.curves import steps
from fednorm.report.frame import of_line, of_result

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

Values = dict[str, float]


class Sink(Protocol):
    """A tool that takes numbers as they come."""

    def log(self, values: Values, step: int) -> None:
        """Take the numbers after a round or an experience."""

    def close(self, final: Values, *, finished: bool) -> None:
        """Take the final scores, none where the run did not finish; nothing comes after them."""


class _TensorBoard:
    """Event files in a folder a run."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], run: str) -> None:
        del run
        self._folder, self._last = folder / "tensorboard" / name, 0
        self._text = "    " + json.dumps(config, indent=1).replace("\n", "\n    ")
        self._writer: SummaryWriter | None = None

    def log(self, values: Values, step: int) -> None:
        writer = self._open(step)
        self._last = step
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    def close(self, final: Values, *, finished: bool) -> None:
        del finished
        if self._writer is None and not final:
            return
        writer = self._open(self._last)
        for name, value in final.items():
            writer.add_scalar(name, value, self._last)
        writer.close()

    def _open(self, step: int) -> SummaryWriter:
        """Return what writes; the first step that it is told hides what earlier files have from there on."""
        if self._writer is None:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=step)
            self._writer.add_text("run", self._text)
        return self._writer


class _Wandb:
    """A run of W&B in the project ``fednorm`` (``WANDB_PROJECT``), offline unless ``WANDB_MODE`` says otherwise."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], run: str) -> None:
        import wandb

        (folder / "wandb").mkdir(parents=True, exist_ok=True)
        self._note, self._began = folder / "wandb" / f"fednorm-{run}.step", False
        self._told = int(self._note.read_text()) if self._note.is_file() else 0
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fednorm"),
            dir=str(folder),
            name=name,
            id=run,
            resume="allow",
            config=flat(config),
            mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, values: Values, step: int) -> None:
        if not self._began and step == 1:  # a run from its beginning, whatever one of its name has told before
            self._told = 0
        self._began = True
        if step > self._told:
            self._run.log(values, step=step)
            self._note.write_text(f"{step}\n")

    def close(self, final: Values, *, finished: bool) -> None:
        self._run.summary.update(final)
        self._run.finish(exit_code=0 if finished else 1)


class _MLflow:
    """A run of MLflow in the experiment ``fednorm``, in a folder unless ``MLFLOW_TRACKING_URI`` says otherwise."""

    _MOST_PARAMETER = 500
    """Characters of a parameter that every server takes."""
    _PATIENCE = 0.5
    """Seconds before what failed at the beginning is tried once more."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], run: str) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # a folder needs no database and no server
        place, self._told = folder / "mlruns", dict[str, int]()
        uri = os.environ.get("MLFLOW_TRACKING_URI") or place.resolve().as_uri()
        self._client, number = self._opened(uri, os.environ.get("MLFLOW_EXPERIMENT_NAME", "fednorm"))
        before = self._client.search_runs([number], f"tags.fednorm_run = '{run}'", max_results=1)
        if before:  # a run that was cut short and goes on
            self._id = before[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            for name in before[0].data.metrics:
                self._told[name] = max(point.step for point in self._client.get_metric_history(self._id, name))
            return
        made = self._client.create_run(number, run_name=name, tags={"fednorm_run": run})
        self._id = made.info.run_id
        for key, value in flat(config).items():
            self._client.log_param(self._id, key, str(value)[: self._MOST_PARAMETER])

    def _opened(self, uri: str, experiment: str) -> tuple[Any, str]:
        """Return a client and the experiment's number; of several runs that begin at once one makes folder and it."""
        from mlflow.tracking import MlflowClient

        for again in (True, False):
            try:
                client = MlflowClient(tracking_uri=uri)
                found = client.get_experiment_by_name(experiment)
                return client, str(found.experiment_id if found else client.create_experiment(experiment))
            except Exception:  # each of MLflow's stores has its own for what another run has made meanwhile
                if not again:
                    raise
                time.sleep(self._PATIENCE)
        raise AssertionError("unreachable")

    def log(self, values: Values, step: int) -> None:
        for name, value in values.items():
            self._tell(_plain(name), value, step)

    def close(self, final: Values, *, finished: bool) -> None:
        for name, value in final.items():
            self._tell(_plain(name), value, 0)
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")

    def _tell(self, name: str, value: float, step: int) -> None:
        if step > self._told.get(name, -1):
            self._client.log_metric(self._id, name, value, step=step)


def _plain(name: str) -> str:
    """Return a name of the characters that MLflow allows."""
    return "".join(c if c.isalnum() or c in "_-./ " else "_" for c in name)


SINKS: Mapping[str, tuple[Callable[[Path, str, Mapping[str, Any], str], Sink], str, str]] = {
    "tensorboard": (_TensorBoard, "tensorboard", ""),
    "wandb": (_Wandb, "wandb", "wandb"),
    "mlflow": (_MLflow, "mlflow", "mlflow"),
}
"""The tools by name: what makes them, the package they need, and the extra that installs it."""


def require_tools(names: Sequence[str]) -> tuple[str, ...]:
    """Return the tools' names in their spelling here, each once.

    Raises:
        ConfigError: One is unknown, or its package is not installed.
    """
    from importlib.util import find_spec

    tools = tuple(dict.fromkeys(map(canonical, names)))
    for name in tools:
        if name not in SINKS:
            raise ConfigError(f"--log takes {', '.join(SINKS)}; got {name!r}.")
        _, package, extra = SINKS[name]
        try:
            there = find_spec(package) is not None
        except (ImportError, ValueError):
            there = False
        if not there:
            raise ConfigError(
                f'--log {name} needs the package {package}, which is not installed: pip install "fednorm[{extra}]". '
                "TensorBoard needs no further package: --log tensorboard."
            )
    return tools


FOLDER = Path("logs")
"""Where the tools' files go unless another folder is named."""


def require_folder(names: Sequence[str], folder: str | Path | None) -> Path:
    """Return the folder of what tools write.

    Args:
        names: The tools.
        folder: The one that is named; None for :data:`FOLDER`.

    Raises:
        ConfigError: One is named and no tool is, or it is none that can be written to.
    """
    if folder is not None and not names:
        raise ConfigError(
            "--log-dir is the folder of what --log writes, and no --log names a tool. Add --log "
            f"{' or --log '.join(SINKS)}."
        )
    path = FOLDER if folder is None else Path(folder)
    if names:
        require_path(path, "--log-dir")
        there = next(place for place in (path, *path.absolute().parents) if place.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            what = "cannot be written to" if there.is_dir() else "is a file"
            raise ConfigError(f"--log-dir is a folder that files can be written to; {there} {what}. Name another.")
    return path


class Live:
    """Tells tools how a run goes: an observer of runs of every kind; use it as a context manager.

    Args:
        names: The tools: keys of :data:`SINKS`.
        folder: Where their files go; None for ``logs``.

    Raises:
        ConfigError: A tool is unknown or not installed, or the folder is none, or is named where no tool is.
    """

    def __init__(self, names: Sequence[str], folder: str | Path | None = None) -> None:
        self._names, self._folder = require_tools(names), require_folder(names, folder)
        self._sinks: dict[str, Sink] = {}
        self._result: Mapping[str, Any] | None = None
        self._silent = True

    def __enter__(self) -> Self:
        """Return itself; the tools are opened as a run begins."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the tools, with the final scores where :meth:`end` told them."""
        final = _named(of_result(self._result), "final/") if self._result else {}
        if self._result and self._silent and self._sinks and (lines := steps(self._result)):
            number, line = lines[-1]  # cut after its last round: the final scores belong there
            self._log(line, "round" if self._result["kind"] == "federated" else "experience", number)
        self._tell(lambda sink: sink.close(final, finished=self._result is not None))
        self._sinks.clear()

    def begin(self, bench: Any, *_: int) -> None:
        """Open the tools for a run."""
        config: RunConfig = bench.config
        leads = config.learner.name if config.kind == "continual" else config.strategy.name
        name = f"{leads}-{config.norm.name}-seed{config.seed}-{config.hash}"
        for tool in self._names:
            with self._spared(tool):
                self._folder.mkdir(parents=True, exist_ok=True)
                self._sinks[tool] = SINKS[tool][0](self._folder, name, config.to_dict(), config.hash)

    def round(self, line: Mapping[str, Any]) -> None:
        """Tell the numbers after a round."""
        self._log(line, "round", line["round"])

    def step(self, steps_done: int) -> None:
        """Take no notice of a single step: numbers are measured after an experience."""

    def experience(self, line: Mapping[str, Any]) -> None:
        """Tell the numbers after an experience."""
        self._log(line, "experience", line["experience"] + 1)

    def end(self, result: Mapping[str, Any]) -> None:
        """Take the result of the run, whose final scores are told as the tools are closed."""
        self._result = result

    def _log(self, line: Mapping[str, Any], what: str, step: int) -> None:
        values, self._silent = _named(of_line(line, what), ""), False
        self._tell(lambda sink: sink.log(values, step))

    def _tell(self, tell: Callable[[Sink], None]) -> None:
        for tool, sink in list(self._sinks.items()):
            with self._spared(tool):
                tell(sink)

    @contextlib.contextmanager
    def _spared(self, tool: str) -> Any:
        """Leave a tool out that fails: its trouble is not the run's."""
        try:
            yield
        except Exception as error:  # whatever a tool's network, disk or server makes it raise
            self._sinks.pop(tool, None)
            warnings.warn(
                f"{tool} is told no more of this run, which goes on: {type(error).__name__}: {error}",
                UserWarning,
                stacklevel=2,
            )


@dataclass(frozen=True)
class Logged:
    """Tells tools of each run of a study, in the process that the run is made in.

    Attributes:
        names: The tools: keys of :data:`SINKS`.
        folder: Where their files go; None for ``logs``.

    Raises:
        ConfigError: A tool is unknown or not installed, or the folder is none.
    """

    names: Sequence[str]
    folder: Path | None = None

    def __post_init__(self) -> None:
        require_tools(self.names)
        require_folder(self.names, self.folder)

    @contextlib.contextmanager
    def __call__(self, observer: Any) -> Iterator[tuple[Any, Callable[[Mapping[str, Any]], None]]]:
        """Yield an observer that tells the tools too, and what takes the run's result.

        Args:
            observer: What else is told how the run goes.
        """
        with Live(self.names, self.folder) as live:
            yield Several(observer, live), live.end


class Several:
    """Several observers as one.

    Args:
        observers: What is told, in this order.
    """

    def __init__(self, *observers: Any) -> None:
        self._observers = observers

    def begin(self, bench: Any, *numbers: int) -> None:
        """Tell that a run begins."""
        for observer in self._observers:
            observer.begin(bench, *numbers)

    def round(self, line: Mapping[str, Any]) -> None:
        """Tell a finished round."""
        for observer in self._observers:
            observer.round(line)

    def step(self, steps_done: int) -> None:
        """Tell a finished step."""
        for observer in self._observers:
            observer.step(steps_done)

    def experience(self, line: Mapping[str, Any]) -> None:
        """Tell a finished experience."""
        for observer in self._observers:
            observer.experience(line)


def _named(rows: Any, prefix: str) -> Values:
    """Return numbers by the names that TensorBoard's files have."""
    values = {}
    for _, _, metric, domain, experience, layer, statistics, value in rows:
        what = [metric, domain, None if experience is None else f"experience {experience}", layer, statistics]
        values[prefix + "/".join(part for part in what if part is not None)] = value
    return values
