"""The server of a deployed run: it has no data, and makes its workbench of what the sites say of themselves."""

from __future__ import annotations

import json

import torch
from flwr.app import Context
from flwr.serverapp import Grid

from fednorm.config import RunConfig, resolve
from fednorm.data.domain import Federation
from fednorm.errors import ConfigError
from fednorm.federation.central import require_folder
from fednorm.federation.constants import constant_prints
from fednorm.federation.deployment.grid import DeployedGrid
from fednorm.federation.deployment.roster import Roster
from fednorm.federation.deployment.site import plan_digest
from fednorm.federation.server import Document, Observer, RecordSource, expected_of, read_back, serve
from fednorm.federation.workbench import Workbench
from fednorm.records.record import RunRecord

ASKING = ("cross", "averaged", "pooled")
"""Evaluations that ask clients for their local tensors."""


class ServerWorkbench(Workbench):
    """A workbench of a server whose clients' images are elsewhere."""

    def about(self) -> Document:
        """Return what the record says of the sites: which run they know, their numbers, digests of their data."""
        roster = self.roster
        return {} if roster is None else {"sites": {"run": roster.run, "known": roster.about()}}

    def _loaded(self, given: Federation | None) -> Federation:
        assert given is not None, "a server has no data of its own"
        return given  # the sites scale their own images

    def _move_data(self, device: torch.device) -> None:
        """Leave what is not there where it is."""

    def _require_memory_of_clients(self) -> None:
        """The clients' tensors are on machines of their own."""


def check_deployed(config: RunConfig) -> None:
    """Refuse what no federation of sites can run, or what would need one site's images at another.

    Raises:
        ConfigError: The configuration is one of these.
    """
    data, rounds = config.data, config.rounds
    if config.kind == "federated" and config.train.private_noise:
        raise ConfigError(
            "Private training (train.private_noise) draws its noise from the run's seed, which the server knows and "
            "could take away again: it is for simulations. Let real sites train with Opacus's own secure mode."
        )
    if config.kind != "federated":
        raise ConfigError("A federation of streams runs in process or on Flower's simulation; sites are not asked yet.")
    config.require_importable("the sites' processes are others")
    if config.evaluate.central != bool(config.evaluate.central_dir):
        require_folder(config.evaluate)  # of which the server's machine alone can say whether it is there
    if config.strategy.card.pooled:
        raise ConfigError(
            f"strategy {config.strategy.name} trains on the images of all sites at once: they would travel."
        )
    if data.normalize == "global" or (data.normalize == "domain" and data.held_out):
        raise ConfigError(
            f"data.normalize is {data.normalize!r}, which measures the images of all sites"
            f"{' for the held-out one' if data.held_out else ''}, and a site sees its own. Take 'half' or 'domain'."
        )
    if data.clients_per_domain > 1:
        raise ConfigError(f"A site is one client; data.clients_per_domain is {data.clients_per_domain}.")
    if not data.domains and not rounds.min_nodes:
        raise ConfigError(
            "A deployed run must know whom it waits for: name its sites (--domains siteA,siteB,siteC), or the least "
            "number of them (--set rounds.min_nodes=3)."
        )
    if data.domains and rounds.min_nodes > len(data.domains):
        raise ConfigError(
            f"rounds.min_nodes is {rounds.min_nodes}, and data.domains names {len(data.domains)} sites, beside which "
            "none is taken on."
        )


def serve_sites(grid: Grid, context: Context, record_of: RecordSource, observer: Observer | None) -> Document:
    """Run a federation of sites to its result.

    Args:
        grid: Flower's way to the nodes.
        context: The ServerApp's.
        record_of: Finds the run's record.
        observer: Is told how the run goes.

    Raises:
        FedNormError: The configuration cannot be run, too few sites came or answered, or the record cannot be written.
    """
    config = resolve(json.loads(str(context.run_config.get("config", "")) or "{}"))
    check_deployed(config)
    record = record_of(context, config)
    if record is not None and (finished := read_back(record, config)):
        return finished
    require_folder(config.evaluate)  # before anybody is waited for
    torch.set_num_threads(config.threads)
    deployed = DeployedGrid(grid, timeout=config.rounds.timeout)
    roster = roster_of(config, deployed, record, f"{config.hash}-{context.run_id}")
    return serve(deployed, gathered(config, roster), record, observer)


def roster_of(config: RunConfig, grid: DeployedGrid, record: RunRecord | None, run: str) -> Roster:
    """Return the roster of a new run, or of one that goes on from its server's checkpoint.

    Args:
        config: The run's configuration.
        grid: The way to the nodes.
        record: Where it may have been before.
        run: What a new one is called.

    Raises:
        RecordError: The record cannot be read.
    """
    said = record.about().get("sites") if record is not None and record.has_checkpoint() else None
    checkpoint = record.load_checkpoint() if record is not None and isinstance(said, dict) else None
    if record is None or checkpoint is None or not isinstance(said, dict):
        return Roster(config, grid, run)
    before = {name: (int(number), str(digest)) for name, (number, digest) in said["known"].items()}
    # A round whose line is there and whose checkpoint is not will be again: no site may count it as used.
    lines = record.lines()[: checkpoint.ended]
    last = {c["client"]: line["round"] for line in lines for c in line["clients"]["train"]}
    return Roster(config, grid, str(said["run"]), before, last)


def gathered(config: RunConfig, roster: Roster) -> Workbench:
    """Wait for the sites, hold them against each other and the server's norm plan, and return its workbench.

    Raises:
        FedNormError: Too few came, or what is to be evaluated would ask for what they do not allow.
    """
    bench = ServerWorkbench(config, roster.gather())
    roster.admit(plan_digest(bench.plan), constant_prints(bench.model, bench.plan))
    bench.roster, bench.strategy.renew = roster, roster.look

    def learn() -> None:
        bench.federation = roster.federation()
        bench.strategy.expected = expected_of(bench)

    roster.on_change = learn
    learn()
    bench.strategy.nodes = roster.nodes()
    asking = [kind for kind in config.evaluate.kinds if kind in ASKING]
    adapts_unseen = bool(config.evaluate.adaptation) and bool(bench.federation.counts.held_out.any())
    if ("unseen" in config.evaluate.kinds or adapts_unseen) and config.evaluate.fallback != "refuse":
        asking.append("unseen")
    if bench.plan.local and asking:
        roster.require_shown(f"evaluate.kinds = {', '.join(asking)}")
    return bench
