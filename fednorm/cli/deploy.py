"""``fednorm federated --runtime deployment`` and ``fednorm deploy``: federations of sites with data of their own."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from fednorm.cli.answer import Depth
from fednorm.cli.console import err, out, print_json
from fednorm.cli.deploying import Target
from fednorm.cli.federated import show_result
from fednorm.cli.standing import run_stands, saying_what_stands
from fednorm.config import RunConfig
from fednorm.errors import AggregationError, ConfigError
from fednorm.federation.deployment.check import Checked, check_folder
from fednorm.federation.deployment.folder import Deployment, write_deployment
from fednorm.federation.deployment.sent import Sent
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

    become: list[str] = []

    def what() -> str:
        stands = run_stands(config, runs) if superlink.local else "The same command goes on from its last round there."
        return " ".join([*become, stands]) if become else stands

    with saying_what_stands(what):
        result = deploy(config, superlink, runs=runs, on_line=_show, on_stop=become.append)
    if result is None:
        out().print(f"The run has completed. Its record is on the SuperLink's machine, in {runs}.", markup=False)
        return None
    return show_result(result, depth or Depth(), as_json=as_json)


def _show(line: str) -> None:
    """Show a line of Flower's log where it is one of ours."""
    if "fednorm: " in line:
        err().print(line.partition("fednorm: ")[2], markup=False, soft_wrap=True)


def run_deploy_init(folder: Path, sites: str, *, data: str, port: int) -> None:
    """Write a folder with all that a federation of sites needs to start, and say what to do with it."""
    names = tuple(name.strip() for name in sites.split(",") if name.strip())
    notes = write_deployment(folder, Deployment(names, data=data, port=port))
    for note in notes:
        err().print(note, markup=False, soft_wrap=True)
    out().print(f"{folder / 'README.md'} says what to start, and in which order.", markup=False, soft_wrap=True)


def run_deploy_check(folder: Path, *, rounds: int, as_json: bool) -> None:
    """Run a folder on this machine alone, and show what its sites sent.

    Raises:
        AggregationError: The run did not complete, or something left a site that should not have.
    """
    err().print("Starting the SuperLink and the sites' nodes on 127.0.0.1 …", soft_wrap=True)
    with saying_what_stands(lambda: f"What was started has ended, and {folder} is as it was."):
        checked = check_folder(folder, rounds=rounds, on_line=_show)
    if as_json:
        print_json(checked.document())
    else:
        _show_checked(checked)
    if leaks := checked.leaks():
        raise AggregationError(f"What should not have left a site did: {'; '.join(leaks)}.")


def _show_checked(checked: Checked) -> None:
    console = out()
    if checked.drawn:
        console.print("The data folders are empty: drawn images took the place of the sites' own.", markup=False)
    for site, messages in checked.sent.items():
        console.print(f"{site} sent", markup=False)
        for message, sent in messages.items():
            console.print(f"  {message}: {_shown(sent)}", markup=False, soft_wrap=True)
    seconds = fmean(line["seconds"] for line in checked.result["rounds"])
    console.print(f"A round took {seconds:.1f} s.")
    kept = f"; none of the {len(checked.local)} tensors that the norm plan keeps on the sites" if checked.local else ""
    if not checked.leaks():
        console.print(f"No image and no label{kept}. All processes listened on this machine alone, and have ended.")


def _shown(sent: Sent) -> str:
    times = f"{sent.seconds / sent.count:.1f} s a process, {sent.cpu_seconds / sent.count:.1f} s of it computing"
    parts = [f"{sent.count} answer{'s'[: sent.count > 1]}, {sent.size:,} bytes, {times}"]
    if sent.tensors:
        names = [key.partition("/")[2] for key in sent.tensors]
        parts.append(f"{len(names)} tensor{'s'[: len(names) > 1]}: {', '.join(names)}")
    parts += [f"{name}: {', '.join(keys)}" for name, keys in sent.values.items()]
    return "; ".join([*parts, *sent.errors])
