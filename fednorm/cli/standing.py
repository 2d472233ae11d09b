"""What stands when a command is stopped in the middle: by Ctrl-C, a closed terminal or a polite kill."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fednorm.cli.console import Stopped, err
from fednorm.config import RunConfig
from fednorm.errors import FedNormError
from fednorm.records.checkpoint import CHECKPOINT
from fednorm.records.record import RunRecord
from fednorm.signals import Terminated, exit_code, held, name_of


@contextmanager
def saying_what_stands(what: Callable[[], str]) -> Iterator[None]:
    """Let a block that is stopped end with a sentence and with the exit code 128 + the signal's number.

    Args:
        what: Returns the sentence on what stands; empty where nothing does, and then nothing is said.

    Raises:
        Stopped: The block was stopped.
    """
    try:
        yield
    except (KeyboardInterrupt, Terminated) as stop:
        code = exit_code(stop)
        with held():
            if sentence := what():
                say_stopped(sentence, code)
        raise Stopped(code) from None


def say_stopped(sentence: str, code: int) -> None:
    """Say on standard error that a command was stopped, and what stands; a terminal that is gone hears nothing."""
    by = "" if code == 130 else f" by {name_of(code)}"
    try:
        err().print(f"[bold red]stopped{by}.[/] ", end="")
        err().print(sentence, markup=False, soft_wrap=True)
    except OSError:
        return


def run_stands(config: RunConfig, runs: Path) -> str:
    """Return what stands of a run that was stopped; empty if nothing does.

    Args:
        config: The run's configuration.
        runs: The folder of records.
    """
    record = RunRecord(runs, config)
    try:
        if record.result():
            return f"The run has finished; its record is whole: {record.folder}"
        done = len(record.lines())
    except (FedNormError, OSError):
        done = 0
    parts = f"{done} experiences" if config.kind == "continual" else f"{done} rounds"
    if config.kind == "federated":
        parts = f"{done} of {config.rounds.num_rounds} rounds"
    finished = f"Finished and whole: {parts}, in {record.folder}."
    if not (record.folder / CHECKPOINT).exists():
        return ""
    return f"{finished} Run the same command again to go on from the last checkpoint."
