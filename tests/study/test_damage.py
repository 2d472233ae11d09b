"""Whatever happens to a file of a record, its run ends with the same numbers, or in a sentence that names the file.

Each example damages one file of a run that has finished or was interrupted, of either kind, calls the run again, and
does what every error says until the run ends.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fednorm.config import merge, resolve
from fednorm.errors import DamageWarning, RecordError
from fednorm.records.integrity import digest_of
from fednorm.records.results import load

FEDERATED: dict[str, Any] = {
    "data": {"train_per_client": 8, "test_per_domain": 5, "domains": ["scans", "photo"]},
    "model": {"width": 4},
    "strategy": {"name": "fedbn"},
    "rounds": {"num_rounds": 3},
    "evaluate": {"diagnostics": False},
}
CONTINUAL: dict[str, Any] = {
    "kind": "continual",
    "scenario": {"name": "split_digits", "num_experiences": 2, "train_per_experience": 12, "test_per_experience": 4},
    "data": {"image_size": 8},
    "model": {"name": "digits_cnn", "width": 4},
    "norm": {"name": "batch_norm"},
    "learner": {"name": "er", "memory_size": 20},
    "train": {"batch_size": 4, "epochs": 1, "checkpoint_every": 2, "momentum": 0.9},
    "evaluate": {"probe_images": 0},
}

FINISHED = ("run.json", "model.safetensors", "clients.safetensors", "result.json")
INTERRUPTED = ("run.json", "checkpoint.safetensors", "previous.safetensors")


class Stop:
    """Interrupts a run after a round, or in the middle of an experience."""

    def __init__(self, after: int) -> None:
        self.after = after

    def begin(self, *_: Any) -> None: ...

    def experience(self, _: Any) -> None: ...

    def round(self, line: Any) -> None:
        self.step(line["round"])

    def step(self, done: int) -> None:
        if done == self.after:
            raise KeyboardInterrupt


@dataclass
class Made:
    """Runs of one kind: the same one finished, interrupted and interrupted earlier; and another one in both states."""

    run: Callable[[Path], dict[str, Any]]
    journal: str
    folders: dict[str, Path] = field(default_factory=dict)
    numbers: Any = None

    def of(self, folder: Path) -> Any:
        """Return every number that a finished run has left, without times."""
        result = json.loads((folder / "result.json").read_text())
        lines = [json.loads(line) for line in (folder / self.journal).read_text().splitlines()]
        tensors = {
            path.name: {key: tensor.numpy().tobytes() for key, tensor in load_file(path).items()}
            for path in sorted(folder.glob("*.safetensors"))
        }
        return tensors, timeless(result["final"]), timeless(lines)


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: timeless(inner) for key, inner in value.items() if key not in ("seconds", "digest")}
    return [timeless(inner) for inner in value] if isinstance(value, list) else value


def make(kind: str, root: Path) -> Made:
    if kind == "federated":
        from fednorm.federation.simulate import simulate as simulate_federation

        simulate: Any = simulate_federation
        base, states = FEDERATED, {"interrupted": 2, "earlier": 1}
    else:
        pytest.importorskip("avalanche")
        from fednorm.streams.simulate import simulate as simulate_stream

        simulate, base, states = simulate_stream, CONTINUAL, {"interrupted": 5, "earlier": 3}
    config = resolve(base)
    made = Made(
        lambda runs: dict(simulate(config, runs=runs)), {"federated": "rounds.jsonl"}.get(kind, "experiences.jsonl")
    )
    for name, values in (("", base), ("other ", merge(base, {"train": {"learning_rate": 0.123}}))):
        made.folders[f"{name}finished"] = Path(simulate(resolve(values), runs=root / f"{name}finished")["run"])
        for state, after in states.items() if not name else [("interrupted", states["interrupted"])]:
            runs = root / f"{name}{state}"
            with pytest.raises(KeyboardInterrupt):
                simulate(resolve(values), runs=runs, observer=Stop(after))
            made.folders[f"{name}{state}"] = next(runs.iterdir())
    made.numbers = made.of(made.folders["finished"])
    return made


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    kinds: dict[str, Made] = {}

    def of(kind: str) -> Made:
        if kind not in kinds:
            kinds[kind] = make(kind, tmp_path_factory.mktemp(kind))
        return kinds[kind]

    return of


# Damage ---------------------------------------------------------------------------------------------------------------

share = st.floats(0, 1, exclude_max=True)
junk = st.sampled_from(["5", "[1, 2]", "null", "true", '"x"', "{}", "[" * 3000, "", "NaN", "\x00\x00", '{"hash": 1}'])
formats = st.sampled_from([0, -1, True, None, 1, 3, "2", 2.0])

DAMAGES: dict[str, st.SearchStrategy[Any]] = {
    "a bit": st.tuples(share, st.integers(0, 7)),
    "cut": share,
    "more": st.binary(min_size=1, max_size=20),
    "other": junk,
    "directory": st.none(),
    "lost": st.none(),
    "of another run": st.none(),
    "of an earlier moment": st.none(),
    "of another state": st.none(),
    "format": formats,
    "edited": share,
    "swapped": share,
    "doubled": share,
    "dropped": share,
}

damages = st.sampled_from(sorted(DAMAGES)).flatmap(lambda how: st.tuples(st.just(how), DAMAGES[how]))


def damage(path: Path, how: str, what: Any, made: Made, state: str) -> None:
    """Damage one file; what cannot happen to it leaves it as it is."""
    if how in ("format", "edited") and path.suffix == ".safetensors":
        rewrite_tensors(path, how, what)
        return
    content = path.read_bytes()
    path.unlink()
    if how == "directory":
        path.mkdir()
    elif how.startswith("of "):
        source = made.folders[other_folder(how, state)] / path.name
        path.write_bytes(source.read_bytes() if source.exists() else content)
    elif how != "lost":
        path.write_bytes(damaged(content, how, what))


def other_folder(how: str, state: str) -> str:
    if how == "of another run":
        return f"other {state}"
    other = "finished" if state == "interrupted" else "interrupted"
    return "earlier" if how == "of an earlier moment" else other


def damaged(content: bytes, how: str, what: Any) -> bytes:
    if how in ("swapped", "doubled", "dropped"):
        return moved(content, how, what)
    if how == "a bit":
        offset = int(what[0] * len(content))
        return content[:offset] + bytes([content[offset] ^ 1 << what[1]]) + content[offset + 1 :]
    if how == "format":
        first, _, rest = content.decode().partition("\n") if content.count(b"\n{") else (content.decode(), "", "")
        return "\n".join([json.dumps({**json.loads(first), "format": what}), rest]).encode()
    if how == "edited":
        numbers = list(re.finditer(rb"\d", content))
        at = numbers[int(what * len(numbers))].start()
        return content[:at] + b"%d" % ((int(content[at : at + 1]) + 1) % 10) + content[at + 1 :]
    return {
        "more": lambda: content + what,
        "cut": lambda: content[: int(what * len(content))],
        "other": lambda: what.encode(),
    }[how]()


def moved(content: bytes, how: str, what: float) -> bytes:
    lines = content.splitlines(keepends=True)
    at = int(what * len(lines))
    if how == "swapped" and len(lines) > 1:
        at = min(at, len(lines) - 2)
        lines[at : at + 2] = reversed(lines[at : at + 2])
    elif how == "doubled":
        lines.insert(at, lines[at])
    elif how == "dropped":
        del lines[at]
    return b"".join(lines)


def rewrite_tensors(path: Path, how: str, what: Any) -> None:
    """Change one value of one tensor, or the format, and nothing that is said of the rest."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    if how == "edited":
        tensor = tensors[sorted(tensors)[int(what * len(tensors))]]
        tensor.view(-1)[0:1].add_(1)
    elif what is None:
        del metadata["record_format"]
    else:
        metadata["record_format"] = str(what)
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    path.chmod(mode)  # the library gives its owner's alone


# The property ---------------------------------------------------------------------------------------------------------


def refusal(made: Made, runs: Path) -> RecordError | None:
    """Call a run, and return why it is refused, None where it ends."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DamageWarning)
            made.run(runs)
    except RecordError as error:
        return error
    return None


def do_what_it_says(error: RecordError, folder: Path, path: Path) -> None:
    assert str(path) in str(error)
    before, after = re.split(r"[Rr]emove", str(error), maxsplit=1)
    place = re.escape(str(folder)) + r"/[a-z]+\.[a-z]+"
    paths = re.findall(place, after) or re.findall(place, before)[:1]
    if "it, and the checkpoints beside it" in after:
        paths += [str(folder / name) for name in ("checkpoint.safetensors", "previous.safetensors")]
    assert paths, error
    for path in map(Path, paths):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def check(made: Made, state: str, name: str, how: str, what: Any) -> None:
    with TemporaryDirectory() as place:
        source = made.folders[state]
        folder = Path(place) / source.name
        shutil.copytree(source, folder)
        path = folder / name
        if not path.exists():  # a stream's run has no clients
            return
        damage(path, how, what, made, state)
        for _ in range(4):
            error = refusal(made, folder.parent)
            if error is None:
                break
            do_what_it_says(error, folder, path)
            path = folder  # what is left over may be named next
        assert error is None, "what the errors say does not help"
        assert made.of(folder) == made.numbers
        assert not list(folder.glob("checkpoint*")) + list(folder.glob("previous*"))
        assert len({file.stat().st_mode for file in folder.iterdir()}) == 1


def property_of(max_examples: int) -> Any:
    def decorate(test: Any) -> Any:
        drawn = given(
            kind=st.sampled_from(["federated", "continual"]),
            state=st.sampled_from(["finished", "interrupted"]),
            file=share,
            how=damages,
        )(test)
        checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
        return settings(max_examples=max_examples, deadline=None, suppress_health_check=checks)(drawn)

    return decorate


def any_damage(made: Callable[[str], Made], kind: str, state: str, file: float, how: tuple[str, Any]) -> None:
    runs = made(kind)
    names = (*(FINISHED if state == "finished" else INTERRUPTED), runs.journal)
    check(runs, state, names[int(file * len(names))], *how)


def test_a_file_written_anew_as_it_was_is_no_damage(made: Callable[[str], Made]) -> None:
    check(made("federated"), "finished", "clients.safetensors", "format", "2")


@pytest.mark.slow
@property_of(8)
def test_a_damaged_file_is_named_or_changes_nothing(
    made: Callable[[str], Made], kind: str, state: str, file: float, how: tuple[str, Any]
) -> None:
    any_damage(made, kind, state, file, how)


@pytest.mark.slow
@property_of(300)
def test_many_damaged_files_are_named_or_change_nothing(
    made: Callable[[str], Made], kind: str, state: str, file: float, how: tuple[str, Any]
) -> None:
    any_damage(made, kind, state, file, how)


# Examples -------------------------------------------------------------------------------------------------------------


@pytest.mark.few(6)
@pytest.mark.parametrize("kind", ["federated", "continual"])
@pytest.mark.parametrize(
    ("state", "name"),
    [
        *(("finished", name) for name in (*FINISHED, "the journal")),
        *(("interrupted", name) for name in (*INTERRUPTED[:2], "the journal")),
    ],
)
def test_a_file_copied_from_another_run_is_refused_by_name(
    kind: str, state: str, name: str, made: Callable[[str], Made], tmp_path: Path
) -> None:
    """Of another learning rate: tensors have the same names and shapes."""
    runs = made(kind)
    name = runs.journal if name == "the journal" else name
    source, other = runs.folders[state], runs.folders[f"other {state}"]
    if not (source / name).exists():
        pytest.skip("a stream's run has no clients")
    folder = tmp_path / source.name
    shutil.copytree(source, folder)
    shutil.copyfile(other / name, folder / name)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(RecordError, match="of another run") as caught:
        runs.run(tmp_path)
    assert str(folder / name) in str(caught.value)
    assert other.name[-12:] in str(caught.value)  # its hash
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("kind", ["federated", "continual"])
@pytest.mark.parametrize("written", [0, -1, True, 1, 3, "missing"])
def test_a_result_of_another_format_is_refused(
    kind: str, written: Any, made: Callable[[str], Made], tmp_path: Path
) -> None:
    """With a digest that fits: the format itself is looked at."""
    runs = made(kind)
    folder = tmp_path / runs.folders["finished"].name
    shutil.copytree(runs.folders["finished"], folder)
    document = json.loads((folder / "result.json").read_text())
    document = {key: value for key, value in document.items() if key not in ("digest", "format")}
    document |= {} if written == "missing" else {"format": written}
    (folder / "result.json").write_text(json.dumps({**document, "digest": digest_of(document)}))
    words = {1: "older", 3: "newer", "missing": "tells no format.*older"}.get(written, "no fednorm has written")
    words = "no fednorm has written" if written is True else words
    with pytest.raises(RecordError, match=rf"result\.json is not a result of this run: .*{words}.*Remove it"):
        runs.run(tmp_path)
    with pytest.raises(RecordError, match=words):
        load([tmp_path])


def test_lines_of_another_attempt_at_the_same_run_do_not_pass_for_this_one_s(
    made: Callable[[str], Made], tmp_path: Path
) -> None:
    runs = made("federated")
    folder = tmp_path / runs.folders["interrupted"].name
    shutil.copytree(runs.folders["interrupted"], folder)
    shutil.copyfile(runs.folders["finished"] / runs.journal, folder / runs.journal)
    with pytest.raises(RecordError, match="they are of another attempt at this run"):
        runs.run(tmp_path)
    assert (folder / "checkpoint.safetensors").exists()


def test_a_result_in_the_folder_of_another_run_is_not_reported(made: Callable[[str], Made], tmp_path: Path) -> None:
    runs = made("federated")
    for state in ("finished", "other finished"):
        shutil.copytree(runs.folders[state], tmp_path / state)
    shutil.copyfile(tmp_path / "other finished" / "result.json", tmp_path / "finished" / "result.json")
    loaded = load([tmp_path])
    assert [result["config"]["train"]["learning_rate"] for result in loaded.results] == [0.123]
    (problem,) = loaded.problems
    assert str(tmp_path / "finished" / "result.json") in problem
    assert "of another run" in problem


@pytest.mark.parametrize("kind", ["federated", "continual"])
def test_a_checkpoint_left_beside_a_result_is_removed(kind: str, made: Callable[[str], Made], tmp_path: Path) -> None:
    """A process that dies between the two leaves both."""
    runs = made(kind)
    folder = tmp_path / runs.folders["finished"].name
    shutil.copytree(runs.folders["finished"], folder)
    shutil.copyfile(runs.folders["interrupted"] / "checkpoint.safetensors", folder / "checkpoint.safetensors")
    runs.run(tmp_path)
    assert not (folder / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("name", ["result.json", "checkpoint.safetensors", "rounds.jsonl", "run.json"])
def test_a_file_that_would_never_be_read_to_its_end_is_refused(
    name: str, made: Callable[[str], Made], tmp_path: Path
) -> None:
    runs = made("federated")
    source = runs.folders["finished" if name == "result.json" else "interrupted"]
    folder = tmp_path / source.name
    shutil.copytree(source, folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(RecordError, match="no regular file") as caught:
        runs.run(tmp_path)
    assert str(folder / name) in str(caught.value)
    if name == "result.json":
        with pytest.raises(RecordError, match="no regular file"):
            load([tmp_path])
