"""``fednorm federated --runtime deployment`` and ``fednorm deploy``: federations of sites with data of their own."""

from __future__ import annotations

from pathlib import Path

from fednorm.cli.answer import Depth
from fednorm.cli.console import err, out, print_json
from fednorm.cli.deploying import Target
from fednorm.cli.federated import show_result
from fednorm.config import RunConfig
from fednorm.errors import ConfigError
from fednorm.federation.deployment.folder import Deployment, write_deployment
from fednorm.federation.deployment.server import check_deployed
from fednorm.federation.deployment.submit import deploy, superlink_of


def run_deployed(
    config: RunConfig, target: Target, *, runs: Path, dry_run: bool, depth: Depth | None, as_json: bool
) -> None:
    """Hand a run to a SuperLink, show how it goes, and its result."""
    check_deployed(config)
    if not target.superlink:
        raise ConfigError("--runtime deployment needs the address of a running SuperLink: --superlink 127.0.0.1:8000.")
    superlink = superlink_of(target.superlink, target.root_certificates, insecure=target.insecure)
    if dry_run:
        sites = ", ".join(config.data.domains) or f"any {config.rounds.min_nodes} sites"
        text = (
            f"{config.strategy.name} with norm {config.norm.name} for {sites}, on the SuperLink at {superlink.address}"
        )
        return (
            print_json({"config": config.to_dict(), "superlink": superlink.address}) if as_json else out().print(text)
        )

    def show(line: str) -> None:
        if "fednorm: " in line:
            err().print(line.partition("fednorm: ")[2], markup=False, soft_wrap=True)

    result = deploy(config, superlink, runs=runs, on_line=show)
    if result is None:
        out().print(f"The run has completed. Its record is on the SuperLink's machine, in {runs}.", markup=False)
        return None
    return show_result(result, depth or Depth(), as_json=as_json)


def run_deploy_init(folder: Path, sites: str, *, data: str, port: int) -> None:
    """Write a folder with all that a federation of sites needs to start, and say what to do with it."""
    names = tuple(name.strip() for name in sites.split(",") if name.strip())
    notes = write_deployment(folder, Deployment(names, data=data, port=port))
    for note in notes:
        err().print(note, markup=False, soft_wrap=True)
    out().print(f"{folder / 'README.md'} says what to start, and in which order.", markup=False, soft_wrap=True)
