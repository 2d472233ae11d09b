"""A trained model back in plain PyTorch: rebuilt from its record, whole, in evaluation mode; and written to a file.

The network is built again from the record's configuration, by the import path it was given, and takes the run's final
tensors: the server's, and over them a client's own where its strategy keeps some at the clients; of a stream those that
were evaluated last. So it gives the very logits of the run's own last evaluation.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as as_safetensors
from torch import Tensor, nn

from fednorm.config import RunConfig, resolve
from fednorm.errors import ConfigError, RecordError
from fednorm.models import chosen_model
from fednorm.records.folder import Folder
from fednorm.records.results import load
from fednorm.records.states import STATES, States
from fednorm.report.files import write_whole
from fednorm.roles import Kind, Role
from fednorm.spec import Norm

SUFFIXES = (".pt2", ".safetensors", ".pt")
"""What an exported model's file ends in: a program that needs no fednorm, or a state dict in one of two forms."""

Result = Mapping[str, Any]


def load_model(run: str | Path, client: int | None = None) -> nn.Module:
    """Return the final model of a finished run, in evaluation mode, on the CPU.

    Images go in as float32 in [-1, 1] (:func:`~fednorm.data.domain.pixels`: x / 127.5 - 1 for x in 0, ..., 255), shape
    (N, 3, S, S) with the run's image size S; logits come out.

    Args:
        run: The run's folder.
        client: The client whose model it is, by its number in the record; needed where the strategy keeps tensors at
            the clients. None for the server's.

    Returns:
        The network; its class is that of the record's model, its layers are PyTorch's and fednorm's.

    Raises:
        RecordError: There is no finished run, or what the record holds does not fit together.
        ConfigError: There is no such client, or no server's model; a stranger's model or norm cannot be imported.

    Example:
        >>> small = {"data": {"train_per_client": 8, "test_per_domain": 4}, "model": {"width": 4}}
        >>> result = fednorm.federated(strategy="fedbn", rounds=1, config=small, runs=folder)
        >>> network = fednorm.load_model(result["run"], client=3)
        >>> network(torch.zeros(2, 3, 28, 28)).shape
        torch.Size([2, 10])
    """
    result = _result(Path(run))
    tensors, whole = _tensors(result, client)
    config, norm = _configured(result, pristine=whole)
    about = result.get("model", {})
    if "num_classes" not in about:
        raise RecordError(
            f"The record {result['run']} does not say how many classes its model has, as older ones do not. Make the "
            "run again."
        )
    model = chosen_model(config.model, norm, about["num_classes"], about["image_size"], config.seed).model
    model = model.to(memory_format=torch.channels_last)  # as in the run: other layouts sum in another order
    own = model.state_dict()
    misfit = [k for k, t in tensors.items() if k not in own or own[k].shape != t.shape]
    misfit += [k for k in own if whole and k not in tensors]
    if misfit:
        raise RecordError(
            f"The tensors in {result['run']} do not fit model {config.model.name} as it is built now: "
            f"{', '.join(misfit[:5])}. Put its source back as it was when the run was made."
        )
    model.load_state_dict({**own, **tensors})
    return model.eval()


def export(run: str | Path, to: str | Path, client: int | None = None) -> dict[str, Any]:
    """Write the final model of a finished run to a file.

    Args:
        run: The run's folder.
        to: The file: ``.pt2`` for a program of ``torch.export``, for any number of images, that needs neither fednorm
            nor the model's source; ``.safetensors`` or ``.pt`` for the state dict.
        client: As in :func:`load_model`.

    Returns:
        What was written: ``file``, ``client``, ``model``, ``norm``, ``num_classes``, ``image_size``, ``run``.

    Raises:
        ConfigError: The file's name ends in something else, or the network cannot be exported as a program; and as
            :func:`load_model`.
        RecordError: As :func:`load_model`, or the file cannot be written.
    """
    path = Path(to)
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"An exported model's name ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}; got {path}.")
    model = load_model(run, client)
    result = _result(Path(run))
    about = {
        "run": result["hash"],
        "model": result["model"]["name"],
        "norm": result["config"]["norm"]["name"],
        "num_classes": result["model"]["num_classes"],
        "image_size": result["model"]["image_size"],
        "client": client,
    }
    write_whole(path, _content(model, path.suffix.lower(), about))
    return {"file": str(path), **about, "run": result["run"]}


def _content(model: nn.Module, suffix: str, about: Mapping[str, Any]) -> bytes:
    if suffix == ".pt2":
        return _program(model, about)
    state = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in model.state_dict().items()}
    if suffix == ".safetensors":
        content: bytes = as_safetensors(state, {key: str(value) for key, value in about.items()})
        return content
    buffer = BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _program(model: nn.Module, about: Mapping[str, Any]) -> bytes:
    images, buffer = torch.zeros(2, 3, about["image_size"], about["image_size"]), BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's own, about its own future
            program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
            torch.export.save(program, buffer, extra_files={"fednorm.json": json.dumps(about)})
    except Exception as error:  # whatever stands in a stranger's forward pass
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"torch.export cannot make a program of model {about['model']} ({type(error).__name__}: {reason}). Export "
            "its tensors, to .safetensors or .pt, and load them with fednorm.load_model or the model's own source."
        ) from error
    return buffer.getvalue()


def _result(run: Path) -> dict[str, Any]:
    """Return the one result in a run's folder."""
    loaded = load([run], select=True)
    if len(loaded.results) > 1:
        names = ", ".join(Path(result.get("run", "?")).name for result in loaded.results[:4])
        raise RecordError(f"{run} holds {len(loaded.results)} runs. Give the folder of one, e.g. {names}.")
    if "run" not in loaded.results[0]:
        raise RecordError(f"{run} is a summary, which has no tensors. Give the folder of a run.")
    return loaded.results[0]


def _configured(result: Result, *, pristine: bool) -> tuple[RunConfig, Norm]:
    """Return the model's and the norm's configuration, and the norm as it was fitted to the run.

    Args:
        result: The run.
        pristine: Whether the run's weights to start from are of no importance any more.
    """
    then = result["config"]
    model = {key: value for key, value in then["model"].items() if key != "weights" or not pristine}
    config = resolve({"seed": then["seed"], "model": model, "norm": then["norm"]})
    for name, digest in config.sources.items():
        if (before := then.get("sources", {}).get(name, digest)) != digest:
            warnings.warn(
                f"The source of {name} {then[name]['name']!r} is not what it was in the run {result['run']} ({before} "
                f"then, {digest} now): its function may be another.",
                stacklevel=3,
            )
    norm = config.norm.card.made(config.norm.options)
    fields = {f.name for f in dataclasses.fields(norm) if f.init}
    return config, dataclasses.replace(norm, **{k: v for k, v in result["norm"].items() if k in fields})


def _tensors(result: Result, client: int | None) -> tuple[dict[str, Tensor], bool]:
    """Return the tensors of a run's model, and whether they are all of them.

    What is reset begins anew, and what never changed is as it began.
    A client's model is what the server sent, its own tensors, and of the counters that travel its own.
    """
    folder = Path(result["run"])
    if result["kind"] == "continual":
        if client is not None:
            raise ConfigError(
                f"{folder} is a run on a stream, which has one model and no clients. Leave the client out."
            )
        evaluated = folder / "evaluated.safetensors"
        return _read(evaluated if evaluated.exists() else folder / "model.safetensors"), True
    entries = result["plan"]["tensors"]
    local = [entry["key"] for entry in entries if entry["role"] == Role.LOCAL.value]
    counters = {entry["key"] for entry in entries if entry["kind"] == Kind.COUNT.value}
    whole = all(entry["role"] not in (Role.RESET.value, Role.CONSTANT.value) for entry in entries)
    _require_client(result, client, len(local))
    server = _read(folder / "model.safetensors")
    if client is None:
        return server, whole
    if (folder / STATES).exists():
        own, personal = _of_table(folder, result, client)
    else:
        place = folder / "personal.safetensors"
        personal = _of(place, client) if place.exists() else {}
        own = _own(folder, client) if local else {}
    server |= personal
    if not local:
        return server, whole
    if missing := [key for key in local if key not in own]:
        raise ConfigError(
            f"Client {client} of {folder} has no model: it was never trained, so {len(missing)} tensors that "
            f"{result['strategy']['name']} keeps at the clients were never learned. Choose another."
        )
    return {**own, **server, **{key: own[key] for key in counters & own.keys()}}, whole


def _require_client(result: Result, client: int | None, count: int) -> None:
    """Refuse a client that there is not, and the server's model where it is not whole."""
    domains = result["data"]["clients"]  # of a large federation an entry is of many clients of a domain
    ends = [(entry["client"], entry["client"] + entry.get("clients", 1)) for entry in domains]
    spans = [str(first) if end == first + 1 else f"{first} to {end - 1}" for first, end in ends]
    there = [f"{span} ({entry['domain']})" for span, entry in zip(spans, domains, strict=True)]
    known = ", ".join(there[:20]) + (f" and {len(there) - 20} more" if len(there) > 20 else "")
    if client is None and count:
        raise ConfigError(
            f"{result['strategy']['name']} keeps {count} tensors of {result['model']['name']} at its clients, so this "
            f"run has no model without a client. Choose one (--client N, client=N): {known}."
        )
    if client is not None and not any(first <= client < end for first, end in ends):
        raise ConfigError(f"There is no client {client} in {result['run']}. Its clients: {known}.")


def _of_table(folder: Path, result: Result, client: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what a client of a large federation keeps, and the model that it was evaluated with where it has one."""
    table = States(Folder(folder, result["hash"]))
    try:
        kept, personal = table.read(client), table.has("personal/")
    finally:
        table.close()
    own, model = ({k.removeprefix(p): t for k, t in kept.items() if k.startswith(p)} for p in ("client/", "personal/"))
    if personal and not model:
        raise ConfigError(
            f"Client {client} of {folder} has no model: it was not evaluated after the last round, and only those "
            f"that were have one in the record (evaluate.clients is {result['config']['evaluate']['clients']}). "
            "Choose another."
        )
    return own, model


def _of(path: Path, client: int) -> dict[str, Tensor]:
    begin = f"{client}/"
    return {key.removeprefix(begin): tensor for key, tensor in _read(path, begin).items()}


def _own(folder: Path, client: int) -> dict[str, Tensor]:
    path = folder / "clients.safetensors"
    if not path.exists():
        raise ConfigError(
            f"{folder} has no clients' tensors: on Flower's own runtime they stay in its processes. Make the run with "
            "--runtime in-process, whose numbers are the same, in another folder (--runs)."
        )
    return _of(path, client)


def _read(path: Path, begin: str = "") -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys() if key.startswith(begin)}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise RecordError(
            f"{path} cannot be read ({' '.join(str(error).split())}). The record has lost its tensors: remove its "
            "folder, and make the run again."
        ) from error
