"""``fednorm deploy check``: what a site writes down of what it sends, what must not leave it, a folder tried out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from PIL import Image

from fednorm.cli import deploy
from fednorm.config import resolve
from fednorm.errors import AggregationError, ConfigError, RecordError
from fednorm.federation.client import make_client_app
from fednorm.federation.deployment import loopback
from fednorm.federation.deployment.check import Checked, _draw
from fednorm.federation.deployment.folder import Deployment, write_deployment
from fednorm.federation.deployment.sent import Sent, SentFile, read_sent
from fednorm.federation.flower_private import ensure_task_identity
from fednorm.federation.processes import is_alive
from fednorm.federation.wire import pack
from fednorm.federation.workbench import process_workbench

SITES = ("siteA", "siteB")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose keys are empty files."""
    monkeypatch.setattr("fednorm.federation.deployment.folder.shutil.which", lambda _: None)
    made = tmp_path / "clinic"
    write_deployment(made, Deployment(SITES))
    for name in ("keys/siteA", "keys/siteB", "certificates/ca.crt"):
        (made / name).parent.mkdir(exist_ok=True)
        (made / name).touch()
    return made


# What a site writes down ----------------------------------------------------------------------------------------------


def ask(kind: str, sent_file: Path, content: RecordDict | None = None) -> Message:
    """Ask a site that allows nothing, as Flower does."""
    ensure_task_identity(run_id=1, node_id=1, task_id=1)
    values: dict[str, Any] = {"model": {"width": 4}, "data": {"domains": ["photo"]}, "strategy": {"name": "fedbn"}}
    run = {"config": json.dumps(resolve(values).to_dict()), "runtime": "deployment"}
    node = {"domain": "photo", "sent-file": str(sent_file)}
    context = Context(run_id=7, node_id=10, node_config=node, state=RecordDict(), run_config=run)
    message = Message(content or RecordDict(), dst_node_id=10, message_type=kind)
    return make_client_app(process_workbench)(message, context)


def test_a_site_writes_down_every_answer_before_it_leaves(tmp_path: Path) -> None:
    path = tmp_path / "new" / "sent.jsonl"
    reply = ask("query.describe", path)
    (line,) = map(json.loads, path.read_text().splitlines())
    assert (line["message"], line["round"], line["tensors"]) == ("query.describe", 0, {})
    assert line["values"]["client"] == dict(reply.content.config_records["client"])
    assert line["process_cpu_seconds"] > 0
    with pytest.raises(ConfigError, match="Refused: photo keeps"):
        ask("query.local", path)
    sent = read_sent(path)
    assert (sent["query.describe"].count, sent["query.local"].count) == (1, 1)
    (error,) = sent["query.local"].errors
    assert error.startswith("ConfigError: Refused: photo keeps its local tensors")


def test_what_cannot_be_written_down_is_not_sent(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecordError, match="Nothing was sent"):
        ask("query.describe", tmp_path / "file" / "sent.jsonl")


def test_an_entry_has_every_tensor_and_counts_bytes(tmp_path: Path) -> None:
    file, content = SentFile(tmp_path / "sent.jsonl"), RecordDict({"config": ConfigRecord({"server-round": 3})})
    reply = RecordDict(
        {
            "arrays": pack({"weight": torch.zeros(2, 3), "steps": torch.zeros((), dtype=torch.int64)}),
            "metrics": MetricRecord({"loss": float("nan"), "num-examples": 5}),
        }
    )
    for _ in range(2):
        file.answered("train", content, reply)
    file.answered("train", content, RecordDict({"arrays": ArrayRecord()}))
    lines = [json.loads(line) for line in (tmp_path / "sent.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [3, 3, 3]
    assert lines[0]["bytes"] == 2 * 3 * 4 + 8 + len(json.dumps(lines[0]["values"]))
    train = read_sent(tmp_path / "sent.jsonl")["train"]
    assert (train.count, train.size) == (3, sum(line["bytes"] for line in lines))
    assert train.tensors == {"arrays/weight": ("float32", (2, 3)), "arrays/steps": ("int64", ())}
    assert train.values == {"metrics": ("loss", "num-examples")}


@pytest.mark.parametrize("text", ["no JSON", "[1]", '{"message": "train"}'])
def test_a_file_of_something_else_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "sent.jsonl").write_text(text)
    with pytest.raises(RecordError, match="does not say what a site has sent"):
        read_sent(tmp_path / "sent.jsonl")


# What must not leave a site -------------------------------------------------------------------------------------------


def checked(tensors: Mapping[str, tuple[str, tuple[int, ...]]], *listening: str) -> Checked:
    sent = {"siteA": {"train": Sent(1, 10, dict(tensors))}}
    clients = [{"domain": "siteA", "train": 16, "validation": 0, "test": 4}]
    return Checked(sent, ("bn1.weight",), 28, (), listening, {"data": {"clients": clients}, "final": {}})


@pytest.mark.parametrize(
    ("key", "dtype", "shape", "why"),
    [
        ("arrays/bn1.weight", "float32", (4,), "the run's norm plan keeps it on the site"),
        ("extra/some", "uint8", (16, 3, 28, 28), "it has the shape of images: (16, 3, 28, 28)"),
        ("extra/some", "float32", (3, 28, 28), "it has the shape of images"),
        ("extra/some", "int64", (16,), "it has a whole number for each image, as labels are"),
        ("arrays/conv1.weight", "float32", (4, 3, 5, 5), ""),
        ("arrays/fc.bias", "float32", (16,), ""),
        ("extra/histogram", "int64", (10,), ""),
        ("arrays/bn1.num_batches_tracked", "int64", (), ""),
    ],
)
def test_what_a_site_should_not_have_sent_is_told(key: str, dtype: str, shape: tuple[int, ...], why: str) -> None:
    leaks = checked({key: (dtype, shape)}, "127.0.0.1", "::1").leaks()
    assert ([why in leak and leak.startswith(f"siteA sent {key}") for leak in leaks]) == ([True] if why else [])


def test_an_address_that_others_reach_is_told() -> None:
    assert checked({}, "127.0.0.1", "0.0.0.0").leaks() == ["a process listened on 0.0.0.0"]


@pytest.mark.parametrize("leak", [False, True])
def test_the_command_shows_what_each_site_sent_and_fails_where_it_should_not_have(
    leak: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "arrays/bn1.weight" if leak else "arrays/conv1.weight"
    seen = checked({key: ("float32", (4,))}, "127.0.0.1")
    seen = replace(seen, result={**seen.result, "rounds": [{"seconds": 2.0}]})
    seen.sent["siteA"]["train"].values["metrics"] = ("loss",)
    monkeypatch.setattr(deploy, "check_folder", lambda *_, **__: seen)
    if leak:
        with pytest.raises(AggregationError, match=r"should not have left a site did: siteA sent arrays/bn1\.weight"):
            deploy.run_deploy_check(Path("clinic"), rounds=1, as_json=False)
    else:
        deploy.run_deploy_check(Path("clinic"), rounds=1, as_json=False)
    told = capsys.readouterr().out
    assert (
        f"siteA sent\n  train: 1 answer, 10 bytes, 0.0 s a process, 0.0 s of it computing; 1 tensor: {key[7:]}" in told
    )
    assert "; metrics: loss\nA round took 2.0 s." in told
    assert ("No image and no label; none of the 1 tensors" in told) is not leak


# The folder -----------------------------------------------------------------------------------------------------------


def test_a_copy_is_this_machine_s_whatever_the_scripts_say(folder: Path, tmp_path: Path) -> None:
    for name in ("superlink", "register", *SITES):
        path = folder / f"{name}.sh"
        text = path.read_text().replace("127.0.0.1:8000", "10.1.2.3:9999").replace("--host 127.0.0.1", "--host 0.0.0.0")
        path.write_text(text.replace("--port 8000", "--port 9999"))
    loopback.copy_to(tmp_path / "copy", folder, SITES, 4567)
    texts = {path.name: path.read_text() for path in (tmp_path / "copy").glob("*.sh")}
    assert "--host 127.0.0.1 --port 4567" in texts["superlink.sh"]
    assert 'address = "127.0.0.1:4567"' in texts["register.sh"]
    assert all("--superlink 127.0.0.1:4567" in texts[f"{name}.sh"] for name in SITES)
    assert not any("10.1.2.3" in text or "0.0.0.0" in text or "9999" in text for text in texts.values())
    assert (tmp_path / "copy/data/siteA").resolve() == (folder / "data/siteA").resolve()


def test_a_folder_of_something_else_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.toml is no run of a federation of sites"):
        loopback.read_run(tmp_path)
    (folder / "siteB.sh").unlink()
    with pytest.raises(ConfigError, match=r"has no siteB\.sh\. fednorm deploy init writes"):
        loopback.sites_of(folder, loopback.read_run(folder))
    with pytest.raises(ConfigError, match=r"names the sites, each with a script"):
        loopback.sites_of(folder, resolve({"data": {"name": "image_folders", "domains": ["../x"]}}))


def test_images_are_drawn_for_all_sites_or_for_none(folder: Path, tmp_path: Path) -> None:
    config = loopback.read_run(folder)
    loopback.copy_to(tmp_path / "one", folder, SITES, 4567)
    assert _draw(tmp_path / "one", SITES, config) == list(SITES)
    assert len(list((tmp_path / "one/data/siteA").rglob("*.png"))) == 24
    assert list((folder / "data/siteA").iterdir()) == [], "the folder itself is left as it is"
    (folder / "data/siteA/cat").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "data/siteA/cat/0.png")
    loopback.copy_to(tmp_path / "two", folder, SITES, 4567)
    with pytest.raises(ConfigError, match="The data folder of siteB is empty, and those of other sites are not"):
        _draw(tmp_path / "two", SITES, config)


# The command, for real ------------------------------------------------------------------------------------------------


def real_folder(tmp_path: Path) -> Path:
    made = tmp_path / "clinic"
    if write_deployment(made, Deployment(SITES)):
        pytest.skip("keys and certificates need OpenSSL and OpenSSH")
    run = made / "run.toml"
    run.write_text(run.read_text() + "\n[model]\nwidth = 4\n[train]\nbatch_size = 6\n")
    return made


def command(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    call = [sys.executable, "-m", "fednorm", "deploy", "check", *arguments]
    return subprocess.Popen(
        call, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def words_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.mark.deployment
@pytest.mark.slow
def test_a_folder_as_it_was_written_passes_and_is_left_as_it_was(tmp_path: Path) -> None:
    made = real_folder(tmp_path)
    before = sorted(str(path) for path in made.rglob("*"))
    process = command(str(made), "--json")
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    document = json.loads(out)
    assert (document["leaks"], document["drawn"], document["listening"]) == ([], list(SITES), ["127.0.0.1"])
    for site in SITES:
        kinds = document["sites"][site]
        assert {kind: of_kind["answers"] for kind, of_kind in kinds.items()} == {
            "query.describe": 1, "train": 1, "evaluate": 1
        }  # fmt: skip
        assert not {key.partition("/")[2] for key in kinds["train"]["tensors"]} & set(document["local"])
    assert sorted(str(path) for path in made.rglob("*")) == before


@pytest.mark.deployment
@pytest.mark.slow
def test_ctrl_c_ends_all_that_was_started(tmp_path: Path) -> None:
    with command(str(real_folder(tmp_path))) as process:
        started: list[psutil.Process] = []
        until = time.monotonic() + 240
        try:
            while not any("flower-supernode" in words_of(one) for one in started):
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.2)
                started = psutil.Process(process.pid).children(recursive=True)
        finally:
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=240)
    assert (process.returncode, out) == (130, "")
    assert "What was started has ended, and" in " ".join(err.split())
    assert [one for one in started if is_alive(one)] == []
