"""Who the nodes of a deployed run are: sites that say their names, come, leave, and come back.

Flower's node ids are random, and a node that is started again may have another. So a site is known by its name, its
domain, and keeps its client's number (partition id) whatever node it comes back as. Nodes are asked once, when they are
first seen (``query.describe``); what they say is held against the run and against each other: a site whose version of
fednorm, classes, image shape or norm plan differs is refused by name, with the difference.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from flwr.app import Message, RecordDict

import fednorm
from fednorm.config import RunConfig
from fednorm.data.domain import Federation
from fednorm.errors import ConfigError, IncompleteError
from fednorm.federation.constants import differing
from fednorm.federation.deployment.about import Site, read_site, remote_federation
from fednorm.federation.deployment.grid import NO_ANSWER, DeployedGrid
from fednorm.federation.deployment.kept import LOST
from fednorm.federation.nodes import Node
from fednorm.federation.replies import UnfitReply, in_order, one_line
from fednorm.federation.round_report import RoundReport

log = logging.getLogger("flwr")

LOOK_SECONDS = 0.5
"""Between two looks for nodes that are waited for."""

LEAST_SECONDS = 60.0
"""Least time for a node to describe itself: it reads its data and builds its model for that."""

RIVAL_SECONDS = 30.0
"""Time for a known node to show that it is alive, where another says that it is the same site."""


class Roster:
    """The sites of a run, and which node each of them is now.

    Args:
        config: The run's configuration.
        grid: The way to the nodes; from now on it says to each which client of which run it is.
        run: What tells this run from others of the same configuration, on the sites' disks.
        before: What :meth:`about` returned before the server was started again; nothing for a new run.
        last: The last round of which each client's training was used, by its number.

    Attributes:
        run: See above.
        sites: Every site that was ever taken on, by its client's number.
        on_change: Called when there are new ones.
    """

    def __init__(
        self,
        config: RunConfig,
        grid: DeployedGrid,
        run: str,
        before: Mapping[str, tuple[int, str]] | None = None,
        last: Mapping[int, int] | None = None,
    ) -> None:
        self.run = run
        self.sites: dict[int, Site] = {}
        self.on_change: Callable[[], None] = lambda: None
        self._config, self._grid = config, grid
        self._before = dict(before or {})
        self._nodes: dict[int, int] = {}  # the numbers of those that are there, by node id
        self._candidates: dict[int, Site] = {}
        self._refused: dict[int, str] = {}
        self._looks = 0
        self._silent: dict[int, tuple[int, int]] = {}  # how often asked in vain, and from which look on again
        self._last = dict(last or {})
        self._events: list[dict[str, str]] = []
        self._plan = ""
        self._constants: Mapping[str, list[float]] = {}
        self._began = False
        grid.addressed = self._addressed

    # Before the first round ------------------------------------------------------------------------------------------

    def gather(self) -> Federation:
        """Wait for the sites that the run begins with, and return them as a federation; their numbers are not final.

        The wait is over as soon as all of ``data.domains`` are there, or ``rounds.min_nodes`` where none are named; and
        after ``rounds.wait`` seconds if the fewest are there.

        Raises:
            IncompleteError: They are not; with what was said by those that could not be taken on.
        """
        rounds, until = self._config.rounds, time.monotonic() + self._config.rounds.wait
        everyone = len(self._config.data.domains) or rounds.min_nodes
        while True:
            self._see_who_left()
            self._ask_newcomers(until)
            agreed = self._agreeing()
            if len(agreed) >= everyone or time.monotonic() >= until:
                break
            time.sleep(LOOK_SECONDS)
        self._require_enough(len(agreed))
        self._candidates = agreed
        return remote_federation(dict(enumerate(sorted(agreed.values(), key=lambda site: site.name))))

    def admit(self, plan: str, constants: Mapping[str, list[float]]) -> None:
        """Take on those that were gathered and have the server's norm plan, and number them.

        Args:
            plan: The digest of the server's norm plan.
            constants: Prints of the constants of its model.

        Raises:
            IncompleteError: Too few are left; with the differences of the others.
        """
        self._plan, self._constants = plan, constants
        self._take_on(self._candidates)
        self._require_enough(len(self._nodes))
        self._candidates, self._began = {}, True

    def _agreeing(self) -> dict[int, Site]:
        """Return the candidates that agree with most of them, of a name of their own; the others are refused."""
        names = Counter(site.name for site in self._candidates.values())
        fitting = [site for site in self._candidates.values() if not self._version(site)]
        kinds = Counter((site.classes, site.image_size) for site in fitting)
        model = min(fitting, key=lambda site: (-kinds[site.classes, site.image_size], site.name), default=None)
        agreed = {}
        for node_id, site in self._candidates.items():
            reason = _twins(site, names) or self._unknown(site) or self._version(site)
            reason = reason or (site.differs(model) if model else "")
            if reason:
                self._refuse(node_id, site.name, reason)
            else:
                self._refused.pop(node_id, None)
                agreed[node_id] = site
        return agreed

    def _require_enough(self, count: int) -> None:
        named = self._config.data.domains
        fewest = self._config.rounds.min_nodes or len(named)
        if count >= max(fewest, 1):
            return
        reasons = "; ".join(dict.fromkeys(reason.rstrip(".") for reason in self._refused.values()))
        there = {site.name for site in self._candidates.values()}
        absent = ", ".join(name for name in named if name not in there)
        raise IncompleteError(
            f"{count} of the {fewest} sites that this run needs came within rounds.wait, {self._config.rounds.wait:g} s"
            + (f", not {absent}" if absent else "")
            + (f". Not taken on: {reasons}" if reasons else "")
            + ". Start their nodes; or set rounds.min_nodes to fewer, or rounds.wait to longer."
        )

    # In every round --------------------------------------------------------------------------------------------------

    def look(self) -> tuple[Node, ...]:
        """See who has come and gone, and return the nodes of a round, in the order of their numbers.

        Where no site is there that trains, it is waited for, ``rounds.wait`` seconds at most.

        Raises:
            IncompleteError: None came.
        """
        until = time.monotonic() + self._config.rounds.wait
        self._grid.begin_round()
        while True:
            self._see_who_left()
            # Newcomers are not waited for longer than it takes to describe oneself, while others could go on.
            self._ask_newcomers(time.monotonic() if self._trainer_is_there() else until)
            self._take_on(self._candidates)
            self._candidates = {}
            if self._trainer_is_there():
                return self.nodes()
            if time.monotonic() >= until:
                raise IncompleteError(
                    f"No site that trains is there any more, and none came within {self._config.rounds.wait:g} s "
                    "(rounds.wait). The record keeps the last good round."
                )
            time.sleep(LOOK_SECONDS)

    def _trainer_is_there(self) -> bool:
        return any(node.trains and not node.held_out for node in self.nodes())

    def nodes(self) -> tuple[Node, ...]:
        """Return the nodes that are there, in the order of their numbers."""
        pairs = sorted((number, node_id) for node_id, number in self._nodes.items())
        return tuple(
            Node(node_id, number, site.name, site.held_out, True, site.counts[0] > 0, site.shows)
            for number, node_id in pairs
            for site in [self.sites[number]]
        )

    def note(self, report: RoundReport) -> None:
        """Take down whose training a round used, and tell its report what has become of the nodes."""
        for client in report.train:
            self._last[client.partition_id] = report.server_round
            if lost := client.metrics.get(LOST):
                self._event(client.domain, f"it has lost what it kept in round {int(lost)}, and began anew")
        for node_id in self._grid.late:
            number = self._nodes.get(node_id)
            name = self.sites[number].name if number is not None else f"node {node_id}"
            self._event(name, "a reply of it came after its time, and was dropped")
        self._grid.late.clear()
        report.events, self._events = self._events, []

    def about(self) -> dict[str, list[object]]:
        """Return each site's number and its data's digest, by its name; those before a restart of the server too."""
        now = {site.name: [number, site.digest] for number, site in sorted(self.sites.items())}
        return {name: list(said) for name, said in self._before.items()} | now

    def federation(self) -> Federation:
        """Return the run's clients as the server knows them: their numbers of images, and none of the images."""
        return remote_federation(self.sites)

    def _see_who_left(self) -> None:
        there = set(self._grid.get_node_ids())
        for node_id in [node_id for node_id in self._nodes if node_id not in there]:
            self._event(self.sites[self._nodes.pop(node_id)].name, "its node has left")
        for node_id in [node_id for node_id in self._refused if node_id not in there]:
            del self._refused[node_id]
        for node_id in [node_id for node_id in self._candidates if node_id not in there]:
            del self._candidates[node_id]

    def _ask_newcomers(self, until: float) -> None:
        """Ask the nodes that nobody knows who they are.

        One that does not answer is asked again, at looks that are further and further apart: it holds up the others.
        """
        self._looks += 1
        known = {**self._nodes, **self._candidates, **self._refused}
        ids = sorted(set(self._grid.get_node_ids()) - known.keys())
        due = [node_id for node_id in ids if self._silent.get(node_id, (0, 0))[1] <= self._looks]
        unnamed = [Node(node_id, k) for k, node_id in enumerate(due)]
        for node, site in self._described(unnamed, max(LEAST_SECONDS, until - time.monotonic())):
            self._candidates[node.node_id] = site
        for node_id in due:
            if node_id not in self._candidates and node_id not in self._refused:
                times = self._silent.get(node_id, (0, 0))[0] + 1
                self._silent[node_id] = times, self._looks + 2**times

    def _described(self, nodes: list[Node], seconds: float) -> Iterable[tuple[Node, Site]]:
        ask = [Message(RecordDict(), dst_node_id=node.node_id, message_type="query.describe") for node in nodes]
        replies = self._grid.send_and_receive(ask, timeout=seconds) if ask else ()
        for node, reply in in_order(replies, nodes, range(len(nodes)), lambda *_: None):
            if reply.has_error() and reply.error.code == NO_ANSWER:
                continue
            try:
                site = read_site(reply)
            except UnfitReply as unfit:
                self._refuse(node.node_id, "", unfit.reason)
            else:
                yield node, site

    def _take_on(self, candidates: Mapping[int, Site]) -> None:
        """Take on those that fit the run, each under its number; the others are refused."""
        order = {name: k for k, name in enumerate(self._config.data.domains)}
        came = sorted(candidates.items(), key=lambda item: (item[1].held_out, order.get(item[1].name, 0), item[1].name))
        names = Counter(site.name for _, site in came)
        stated = Counter(site.number for _, site in came if site.number is not None)
        anew = False
        for node_id, site in came:
            number = self._number(site, {n for n in stated if n is not None})
            reason = self._unfit(site, names, stated) or self._rival(number, site)
            if reason:
                self._refuse(node_id, site.name, reason)
                continue
            back = number in self.sites
            digest = self.sites[number].digest if back else self._before.get(site.name, (0, site.digest))[1]
            if digest != site.digest:
                self._event(site.name, "it came back with other data")
            elif self._began:
                self._event(site.name, "its node has come back" if back else "it has joined")
            self._nodes[node_id], self.sites[number], anew = number, replace(site, number=number), True
        if anew:
            self.on_change()

    def _unfit(self, site: Site, names: Mapping[str, int], stated: Mapping[int, int]) -> str:
        """Return why a site is not taken on; empty where it is."""
        if site.number is not None and stated[site.number] > 1:
            return f"{stated[site.number]} nodes say that they are client {site.number} (partition-id)"
        reason = _twins(site, names) or self._unknown(site) or self._version(site)
        if not reason and site.held_out != (site.name == self._config.data.held_out):
            reason = f"it {'never trains' if site.held_out else 'trains'}, and data.held_out says otherwise"
        if not reason and self.sites:
            reason = site.differs(self.sites[min(self.sites)])
        if not reason and site.plan != self._plan:
            reason = f"its norm plan is not the server's: {site.plan}, and {self._plan} there; its packages may differ"
        if not reason and site.constants is not None and (key := differing(self._constants, site.constants)):
            reason = f"the constant {key} of its model is not the server's; build both models alike, versions included"
        return reason

    def _unknown(self, site: Site) -> str:
        named = self._config.data.domains
        if named and site.name not in named:
            return f"this run has the sites {', '.join(named)} (data.domains), and no {site.name}"
        return ""

    @staticmethod
    def _version(site: Site) -> str:
        own = fednorm.__version__
        return "" if site.version == own else f"it has fednorm {site.version}, and the server has {own}"

    def _number(self, site: Site, stated: set[int]) -> int:
        """Return a site's number: its own, the one it had, that of its place among the domains, or the next."""
        if site.number is not None:
            return site.number
        if (had := next((n for n, known in self.sites.items() if known.name == site.name), None)) is not None:
            return had
        if site.name in self._before:
            return self._before[site.name][0]
        named = self._config.data.domains
        if site.name in named:
            place = sorted(named, key=lambda name: name == self._config.data.held_out).index(site.name)
            if place not in {*self.sites, *stated, *(number for number, _ in self._before.values())}:
                return place
        taken = {
            *self.sites,
            *stated,
            *(number for number, _ in self._before.values()),
            *(range(len(named)) if named else ()),
        }
        return next(n for n in range(len(taken) + 1) if n not in taken)

    def _rival(self, number: int, site: Site) -> str:
        """Return why a site cannot have its number: another has it, or its own node of before is still alive."""
        known = self.sites.get(number)
        if known is None:
            twin = next((s for s in self.sites.values() if s.name == site.name), None)
            return f"{site.name} is client {twin.number} of this run, and not {number}" if twin else ""
        if known.name != site.name:
            return f"client {number} of this run is {known.name}"
        before = next((node_id for node_id, held in self._nodes.items() if held == number), None)
        if before is None:
            return ""
        if any(True for _ in self._described([Node(before, 0)], RIVAL_SECONDS)):
            return f"another node of this run is {site.name}, and alive; each site needs a name of its own"
        self._nodes.pop(before, None)
        self._refused.pop(before, None)
        return ""

    def _addressed(self, node_id: int) -> Mapping[str, str | int] | None:
        number = self._nodes.get(node_id)
        if number is None:
            return None
        return {"run": self.run, "partition-id": number, "last-round": self._last.get(number, 0)}

    def _refuse(self, node_id: int, name: str, reason: str) -> None:
        who = name or f"node {node_id}"
        if self._refused.get(node_id) == f"{who}: {reason}":
            return
        self._refused[node_id] = f"{who}: {reason}"
        self._event(who, f"refused: {reason}")
        log.warning("fednorm: %s is not taken on: %s", who, reason)

    def _event(self, site: str, what: str) -> None:
        self._events.append({"site": one_line(site), "event": one_line(what)})

    def require_shown(self, why: str) -> None:
        """Refuse, before training, what would ask sites for what their nodes do not allow.

        Args:
            why: What would ask for it.

        Raises:
            ConfigError: A site does not allow it.
        """
        silent = ", ".join(site.name for site in self.sites.values() if not site.shows)
        if silent:
            raise ConfigError(
                f"{why} asks the sites for their local tensors, and {silent} keeps them to itself. Leave it out, or "
                "set allow-statistics=true in the configuration of each of their nodes."
            )


def _twins(site: Site, names: Mapping[str, int]) -> str:
    """Return why a site is refused whose name others have too; empty where none has."""
    if names[site.name] < 2:
        return ""
    return f"{names[site.name]} nodes say that they are {site.name}; each site needs a name of its own"
