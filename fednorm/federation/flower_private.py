"""Everything fednorm uses of Flower that is not public Flower API, and nothing else.

Flower calls public what is reachable through ``__all__`` from its root: ``flwr.app``, ``flwr.clientapp``,
``flwr.serverapp``. Our in-process grid needs three things beyond that. They live here, so that a new Flower
version breaks one file and one test. Read in the wheels of 1.39.0, 1.41.0 and 1.42.0: the same in all three.

``flwr.app.Context`` is *not* here: its class and its constructor's keywords (``run_id``, ``node_id``,
``node_config``, ``state``, ``run_config``) are public; do not pass ``series_id``, which came later.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.supercore.run import Run

__all__ = [
    "Run",
    "array_record",
    "empty_run",
    "ensure_task_identity",
    "fill",
    "metric_record",
    "quiet_flower_log",
    "record_dict",
]

R = TypeVar("R", ArrayRecord, MetricRecord, RecordDict)

_IDENTITY = ("task_id", "run_id", "node_id")
_set_by_us: tuple[int | None, ...] | None = None


def ensure_task_identity(run_id: int, node_id: int, task_id: int) -> None:
    """Let this process build a ``flwr.app.Message``, as a ServerApp's process can.

    From 1.38 or 1.39 on, ``Message(content, dst_node_id, message_type)`` takes its sender from
    ``flwr.supercore.task_identity.TaskIdentity``, which Flower sets in the processes that it starts itself;
    elsewhere it raises ``RuntimeError: TaskIdentity.run_id is not set``. Every built-in
    ``Strategy.configure_train`` builds such messages. (A reply, ``Message(content, reply_to=message)``, needs
    none of this.) Older versions have no such class: there this does nothing.

    An identity that Flower has set is left as it is; one that an earlier call has set is replaced, so that
    several runs can follow each other in one process. The identity belongs to the process, not to a thread.

    Args:
        run_id: What ``Message.metadata.run_id`` shall say.
        node_id: What ``Message.metadata.src_node_id`` shall say; Flower's server is node 1.
        task_id: What ``Message.metadata.src_task_id`` shall say.
    """
    global _set_by_us  # as process-wide as the identity itself
    try:
        from flwr.supercore.task_identity import TaskIdentity
    except ImportError:
        return
    current = _identity(TaskIdentity)
    if current is not None and current != _set_by_us:
        return
    TaskIdentity.task_id = task_id
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = node_id
    _set_by_us = (task_id, run_id, node_id)


def _identity(task_identity: Any) -> tuple[int | None, ...] | None:
    """Return the identity's three numbers, ``None`` when not one of them is set."""
    values: list[int | None] = []
    for name in _IDENTITY:
        try:
            values.append(getattr(task_identity, name))
        except RuntimeError:
            values.append(None)
    return None if all(value is None for value in values) else tuple(values)


def empty_run(run_id: int) -> Run:
    """Return the object that ``Grid.run`` must be for a run that no SuperLink knows.

    ``Grid`` is public, but the type of its ``run`` property, ``flwr.supercore.run.Run``, is not, and its
    fields grow from version to version: hence its own factory, and no field is set here.

    Args:
        run_id: The run's number.
    """
    return Run.create_empty(run_id=run_id)


def array_record(arrays: dict[str, Array]) -> ArrayRecord:
    """Return a record of arrays that are known to be some, under names that are.

    Args:
        arrays: By name; the dictionary becomes the record's.
    """
    return _filled(ArrayRecord, arrays)


def metric_record(metrics: dict[str, float]) -> MetricRecord:
    """Return a record of plain numbers, under names that are; the dictionary becomes the record's."""
    return _filled(MetricRecord, metrics)


def record_dict(records: dict[str, Any]) -> RecordDict:
    """Return a dictionary of records that are known to be some; the dictionary becomes its own."""
    return _filled(RecordDict, records)


@cache
def _empty(kind: type[R]) -> dict[str, Any] | None:
    """Return the attributes of an empty record; None where its entries are not in a dictionary called ``_data``."""
    attributes = dict(kind().__dict__)
    return attributes if attributes.pop("_data", None) == {} and all(map(callable, attributes.values())) else None


def _filled(kind: type[R], entries: dict[str, Any]) -> R:
    """Return a new record of entries that need not be looked at.

    Entry by entry, a record looks at each key and each value: for a small network that is as long as a step of its
    training. Where a record does not keep its entries in a dictionary called ``_data``, it is filled that way.
    """
    if _empty(kind) is not None:
        made = kind.__new__(kind)
        fill(made, kind, entries)
        return made
    record = kind()
    for key, value in entries.items():
        record[key] = value
    return record


def fill(record: R, kind: type[R], entries: Mapping[str, Any]) -> None:
    """Make a record that has not been initialised one of a kind, whose entries are a mapping of ours.

    Args:
        record: Of the kind, or of a class below it.
        kind: Flower's own.
        entries: Its entries; they are not looked at.
    """
    attributes = _empty(kind)
    if attributes is None:
        kind.__init__(record)
        attributes = {}
    record.__dict__.update(attributes, _data=entries)


@contextmanager
def quiet_flower_log(level: int = logging.WARNING) -> Iterator[None]:
    """Hold back what Flower logs below ``level`` for a block, then restore its logger.

    Flower's strategies log each round at INFO through a handler of their own on the logger ``flwr``
    (a name it does not document), whatever the application's logging configuration says.

    Args:
        level: The lowest level that still gets through.
    """
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
