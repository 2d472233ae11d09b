"""A command that is stopped says what stands, leaves with 128 + the signal's number, and leaves nothing half done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fednorm import signals
from fednorm.cli.standing import run_stands
from fednorm.config import resolve
from fednorm.federation import client
from fednorm.records.checkpoint import CHECKPOINT
from fednorm.records.record import RunRecord

SMALL = ("--set", "model.width=4", "--set", "evaluate.batch_size=64")
ENDLESS: dict[str, tuple[str, ...]] = {
    "federated": (
        *("federated", "--train-per-client", "16", "--set", "data.test_per_domain=10", "--learning-rate", "0.001"),
        *("--rounds", "1000000", *SMALL),
    ),
    "continual": (
        *("continual", "--scenario", "split_digits", "--set", "scenario.train_per_experience=20", "--epochs", "100000"),
        *("--learning-rate", "0.001", "--set", "train.checkpoint_every=5", *SMALL),
    ),
}
STANDS = {
    "federated": ("checkpoint.safetensors", "of 1000000 rounds"),
    "continual": ("checkpoint.safetensors", "experiences"),
}


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fednorm.cli.app", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, sys.path))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(folder: Path, pattern: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in folder.glob(pattern)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def stopped(process: subprocess.Popen[str], number: signal.Signals) -> str:
    """Send a signal twice, as a closed terminal does, and return what the command said on standard error."""
    process.send_signal(number)
    if number is not signal.SIGINT:
        process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert out == ""
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize(
    ("command", "name"),
    [
        *(("federated", name) for name in ("SIGINT", "SIGHUP", "SIGQUIT", "SIGTERM")),
        *(("continual", name) for name in ("SIGINT", "SIGHUP", "SIGTERM")),
    ],
)
@pytest.mark.slow
def test_a_run_that_is_stopped_says_what_stands(command: str, name: str, tmp_path: Path) -> None:
    process = start(tmp_path, *ENDLESS[command])
    file, words = STANDS[command]
    wait_for(tmp_path, f"runs/*/{file}", process)
    err = stopped(process, signal.Signals[name])
    (folder,) = (tmp_path / "runs").iterdir()
    assert "Run the same command again to go on from the last checkpoint" in err
    assert words in err
    assert str(folder) in err
    assert ("stopped. " if name == "SIGINT" else f"stopped by {name}. ") in err
    assert (folder / "checkpoint.safetensors").is_file()
    assert list(folder.glob("*.part")) == []
    if command == "federated":
        lines = (folder / "rounds.jsonl").read_text().splitlines()
        assert [json.loads(line)["round"] for line in lines] == list(range(1, len(lines) + 1))
        assert f"{len(lines)} of 1000000 rounds" in err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"])
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_study_that_is_stopped_says_what_stands(name: str, jobs: str, tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(
        "base = { model = { width = 4 }, data = { train_per_client = 16, test_per_domain = 10 }, "
        "train = { learning_rate = 0.001 }, rounds = { num_rounds = 100000 } }\ngrid = { seed = [1, 2] }\n"
    )
    process = start(tmp_path, "compare", "s.toml", "--jobs", jobs)
    wait_for(tmp_path, "runs/s/*/rounds.jsonl", process)
    assert "Finished and whole: 0 of the study's 2 runs" in stopped(process, signal.Signals[name])


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        ("SIGINT", 0.3),
        *(pytest.param("SIGINT", s, marks=pytest.mark.slow) for s in (0.05, 0.1, 0.2, 0.5, 0.8, 1.1, 1.4, 1.8, 2.2)),
        *(pytest.param("SIGTERM", s, marks=pytest.mark.slow) for s in (0.5, 1.5)),
    ],
)
def test_a_command_that_is_stopped_in_its_first_seconds_says_and_leaves_nothing(
    name: str, seconds: float, tmp_path: Path
) -> None:
    process = start(tmp_path, *ENDLESS["federated"])
    deadline = time.monotonic() + 30
    while not _takes_signals(process.pid) and time.monotonic() < deadline:  # Python itself has to start first
        time.sleep(0.002)
    time.sleep(seconds)
    process.send_signal(signal.Signals[name])
    out, err = process.communicate(timeout=60)
    assert ended_by(process, signal.Signals[name])
    assert out == ""
    assert "Traceback" not in err
    assert "ignored" not in err
    if (tmp_path / "runs").exists():  # it was quicker than we are, and has a round
        assert "Run the same command again" in err
        return
    assert err == "" or err.startswith("fedavg with norm batch_norm on digits-mini")  # what it is going to do
    assert list(tmp_path.iterdir()) == []


def ended_by(process: subprocess.Popen[str], number: signal.Signals) -> bool:
    """Say whether a process left with 128 + a signal's number, or, what a shell calls the same, died of Ctrl-C.

    Python itself chooses the latter where an interrupt passed through the text that dataclasses execute.
    """
    return process.returncode == 128 + number or (number is signal.SIGINT and process.returncode == -number)


def _takes_signals(pid: int) -> bool:
    """Say whether a process catches SIGTERM: the command line's handlers are in place."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except FileNotFoundError:
        return True
    caught = next(int(line.split()[1], 16) for line in text.splitlines() if line.startswith("SigCgt"))
    return bool(caught >> (signal.SIGTERM - 1) & 1)


@pytest.mark.slow
@pytest.mark.parametrize("words", [("list", "data"), ("explain", "adab2n"), ("check", "torchvision:resnet18")])
def test_a_command_that_only_looks_is_stopped_without_a_word(words: tuple[str, ...], tmp_path: Path) -> None:
    """It imports NumPy and PyTorch on its way: an import that is cut short must not be seen to fail."""
    for moment in range(8):
        process = start(tmp_path, *words)
        deadline = time.monotonic() + 30
        while not _takes_signals(process.pid) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(0.12 * moment)
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert err == ""
        assert process.returncode == 0 or ended_by(process, signal.SIGINT)


@pytest.mark.few(4)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
@pytest.mark.parametrize("at", [1, 2])
def test_a_round_that_is_stopped(
    number: signal.Signals, at: int, call: Any, small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = client.fit

    def interrupted(bench: Any, who: Any, *, server_round: int, **settings: Any) -> Any:
        if (server_round, who.partition_id) == (at, 3):
            signal.raise_signal(number)
        return fit(bench, who, server_round=server_round, **settings)

    monkeypatch.setattr(client, "fit", interrupted)
    monkeypatch.setattr(signals, "_state", signals._State())
    outcome = call("federated", *small)
    assert outcome.code == 128 + number
    if at == 1:  # nothing stands: nothing is left, and there is nothing to say of it
        assert "stopped" not in outcome.err
        assert not (tmp_path / "runs").exists()
    else:
        assert "Finished and whole: 1 of 2 rounds" in outcome.err
        (folder,) = (tmp_path / "runs").iterdir()
        assert (folder / "checkpoint.safetensors").exists()


# In this process  -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_is_raised_and_its_repeat_is_not(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_state", signals._State())
    cleaned = False
    with pytest.raises(signals.Terminated) as caught, signals.raising():  # noqa: PT012
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)
            cleaned = True
    assert cleaned
    assert (caught.value.code, signals.exit_code(caught.value), signals.name_of(128 + number)) == (
        128 + number,
        128 + number,
        number.name,
    )
    assert signal.getsignal(number) == signal.SIG_DFL


def test_a_signal_waits_until_things_are_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_state", signals._State())
    steps = []
    with pytest.raises(KeyboardInterrupt), signals.raising():  # noqa: PT012
        with signals.held():
            with signals.held():
                signal.raise_signal(signal.SIGINT)
            steps.append("in order")
        steps.append("never")
    assert steps == ["in order"]
    with pytest.raises(ValueError, match="its own"), signals.raising(), signals.held():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        raise ValueError("its own")
    with signals.raising(), signals.held():
        pass


def test_a_signal_outlasts_the_failure_of_what_it_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A study's run fails at its checkpoint (a full disk) while somebody stops the study: no other run is begun."""
    monkeypatch.setattr(signals, "_state", signals._State())
    with pytest.raises(KeyboardInterrupt), signals.raising():  # noqa: PT012
        with pytest.raises(OSError, match="full"), signals.held():  # noqa: PT012
            signal.raise_signal(signal.SIGINT)
            raise OSError("full")
        with signals.held():
            pass
        pytest.fail("another run was begun")


def test_what_is_ignored_or_somebody_else_s_stays_so() -> None:
    mine: Callable[..., Any] = lambda *_: None  # noqa: E731
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, mine)
    try:
        with signals.raising():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is mine
            signal.raise_signal(signal.SIGHUP)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


BLOCKED = """
import os, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
from fednorm.cli import app
app.command_of = lambda _: lambda **_: (os.kill(os.getpid(), signal.SIG{0}), time.sleep(30))
app.main()
"""


@pytest.mark.parametrize("name", ["INT", "TERM"])
def test_a_signal_that_was_blocked_by_whoever_started_the_command_ends_it(name: str) -> None:
    ended = subprocess.run([sys.executable, "-c", BLOCKED.format(name)], timeout=60, check=False, capture_output=True)
    assert ended.returncode == 128 + signal.Signals[f"SIG{name}"], ended.stderr


def test_outside_the_main_thread_nothing_is_touched() -> None:
    seen = []

    def look() -> None:
        with signals.raising(), signals.held():
            seen.append((signal.getsignal(signal.SIGTERM), signals._state.held))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [(signal.SIG_DFL, False)]


@pytest.mark.parametrize(("kind", "words"), [("federated", "0 of 10 rounds, in "), ("continual", "0 experiences, in ")])
def test_what_stands_is_counted_in_the_kind_s_own_parts(kind: str, words: str, tmp_path: Path) -> None:
    config = resolve({"kind": kind})
    folder = RunRecord(tmp_path, config).folder
    folder.mkdir(parents=True, exist_ok=True)
    assert run_stands(config, tmp_path) == ""
    (folder / CHECKPOINT).touch()
    assert f"Finished and whole: {words}{folder}. Run the same command again" in run_stands(config, tmp_path)
