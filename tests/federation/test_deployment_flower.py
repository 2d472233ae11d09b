"""The folder of ``fednorm deploy init``, and how a run is handed to a SuperLink."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points, metadata, requires, version
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.common.config import parse_config_args
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from fednorm.cli import app as cli
from fednorm.config import resolve
from fednorm.errors import AggregationError, ConfigError
from fednorm.federation import flower_runtime
from fednorm.federation.deployment import folder as folders
from fednorm.federation.deployment.compose import image_tag
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


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("composed") / "clinic"
    write_deployment(made, Deployment(SITES, port=8123))
    return made


@pytest.fixture
def services(composed: Path) -> dict[str, Any]:
    document = yaml.safe_load((composed / "docker-compose.yml").read_text())
    assert set(document) == {"services"}
    found: dict[str, Any] = document["services"]
    return found


def flags(words: list[str]) -> dict[str, str]:
    """Return a command's options and their values, however these are written; an empty text where one has none."""
    split = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    return {
        word: split[k + 1] if k + 1 < len(split) and not split[k + 1].startswith("--") else ""
        for k, word in enumerate(split)
        if word.startswith("--")
    }


def started(folder: Path, script: str, command: str) -> dict[str, str]:
    """Return the options with which a script starts a command."""
    text = (folder / script).read_text().replace("\\\n", " ")
    (line,) = (line for line in text.splitlines() if line.strip().removeprefix("exec ").startswith(command))
    return flags([word for word in shlex.split(line) if word not in ("&", "$@")])


def test_compose_s_services_are_whole(services: dict[str, Any], composed: Path) -> None:
    """By the rules of Compose's own schema that matter here; no text of ours is taken for a number or a key."""
    assert list(services) == ["superlink", "sitea", "siteb", "sitec", "submit"]
    known = {"build", "user", "ports", "environment", "volumes", "command", "depends_on", "restart", "profiles"}
    for name, service in services.items():
        assert set(service) <= known | {"entrypoint"}
        assert re.fullmatch(r"[a-zA-Z0-9._-]+", name)
        assert service["build"]["context"] == "."
        assert service["user"] == "${FEDNORM_USER:?is in .env}"
        lists = [
            service.get(key, []) for key in ("command", "entrypoint", "volumes", "ports", "depends_on", "profiles")
        ]
        assert all(isinstance(text, str) for each in lists for text in each)
        assert all(isinstance(value, str) for value in service["environment"].values())
        assert set(service.get("depends_on", [])) <= set(services)
        for volume in service["volumes"]:
            source, target, *mode = volume.split(":")
            assert mode in ([], ["ro"])
            assert target.startswith("/")
            assert (composed / source).exists(), "what is missing, Docker makes, as root"
    assert services["superlink"]["ports"] == ["127.0.0.1:8123:8123"]
    assert (composed / ".env").read_text().splitlines()[-1] == f"FEDNORM_USER={os.getuid()}:{os.getgid()}"


def test_compose_starts_what_the_scripts_start(services: dict[str, Any], composed: Path) -> None:
    own, theirs = flags(services["superlink"]["command"]), started(composed, "superlink.sh", "flower-superlink")
    assert (own.pop("--host"), theirs.pop("--host")) == ("0.0.0.0", "127.0.0.1")
    assert (own.pop("--database"), theirs.pop("--database")) == ("/flower/state.db", "$FLWR_HOME/state.db")
    assert own == theirs
    for name in SITES:
        own, theirs = flags(services[name.lower()]["command"]), started(composed, f"{name}.sh", "flower-supernode")
        assert (own.pop("--superlink"), theirs.pop("--superlink")) == ("superlink:8123", "127.0.0.1:8123")
        assert theirs.pop("--node-config") == "$node_config"
        text = "".join(re.findall(r"^node_config\+?=\"(.*)\"", (composed / f"{name}.sh").read_text(), re.MULTILINE))
        assert own.pop("--node-config") == text.replace('\\"', '"').replace("$PWD", "")
        assert own == theirs
        mounted = {volume.split(":")[1] for volume in services[name.lower()]["volumes"]}
        assert {f"/data/{name}", f"/state/{name}", "/sent", "/flower", f"/app/keys/{name}"} <= mounted
        assert not any(other in volume for other in SITES if other != name for volume in mounted)
    entry = services["submit"]["entrypoint"]
    own, theirs = flags(entry[2:]), started(composed, "submit.sh", "fednorm federated")
    assert (own.pop("--superlink"), theirs.pop("--superlink")) == ("superlink:8123", "127.0.0.1:8123")
    assert (entry[:2], own) == (["fednorm", "federated"], theirs)
    exported = dict(re.findall(r"(FLWR_\w+)=(\S+)", (composed / "superlink.sh").read_text()))
    for service in services.values():
        shared = {key: value for key, value in service["environment"].items() if key in exported and key != "FLWR_HOME"}
        assert shared == {key: value for key, value in exported.items() if key != "FLWR_HOME"}


def test_compose_s_images_are_flower_s_of_the_version_that_is_here(services: dict[str, Any], composed: Path) -> None:
    """Pinned, and on Ubuntu; the version is one that fednorm declares."""
    (line,) = (line for line in (composed / "Dockerfile").read_text().splitlines() if line.startswith("FROM "))
    assert line == f"FROM flwr/${{BASE}}:{version('flwr')}-py3.13-ubuntu24.04"
    (declared,) = (
        Requirement(text) for text in requires("fednorm") or () if re.match(r"flwr\W", text) and "extra" not in text
    )
    assert declared.specifier.contains(version("flwr"))
    assert {service["build"]["args"]["BASE"] for service in services.values()} == {"superlink", "supernode"}


@pytest.mark.parametrize(
    ("flower", "tag"),
    [
        ("1.42.0", "1.42.0-py3.13-ubuntu24.04"),
        ("1.39.1", "1.39.1-py3.13-ubuntu24.04"),
        ("1.43.0.dev20260624", "1.43.0.dev20260624"),
        ("1.43.0rc1", "1.43.0-py3.13-ubuntu24.04"),
        ("1.43.0.dev0+g1f8a6c3", "1.43.0-py3.13-ubuntu24.04"),
    ],
)
def test_a_tag_is_one_that_flower_publishes(flower: str, tag: str) -> None:
    """Of https://hub.docker.com/r/flwr/superlink and flwr/supernode, by their pages; its Python is one of fednorm's."""
    assert image_tag(flower) == tag
    assert SpecifierSet(metadata("fednorm")["Requires-Python"]).contains("3.13")


def test_flower_s_own_commands_take_what_compose_starts_them_with(services: dict[str, Any]) -> None:
    """The images' entry points are these commands; the processes of messages are theirs to start, in one container."""
    superlink = pytest.importorskip("flwr.superlink.cli.flower_superlink")._parse_args_run_superlink()
    supernode = pytest.importorskip("flwr.supernode.cli.flower_supernode")._parse_args_run_supernode()
    server = superlink.parse_args(services["superlink"]["command"])
    assert (server.isolation, server.host, server.port, server.insecure) == ("subprocess", "0.0.0.0", 8123, False)
    assert (server.enable_supernode_auth, server.runtime_dependency_install) == (True, False)
    mounted = [volume.split(":")[1] for volume in services["superlink"]["volumes"]]
    for path in (server.ssl_certfile, server.ssl_keyfile, server.ssl_ca_certfile, server.database):
        assert any(f"/app/{path}".startswith(target) or path.startswith(target) for target in mounted)
    commands = {entry.name for entry in entry_points(group="console_scripts") if entry.value.startswith("flwr.")}
    assert {"flower-superlink", "flower-supernode", "flower-superexec", "flwr-serverapp", "flwr-clientapp"} <= commands
    for k, name in enumerate(SITES):
        node = supernode.parse_args(services[name.lower()]["command"])
        assert (node.isolation, node.superlink, node.insecure) == ("subprocess", "superlink:8123", False)
        assert (node.host, node.port) == ("127.0.0.1", 9200 + k), "its own port is the container's alone"
        assert parse_config_args([node.node_config]) == {
            "domain": name,
            "data-dir": f"/data/{name}",
            "state-dir": f"/state/{name}",
            "sent-file": f"/sent/{name}.jsonl",
        }
        mounted = [volume.split(":")[1] for volume in services[name.lower()]["volumes"]]
        assert {f"/app/{node.root_certificates}", f"/app/{node.auth_supernode_private_key}"} <= set(mounted)


@pytest.mark.parametrize("name", ["superlink", "Submit", "keys"])
def test_a_site_is_not_called_as_what_the_folder_has_already(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--sites names {name}, which the folder has another"):
        Deployment(("siteA", name))


def test_a_site_that_is_called_as_a_number_or_a_word_of_yaml_s_is_none_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "_made_keys", lambda _: [])
    write_deployment(tmp_path / "made", Deployment(("123", "on", "null")))
    services = yaml.safe_load((tmp_path / "made/docker-compose.yml").read_text())["services"]
    assert list(services) == ["superlink", "123", "on", "null", "submit"]


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
