"""A folder with all that a federation of sites needs to start: scripts, keys, certificates, an app, a page on how.

Everything in it is text to read and change. The SuperLink listens on 127.0.0.1 until its script says otherwise, speaks
TLS, and takes only nodes whose public keys were registered; Flower's telemetry is off.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from fednorm.config import resolve
from fednorm.errors import ConfigError
from fednorm.federation.deployment.compose import SUBMIT, compose, dockerfile, environment
from fednorm.federation.flower_app import write_app
from fednorm.federation.simulate_flower import CLIENTAPP, SERVERAPP
from fednorm.federation.workbench import DEPLOYMENT

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,59}")
"""What a site is called: its name becomes that of files and of a service of Docker's."""

TAKEN = ("superlink", "register", "submit", "make-keys", "keys")
"""What no site can be called, in lower case: other scripts, services and folders of Flower's."""

NODE_PORT = 9200
"""The port of the first site's node for its own processes, on 127.0.0.1; the others' follow."""

KEYS_SECONDS = 120.0

AGAIN_SECONDS = 10
"""Until a node that has ended is started again."""


@dataclass(frozen=True)
class Deployment:
    """A federation of sites to write a folder for.

    Attributes:
        sites: The sites' names.
        data: The form of their folders (``data.name``).
        port: The SuperLink's port.
    """

    sites: tuple[str, ...]
    data: str = "image_folders"
    port: int = 8000

    def __post_init__(self) -> None:
        odd = next((name for name in self.sites if not NAME.fullmatch(name)), None)
        if not self.sites or odd is not None:
            raise ConfigError(
                "--sites are names with commas between, of letters, digits, '-' and '_', e.g. siteA,siteB,siteC"
                f"{f'; got {odd!r}' if odd else ''}."
            )
        if taken := next((name for name in self.sites if name.lower() in TAKEN), None):
            raise ConfigError(f"--sites names {taken}, which the folder has another script or service of. Rename it.")
        lower = [name.lower() for name in self.sites]
        if twice := next((name for name in self.sites if lower.count(name.lower()) > 1), None):
            raise ConfigError(f"--sites names {twice} more than once, as a file system may see it.")
        if not 1024 <= self.port <= 65535 or NODE_PORT <= self.port < NODE_PORT + len(self.sites):
            raise ConfigError(
                f"--port is between 1024 and 65535, and none of the nodes' own, {NODE_PORT} on; got {self.port}."
            )

    @property
    def values(self) -> dict[str, object]:
        """The run's configuration, as its file has it."""
        return {
            "strategy": {"name": "fedbn"},
            "data": {"name": self.data, "domains": list(self.sites)},
            "rounds": {"num_rounds": 3, "wait": 300.0, "timeout": 3600.0},
        }


def write_deployment(folder: Path, deployment: Deployment) -> list[str]:
    """Write the folder, and make the keys and certificates where this machine has OpenSSL and OpenSSH.

    Args:
        folder: A new or an empty folder.
        deployment: What for.

    Returns:
        What is still to be done by hand, if anything.

    Raises:
        ConfigError: The folder holds something, or there is no such data.
    """
    config = resolve(deployment.values)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already and not empty. Name a new folder.")
    run_config = {"config": json.dumps(config.to_dict()), "runs": "runs", "runtime": DEPLOYMENT}
    write_app(folder / "app", SERVERAPP, CLIENTAPP, run_config)
    texts = {
        "README.md": _readme(deployment),
        "run.toml": _run(deployment),
        "make-keys.sh": _keys(deployment),
        "superlink.sh": _superlink(deployment),
        "register.sh": _register(deployment),
        "submit.sh": _submit(deployment),
        "docker-compose.yml": compose(deployment.sites, deployment.port, NODE_PORT),
        "Dockerfile": dockerfile(),
        ".env": environment(),
        ".gitignore": "keys/\ncertificates/*.key\n",
        **{f"{name}.sh": _node(deployment, k) for k, name in enumerate(deployment.sites)},
    }
    for name, text in texts.items():
        path = folder / name
        path.write_text(text, encoding="utf-8")
        if name.endswith(".sh"):
            path.chmod(0o755)
    for name in ("runs", "sent", "flower/superlink", "flower/submit"):
        (folder / name).mkdir(parents=True)
    for site in deployment.sites:
        for name in ("data", "state", "flower"):  # what containers find missing, Docker makes as root
            (folder / name / site).mkdir(parents=True)
    return _made_keys(folder)


def _made_keys(folder: Path) -> list[str]:
    lacking = [name for name in ("bash", "openssl", "ssh-keygen") if shutil.which(name) is None]
    if lacking:
        return [f"Keys and certificates were not made: there is no {', '.join(lacking)} here. Run make-keys.sh later."]
    made = subprocess.run(
        ["bash", str(folder / "make-keys.sh")], capture_output=True, text=True, timeout=KEYS_SECONDS, check=False
    )
    if made.returncode:
        return [f"Keys and certificates were not made: {made.stderr.strip().splitlines()[-1:]}. See make-keys.sh."]
    return []


_HEAD = """#!/usr/bin/env bash
# Written by fednorm deploy init. {what}
set -euo pipefail
cd "$(dirname "$0")"
export FLWR_HOME="$PWD/flower/{home}" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
export FLWR_SUPEREXEC_TASK_POLL_INTERVAL=0.1 # seconds; 1 by default, which every message would wait for
"""


def _head(what: str, home: str) -> str:
    return _HEAD.format(what=what, home=home)


def _run(deployment: Deployment) -> str:
    lines = ["# The run: any key of fednorm's configuration (fednorm explain config)."]
    for section, table in deployment.values.items():
        assert isinstance(table, dict)
        lines += ["", f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def _keys(deployment: Deployment) -> str:
    return (
        _head("Makes a certificate authority for a test, the SuperLink's certificate, and a key for each site.", "keys")
        + """umask 077
mkdir -p certificates keys
openssl req -x509 -newkey rsa:3072 -nodes -days 365 -subj "/CN=fednorm test CA" \\
    -keyout certificates/ca.key -out certificates/ca.crt
openssl req -newkey rsa:3072 -nodes -subj "/CN=localhost" -keyout certificates/server.key -out certificates/server.csr
# The names and addresses under which the nodes reach the SuperLink; add those of your network.
printf 'subjectAltName = DNS:localhost, DNS:superlink, IP:127.0.0.1\\n' > certificates/names.txt
openssl x509 -req -in certificates/server.csr -CA certificates/ca.crt -CAkey certificates/ca.key -CAcreateserial \\
    -days 365 -extfile certificates/names.txt -out certificates/server.pem
"""
        + "".join(
            f'rm -f keys/{name} keys/{name}.pub; ssh-keygen -q -t ecdsa -b 384 -N "" -C {name} -f keys/{name}\n'
            for name in deployment.sites
        )
    )


def _superlink(deployment: Deployment) -> str:
    return (
        _head("Starts the SuperLink: the server, which has no data.", "superlink")
        + f"""mkdir -p "$FLWR_HOME"
# --database is where it keeps the registered keys, so that it can be started again.
# --host is where it listens: 127.0.0.1 is this machine alone; put the address that the sites reach it at.
exec flower-superlink --host 127.0.0.1 --port {deployment.port} \\
    --ssl-certfile certificates/server.pem --ssl-keyfile certificates/server.key \\
    --ssl-ca-certfile certificates/ca.crt --enable-supernode-auth --disable-runtime-dependency-installation \\
    --database "$FLWR_HOME/state.db"
"""
    )


def _node(deployment: Deployment, k: int) -> str:
    name = deployment.sites[k]
    return (
        _head(f"Starts the node of {name}, on its own machine, with its own data.", name)
        + f"""node_config="domain=\\"{name}\\" data-dir=\\"$PWD/data/{name}\\" state-dir=\\"$PWD/state/{name}\\""
node_config+=" sent-file=\\"$PWD/sent/{name}.jsonl\\"" # a line for every message that it answers: what it has sent
# allow-statistics=true in it would let the server ask for this site's local tensors and statistics.
# A node that dies is started again. For a minute or so the SuperLink takes the dead one for alive, and refuses it.
trap 'kill "$started" 2>/dev/null; wait; exit 143' INT TERM HUP
while true; do
    flower-supernode --superlink 127.0.0.1:{deployment.port} --root-certificates certificates/ca.crt \\
        --auth-supernode-private-key keys/{name} --host 127.0.0.1 --port {NODE_PORT + k} \\
        --node-config "$node_config" &
    started=$!
    wait "$started" && exit 0
    echo "The node of {name} has ended; it is started again in {AGAIN_SECONDS} s." >&2
    sleep {AGAIN_SECONDS} & started=$!
    wait "$started" || true
done
"""
    )


def _register(deployment: Deployment) -> str:
    return (
        _head("Registers the sites' public keys; once, when the SuperLink runs.", "submit")
        + f"""mkdir -p "$FLWR_HOME"
printf '[superlink]\\ndefault = "own"\\n[superlink.own]\\naddress = "127.0.0.1:{deployment.port}"\\n' \\
    > "$FLWR_HOME/config.toml"
printf 'root-certificates = "%s"\\n' "$PWD/certificates/ca.crt" >> "$FLWR_HOME/config.toml"
"""
        + "".join(f"flwr supernode register keys/{name}.pub own\n" for name in deployment.sites)
    )


def _submit(deployment: Deployment) -> str:
    command = [*SUBMIT, "--superlink", f"127.0.0.1:{deployment.port}", "--root-certificates", "certificates/ca.crt"]
    return (
        _head("Hands the run to the SuperLink; its exit status is the run's.", "submit")
        + f'exec {shlex.join(command)} --runs runs "$@"\n'
    )


def _readme(deployment: Deployment) -> str:
    scripts = "\n".join(f"./{name}.sh            # in a terminal of its own" for name in deployment.sites)
    folders = "\n".join(f"- `data/{name}`" for name in deployment.sites)
    return f"""# A federation of {len(deployment.sites)} sites

Each site's images go into its own folder, in the form of `data.name = "{deployment.data}"`:

{folders}

Then, on one machine:

```bash
./superlink.sh        # in a terminal of its own
./register.sh         # once: the sites' public keys
{scripts}
./submit.sh           # the run; its exit status is honest
```

`run.toml` is the run, `app` the same as a Flower app (`flwr run app`). `make-keys.sh` makes keys and certificates anew.

On several machines, a site needs its own script, its own private key (`keys/NAME`), `certificates/ca.crt` and its
data, and nothing else; `superlink.sh`, `make-keys.sh` and the sites' scripts say where the addresses go. Keep
`certificates/ca.key` and the private keys where nobody else reads them, and take a certificate authority of your own
for anything but a test.

`docker-compose.yml`, `Dockerfile` and `.env` do the same in Flower's images, as whoever owns this folder:

```bash
docker compose up --build -d
./register.sh                       # once
docker compose run --rm submit
```

No test of fednorm's runs them; that they are whole, and start what the scripts start, is tested.
"""
