"""Whether a file of a record is what was written, and of which run: every one carries a digest, a format and a hash.

    run.json, result.json, study.json   "format", "digest" of all else in it; "hash", of the run
    rounds.jsonl, experiences.jsonl     in each line "line", its number from 1; "hash"; "digest", of the line before it
                                        and itself: a line that is edited, lost, doubled or moved breaks the chain
    *.safetensors                       in the metadata "record_format", "hash", "shapes"; "digest", of the metadata and
                                        of each tensor's name, type, shape and bytes

Digests are of what a file says, not of how: BLAKE2b of JSON with its keys sorted, and of tensors in the order of their
names. They tell damage and mix-ups; they are no signatures, and whoever wants to forge a record can.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

import fednorm.records.files as files
from fednorm.records.formats import FORMAT, Unfit, migrated, shortened

if TYPE_CHECKING:  # results are read back without PyTorch, whose import takes longer than their reading
    from torch import Tensor

Document = dict[str, Any]

DIGEST_BYTES = 16
UNREADABLE = (OSError, ValueError, RecursionError, SafetensorError, Unfit)
"""What reading a damaged file ends in."""


def reason(error: BaseException) -> str:
    """Return why a file could not be read, as part of a sentence."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split()).rstrip(".")


# Tables of keys -------------------------------------------------------------------------------------------------------


def sealed(document: Mapping[str, Any]) -> Document:
    """Return a document with its format and the digest of all of it, as JSON will have it."""
    plain = {key: value for key, value in document.items() if key != "digest"}
    whole: Document = json.loads(json.dumps({"format": FORMAT, **plain}))
    return {**whole, "digest": digest_of(whole)}


def unsealed(document: Any) -> Document:
    """Return what :func:`sealed` was given, and its format.

    Raises:
        Unfit: It is of another format, or not what was written.
    """
    if not isinstance(document, dict):
        raise Unfit(f"it holds no table of keys but {shortened(document)}.")
    _require_format(document.get("format"))
    content = {key: value for key, value in document.items() if key != "digest"}
    if document.get("digest") != digest_of(content):
        raise Unfit("its content is not what was written: the digest in it is of something else.")
    return content


def read_document(path: Path, run: str | None = None) -> Document:
    """Return the content of a sealed JSON file.

    Args:
        path: The file.
        run: The hash of the run that it must be of; None for any.

    Raises:
        Unfit: It is missing or damaged, or of another format or run.
    """
    try:
        content = unsealed(json.loads(files.read(path).decode("utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise Unfit(f"it cannot be read ({reason(error)})") from error
    if run is not None:
        require_run(content.get("hash"), run)
    return content


def read_result(path: Path, run: str | None = None) -> tuple[Document, dict[str, str]]:
    """Return the result in a ``result.json``, checked, and the digests of the files that belong to it.

    Args:
        path: The file.
        run: The hash of the run that it must be of; None for any.

    Raises:
        Unfit: It is missing or damaged, or of another format or run.
    """
    content = read_document(path, run)
    parts = content.pop("files", {})
    del content["format"]
    if not isinstance(parts, dict) or not all(isinstance(value, str) for value in parts.values()):
        raise Unfit(f"its 'files' should be a table of digests; it is {shortened(parts)}.")
    return migrated(content), parts


def require_run(found: Any, run: str) -> None:
    """Refuse a file of another run.

    Raises:
        Unfit: Its hash is another.
    """
    if found != run:
        raise Unfit(
            f"it is of another run: the configuration that it was written for has the hash {shortened(found)}, and "
            f"this one has {run!r}"
        )


def _require_format(found: Any) -> None:
    """Refuse what this fednorm does not write: records are read by the version that made them."""
    if isinstance(found, int) and not isinstance(found, bool) and found == FORMAT:
        return
    if found is None:
        what, why = "it tells no format", "An older fednorm wrote it"
    elif isinstance(found, bool) or not isinstance(found, int) or found < 1:
        what, why = f"it is of format {shortened(found)}, which no fednorm has written", "It is damaged"
    elif found < FORMAT:
        what, why = f"it is of format {found}", "An older fednorm wrote it"
    else:
        what, why = f"it is of format {found}", "A newer fednorm wrote it, which would read it"
    raise Unfit(f"{what}, and this fednorm reads format {FORMAT}. {why}.")


def digest_of(document: Mapping[str, Any], before: str = "") -> str:
    """Return the digest of a document, and of what came before it."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(f"{before}{text}".encode(), digest_size=DIGEST_BYTES).hexdigest()


# Lines ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chain:
    """The lines of a journal, as far as each follows from the one before.

    Attributes:
        lines: What they tell.
        digests: Theirs, the last of which stands for all.
        ends: How many bytes of the file they take up to each, its line break included.
        broken: Why the line after them is not among them; empty where there is none.
        foreign: Whether that is because it is another run's.
    """

    lines: list[Document] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    broken: str = ""
    foreign: bool = False

    def digest(self, count: int) -> str:
        """Return the digest of the first lines, empty for none of them."""
        return self.digests[count - 1] if count else ""


def chained(line: Mapping[str, Any], number: int, run: str, before: str) -> Document:
    """Return a line with its number from 1, its run's hash, and the digest of all lines up to it.

    Args:
        line: What it tells.
        number: Its number from 1.
        run: The hash of its run.
        before: The digest of the line before it, empty for the first.
    """
    whole: Document = json.loads(json.dumps({**line, "line": number, "hash": run}))
    return {**whole, "digest": digest_of(whole, before)}


def read_chain(content: bytes, run: str) -> Chain:
    """Return the lines of a journal up to the first that is not what was written there."""
    chain, start = Chain(), 0
    for number, text in enumerate(content.split(b"\n"), 1):
        if not text and start == len(content):
            break
        start += len(text) + 1
        try:
            line = json.loads(text.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            return _ended(chain, f"line {number} cannot be read ({reason(error)})")
        if not isinstance(line, dict):
            return _ended(chain, f"line {number} holds no table of keys but {shortened(line)}")
        digest, own, place = line.pop("digest", None), line.get("hash"), line.get("line")
        if place != number or isinstance(place, bool) or digest != digest_of(line, chain.digest(number - 1)):
            return _ended(chain, f"line {number} is not what was written after the line before it")
        if own != run:
            why = f"line {number} is of another run, {shortened(own)}, and this one is {run!r}"
            return _ended(chain, why, foreign=True)
        chain.lines.append({key: value for key, value in line.items() if key not in ("line", "hash")})
        chain.digests.append(str(digest))
        chain.ends.append(start)  # past the end of the file, if the line has lost its own
    return chain


def _ended(chain: Chain, why: str, *, foreign: bool = False) -> Chain:
    return Chain(chain.lines, chain.digests, chain.ends, why, foreign)


# Tensors --------------------------------------------------------------------------------------------------------------


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous tensors of which no two share memory: a network may have one parameter in two places."""
    places: set[int] = set()
    separate: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        whole = tensor.contiguous()
        separate[key] = whole.clone() if whole.untyped_storage().data_ptr() in places else whole
        places.add(whole.untyped_storage().data_ptr())
    return separate


def tensors_metadata(tensors: Mapping[str, Tensor], run: str, about: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the metadata of a safetensors file of a record.

    Args:
        tensors: What the file will hold.
        run: The hash of its run.
        about: What else the metadata tell.
    """
    shapes = json.dumps({key: list(tensor.shape) for key, tensor in tensors.items()})
    metadata = {**(about or {}), "record_format": str(FORMAT), "hash": run, "shapes": shapes}
    return {**metadata, "digest": _digest_of_tensors(tensors, metadata)}


def read_tensors(path: Path, run: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file of a record.

    Raises:
        Unfit: It is of another format or run.
        KeyError: A tensor is lost.
        ValueError: It is not what was written.
        OSError: It is missing, or cannot be read.
        SafetensorError: It is no safetensors file.
    """
    if not files.is_there(path):
        raise FileNotFoundError(0, "it is missing", str(path))
    with safe_open(path, framework="pt") as file:
        metadata: dict[str, str] = dict(file.metadata() or {})
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dictionary
    written = metadata.get("record_format")
    _require_format(int(written) if written is not None and written.isdecimal() else written)
    for key, shape in json.loads(metadata["shapes"]).items():
        if tuple(tensors[key].shape) != tuple(shape):
            raise ValueError(f"{key} was written in shape {tuple(shape)} and has {tuple(tensors[key].shape)}")
    digest = metadata.pop("digest", None)
    if digest != _digest_of_tensors(tensors, metadata):
        raise ValueError("its content is not what was written: the digest in it is of something else")
    require_run(metadata["hash"], run)
    return tensors, {**metadata, "digest": str(digest)}


def _digest_of_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    import torch

    digest = hashlib.blake2b(digest_of(metadata).encode(), digest_size=DIGEST_BYTES)
    for key in sorted(tensors):
        tensor = tensors[key].detach()
        digest.update(json.dumps([key, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
