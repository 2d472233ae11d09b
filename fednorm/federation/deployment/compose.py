"""The same processes as a folder's scripts start, in Flower's own images, for ``docker compose``.

The images are Flower's of the version that is installed here, on Ubuntu: its plain tags are on Alpine, for which there
is no PyTorch. Two are enough: without ``--isolation process`` the SuperLink and each SuperNode start the processes of
messages themselves, and no container of ``flwr/superexec`` is needed. Containers run as whoever owns the folder, since
the keys are readable by nobody else, and write into the folder what the scripts do.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version

IMAGE = "py3.13-ubuntu24.04"
"""How the tag of a release's image of Flower's ends: of the SuperLink on Ubuntu there is none of another Python."""

FLOWER_USER = 49999
"""The user of Flower's images, where a system has no numbers of users."""

SUBMIT = ("fednorm", "federated", "--config", "run.toml", "--runtime", "deployment")
"""The command that hands a folder's run in, as far as it is the same everywhere."""

_ENVIRONMENT = {
    "FLWR_HOME": "/flower",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
    "FEDNORM_CACHE": "/flower/cache",
}
_AUTHORITY = "./certificates/ca.crt:/app/certificates/ca.crt:ro"


def image_tag(flower: str) -> str:
    """Return the tag of Flower's images that have a version of it.

    A release's are called as ``1.42.0-py3.13-ubuntu24.04``, a night's as its version, ``1.43.0.dev20260624``, and
    are on Ubuntu by themselves (https://flower.ai/docs/framework/docker/, and the images' own pages). Of candidates and
    of own builds there are no images: the tag is that of the release.

    Args:
        flower: The version.
    """
    if re.fullmatch(r"[\d.]+\.dev\d{8}", flower):
        return flower
    return f"{re.split(r'[^0-9.]', flower)[0].strip('.')}-{IMAGE}"


def dockerfile() -> str:
    """Return a Dockerfile for any of the images."""
    return f"""# Flower's image with fednorm in it; put a wheel of your own in place of the name where you have one.
# The one on Ubuntu: the plain tag is Alpine's, for which there is no PyTorch.
ARG BASE=superlink
FROM flwr/${{BASE}}:{image_tag(version("flwr"))}
RUN python -m pip install --no-cache-dir fednorm
"""


def environment() -> str:
    """Return the file that tells ``docker compose`` as whom the containers run: whoever writes it."""
    numbers = f"{os.getuid()}:{os.getgid()}" if hasattr(os, "getuid") else f"{FLOWER_USER}:{FLOWER_USER}"
    return f"""# Read by docker compose: user and group of the containers (id -u, id -g).
# They must be able to read keys and certificates, and to write into runs, state, sent and flower.
FEDNORM_USER={numbers}
"""


def compose(sites: Sequence[str], port: int, node_port: int) -> str:
    """Return a ``docker-compose.yml``.

    Args:
        sites: The sites' names.
        port: The SuperLink's port.
        node_port: The port of the first node's own processes; the others' follow.
    """
    nodes = "".join(_node(name, port, node_port + k) for k, name in enumerate(sites))
    return f"""# Written by fednorm deploy init: what the scripts start, in Flower's own images.
#   docker compose up --build -d           the SuperLink, and a node for each site
#   ./register.sh                          once: the sites' public keys
#   docker compose run --rm submit         the run; its record is in runs
services:
{_superlink(port)}{nodes}{_submit(port)}"""


def _superlink(port: int) -> str:
    return _service(
        "superlink",
        "superlink",
        volumes=["./certificates:/app/certificates:ro", "./flower/superlink:/flower", "./runs:/app/runs"],
        command=[
            "--host=0.0.0.0",  # of the container, whose port is this machine's alone
            f"--port={port}",
            "--ssl-certfile=certificates/server.pem",
            "--ssl-keyfile=certificates/server.key",
            "--ssl-ca-certfile=certificates/ca.crt",
            "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
            "--database=/flower/state.db",
        ],
        more={"ports": [f"127.0.0.1:{port}:{port}"]},
    )


def _node(name: str, port: int, own_port: int) -> str:
    config = f'domain="{name}" data-dir="/data/{name}" state-dir="/state/{name}" sent-file="/sent/{name}.jsonl"'
    return _service(
        name.lower(),
        "supernode",
        volumes=[
            _AUTHORITY,
            f"./keys/{name}:/app/keys/{name}:ro",
            f"./data/{name}:/data/{name}:ro",
            f"./state/{name}:/state/{name}",
            "./sent:/sent",
            f"./flower/{name}:/flower",
        ],
        command=[
            f"--superlink=superlink:{port}",
            "--root-certificates=certificates/ca.crt",
            f"--auth-supernode-private-key=keys/{name}",
            "--host=127.0.0.1",
            f"--port={own_port}",
            f"--node-config={config}",
        ],
        more={"depends_on": ["superlink"], "restart": "on-failure"},
    )


def _submit(port: int) -> str:
    link = ["--superlink", f"superlink:{port}", "--root-certificates", "certificates/ca.crt", "--runs", "runs"]
    return _service(
        "submit",
        "superlink",
        volumes=["./run.toml:/app/run.toml:ro", _AUTHORITY, "./flower/submit:/flower", "./runs:/app/runs"],
        command=[],
        more={"profiles": ["submit"], "depends_on": ["superlink"], "entrypoint": [*SUBMIT, *link]},
    )


def _service(name: str, base: str, *, volumes: list[str], command: list[str], more: Mapping[str, object]) -> str:
    """Return a service; texts are JSON's, which YAML's are too, so that no name is taken for a number."""
    lines = [
        f"  {json.dumps(name)}:",
        f'    build: {{context: ".", args: {{BASE: {json.dumps(base)}}}}}',
        '    user: "${FEDNORM_USER:?is in .env}"',
        *(f"    {key}: {json.dumps(value)}" for key, value in more.items()),
        "    environment:",
        *(f"      {key}: {json.dumps(value)}" for key, value in _ENVIRONMENT.items()),
        "    volumes:",
        *(f"      - {json.dumps(volume)}" for volume in volumes),
        *(["    command:"] if command else []),
        *(f"      - {json.dumps(argument)}" for argument in command),
    ]
    return "\n".join(lines) + "\n"
