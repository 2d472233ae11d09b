"""A run of sites handed to a running SuperLink, followed to its end."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fednorm.config import RunConfig
from fednorm.errors import ConfigError
from fednorm.federation.deployment.server import check_deployed
from fednorm.federation.flower_runtime import RunningSuperLink, submit_to_flower, write_app
from fednorm.federation.server import read_back
from fednorm.federation.simulate_flower import CLIENTAPP, SERVERAPP
from fednorm.federation.workbench import DEPLOYMENT
from fednorm.records.record import RunRecord

_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")


def superlink_of(address: str, root_certificates: Path | None, *, insecure: bool) -> RunningSuperLink:
    """Return the SuperLink that a command names.

    Raises:
        ConfigError: The address is none, the certificates are no file, or it is not said whether to encrypt.
    """
    match = _ADDRESS.fullmatch(address.strip())
    if match is None or not 0 < int(match[2]) < 65536:
        raise ConfigError(
            f"--superlink is the address of a running SuperLink, host:port, e.g. 127.0.0.1:8000; got {address!r}."
        )
    if insecure and root_certificates is not None:
        raise ConfigError("--insecure asks for a connection without certificates, and --root-certificates names some.")
    if not insecure and root_certificates is None:
        raise ConfigError(
            "Name the certificate that the SuperLink's own is checked against (--root-certificates FILE), or say that "
            "the connection need not be encrypted (--insecure), on a machine of your own."
        )
    if root_certificates is not None and not root_certificates.is_file():
        raise ConfigError(f"--root-certificates names no file: {root_certificates}.")
    return RunningSuperLink(address.strip(), root_certificates)


def deploy(
    config: RunConfig,
    superlink: RunningSuperLink,
    *,
    runs: Path,
    on_line: Callable[[str], None] | None = None,
    on_stop: Callable[[str], None] = lambda _: None,
    timeout: float = 24 * 3600.0,
) -> dict[str, Any] | None:
    """Run a federation of sites on a running SuperLink.

    The record is written by the ServerApp, on the SuperLink's machine. Where that is this one, a run that has finished
    is read back, and so is the result.

    Args:
        config: The run's configuration.
        superlink: Where to.
        runs: The folder of records on the SuperLink's machine.
        on_line: Called with each line of the log.
        on_stop: Called with a sentence on what has become of the run, when this process is interrupted or terminated.
        timeout: Seconds until nobody waits any more.

    Returns:
        The result; None where it is on another machine.

    Raises:
        FedNormError: The configuration cannot be run, or the run did not complete.
    """
    check_deployed(config)
    record = RunRecord(runs, config)
    if superlink.local and (finished := read_back(record, config)):
        return finished
    folder = str(record.folder.parent) if superlink.local else str(runs)
    run_config = {"config": json.dumps(config.to_dict()), "runs": folder, "runtime": DEPLOYMENT}
    with record.held(".launch", f"Another process has handed this very run to a SuperLink ({record.folder})."):
        flower = record.folder / "flower"
        app = write_app(flower / "app", SERVERAPP, CLIENTAPP, run_config)
        submit_to_flower(
            app,
            superlink,
            run_config=run_config,
            home=flower / "home",
            timeout=timeout,
            on_line=on_line,
            on_stop=on_stop,
        )
        shutil.rmtree(flower, ignore_errors=True)
        return record.result() if superlink.local else None
