"""The folder of ``fednorm deploy init``, and how a run is handed to a SuperLink."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fednorm.cli import app as cli
from fednorm.config import resolve
from fednorm.errors import AggregationError, ConfigError
from fednorm.federation import flower_runtime
from fednorm.federation.deployment.folder import Deployment, write_deployment
from fednorm.federation.deployment.submit import deploy, superlink_of
from fednorm.federation.flower_runtime import RunningSuperLink
from fednorm.federation.processes import free_port

SITES = ("siteA", "siteB", "siteC")


def run_of(**sections: Any) -> dict[str, Any]:
    return {
        "strategy": {"name": "fedbn"},
        "data": {"name": "image_folders", "domains": list(SITES)},
        "model": {"width": 4},
        "train": {"batch_size": 6},
        "rounds": {"num_rounds": 2, "wait": 200.0, "timeout": 300.0},
        **sections,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "clinic"
    write_deployment(made, Deployment(SITES, port=8123))
    return made


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"address": "nowhere"}, "host:port, e.g. 127.0.0.1:8000; got 'nowhere'"),
        ({"address": "127.0.0.1:99999"}, "host:port"),
        ({"insecure": False}, "Name the certificate .*--root-certificates FILE.* or say that .*--insecure"),
        ({"root_certificates": Path("missing.crt"), "insecure": False}, "names no file: missing.crt"),
        ({"root_certificates": Path("ca.crt")}, "--insecure asks for a connection without certificates"),
    ],
)
def test_a_superlink_that_is_none_is_refused(arguments: dict[str, Any], message: str) -> None:
    given = {"address": "127.0.0.1:8000", "root_certificates": None, "insecure": True} | arguments
    with pytest.raises(ConfigError, match=message):
        superlink_of(**given)


def test_flower_is_told_the_address_and_whom_to_trust(tmp_path: Path) -> None:
    certificate = tmp_path / 'a "quoted" name.crt'
    certificate.touch()
    told = tomllib.loads(superlink_of("localhost:8000", certificate, insecure=False).toml())["superlink"]
    assert told == {"default": "own", "own": {"address": "localhost:8000", "root-certificates": str(certificate)}}
    told = tomllib.loads(RunningSuperLink("10.0.0.1:8000").toml())["superlink"]["own"]
    assert told == {"address": "10.0.0.1:8000", "insecure": True}
    assert [RunningSuperLink(f"{host}:1").local for host in ("127.0.0.1", "[::1]", "10.0.0.1")] == [True, True, False]


@pytest.mark.parametrize(
    ("lines", "outcome", "sentence"),
    [
        (["Successfully started run 42", "more"], 0, "Run 42 on the SuperLink at 127.0.0.1:1 was stopped."),
        (["Successfully started run 42"], 1, "Run 42 goes on, .* FLWR_HOME='/a b' flwr stop 42 ends it."),
        (["Successfully started run 42"], None, "Run 42 goes on, .*could not be told to stop it"),
        (["no route", None], 0, "The SuperLink at 127.0.0.1:1 did not take the run."),
        (["Using SuperLink"], 0, "has not said yet whether it takes the run"),
    ],
)
def test_a_run_whose_launcher_is_interrupted_is_stopped_or_it_is_said_how(
    lines: list[str | None], outcome: int | None, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        assert command[1:] == ["stop", "42"]
        if outcome is None:
            raise subprocess.TimeoutExpired(command, 60)
        return subprocess.CompletedProcess(command, outcome)

    monkeypatch.setattr(flower_runtime.subprocess, "run", run)
    monkeypatch.setattr(flower_runtime, "_SUBMIT_SECONDS", 0.05)
    number = flower_runtime._Number()
    for line in lines:
        number.look(line)
    told = flower_runtime._stopped(number, RunningSuperLink("127.0.0.1:1"), {"FLWR_HOME": "/a b"})
    assert re.search(sentence, told), told


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["fednorm", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(str(ended.value.code)), " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--superlink", "127.0.0.1:8000"], "are for runs on real nodes: add --runtime deployment"),
        (["--runtime", "deployment", "--domains", "a,b"], "needs the address of a running SuperLink: --superlink"),
        (["--runtime", "deployment", "--superlink", "127.0.0.1:8000"], "must know whom it waits for"),
        (["--runtime", "deployed"], "in-process, flower, deployment"),
    ],
)
def test_the_command_says_what_a_deployment_lacks(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, error = command(monkeypatch, capsys, "federated", *arguments)
    assert (code, message in error) == (2, True), error


def test_the_command_writes_a_folder_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fednorm.federation.deployment.folder.shutil.which", lambda _: None)  # keys take a second
    arguments = ("deploy", "init", str(tmp_path / "clinic"), "--sites", "a, b", "--data", "folders")
    assert command(monkeypatch, capsys, *arguments)[0] == 0
    assert {"a.sh", "b.sh", "README.md", "submit.sh"} <= {path.name for path in (tmp_path / "clinic").iterdir()}
    code, error = command(monkeypatch, capsys, *arguments)
    assert (code, "is there already and not empty" in error) == (2, True), error


@pytest.mark.slow
def test_a_superlink_that_is_not_there_is_an_error_with_its_log(tmp_path: Path) -> None:
    with pytest.raises(AggregationError, match=r"did not complete: .*'never taken'(.|\n)*flower\.log"):
        deploy(resolve(run_of()), RunningSuperLink(f"127.0.0.1:{free_port()}"), runs=tmp_path / "runs", timeout=120)


def test_the_folder_s_scripts_are_scripts_and_its_app_is_the_run(folder: Path) -> None:
    for script in folder.glob("*.sh"):
        assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
        assert os.access(script, os.X_OK)
    app = tomllib.loads((folder / "app/pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    run = resolve(tomllib.loads((folder / "run.toml").read_text()))
    assert (resolve(json.loads(app["config"])), app["runtime"]) == (run, "deployment")
    assert run.data.domains == SITES
    assert all(f'sent-file=\\"$PWD/sent/{site}.jsonl\\"' in (folder / f"{site}.sh").read_text() for site in SITES)
    assert "--host 127.0.0.1 --port 8123" in (folder / "superlink.sh").read_text()
    assert all("insecure" not in path.read_text() for path in folder.iterdir() if path.is_file())


def test_private_keys_are_nobody_else_s_to_read(folder: Path) -> None:
    if not (folder / "keys").is_dir():
        pytest.skip("no OpenSSL here")
    private = [*(folder / "keys" / name for name in SITES), *folder.glob("certificates/*.key")]
    assert len(private) == 5
    assert all(path.stat().st_mode & 0o077 == 0 for path in private)


def test_a_folder_without_openssl_says_what_is_left_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (note,) = write_deployment(tmp_path / "clinic", Deployment(SITES))
    assert "there is no bash, openssl, ssh-keygen here. Run make-keys.sh later" in note


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ((), "--sites are names with commas between"),
        (("a b",), "got 'a b'"),
        (("$(reboot)",), "got"),
        (("a", "A"), "names a more than once"),
    ],
)
def test_names_that_are_no_files_are_refused(sites: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Deployment(sites)


def test_a_folder_that_holds_anything_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ConfigError, match="is there already and not empty"):
        write_deployment(tmp_path, Deployment(SITES))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
