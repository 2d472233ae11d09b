"""What a site says of itself, and the federation that a server makes of it: numbers of images, and no image."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from flwr.app import Message

from fednorm.data.domain import Client, Federation, Split
from fednorm.federation.replies import UnfitReply, one_line, read_about, reader

MOST_SITES = 10_000
"""Sites of a run."""

MOST_CHARACTERS = 200
"""Of a site's name."""

MOST_NOTES = 20
"""Sentences of a site that go into the result."""


@dataclass(frozen=True)
class Site:
    """What a site said of itself.

    Attributes:
        name: Its domain.
        number: Its client's number; None where its node leaves that to the server.
        held_out: Whether it never trains.
        counts: Numbers of its training, validation and test images.
        classes: K, and the classes' names as JSON, an empty list where the data does not name them.
        image_size: Height and width of its images.
        digest: Of its data.
        version: Of its fednorm.
        plan: Digest of its norm plan.
        shows: Whether its node answers what asks for its local tensors and statistics.
        title: How a table names its data.
        notes: What belongs under such a table.
        constants: Prints of its model's constants.
    """

    name: str
    number: int | None
    held_out: bool
    counts: tuple[int, int, int]
    classes: tuple[int, str]
    image_size: int
    digest: str
    version: str
    plan: str
    shows: bool
    title: str = ""
    notes: tuple[str, ...] = ()
    constants: Mapping[str, object] | None = None

    def differs(self, other: Site) -> str:
        """Return in what it does not fit another site of the same run; empty where it fits."""
        if self.version != other.version:
            return f"it has fednorm {self.version}, and {other.name} has {other.version}"
        (count, names), (others_count, others_names) = self.classes, other.classes
        named = "[]" not in (names, others_names)
        if count != others_count or (named and names != others_names):
            return f"it has {_classes(self)}, and {other.name} has {_classes(other)}"
        if self.image_size != other.image_size:
            return f"its images are {self.image_size} pixels high, and those of {other.name} {other.image_size}"
        return ""


def _classes(site: Site) -> str:
    count, names = site.classes
    listed = json.loads(names)
    shown = ", ".join([*listed[:8], *(["…"] if len(listed) > 8 else [])])
    return f"{count} classes ({shown})" if shown else f"{count} classes"


@reader
def read_site(reply: Message) -> Site:
    """Return what a site says of itself.

    Raises:
        UnfitReply: It failed, or says something else.
    """
    said = read_about(reply, numbered=False)
    if said is None:
        raise UnfitReply("it does not describe itself (query.describe)")
    about, domain, held_out, constants = (
        reply.content.config_records["client"],
        said.domain,
        said.held_out,
        said.constants,
    )
    if domain != one_line(domain, MOST_CHARACTERS):
        raise UnfitReply(f"its domain is no name of at most {MOST_CHARACTERS} printable characters: {domain!r}")
    if about.get("site") is not True:
        raise UnfitReply("it is no site: it describes itself without what a deployed run must know (fednorm is older)")
    counts = tuple(about.get(key) for key in ("train", "validation", "test"))
    numbers = (*counts, about.get("classes"), about.get("image-size"))
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**53 for n in numbers):
        raise UnfitReply(f"it describes itself without its numbers of images and classes, and their size: {numbers}")
    names, notes = (json.loads(str(about.get(key))) for key in ("class-names", "notes"))
    if not all(isinstance(n, list) and all(isinstance(text, str) for text in n) for n in (names, notes)):
        raise UnfitReply("it describes itself with class names or notes that are no texts")
    digest, version, plan, title = (one_line(str(about.get(key))) for key in ("digest", "version", "plan", "title"))
    number = int(str(about["partition-id"])) if about.get("numbered") is True else None
    if number is not None and not 0 <= number < MOST_SITES:
        raise UnfitReply(f"it says that it is client {number}")
    return Site(
        domain,
        number,
        held_out,
        (int(str(counts[0])), int(str(counts[1])), int(str(counts[2]))),
        (int(str(about["classes"])), json.dumps(names)),
        int(str(about["image-size"])),
        digest,
        version,
        plan,
        about.get("allow-statistics") is True,
        title,
        tuple(one_line(note) for note in notes[:MOST_NOTES]),
        constants,
    )


@dataclass(frozen=True, eq=False)
class RemoteFederation(Federation):
    """The clients of a run whose images are elsewhere.

    Attributes:
        digests: What identifies each site's data.
    """

    digests: tuple[str, ...] = ()

    def digest(self) -> str:
        """Return what identifies the data of all sites: 16 hexadecimal digits made of theirs."""
        return hashlib.sha256("\n".join(self.digests).encode()).hexdigest()[:16]


def remote_federation(sites: Mapping[int, Site]) -> RemoteFederation:
    """Return the federation of some sites, by their clients' numbers, as their server knows it.

    A number that no site has is that of a client without images.
    """
    first = sites[min(sites)]
    absent = replace(first, name="(not there)", held_out=False, counts=(0, 0, 0))
    clients = tuple(_remote(number, sites.get(number, absent)) for number in range(max(sites) + 1))
    names = next((json.loads(site.classes[1]) for site in sites.values() if site.classes[1] != "[]"), ())
    return RemoteFederation(
        f"{first.title.partition(' (')[0]} ({', '.join(sites[number].name for number in sorted(sites))})",
        first.classes[0],
        first.image_size,
        clients,
        tuple(dict.fromkeys(note for site in sites.values() for note in site.notes)),
        tuple(names),
        digests=tuple(f"{number}|{sites[number].digest}" for number in sorted(sites)),
    )


def _remote(number: int, site: Site) -> Client:
    none = torch.empty((0, 3, site.image_size, site.image_size), dtype=torch.uint8)
    train, validation, test = (Split(none, torch.empty(0, dtype=torch.int64), torch.arange(n)) for n in site.counts)
    return Client(number, site.name, train, validation, test, site.held_out)
