"""Flower mods: what a ClientApp that is not ours needs to take part under one of our strategies.

Most Flower apps send and receive whole state dicts. A strategy that keeps tensors on its clients sends a part of them
and expects a part back; :func:`keep_local` stands between the two, so that the app stays as it is.
"""

from __future__ import annotations

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable, Mod
from torch import Tensor, nn

from fednorm.errors import RoleError
from fednorm.federation.plan import NormPlan
from fednorm.federation.wire import pack, unpack

OWN = "fednorm.keep_local"
"""The record of a node's state that holds what it keeps."""


def keep_local(plan: NormPlan, model: nn.Module) -> Mod:
    """Return a mod that completes every message to a whole state dict, and keeps back what stays on the client.

        app = ClientApp(mods=[keep_local(FedBN(make_model()).plan, make_model())])

    Before the app, the tensors that the server did not send are put beside those that it sent: the client's own, or,
    before it has trained, the model's initial ones. After training, local tensors go from the reply into the node's
    state, which Flower keeps between rounds, and never travel.

    Args:
        plan: The strategy's plan: which tensors travel.
        model: A network as the server has it; its tensors are the initial ones of what is never sent.

    Raises:
        RoleError: When a message is handled: the app's reply to a training message has no record of the model's
            tensors, or one that lacks some.
    """
    travels = frozenset(plan.sent)
    initial = {key: tensor.detach().clone() for key, tensor in model.state_dict().items() if key not in travels}

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        kind = message.metadata.message_type
        name = _record(message.content, travels)
        if name is None:
            return call_next(message, context)
        sent = unpack(message.content.array_records[name])
        whole = pack({**initial, **_own(context), **sent})
        message.content = RecordDict({**message.content, name: whole})  # other nodes' messages may share the old one
        reply = call_next(message, context)
        if kind.partition(".")[0] == "train" and reply.has_content():
            _keep(plan, reply.content, context)
        return reply

    return mod


def describe(message: Message, context: Context) -> Message:
    """Answer which client a node is, by its partition id; our strategies ask for it before the first round.

        app.query("describe")(describe)

    Without it nodes are numbered in the order of their registration, and Flower logs a missing query for each.
    """
    number = int(context.node_config["partition-id"])
    about = ConfigRecord({"partition-id": number, "domain": f"client {number}", "held-out": False})
    return Message(RecordDict({"client": about}), reply_to=message)


def _own(context: Context) -> dict[str, Tensor]:
    return unpack(context.state.array_records[OWN]) if OWN in context.state.array_records else {}


def _record(content: RecordDict, keys: frozenset[str]) -> str | None:
    """Return the name of the record that holds all of the tensors, whatever an app calls it."""
    return next((name for name, record in content.array_records.items() if keys <= record.keys()), None)


def _keep(plan: NormPlan, content: RecordDict, context: Context) -> None:
    """Move what stays on the client from a reply into the node's state; nothing but what travels is left in it."""
    name = _record(content, frozenset((*plan.sent, *plan.local)))
    if name is None:
        has = {key for record in content.array_records.values() for key in record}
        missing = [key for key in (*plan.sent, *plan.local) if key not in has]
        raise RoleError(
            "The ClientApp's reply to a training message has no record with the model's whole state dict: "
            f"{', '.join(missing[:3]) or 'its tensors are in several records'} is missing. Reply with "
            "ArrayRecord(model.state_dict()); fednorm.federation.mods.keep_local takes out what stays."
        )
    record: ArrayRecord = content.array_records[name]
    if plan.local:
        context.state[OWN] = ArrayRecord({key: record[key] for key in plan.local})
    content[name] = ArrayRecord({key: record[key] for key in plan.sent})
