"""Whatever stands in a configuration, it is accepted or refused by a sentence: no traceback, no hang, nothing left."""

from __future__ import annotations

import datetime
import os
import resource
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fednorm import memory
from fednorm.cards import LEARNERS, MODELS, NORMS, SCENARIOS, STRATEGIES
from fednorm.config import RunConfig, override, read_config, resolve
from fednorm.errors import FedNormError
from fednorm.federation.simulate import plan as plan_federation
from fednorm.records.record import RunRecord
from fednorm.streams.simulate import plan as plan_stream
from fednorm.study.study import make_study

SECONDS = 60  # the embedded images of a new size take ten, on a machine with other work twenty
MEMORY = 6 * 2**30

EXTREME_INTEGERS = [
    0,
    -1,
    1,
    2,
    3,
    7,
    10**3,
    10**6,
    10**7,
    10**9,
    10**12,
    2**31,
    2**63 - 1,
    2**63,
    -(2**63),
    10**40,
    10**6000,
]
EXTREME_FLOATS = [
    0.0,
    -0.0,
    1e-320,
    1e-30,
    0.5,
    1.0,
    1e30,
    3.4e38,
    1e39,
    1e300,
    float("inf"),
    float("-inf"),
    float("nan"),
    -1.0,
]
ODD_TEXTS = [
    "",
    " ",
    "\x00",
    "a\x1b[31mb",
    "../../x",
    "=1+1",
    "\ud800",
    "é😀\u202e",
    "x" * 5000,
    "x" * 10**6,
    "-",
    "nan",
    "1e400",
    "9" * 6000,
]


def deep(depth: int) -> Any:
    value: Any = 1
    for number in range(depth):
        value = [value] if number % 2 else {"a": value}
    return value


junk: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(EXTREME_INTEGERS),
    st.sampled_from(EXTREME_FLOATS),
    st.sampled_from(ODD_TEXTS),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.booleans(),
    st.none(),
    st.sampled_from([datetime.date(2020, 1, 1), datetime.datetime(2020, 1, 1), datetime.time(1), b"x", object(), 1j]),
    st.builds(deep, st.sampled_from([1, 3, 20, 10_000])),
    st.lists(st.one_of(st.integers(), st.text(max_size=5), st.floats()), max_size=4),
    st.dictionaries(st.one_of(st.text(max_size=5), st.integers()), st.integers(), max_size=3),
)  # fmt: skip


def _keys(plain: Mapping[str, Any]) -> list[tuple[str, ...]]:
    flat: list[tuple[str, ...]] = []
    for section, value in plain.items():
        flat += [(section, key) for key in value] if isinstance(value, Mapping) else [(section,)]
    return flat


def _cards(kind: str) -> dict[tuple[str, ...], list[str]]:
    """Names that are there, so that what is drawn gets past the first check."""
    names = {("model", "name"): list(MODELS), ("norm", "name"): [*NORMS, "auto"]}
    if kind == "federated":
        return {**names, ("strategy", "name"): list(STRATEGIES.names)}
    mini = [name for name in SCENARIOS.names if "digits_mini" in (SCENARIOS[name].data or ("digits_mini",))]
    return {**names, ("scenario", "name"): mini, ("learner", "name"): list(LEARNERS.names)}


def _options(kind: str) -> list[tuple[str, ...]]:
    if kind == "federated":
        return [("strategy", "mu"), ("norm", "eps"), ("norm", "num_groups"), ("norm", "momentum"), ("norm", "x\ny")]
    of_learners = {("learner", key) for name in LEARNERS.names for key in LEARNERS[name].options}
    of_scenarios = {("scenario", key) for name in SCENARIOS.names for key in SCENARIOS[name].options}
    return [*sorted(of_learners | of_scenarios), ("norm", "eps"), ("norm", "kappa")]


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a configuration with valid names for the most part and a few bad values."""
    kind = draw(st.sampled_from(["federated", "continual"]))
    plain = (RunConfig.defaults("federated") if kind == "federated" else RunConfig.defaults("continual")).to_dict()
    values: dict[str, Any] = {"kind": kind}
    for path, names in _cards(kind).items():
        if draw(st.booleans()):
            values.setdefault(path[0], {})["name"] = draw(st.sampled_from(names))
    keys = [*_keys(plain), *_options(kind), ("nope",), ("data", "nope")]
    for path in draw(st.lists(st.sampled_from(keys), min_size=1, max_size=4, unique=True)):
        value = draw(junk)
        if len(path) == 1:
            values[path[0]] = value
        elif isinstance(values.setdefault(path[0], {}), dict):
            # Good sizes are made from scratch, which takes ten seconds each; that is for other tests.
            fine = path[1] == "image_size" and isinstance(value, int) and 0 < value <= 512
            values[path[0]][path[1]] = 28 if fine else value
    return values


class TookTooLong(BaseException):
    """Not to be caught by what is tested."""


@contextmanager
def guarded() -> Iterator[None]:
    """Bound the time and the memory of a block."""

    def alarm(*_: object) -> None:
        raise TookTooLong

    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    # Seconds of this process, because others may be busy; and ten times as many of the clock, lest it waits for ever.
    before = {number: signal.signal(number, alarm) for number in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(10 * SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _plan(config: RunConfig) -> dict[str, Any]:
    return plan_federation(config) if isinstance(config, RunConfig) else plan_stream(config)


def _is_a_sentence(error: FedNormError) -> None:
    message = str(error)
    assert 10 < len(message) < 3000
    assert not any(ord(letter) < 32 for letter in message), message


def _accepted_or_refused(values: Any, folder: Path) -> None:
    with guarded():
        try:
            config = resolve(values)
            RunRecord(folder, config).result()
            assert _plan(config)["hash"] == config.hash
            assert resolve(config.to_dict()) == config
        except FedNormError as error:
            _is_a_sentence(error)
    assert list(folder.iterdir()) == []


quick = settings(
    max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nothing")


@quick
@given(values=configurations())
def test_a_drawn_configuration_is_accepted_or_refused(values: dict[str, Any], empty: Path) -> None:
    _accepted_or_refused(values, empty)


@pytest.mark.slow
@settings(quick, max_examples=1500, derandomize=False)
@given(values=configurations())
def test_1500_drawn_configurations_are_accepted_or_refused(values: dict[str, Any], empty: Path) -> None:
    _accepted_or_refused(values, empty)


@quick
@given(
    value=junk,
    path=st.sampled_from(
        [
            ("base",),
            ("grid",),
            ("points",),
            ("search",),
            ("select",),
            ("paper",),
            ("study",),
            ("grid", "seed"),
            ("base", "seed"),
            ("paper", "match"),
        ]
    ),
)
def test_a_drawn_study_is_accepted_or_refused(value: Any, path: tuple[str, ...]) -> None:  # fmt: skip
    document: dict[str, Any] = {"base": {"kind": "federated"}, "grid": {"seed": [1, 2]}}
    document[path[0]] = value if len(path) == 1 else {path[1]: value}
    with guarded():
        try:
            assert make_study(document).cases
        except FedNormError as error:
            _is_a_sentence(error)


@quick
@given(key=st.text(max_size=30), value=st.one_of(st.text(max_size=30), st.sampled_from(ODD_TEXTS)))
def test_a_drawn_setting_is_accepted_or_refused(key: str, value: str) -> None:
    with guarded():
        try:
            resolve(override(f"{key}={value}"))
        except FedNormError as error:
            _is_a_sentence(error)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a = " + "[" * 100_000 + "]" * 100_000, "deeper than any"),
        ("seed = " + "9" * 6000, "4300 digits"),
        ("seed = 0x" + "f" * 6000, "an integer of about 7,224 digits"),
        ("[norm]\neps = 2020-01-01", "norm.eps takes"),
        (".".join("a" * 100_000) + " = 1", "deeper than any"),
        ("[" + ".".join("a" * 100_000) + "]", "deeper than any"),
        ("x = { " + " . ".join(["'a'"] * 100_000) + " = 1 }", "deeper than any"),
        ("[train]\nlearning_rate = 1e400", "must be a finite number"),
        ("[train]\nlearning_rate = nan", "must be a finite number"),
        ("[train]\nlearning_rate = 1e300", "32 bits"),
        ("threads = 1000000", "between 1 and 1024"),
        ('[data]\ndir = "a\\u0000b"', "without control characters"),
        ("x = " + "1" * (5 * 2**20), "4,194,304"),
    ],
)
def test_a_file_that_no_reader_of_toml_should_choke_on(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text(text)
    with guarded(), pytest.raises(FedNormError, match=words):
        resolve(read_config(path))


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.toml")
    with guarded(), pytest.raises(FedNormError, match="a device or a pipe"):
        read_config(tmp_path / "x.toml")


def test_a_file_with_many_values_and_lines_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text(
        '[study]\nabout = """Two\nlines..."""\n[grid.train]\nlearning_rate = ['
        + ", ".join(f"{number / 1000}" for number in range(1, 1001))
        + "]"
    )
    assert len(read_config(path)["grid"]["train"]["learning_rate"]) == 1000


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"model": {"width": 10**6}},
            r"width 1,000,000 .* would take 61\.[56] PiB of memory; .* are free here\. Lower model",
        ),
        ({"model": {"width": 10**14}}, "beyond what can be numbered"),
        ({"data": {"image_size": 2000}}, "512 at most; got 2000"),
        ({"data": {"clients_per_domain": 10**7}}, "gets no training image"),
        ({"data": {"partition": "shards", "shards_per_client": 10**12}}, "shards of no image"),
        ({"kind": "continual", "scenario": {"name": "random_labels", "num_experiences": 10**9}}, "at most 10,000"),
    ],
)
def test_what_this_machine_cannot_hold_is_refused_before_it_is_allocated(values: dict[str, Any], words: str) -> None:
    with guarded(), pytest.raises(FedNormError, match=words):
        _plan(resolve(values))


@pytest.mark.parametrize(
    "values",
    [
        {"rounds": {"num_rounds": 10**12}},
        {"train": {"batch_size": 10**9}},
        {"train": {"local_epochs": 10**15}},
        {"kind": "continual", "train": {"epochs": 10**15, "batch_size": 10**9}},
        {"kind": "continual", "learner": {"memory_size": 10**15}},
    ],
)
def test_what_is_long_but_takes_no_more_memory_is_accepted_in_a_moment(values: dict[str, Any]) -> None:
    with guarded():
        assert _plan(resolve(values))["hash"]


def test_a_batch_is_measured_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of a batch grows with its images; the run itself fits."""
    monkeypatch.setattr(memory, "free_memory", lambda: 2**28)
    wide = {"width": 32}
    assert _plan(resolve({"model": wide, "train": {"batch_size": 8}, "evaluate": {"batch_size": 8}}))
    with pytest.raises(FedNormError, match=r"on 743 images .* Lower train\.batch_size"):
        _plan(resolve({"model": wide, "train": {"batch_size": 743}, "data": {"train_per_client": 743}}))


def test_the_guard_would_see_what_it_is_there_for() -> None:
    with pytest.raises(MemoryError), guarded():
        bytearray(2 * MEMORY)
    assert sys.getrecursionlimit() < 10_000, "a nest of 10,000 tables must be deeper than Python recurses"
