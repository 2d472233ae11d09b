"""The ClientApp: one client's training and evaluation, on any of Flower's runtimes.

Messages:

* ``train``: tensors of the server and the round's settings in; the shared tensors and metrics out. Local tensors go to
  ``Context.state`` and nowhere else.
* ``evaluate``: metrics on the client's share of its domain's test images. ``mode`` says under which local tensors:
  ``own`` (from the client's state), ``given`` (in the message) or ``reestimated`` (statistics estimated on ``images``
  unlabelled test images). With ``adaptation``, a number, the network adapts itself to the images that it is scored on
  (:mod:`fednorm.federation.client_adaptation`).
* ``query.describe``: partition id, domain, numbers of images; prints of the model's constants, where it has any. A
  site says besides what the server must know to fit it in (:mod:`fednorm.federation.deployment`).
* ``query.local``: the client's local tensors, for an evaluation matrix that asks for other clients' statistics. FedBN
  never sends them; this does, once, after training, when the user asks for that evaluation, and between experiences
  where the user has a strategy ask one client for them (``strategies/target.py``).
* ``query.measure``: what the strategy's client side measures (:meth:`Local.measure`) of the network that is sent.
* ``query.refine``: what a client's images make of what a test-time adaptation knows.
* ``query.boundary``: an experience has ended (:mod:`fednorm.federated_continual`); the client's accuracies.
* ``query.undo``: the server has not used the client's training in a round; the client keeps what it had before it.
* ``query.statistics``: the running means and variances among them, after training rounds that are evaluated, for the
  record's diagnostics; ``evaluate.diagnostics = false`` leaves it out. A site answers neither this nor
  ``query.local`` unless its own node's configuration allows it.

What the strategy adds to a client's training, and does before its evaluation, is its :class:`Local`
(:mod:`fednorm.federation.local`); what that remembers is in ``Context.state`` too.

A client that has never trained evaluates with freshly initialised local tensors whose statistics are first estimated
on its own training images; it keeps nothing of that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor
from torch.nn import functional

from fednorm.data.domain import Client, Split
from fednorm.federation import client_adaptation, undo
from fednorm.federation.constants import constant_prints
from fednorm.federation.flower_private import metric_record, record_dict
from fednorm.federation.local import Local, Turn, held
from fednorm.federation.replies import EXTRA
from fednorm.federation.scores import Scores, scores_of
from fednorm.federation.wire import arrays_of, config_of, pack, tensor_of
from fednorm.federation.workbench import LOCAL_RECORD, BenchSource, Workbench, process_workbench
from fednorm.training.recalibration import in_batches, reestimate


def make_client_app(bench_of: BenchSource) -> ClientApp:
    """Return a ClientApp whose processes find their workbench with ``bench_of``."""
    app = ClientApp()

    def handle(message: Message, context: Context) -> Message:
        content = carry_out(bench_of(context), message.metadata.message_type, message.content, context)
        return Message(content, reply_to=message)

    app.train()(handle)
    app.evaluate()(handle)
    for action in QUERIES:
        app.query(action)(handle)
    return app


def carry_out(bench: Workbench, kind: str, content: RecordDict, context: Context) -> RecordDict:
    """Carry out what a client is asked; what it keeps is changed in its context.

    Args:
        bench: This process's workbench.
        kind: The type of the message: ``train``, ``evaluate`` or ``query.NAME``.
        content: What the server sends; it is not written to.
        context: The client's.

    Returns:
        What is sent back.

    Raises:
        ValueError: Clients are not asked such a thing.
    """
    category, _, action = kind.partition(".")
    if kind not in ("train", "evaluate") and (category != "query" or action not in QUERIES):
        raise ValueError(f"A client is asked train, evaluate or query.{', query.'.join(QUERIES)}; got {kind!r}.")
    answer = {"train": _trained, "evaluate": _evaluated}.get(kind) or QUERIES[action]
    try:
        bench.before(kind, content, context)
        reply = answer(bench, content, context)
        bench.after(kind, content, reply, context)
    except Exception as error:
        bench.failed(kind, content, error)
        raise
    return reply


def _trained(bench: Workbench, content: RecordDict, context: Context) -> RecordDict:
    """Train as the message's round has it; keep what is the client's own, and return what is sent."""
    client, config, state = bench.client(context), config_of(content), context.state
    bench.receive(arrays_of(content, "arrays"), state)
    bench.begin_turn(state)
    turn = bench.turn(client, _int(config, "server-round"), content, context)
    metrics = fit(bench, client, server_round=turn.server_round, turn=turn)
    before = undo.kept_now(state)
    bench.keep_local(state, turn.state)
    undo.remember(state, before, turn.server_round)
    reply = record_dict({"arrays": bench.read_sent(), "metrics": metric_record(metrics)})
    if turn.reply:  # only then: a record that nobody asked for makes a reply unfit
        reply[EXTRA] = pack(turn.reply)
    return reply


def _evaluated(bench: Workbench, content: RecordDict, context: Context) -> RecordDict:
    """Evaluate as the message's mode has it, and return the metrics; nothing is kept."""
    client, config = bench.client(context), config_of(content)
    if "mode" not in config:  # a round's, after which its trainings stand
        undo.forget(context.state)
    untouched = _take_network(bench, client, content, context)
    if client_adaptation.ADAPTATION in config:
        return RecordDict({"metrics": MetricRecord(dict(client_adaptation.scores(bench, client, content)))})
    scores = _scores(bench, client, in_a_round="mode" not in config, as_evaluated=untouched and bench.untouched.now)
    if untouched:
        bench.untouched.note()
    return record_dict({"metrics": metric_record(scores)})


def _refined(bench: Workbench, content: RecordDict, context: Context) -> RecordDict:
    """Return what a client's images make of what an adaptation knows; nothing is kept."""
    client = bench.client(context)
    _take_network(bench, client, content, context)
    return RecordDict({EXTRA: pack(client_adaptation.refine(bench, client, content))})


def _take_network(bench: Workbench, client: Client, content: RecordDict, context: Context) -> bool:
    """Write the network that a message's mode asks to evaluate into the workbench's model.

    Returns:
        Whether nothing was done to it when it had been written.
    """
    config = config_of(content)
    complete = bench.receive(arrays_of(content, "arrays"), context.state)
    if config.get("mode") == "reestimated":
        reestimate_on(bench, client.test, _int(config, "images"))
        return False
    if client.held_out:
        return True
    if not complete:
        reestimate_on(bench, client.train, len(client.train))
    side = bench.strategy.local
    if config.get("mode", "own") == "own" and side.before_evaluation is not Local.before_evaluation:
        turn = bench.turn(client, _int(config, "server-round"), content, context, evaluating=True)
        side(bench.strategy).before_evaluation(turn)
        return False
    return complete


def _measured(bench: Workbench, content: RecordDict, context: Context) -> RecordDict:
    """Return what the strategy's client side measures of the network that the server sent; nothing is kept."""
    client, config = bench.client(context), config_of(content)
    if "arrays" in content:  # some measure the client's images alone
        bench.receive(arrays_of(content, "arrays"), context.state)
    turn = bench.turn(client, _int(config, "server-round"), content, context, evaluating=True)
    tensors = held(bench.strategy.local(bench.strategy).measure(turn), "Local.measure sends")
    return RecordDict({EXTRA: pack(tensors), "metrics": MetricRecord({"num-examples": len(client.train)})})


def _described(bench: Workbench, content: RecordDict, context: Context) -> RecordDict:
    """Return what a client says of itself, and prints of its model's constants, where it has any, to be compared."""
    del content
    client = bench.client(context)
    about = ConfigRecord(
        {
            "partition-id": client.partition_id,
            "domain": client.domain,
            "held-out": client.held_out,
            "train": len(client.train),
            "validation": len(client.validation),
            "test": len(client.test),
            **bench.about_node(),
        }
    )
    prints = constant_prints(bench.model, bench.plan)
    constants = {"constants": MetricRecord(dict(prints))} if prints else {}
    return RecordDict({"client": about, **constants})


def _local(bench: Workbench, content: RecordDict, context: Context) -> RecordDict:
    """Return a client's local tensors, where it has any."""
    del content
    reply = RecordDict({"metrics": MetricRecord({"num-examples": len(bench.client(context).train)})})
    if LOCAL_RECORD in context.state:
        reply["arrays"] = context.state[LOCAL_RECORD]
    return reply


def _statistics(bench: Workbench, content: RecordDict, context: Context) -> RecordDict:
    """Return the running means and variances among a client's local tensors, where it has any."""
    del content
    reply = RecordDict({"metrics": MetricRecord({"num-examples": len(bench.client(context).train)})})
    if LOCAL_RECORD in context.state:
        own = arrays_of(context.state, LOCAL_RECORD)
        keys = (key for pair in bench.plan.moments() for key in pair)
        reply["arrays"] = pack({key: tensor_of(own[key]) for key in keys if key in own})
    return reply


def _boundary(bench: Workbench, content: RecordDict, context: Context) -> RecordDict:
    return bench.cross_boundary(content, context)


def _undone(bench: Workbench, content: RecordDict, context: Context) -> RecordDict:
    """Go back to what the client kept before its training in a round."""
    del bench
    undo.go_back(context.state, _int(config_of(content), "server-round"))
    return RecordDict()


QUERIES: Mapping[str, Callable[[Workbench, RecordDict, Context], RecordDict]] = {
    "describe": _described,
    "local": _local,
    "measure": _measured,
    "refine": _refined,
    "boundary": _boundary,
    "undo": _undone,
    "statistics": _statistics,
}
"""How a client answers each query, by its name."""


def fit(bench: Workbench, client: Client, *, server_round: int, turn: Turn | None = None) -> dict[str, float]:
    """Train the workbench's model on a client's images for a round, as the strategy's clients do.

    The optimizer begins anew every round, so that no momentum survives it, unless ``train.reset_optimizer`` is false.
    A batch of one image is left out where the model's layers estimate variances from the batch.

    Args:
        bench: Its model holds the client's tensors, and is changed.
        client: The client.
        server_round: The round; batches are drawn from the stream (seed, client, round).
        turn: What the server and the client's state bring along; nothing if None.

    Returns:
        ``num-examples``, and the mean ``loss`` and ``accuracy`` over the training images as they were seen.
    """
    turn = turn or bench.turn(client, server_round)
    metrics = turn.fit(bench.strategy.local(bench.strategy))
    return {"num-examples": len(turn.client.train), **metrics}


def _batches(split: Split, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    rows = torch.arange(len(split))
    for some in torch.split(rows, size) if len(split) > size else [rows][: len(split)]:
        yield split.inputs(some)


@torch.no_grad()
def score(bench: Workbench, split: Split, *, ready: bool = False) -> Scores:
    """Evaluate the workbench's model on some images.

    Args:
        bench: Its model holds the tensors to evaluate.
        split: The images; may be empty.
        ready: Whether the model is in evaluation mode already.

    Returns:
        ``num-examples``, mean ``loss`` and ``accuracy`` in [0, 1]; zeros where there are no images.
    """
    if not ready:
        bench.trainee.trainable.evaluation_mode()
    loss, hits = 0.0, 0
    for images, labels in _batches(split, bench.config.evaluate.batch_size):
        logits = bench.model(images)
        loss += functional.cross_entropy(logits, labels, reduction="sum").item()
        hits += int((logits.argmax(1) == labels).sum())
    count = len(split)
    return {"num-examples": count, "loss": loss / max(count, 1), "accuracy": hits / max(count, 1)}


def _scores(bench: Workbench, client: Client, *, in_a_round: bool, as_evaluated: bool) -> Scores:
    """Return a client's scores, in a round those on its images held back too where these choose the best round.

    Args:
        bench: Its model holds what is scored.
        client: The client.
        in_a_round: Whether this is a round's evaluation.
        as_evaluated: Whether the model is as the last evaluation left it.
    """
    if not as_evaluated:
        bench.trainee.trainable.evaluation_mode()
    (scores,) = scores_of(
        [client],
        bench.config.evaluate,
        lambda splits: [score(bench, split, ready=True) for split in splits],
        in_a_round=in_a_round,
    )
    return scores


def reestimate_on(bench: Workbench, split: Split, count: int) -> None:
    """Replace the model's running statistics by those of the first ``count`` images of a split (AdaBN).

    Batches have at most ``evaluate.batch_size`` images (3 where it is less) and are as equal as can be. From a single
    image nothing can be estimated: it leaves the initial statistics.
    """
    images, _ = split.inputs(torch.arange(min(count, len(split))))
    size = bench.config.evaluate.batch_size
    reestimate(bench.model, in_batches(images, size) if len(images) > 1 else ())


def _int(config: ConfigRecord, key: str) -> int:
    return int(str(config.get(key, 0)))


app = make_client_app(process_workbench)
"""The ClientApp that Flower's runtimes load."""
