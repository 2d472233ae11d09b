"""Every reply of a client, validated here against what the plan expects before anything else reads it.

A reader takes a reply and returns what it holds, decoded and checked, or raises :class:`UnfitReply` with the reason: a
client whose reply does not fit is rejected, and nothing else happens. So it is in training, evaluation and queries
alike, whatever a client sends: no reader raises anything else.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ParamSpec, TypeGuard, TypeVar

import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fednorm.federation.aggregation import all_finite
from fednorm.federation.flat import flattened, values_of
from fednorm.federation.messages import Answered, sender_of
from fednorm.federation.plan import Entry, NormPlan
from fednorm.federation.stack import RowRecord
from fednorm.federation.wire import FlatRecord, MemoryArray, Undecodable, decode, nbytes
from fednorm.roles import Kind, Role

if TYPE_CHECKING:
    from fednorm.federation.nodes import Node

P = ParamSpec("P")
T = TypeVar("T")

MOST_EXAMPLES = 2**53
"""The largest number of examples that is believed: the last up to which a float64 counts every one."""

NOT_NEGATIVE = {Kind.VAR: "variances", Kind.QUADRATIC: "mean squares", Kind.DEVIATION: "deviations"}

NOT_FINITE = "NaN or infinite values"
NOT_A_NUMBER = "the loss is not a number"


class Cause(StrEnum):
    """What kind of fault a reply has, as far as the remedies differ; each value is the remedy."""

    DIVERGED = "a smaller train.learning_rate, or clipping (train.agc), often helps where losses or weights became NaN"
    KEYS = (
        "a client sends the tensors of strategy.plan.sent only, those that the message brought: "
        "ArrayRecord({key: state[key] for key in message.content['arrays']}) and not the whole state dict"
    )
    TYPE = "a client sends each tensor in the shape and type in which the message brought it"
    BFLOAT16 = (
        "NumPy, and so Flower's arrays, have no bfloat16: a client sends such tensors as float32 (tensor.float(), "
        "which is exact), and they are rounded back here"
    )
    ARRAYS = "a client sends one ArrayRecord of NumPy arrays or PyTorch tensors, which Flower's Array serializes"
    EXTRA = (
        "a client of this strategy sends, beside the tensors of the plan, the ArrayRecord 'extra' with what "
        "strategy.extra_expected() declares; fednorm's own clients do (fednorm.federation.client)"
    )
    METRICS = (
        "a client sends one MetricRecord with num-examples, and with loss (a finite number) and accuracy (a share in "
        "[0, 1]) where it reports them"
    )
    NORM = "a larger rounds.max_update_norm, or 0 for no limit, lets longer updates pass"
    FAILED = "the client's own error says what to mend"
    OTHER = "every client answers each message once, and no other node answers"


class UnfitReply(Exception):
    """Why a reply is not used.

    Attributes:
        reason: The reason, on one line; never empty.
        cause: What kind of fault it is.
    """

    def __init__(self, reason: str, cause: Cause = Cause.OTHER) -> None:
        self.reason = one_line(reason) or "no reason was given"
        self.cause = cause
        super().__init__(self.reason)


@dataclass(frozen=True)
class Update:
    """What a client sends after training.

    Attributes:
        tensors: The plan's tensors, in the plan's order; they must not be written to.
        metrics: ``num-examples`` and whatever other numbers it reports.
        nbytes: Bytes of all tensors.
        extra: What the strategy asked for besides.
        flat: The floating-point tensors as one vector, of a small model (:mod:`fednorm.federation.flat`).
    """

    tensors: Mapping[str, Tensor]
    metrics: dict[str, float]
    nbytes: int
    extra: dict[str, Tensor] = field(default_factory=dict)
    flat: Tensor | None = None


EXTRA = "extra"
"""The ArrayRecord of a message that holds what a strategy sends, or is sent, beside the tensors of the plan."""


@dataclass(frozen=True)
class Form:
    """What a tensor must look like: its shape, and the type of its values, e.g. ``float32``."""

    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        kind: torch.dtype = getattr(torch, self.dtype)
        return math.prod(self.shape) * kind.itemsize

    @classmethod
    def of(cls, tensor: Tensor) -> Form:
        """Return the form of a tensor."""
        return cls(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


@dataclass(frozen=True)
class About:
    """What a client says of itself; None where it does not say how many images it trains on, or prints constants."""

    partition_id: int
    domain: str
    held_out: bool
    constants: Mapping[str, object] | None = None
    train: int | None = None


@dataclass(frozen=True, slots=True)
class Expected:
    """What a run knows of one of its clients before it has answered anything.

    Attributes:
        domain: Its domain.
        held_out: Whether it never trains.
        train: Its training images.
        scored: Its images in the split that is scored.
        constant: Whether it trains on all of its training images in every round.
    """

    domain: str
    held_out: bool
    train: int
    scored: int
    constant: bool = True


def reader(read: Callable[P, T]) -> Callable[P, T]:
    """Let a function raise :class:`UnfitReply` and nothing else: what a client sends may fail in ways of its own."""

    @functools.wraps(read)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return read(*args, **kwargs)
        except UnfitReply:
            raise
        except Exception as error:
            raise UnfitReply(f"the reply cannot be read ({type(error).__name__}: {error})") from error

    return guarded


# The readers --------------------------------------------------------------------------------------------------------


@reader
def read_update(
    reply: Message,
    plan: NormPlan,
    *,
    required: Collection[str] = (),
    examples: int = 0,
    shares: bool = True,
    extra: Mapping[str, Form] | None = None,
) -> Update:
    """Return what a client sends after training: the plan's tensors, finite, and its metrics.

    Args:
        reply: The client's reply.
        plan: Which tensors, of which shapes and types, are expected.
        required: Metrics that it must report besides ``num-examples``.
        examples: How many it trains on, where that is known; 0 where it is not.
        shares: Whether accuracies are shares in [0, 1], as fednorm's are; another app may report percent.
        extra: What the strategy asks for besides the plan's tensors, in an ArrayRecord of its own; nothing if empty.

    Raises:
        UnfitReply: It is something else.
    """
    content = _content(reply)
    metrics = _metrics(content, at_least=1, examples=examples or None, verb="trains on")
    arrays = content.get("arrays")
    if isinstance(arrays, RowRecord) and not extra and arrays.row.stack.fits(plan.sent, plan)[arrays.row.number]:
        # Checked together with the others of its stack.
        return Update(arrays.row, _sound(metrics, required, shares), arrays.row.stack.nbytes)
    records = {key: value for key, value in content.items() if isinstance(value, ArrayRecord)}
    if EXTRA in records and not extra and len(records) > 1:
        raise UnfitReply(f"it sends an ArrayRecord {EXTRA!r}, and the strategy declares none", Cause.EXTRA)
    beside = _extra(records.pop(EXTRA, {}), extra) if extra else {}
    if len(records) != 1:
        raise UnfitReply(f"expected one ArrayRecord; got {len(records)}", Cause.ARRAYS)
    tensors, flat = _tensors(arrays := next(iter(records.values())), plan.sent, plan)
    size = (plan.bytes_sent if flat is not None else nbytes(arrays.values())) + sum(
        tensor.nbytes for tensor in beside.values()
    )
    return Update(tensors, _sound(metrics, required, shares), size, beside, flat)


@reader
def read_scores(
    reply: Message, *, required: Collection[str] = (), images: int | None = None, shares: bool = True
) -> dict[str, float]:
    """Return a client's metrics of an evaluation.

    Args:
        reply: The client's reply.
        required: Metrics that it must report besides ``num-examples``.
        images: How many it scores, where that is known.
        shares: As for :func:`read_update`.

    Raises:
        UnfitReply: Something is missing, no number, or out of range.
    """
    return _sound(_metrics(_content(reply), at_least=0, examples=images, verb="scores"), required, shares)


@reader
def read_about(reply: Message, *, numbered: bool = True) -> About | None:
    """Return what a client says of itself; None for one whose app knows nothing of fednorm.

    Args:
        reply: The client's reply.
        numbered: Whether it must know its number; a site may leave that to the server, and says -1.

    Raises:
        UnfitReply: It failed, or says something else than its partition, its domain and whether it is held out.
    """
    content = _content(reply)
    if "client" not in content.config_records:
        return None
    about = content.config_records["client"]
    partition_id, domain, held_out = (about.get(key) for key in ("partition-id", "domain", "held-out"))
    if not isinstance(partition_id, int) or isinstance(partition_id, bool) or partition_id < (0 if numbered else -1):
        raise UnfitReply(f"it describes itself without a partition-id, a number from 0 on; got {partition_id!r}")
    if not isinstance(domain, str) or not domain.strip():
        raise UnfitReply(f"it describes itself without a domain, a name; got {domain!r}")
    if not isinstance(held_out, bool):
        raise UnfitReply(f"it describes itself without held-out, true or false; got {held_out!r}")
    constants = content.metric_records.get("constants")
    count = about.get("train")
    train = count if isinstance(count, int) and not isinstance(count, bool) else None
    return About(partition_id, domain, held_out, None if constants is None else dict(constants), train)


@reader
def read_local(reply: Message, plan: NormPlan, *, examples: int = 0) -> tuple[float, dict[str, Tensor]] | None:
    """Return a client's training images and its local tensors; None for one that keeps none, as it never trained.

    Raises:
        UnfitReply: A tensor is missing, of another shape or type, or not finite.
    """
    content = _content(reply)
    metrics = _sound(_metrics(content, at_least=0, examples=examples or None, verb="trains on"), (), shares=True)
    if "arrays" not in content.array_records:
        return None
    return metrics["num-examples"], dict(_tensors(content.array_records["arrays"], plan.local, plan)[0])


@reader
def read_statistics(reply: Message, plan: NormPlan) -> Mapping[str, Tensor]:
    """Return the running means and variances that a client keeps; none of one that never trained.

    Raises:
        UnfitReply: One is missing, of another shape or type, not finite, or a negative variance.
    """
    records = _content(reply).array_records
    if "arrays" not in records:
        return {}
    kept = [key for pair in plan.moments() for key in pair if plan.by_key[key].role is Role.LOCAL]
    return _tensors(records["arrays"], kept, plan)[0]


@reader
def read_measured(reply: Message, forms: Mapping[str, Form]) -> dict[str, Tensor]:
    """Return what a client measured where a strategy asked for it (``query.measure``).

    Args:
        reply: The client's reply.
        forms: What the strategy declares (``extra_expected``).

    Raises:
        UnfitReply: A tensor is missing, of another shape or type, or not finite.
    """
    return _extra(_content(reply).array_records.get(EXTRA, {}), forms)


# The order of replies -----------------------------------------------------------------------------------------------


def in_order(
    replies: Iterable[Message],
    nodes: Iterable[Node] | Mapping[int, Node],
    awaited: Sequence[int],
    reject: Callable[[int | None, UnfitReply], None],
) -> Iterator[tuple[Node, Message]]:
    """Yield replies by partition id, each as soon as all before it are there; stragglers' gaps close at the end.

    Args:
        replies: Replies as they come.
        nodes: The nodes that the run knows; or these by their ids.
        awaited: Partition ids of those that were asked, in order.
        reject: Is told of replies that no awaited client sent, with the client's partition id or None.
    """
    known = nodes if isinstance(nodes, Mapping) else {node.node_id: node for node in nodes}
    waiting: dict[int, tuple[Node, Message]] = {}
    came: set[int] = set()
    following = iter(awaited)
    next_one = next(following, None)
    for reply in replies:
        try:
            node = _sender(reply, known, came)
        except UnfitReply as unfit:
            reject(_partition(reply, known), unfit)
            continue
        came.add(node.node_id)
        if node.partition_id == next_one and not waiting:
            yield node, reply
            next_one = next(following, None)
            continue
        waiting[node.partition_id] = (node, reply)
        while next_one in waiting:
            yield waiting.pop(next_one)
            next_one = next(following, None)
    for partition_id in sorted(waiting):
        yield waiting[partition_id]


@reader
def _sender(reply: Message, known: Mapping[int, Node], came: Collection[int]) -> Node:
    if not isinstance(reply, Message):
        raise UnfitReply(f"a {type(reply).__name__} came in place of a reply")
    node_id = sender_of(reply)
    if node_id not in known:
        raise UnfitReply(f"a reply came from node {node_id}, which is not one of this run")
    if node_id in came:
        raise UnfitReply("a second reply to the same message; the first one counts")
    return known[node_id]


def _partition(reply: Message, known: Mapping[int, Node]) -> int | None:
    node = known.get(sender_of(reply)) if isinstance(reply, Message) else None
    return node.partition_id if node else None


# What they have in common -------------------------------------------------------------------------------------------


def _content(reply: Message) -> RecordDict:
    if type(reply) is Answered and reply.has_content():
        return reply.content
    if reply.has_error():
        whole = str(reply.error.reason or "")
        reason = one_line(_last_line(whole)) or f"error code {reply.error.code}"
        raise UnfitReply(reason, Cause.BFLOAT16 if "BFloat16" in whole else Cause.FAILED)
    if not reply.has_content():
        raise UnfitReply("the reply is empty", Cause.FAILED)
    return reply.content


def _last_line(reason: str) -> str:
    """Return what an error says: of a traceback, which Ray and Flower put around it, the last line."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    if not any(line.startswith(("File ", "Traceback")) or "occurred. Message:" in line for line in lines):
        return reason
    return lines[-1].removesuffix("'>").rpartition("occurred. Message:")[2]


def _metrics(content: RecordDict, *, at_least: int, examples: int | None, verb: str) -> dict[str, Any]:
    """Return a reply's metrics, its number of examples checked."""
    records = [value for value in content.values() if type(value) is MetricRecord or isinstance(value, MetricRecord)]
    if len(records) != 1:
        raise UnfitReply(f"expected one MetricRecord; got {len(records)}", Cause.METRICS)
    record = dict(records[0].items())
    count = record.get("num-examples")
    if not _is_number(count) or not at_least <= count < math.inf:
        raise UnfitReply(f"expected the metric num-examples of {at_least} or more; got {count!r}", Cause.METRICS)
    if count > MOST_EXAMPLES:
        raise UnfitReply(f"expected the metric num-examples of at most {MOST_EXAMPLES}; got {count!r}", Cause.METRICS)
    if examples is not None and count != examples:
        raise UnfitReply(f"num-examples is {count}, and this client {verb} {examples} images", Cause.METRICS)
    return record


def _sound(record: Mapping[str, Any], required: Collection[str], shares: bool) -> dict[str, float]:
    """Return the numbers among a reply's metrics; those that are averaged or shown must be sound."""
    loss, accuracy = record.get("loss"), record.get("accuracy")
    usual = type(loss) is type(accuracy) is float and math.isfinite(loss) and 0 <= accuracy <= 1
    for name in () if usual else ("loss", "accuracy"):
        if name in required or name in record:
            _require_sound(name, record, shares)
    return {
        key: value
        for key, value in record.items()
        if type(value) is float or (_is_number(value) and _fits_a_float(value))
    }


def _require_sound(name: str, record: Mapping[str, Any], shares: bool) -> None:
    value = record.get(name)
    if not _is_number(value):
        raise UnfitReply(f"expected the metric {name}, a number; got {value!r}", Cause.METRICS)
    if name == "loss" and not math.isfinite(value):
        raise UnfitReply(f"{NOT_A_NUMBER}: it is {value}", Cause.DIVERGED)
    if name == "accuracy" and not (0 <= value <= 1 if shares else math.isfinite(value)):
        raise UnfitReply(f"the accuracy is a share in [0, 1]; got {value}", Cause.METRICS)


def _is_number(value: object) -> TypeGuard[float]:
    return type(value) is float or (isinstance(value, int | float) and not isinstance(value, bool))


def _fits_a_float(value: float) -> bool:
    return not isinstance(value, int) or abs(value) < 2**63


def _tensors(
    arrays: Mapping[str, Array], keys: Sequence[str], plan: NormPlan
) -> tuple[Mapping[str, Tensor], Tensor | None]:
    """Return some of the plan's tensors, each of its form, and sound; and what ``flattened`` makes of them."""
    if isinstance(arrays, RowRecord) and arrays.row.stack.fits(keys, plan)[arrays.row.number]:
        return arrays.row, None
    if isinstance(arrays, FlatRecord) and (own := arrays.whole) and own.layout.fits(keys, plan.forms):
        return own, _sound_values(own, own.flat, plan)
    if list(arrays) != list(keys) and (odd := sorted(set(arrays) ^ set(keys))):
        extra = set(odd) - set(keys)
        what = f"expected the {len(keys)} tensors of the plan; these are missing or extra: {', '.join(odd[:5])}"
        what += ": the whole state dict came" if extra and set(arrays) >= set(plan.by_key) else ""
        raise UnfitReply(what, Cause.KEYS)
    tensors = _held(arrays, keys, plan) or {key: _tensor(key, arrays[key], plan.by_key[key]) for key in keys}
    return tensors, _sound_values(tensors, flattened(tensors), plan)


def _sound_values(tensors: Mapping[str, Tensor], flat: Tensor | None, plan: NormPlan) -> Tensor | None:
    """Return the vector of all values, or refuse those that are not finite, or negative where none can be."""
    if flat is None or not math.isfinite(flat.sum().item()):  # a finite sum proves it of all at once
        for key, tensor in tensors.items():
            if not all_finite([tensor]):
                raise UnfitReply(f"{key} has {NOT_FINITE}", Cause.DIVERGED)
    limited = values_of(tensors, plan.never_negative)
    if limited.numel() and limited.min().item() < 0:
        key = next(key for key in plan.never_negative if key in tensors and tensors[key].min() < 0)
        raise UnfitReply(f"{key} has negative {NOT_NEGATIVE[plan.by_key[key].kind]}")
    return flat


def _held(arrays: Mapping[str, Array], keys: Sequence[str], plan: NormPlan) -> dict[str, Tensor] | None:
    """Return the tensors that arrays of this process hold; None where one must be looked at closer, or decoded."""
    tensors, forms = dict[str, Tensor](), plan.forms
    for (key, array), expected in zip(arrays.items(), keys, strict=True):
        held = array.__dict__.get("tensor") if type(array) is MemoryArray else None
        if key != expected or type(held) is not Tensor or (held.shape, held.dtype) != forms[key]:
            return None
        if held.layout is not torch.strided or not held.is_cpu or held.requires_grad:
            return None
        tensors[key] = held
    return tensors


def _extra(arrays: Mapping[str, Array], forms: Mapping[str, Form]) -> dict[str, Tensor]:
    """Return what a strategy asked for besides, each tensor of the form it declared, and finite."""
    if odd := sorted(set(arrays) ^ set(forms)):
        what = f"expected the {len(forms)} tensors of the strategy in the ArrayRecord {EXTRA!r}"
        raise UnfitReply(f"{what}; these are missing or extra: {', '.join(odd[:5])}", Cause.EXTRA)
    tensors = {key: _tensor(key, arrays[key], form) for key, form in forms.items()}
    for key, tensor in tensors.items():
        if not all_finite([tensor]):
            raise UnfitReply(f"{EXTRA} {key} has {NOT_FINITE}", Cause.DIVERGED)
    return tensors


def _tensor(key: str, array: Array, form: Entry | Form) -> Tensor:
    try:
        return decode(array, form.shape, form.dtype)
    except Undecodable as error:
        raise UnfitReply(f"{key} {error}", Cause.TYPE if "expected" in str(error) else Cause.ARRAYS) from error


def one_line(text: str, most: int = 300) -> str:
    """Return a stranger's text as it may stand in a record and on a terminal: one line, printable, not long."""
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    text = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
    return text if len(text) <= most else f"{text[: most - 3]}..."
