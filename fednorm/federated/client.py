"""The ClientApp: one client's training and evaluation, on any of Flower's runtimes.

Messages:

* ``train``: tensors of the server and the round's settings in; the shared tensors and metrics out. Local tensors go to
  ``Context.state`` and nowhere else.
* ``evaluate``: metrics on the client's share of its domain's test images. ``mode`` says under which local tensors:
  ``own`` (from the client's state), ``given`` (in the message) or ``reestimated`` (statistics estimated on ``images``
  unlabelled test images).
* ``query.describe``: partition id, domain, numbers of images; prints of the model's constants, where it has any.
* ``query.local``: the client's local tensors, for an evaluation matrix that asks for other clients' statistics. FedBN
  never sends them; this does, once, after training, when the user asks for that evaluation.
* ``query.statistics``: the running means and variances among them, after training rounds that are evaluated, for the
  record's diagnostics; ``evaluate.diagnostics = false`` leaves it out.

A client that has never trained evaluates with freshly initialised local tensors whose statistics are first estimated
on its own training images; it keeps nothing of that.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor
from torch.nn import functional

from fednorm.config import TrainConfig
from fednorm.constants import constant_prints
from fednorm.data.domain import Client, Split
from fednorm.federated.wire import pack
from fednorm.federated.workbench import LOCAL_RECORD, BenchSource, Workbench, process_workbench
from fednorm.recalibration import in_batches, reestimate
from fednorm.rng import torch_seeded, torch_stream
from fednorm.training.step import ProximalTerm, TrainingStep


def make_client_app(bench_of: BenchSource) -> ClientApp:
    """Return a ClientApp whose processes find their workbench with ``bench_of``."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        bench = bench_of(context)
        client = bench.client(context)
        config = message.content.config_records["config"]
        bench.receive(message.content.array_records["arrays"], context.state)
        bench.begin_turn(context.state)
        metrics = fit(bench, client, server_round=_int(config, "server-round"), mu=_float(config, "proximal-mu"))
        bench.keep_local(context.state)
        reply = RecordDict({"arrays": pack(bench.read(bench.plan.sent)), "metrics": MetricRecord(dict(metrics))})
        return Message(reply, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        bench = bench_of(context)
        client = bench.client(context)
        config = message.content.config_records["config"]
        complete = bench.receive(message.content.array_records["arrays"], context.state)
        if config.get("mode") == "reestimated":
            reestimate_on(bench, client.test, _int(config, "images"))
        elif not complete and bench.statistics and not client.held_out:
            reestimate_on(bench, client.train, len(client.train))
        scores = _scores(bench, client, in_a_round="mode" not in config)
        return Message(RecordDict({"metrics": MetricRecord(dict(scores))}), reply_to=message)

    @app.query("describe")
    def describe(message: Message, context: Context) -> Message:
        bench = bench_of(context)
        about = {"client": _about(bench.client(context)), **_constants(bench)}
        return Message(RecordDict(about), reply_to=message)

    @app.query("local")
    def local(message: Message, context: Context) -> Message:
        bench = bench_of(context)
        reply = RecordDict({"metrics": MetricRecord({"num-examples": len(bench.client(context).train)})})
        if LOCAL_RECORD in context.state.array_records:
            reply["arrays"] = context.state.array_records[LOCAL_RECORD]
        return Message(reply, reply_to=message)

    @app.query("statistics")
    def statistics(message: Message, context: Context) -> Message:
        bench = bench_of(context)
        reply = RecordDict({"metrics": MetricRecord({"num-examples": len(bench.client(context).train)})})
        if LOCAL_RECORD in context.state.array_records:
            own = context.state.array_records[LOCAL_RECORD]
            keys = (key for pair in bench.plan.moments() for key in pair)
            reply["arrays"] = ArrayRecord({key: own[key] for key in keys if key in own})
        return Message(reply, reply_to=message)

    return app


def _about(client: Client) -> ConfigRecord:
    """Return what a client says of itself."""
    return ConfigRecord(
        {
            "partition-id": client.partition_id,
            "domain": client.domain,
            "held-out": client.held_out,
            "train": len(client.train),
            "validation": len(client.validation),
            "test": len(client.test),
        }
    )


def _constants(bench: Workbench) -> dict[str, MetricRecord]:
    """Return the prints of a model's constants, for the server to compare; no record where there are none."""
    prints = constant_prints(bench.model, bench.plan)
    return {"constants": MetricRecord(dict(prints))} if prints else {}


def fit(bench: Workbench, client: Client, *, server_round: int, mu: float = 0.0, steps: int = 0) -> dict[str, float]:
    """Train the workbench's model on a client's images for a round.

    The optimizer begins anew every round, so that no momentum survives it, unless ``train.reset_optimizer`` is false.
    A batch of one image is left out where the model's layers estimate variances from the batch.

    Args:
        bench: Its model holds the client's tensors, and is changed.
        client: The client.
        server_round: The round; batches are drawn from the stream (seed, client, round).
        mu: FedProx's factor; 0 for none.
        steps: How many; 0 for those of the configuration (:func:`steps_of_round`).

    Returns:
        ``num-examples``, and the mean ``loss`` and ``accuracy`` over the training images as they were seen.
    """
    trainee, seed = bench.trainee, bench.config.seed
    trainee.set_rate(bench.schedule.at(server_round - 1, 0, 1))
    adjust = [ProximalTerm(bench.shared_parameters, mu)] if mu else []
    step = TrainingStep(
        trainee.model,
        trainee.optimizer,
        adjust=[*adjust, *trainee.adjust],
        after=trainee.after,
        loss=trainee.loss,
    )
    names = ("client", client.partition_id, "round", server_round)
    augmenting = torch_stream(seed, *names, "augment")
    losses, hits, seen = [], [], 0
    trainee.model.train()
    with torch_seeded(seed, *names, "model"):
        for rows in _rows(bench, client, torch_stream(seed, *names, "batches"), steps):
            images, labels = client.train.batch(rows)
            loss, logits = step(client.train.scaling(trainee.augmentation(images, augmenting)), labels)
            losses.append(loss * len(rows))
            hits.append((logits.argmax(1) == labels).sum())
            seen += len(rows)
    trainee.optimizer.zero_grad(set_to_none=True)
    return {
        "num-examples": len(client.train),
        "loss": torch.stack(losses).sum().item() / seen,
        "accuracy": torch.stack(hits).sum().item() / seen,
    }


def steps_of_round(train: TrainConfig, count: int) -> int:
    """Return the steps of a client with ``count`` images: ``local_steps``, or those of ``local_epochs`` passes.

    A part of a pass is made of whole batches, one at least.
    """
    batches = -(-count // train.batch_size)
    return train.local_steps or max(1, round(train.local_epochs * batches))


def _rows(bench: Workbench, client: Client, generator: torch.Generator, steps: int) -> Iterator[Tensor]:
    """Yield the rows of a round's batches, pass after pass over the images, each in an order of its own."""
    train, count = bench.config.train, len(client.train)
    wanted = steps or steps_of_round(train, count)
    while wanted > 0:
        rows_of_pass = torch.split(torch.randperm(count, generator=generator), train.batch_size)
        for rows in rows_of_pass[:wanted]:
            if len(rows) > 1 or not bench.trainee.batch_coupled:
                yield rows
        wanted -= len(rows_of_pass)


def _batches(split: Split, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for rows in torch.split(torch.arange(len(split)), size) if len(split) else ():
        yield split.inputs(rows)


@torch.no_grad()
def score(bench: Workbench, split: Split) -> dict[str, float]:
    """Evaluate the workbench's model on some images.

    Args:
        bench: Its model holds the tensors to evaluate.
        split: The images; may be empty.

    Returns:
        ``num-examples``, mean ``loss`` and ``accuracy`` in [0, 1]; zeros where there are no images.
    """
    bench.model.eval()
    loss, hits = torch.zeros((), dtype=torch.float64), 0
    for images, labels in _batches(split, bench.config.evaluate.batch_size):
        logits = bench.model(images)
        loss += functional.cross_entropy(logits, labels, reduction="sum").double()
        hits += int((logits.argmax(1) == labels).sum())
    count = len(split)
    return {"num-examples": count, "loss": loss.item() / max(count, 1), "accuracy": hits / max(count, 1)}


def _scores(bench: Workbench, client: Client, *, in_a_round: bool) -> dict[str, float]:
    """Return a client's scores, in a round those on its images held back too where these choose the best round."""
    evaluate = bench.config.evaluate
    scores = score(bench, client.validation if evaluate.split == "validation" else client.test)
    if evaluate.best_round and in_a_round:
        scores |= {f"validation-{key}": value for key, value in score(bench, client.validation).items()}
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


def _float(config: ConfigRecord, key: str) -> float:
    return float(str(config.get(key, 0.0)))


app = make_client_app(process_workbench)
"""The ClientApp that Flower's runtimes load."""
