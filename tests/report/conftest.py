"""Results of continual runs written by hand, so that every number of a table is known beforehand; a real browser."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest

from fednorm.config import digest, merge, resolve

LEARNERS: Mapping[str, Mapping[str, Any]] = {
    "er_ace": {"memory_size": 500, "passes": "joint", "recalibrate": False},
    "naive": {},
    "joint": {},
}
FINAL: Mapping[str, Any] = {
    "average_accuracy": 0.541,
    "average_incremental_accuracy": 0.612,
    "forgetting_max_minus_last": 0.25,
    "forgetting_first_minus_last": 0.2049,
    "backward_transfer": -0.2049,
    "forward_transfer": None,
    "online_accuracy": 0.7,
    "task_incremental_accuracy": None,
    "train_accuracy": 0.9,
    "plasticity": 0.8,
    "drift": 0.4567,
}


def _result(
    *,
    learner: Mapping[str, Any] | None = None,
    norm: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    matrix: Sequence[Sequence[float | None]] = ((0.9, 0.0), (0.5, 0.582)),
    final: Mapping[str, Any] | None = None,
    diagnostics: Sequence[Mapping[str, Any]] | None = None,
    train_accuracies: Sequence[float] = (),
    title: str = "Split CIFAR-10 (5×2)",
    notes: Sequence[str] = ("A note.",),
    memorization: bool = False,
    seconds: float = 34.4,
) -> dict[str, Any]:
    methods = {"learner": {"name": "er_ace", **(learner or {})}, "norm": {"name": "batch_norm", **(norm or {})}}
    named = {section: {"name": table["name"]} for section, table in methods.items()}
    values = {"kind": "continual", "train": {"batch_size": 10, "epochs": 1}, **named}
    # What is written of a method stays, at its default or unknown as it may be: a record may be of another version.
    plain = merge(resolve(merge(values, config or {})).to_dict(), {"model": {"width": 0}}, methods, config or {})
    joint = plain["learner"]["name"] == "joint"  # one line, and its row for each experience of the matrix
    experiences = [
        {
            "experience": len(scores) - 1 if joint else number,
            "title": "all experiences" if joint else f"classes {2 * number}, {2 * number + 1}",
            "accuracy": list(scores),
            "task_accuracy": None,
            "online_accuracy": 0.5,
            "train_accuracy": train_accuracies[number] if train_accuracies else 0.9,
            "train_loss": 0.1,
            "steps": 100,
            "seconds": 17.2,
            "diagnostics": diagnostics[number] if diagnostics else {},
        }
        for number, scores in enumerate(matrix[-1:] if joint else matrix)
    ]
    return {
        "kind": "continual",
        "hash": digest(plain, {}, ()),
        "config": plain,
        "norm": {"eps": 1e-5, **plain["norm"]},
        "learner": {**LEARNERS[plain["learner"]["name"]], **plain["learner"]},
        "scenario": {"num_experiences": len(matrix), **plain["scenario"]},
        "parameters": 1000,
        "data": {
            "title": title,
            "notes": list(notes),
            "memorization": memorization,
            "experiences": [{"experience": number, "classes": [0, 1]} for number in range(len(matrix))],
        },
        "experiences": experiences,
        "accuracy_matrix": [list(scores) for scores in matrix],
        "untrained_accuracy": None,
        "final": {
            **FINAL,
            "selection": f"after the last experience, {plain['evaluate']['split']} images",
            **(final or {}),
        },
        "seconds": seconds,
        "run": "runs/somewhere",
    }


@pytest.fixture(scope="session")
def stream_result() -> Callable[..., dict[str, Any]]:
    """Return a function that writes the result of a continual run."""
    return _result


@pytest.fixture(scope="session")
def memorized(stream_result: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Return a function that writes the result of a run on a memorization stream, from its training accuracies."""

    def make(accuracies: Sequence[float], **arguments: Any) -> dict[str, Any]:
        count = len(accuracies)
        unmeasured = dict.fromkeys(
            key for key in FINAL if key not in ("online_accuracy", "train_accuracy", "plasticity")
        )
        return stream_result(
            matrix=[[a if i == j else None for j in range(count)] for i, a in enumerate(accuracies)],
            train_accuracies=accuracies,
            memorization=True,
            title="CIFAR-10 with random labels",
            **{"learner": {"name": "naive"}, "final": unmeasured, **arguments},
        )

    return make


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Yield a headless Chromium that keeps the messages of its console."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    binary, driver_path = shutil.which("chromium"), shutil.which("chromedriver")
    if not (binary and driver_path):
        pytest.skip("needs chromium and chromedriver on the path (Debian: chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1280,900"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver_path))
    try:
        yield driver
    finally:
        driver.quit()
