"""A site: a node with its own data, which it loads alone, and what it says of itself and keeps.

A node is a site where its configuration names what it has (``flower-supernode --node-config '...'``):

* ``domain="siteA"``: what its data is called in the run; needed.
* ``data-dir="/data/siteA"``: its folder, in the form that the run's ``data.name`` says; the run's own ``data.dir`` is
  never looked at. Not needed where the benchmark is embedded.
* ``state-dir="/var/fednorm"``: where it keeps its local tensors on its disk, so that it can be started again.
* ``sent-file="/var/log/sent.jsonl"``: where it writes down what it sends, before it does (:mod:`.sent`).
* ``allow-statistics=true``: it answers what asks for its local tensors and statistics (``query.local``,
  ``query.statistics``); else it refuses.
* ``partition-id=0``: which client of the run it is; needed in place of ``domain`` where the node has the whole
  benchmark. Where it has none, the server numbers the sites.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from flwr.app import Context, RecordDict

import fednorm
from fednorm.config import RunConfig, resolve
from fednorm.data.domain import Client, Federation
from fednorm.data.federation import load_federation, load_site
from fednorm.data.normalize import normalized
from fednorm.errors import ConfigError, DataError, canonical
from fednorm.federation.deployment.kept import SITE, Keeping, KeptOnDisk
from fednorm.federation.deployment.sent import SentFile
from fednorm.federation.plan import NormPlan
from fednorm.federation.workbench import Workbench

NEEDED = (
    'Start it with --node-config \'domain="NAME" data-dir="/its/own/folder"\': what its data is called in the run, and '
    "where it is; data-dir can be left out for an embedded benchmark"
)
"""What a node's configuration must have."""

_KEYS = ("domain", "data-dir", "state-dir", "sent-file", "allow-statistics", "partition-id")


@dataclass(frozen=True)
class SiteConfig:
    """What a node's configuration says, checked.

    Attributes:
        domain: What its data is called; empty for a node that is told by its number.
        data_dir: Its folder.
        state_dir: Where it keeps its state; empty for nowhere.
        sent_file: Where it writes down what it sends; empty for nowhere.
        allow_statistics: Whether it answers what asks for its local tensors and statistics.
        number: Which client it is; None where the server says so.
    """

    domain: str
    data_dir: str = ""
    state_dir: str = ""
    sent_file: str = ""
    allow_statistics: bool = False
    number: int | None = None

    @classmethod
    def read(cls, node: Mapping[str, object]) -> SiteConfig:
        """Read a node's configuration; keys of other apps are left alone.

        Raises:
            ConfigError: It names no data, a key is misspelt, or a value cannot be.
        """
        spelled = {_bare(key): key for key in _KEYS}
        for key in node:
            if (right := spelled.get(_bare(key))) not in (None, key):
                raise ConfigError(f"The node's configuration has {key!r}; it is spelled {right!r}.")
        texts = {key: node.get(key, "") for key in ("domain", "data-dir", "state-dir", "sent-file")}
        for key, text in texts.items():
            if not isinstance(text, str) or not text.isprintable() or len(text) > 4096:
                raise ConfigError(f"{key} in the node's configuration is a text; got {str(text)[:60]!r}. {NEEDED}.")
        domain, number, allows = (
            str(texts["domain"]).strip(),
            node.get("partition-id"),
            node.get("allow-statistics", False),
        )
        if not domain and number is None:
            raise ConfigError(f"The node's configuration names no data: it has no domain. {NEEDED}.")
        if len(domain) > 200:
            raise ConfigError("domain in the node's configuration is a name of at most 200 characters.")
        if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 0):
            raise ConfigError(f"partition-id in the node's configuration is a number from 0 on; got {number!r}.")
        if allows not in (True, False, "true", "false"):
            raise ConfigError(f"allow-statistics in the node's configuration is true or false; got {allows!r}.")
        folder, state, sent = (str(texts[key]) for key in ("data-dir", "state-dir", "sent-file"))
        return cls(domain, folder, state, sent, allows in (True, "true"), number)


def _bare(key: str) -> str:
    return canonical(key).replace("-", "").replace("_", "")


class SiteWorkbench(Workbench):
    """The workbench of one site: its own data, one model, the strategy's client side.

    Attributes:
        node: What its node's configuration says.
    """

    def __init__(self, config: RunConfig, node: SiteConfig) -> None:
        """Load the site's data and build the model.

        Raises:
            FedNormError: The configuration, the data and the node do not fit each other.
        """
        self.node = node
        super().__init__(config)
        (self._client,) = self.federation.clients
        disk = KeptOnDisk(Path(node.state_dir).expanduser(), self._client.domain) if node.state_dir else None
        self._keeping = Keeping(lambda _: disk)
        self._sent_file = SentFile(Path(node.sent_file).expanduser()) if node.sent_file else None

    def _loaded(self, given: Federation | None) -> Federation:
        config = self.config
        size, seed = config.model.card.input_size, config.seed
        if given is None and self.node.domain:
            try:
                given = load_site(config.data, self.node.domain, self.node.data_dir, image_size=size, seed=seed)
            except DataError as error:
                if self.node.data_dir:
                    raise
                raise DataError(f"{error} This node's configuration names no folder (data-dir).") from error
        elif given is None:
            whole = load_federation(config.data.replace(dir=self.node.data_dir), image_size=size, seed=seed)
            number = self.node.number or 0
            if number >= len(whole.clients):
                raise ConfigError(
                    f"The node's configuration has partition-id={number}, and the run has the clients 0 to "
                    f"{len(whole.clients) - 1}."
                )
            given = dataclasses.replace(whole, clients=(whole.clients[number],))
        return normalized(given, config.data.normalize)

    def client(self, context: Context) -> Client:
        """Return the site's client, under the number that the server gave it; -1 before it has given one."""
        known = context.state.config_records.get(SITE)
        own = -1 if self.node.number is None else self.node.number
        number = own if known is None else int(str(known["partition-id"]))
        return dataclasses.replace(self._client, partition_id=number)

    def about_node(self) -> dict[str, str | int | bool]:
        """Return what the server must know to fit the site in; no image and no label is part of it."""
        return {
            "site": True,
            "numbered": self.node.number is not None,
            "classes": self.federation.num_classes,
            "class-names": json.dumps(self.federation.class_names),
            "image-size": self.federation.image_size,
            "title": self.federation.title,
            "notes": json.dumps(self.federation.notes),
            "digest": self.federation.digest(),
            "version": fednorm.__version__,
            "plan": plan_digest(self.plan),
            "allow-statistics": self.node.allow_statistics,
        }

    def before(self, kind: str, content: RecordDict, context: Context) -> None:
        """Learn which client this is, find what it kept, and refuse what its node does not allow.

        Raises:
            ConfigError: The node does not allow what is asked.
            RecordError: What it kept on its disk cannot be read.
        """
        if kind in ("query.local", "query.statistics") and not self.node.allow_statistics:
            raise ConfigError(
                f"Refused: {self._client.domain} keeps its local tensors and statistics to itself. Its own node's "
                "configuration would have to say allow-statistics=true."
            )
        self._keeping.before(kind, content, context.state)

    def after(self, kind: str, content: RecordDict, reply: RecordDict, context: Context) -> None:
        """Keep the state on the site's disk where it has changed, say where it was lost, and write down what goes.

        Raises:
            RecordError: It cannot be written there.
        """
        self._keeping.after(kind, content, reply, context.state)
        if self._sent_file:
            self._sent_file.answered(kind, content, reply)

    def failed(self, kind: str, content: RecordDict, error: Exception) -> None:
        """Write down that an error goes back.

        Raises:
            RecordError: It cannot be written.
        """
        if self._sent_file:
            self._sent_file.failed(kind, content, error)


def plan_digest(plan: NormPlan) -> str:
    """Return 16 hexadecimal digits that identify a norm plan: every entry's key, kind, role, shape and type."""
    entries = [(e.key, e.kind.value, e.role.value, list(e.shape), str(e.dtype)) for e in plan.entries]
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:16]


def site_workbench(context: Context) -> SiteWorkbench:
    """Return this process's workbench of a site, made at the first call.

    Raises:
        FedNormError: Something in the run's or the node's configuration does not fit the rest.
    """
    return _workbench(str(context.run_config.get("config", "")), SiteConfig.read(context.node_config))


@lru_cache(maxsize=2)
def _workbench(config: str, node: SiteConfig) -> SiteWorkbench:
    bench = SiteWorkbench(resolve(json.loads(config or "{}")), node)
    torch.set_num_threads(bench.config.threads)  # Flower's processes are ours alone
    return bench
