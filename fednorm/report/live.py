"""A run told to TensorBoard, Weights & Biases or MLflow while it goes: ``--log tensorboard``, or an observer.

    fednorm federated --log tensorboard --log mlflow        # into the folder logs; --log-dir names another
    with fednorm.report.live.Live(["wandb"]) as live:
        live.end(fednorm.federated(strategy="fedbn", observer=live))

A round's or an experience's numbers have the names that ``fednorm report --tensorboard`` gives them (``mean``,
``accuracy/mnist``, ``weight_norm/conv1``), the final scores are under ``final/``. Nothing leaves the machine unless it
is asked to: W&B writes its files offline (``wandb sync`` sends them later) unless ``WANDB_MODE`` says otherwise, MLflow
writes to a folder unless ``MLFLOW_TRACKING_URI`` does. A tool that fails in the middle of a run is left out from there
on, with a warning: the run and its record go on.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from fednorm.config import RunConfig
from fednorm.errors import ConfigError, canonical
from fednorm.report._common import flat
from fednorm.report.frame import of_line, of_result

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
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer, self._last = SummaryWriter(str(folder / "tensorboard" / name)), 0
        self._writer.add_text("run", "    " + json.dumps(config, indent=1).replace("\n", "\n    "))
        self._writer.flush()

    def log(self, values: Values, step: int) -> None:
        self._last = step
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, final: Values, *, finished: bool) -> None:
        del finished
        for name, value in final.items():
            self._writer.add_scalar(name, value, self._last)
        self._writer.close()


class _Wandb:
    """A run of W&B in the project ``fednorm`` (``WANDB_PROJECT``), offline unless ``WANDB_MODE`` says otherwise."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], run: str) -> None:
        import wandb

        (folder / "wandb").mkdir(parents=True, exist_ok=True)
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
        self._run.log(values, step=step)

    def close(self, final: Values, *, finished: bool) -> None:
        self._run.summary.update(final)
        self._run.finish(exit_code=0 if finished else 1)


class _MLflow:
    """A run of MLflow in the experiment ``fednorm``, in a folder unless ``MLFLOW_TRACKING_URI`` says otherwise."""

    _MOST_PARAMETER = 500
    """Characters of a parameter that every server takes."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], run: str) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # a folder needs no database and no server
        from mlflow.tracking import MlflowClient

        place = folder / "mlruns"
        self._client = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or place.resolve().as_uri())
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "fednorm")
        found = self._client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else self._client.create_experiment(experiment)
        before = self._client.search_runs([number], f"tags.fednorm_run = '{run}'", max_results=1)
        if before:  # a run that was cut short and goes on
            self._id = before[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        made = self._client.create_run(number, run_name=name, tags={"fednorm_run": run})
        self._id = made.info.run_id
        for key, value in flat(config).items():
            self._client.log_param(self._id, key, str(value)[: self._MOST_PARAMETER])

    def log(self, values: Values, step: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self._id, _plain(name), value, step=step)

    def close(self, final: Values, *, finished: bool) -> None:
        for name, value in final.items():
            self._client.log_metric(self._id, _plain(name), value)
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")


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


class Live:
    """Tells tools how a run goes: an observer of runs of every kind; use it as a context manager.

    Args:
        names: The tools: keys of :data:`SINKS`.
        folder: Where their files go.

    Raises:
        ConfigError: A tool is unknown or not installed.
    """

    def __init__(self, names: Sequence[str], folder: str | Path = "logs") -> None:
        self._names, self._folder = require_tools(names), Path(folder)
        self._sinks: dict[str, Sink] = {}
        self._result: Mapping[str, Any] | None = None

    def __enter__(self) -> Self:
        """Return itself; the tools are opened as a run begins."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the tools, with the final scores where :meth:`end` told them."""
        final = _named(of_result(self._result), "final/") if self._result else {}
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
        values = _named(of_line(line, what), "")
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
