"""torchvision's and timm's classifiers by name: ``torchvision:resnet50``, ``timm:resnet26d``.

The network is the library's own, with any argument of its constructor as ``model.KEY``, converted to the run's norm.
Images have the library's published size unless ``data.image_size`` is another that the network takes. Nothing is ever
downloaded: ``model.weights = "pretrained"`` takes what the libraries' caches on this machine have.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from fednorm.cards import Option, type_hints
from fednorm.errors import ConfigError, UnknownNameError
from fednorm.models import Order
from fednorm.models._foreign import ForeignModel

_OURS = frozenset({"num_classes", "in_chans", "img_size", "image_size", "input_size", "norm_layer", "device", "dtype"})
"""Arguments of constructors that the run decides: the classes, the images, the norm."""

_AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")
"""Heads that torchvision's Inception networks have in training alone, which are left out."""


@dataclass(frozen=True, kw_only=True)
class ZooModel(ForeignModel):
    """The card of a library's network.

    Attributes:
        kind: The network's class, whose constructor's arguments are the options.
        files: Gives the places where the cache may have published weights, and what would put them there.
    """

    kind: type[nn.Module] = field(repr=False)
    files: Callable[[], tuple[list[str], str]] = field(repr=False)

    @property
    def maker(self) -> type[nn.Module]:
        """The network's class."""
        return self.kind

    @cached_property
    def declared(self) -> Mapping[str, Option]:
        """The constructor's arguments. A default of None is the library's own for that very network."""
        hints = type_hints(self.kind)
        named = [
            p for p in signature(self.kind).parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]
        return {p.name: Option(p.name, _plain(hints.get(p.name)), None) for p in named if p.name not in _OURS}

    @cached_property
    def parameters(self) -> Mapping[str, Parameter]:
        """What the run fills in: never the norm, a width or an activation."""
        return {}

    @property
    def stream(self) -> tuple[str, ...]:
        """The names of the stream of initial weights."""
        return "model", self.name

    @property
    def unused_weights(self) -> tuple[str, ...]:
        """The auxiliary heads."""
        return _AUXILIARY if "aux_logits" in self.declared else ()

    def arguments(self, order: Order) -> dict[str, Any]:
        """Return what the library is given."""
        sizes = {"img_size": order.image_size, "image_size": order.image_size, "input_size": (order.image_size,) * 2}
        own = signature(self.kind).parameters
        return {
            "num_classes": order.num_classes,
            **{name: size for name, size in sizes.items() if name in own},
            **({"aux_logits": False} if "aux_logits" in own else {}),
            **{name: _tuples(value) for name, value in order.options.items()},
        }

    def pretrained(self) -> str:
        """Return the published weights' file in the library's cache.

        Raises:
            ConfigError: There are none, or they are not in the cache.
        """
        places, remedy = self.files()
        for place in places:
            if Path(place).is_file():
                return place
        raise ConfigError(
            f"The published weights of model {self.name} are not on this machine, and fednorm downloads nothing. "
            f"{remedy} Then run this again; or give a file as model.weights."
            if places or remedy
            else f"{self.name} has no published weights. Leave model.weights empty, or give a file."
        )


def _plain(annotation: Any) -> Any:
    """Return an annotation of plain types alone, to be checked; Any for all others, which the library checks."""
    kinds = set(get_args(annotation) or [annotation]) - {type(None)}
    return annotation if kinds and kinds <= {int, float, bool, str} else Any


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def _first(text: str | None) -> str:
    """Return a docstring's first paragraph as one line, links in it reduced to their words."""
    line = " ".join((text or "").strip().partition("\n\n")[0].split())
    return re.sub(r"`([^`<]*?) *<[^>]*>`__?", r"\1", line)


def _unknown(library: str, noun: str, name: str, known: list[str], how: str) -> UnknownNameError:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(f'{library}:{other}' for other in near)}?" if near else ""
    return UnknownNameError(f"{library} has no {noun} named {name!r}.{hint} {how} lists its {len(known)} names.")


def _kind(make: Callable[..., nn.Module]) -> type[nn.Module]:
    """Return the class of what a library's function makes; made without memory.

    Some constructors compute with what they make, which no meta tensor allows; but they have begun by then, and the
    outermost of them is the network's.
    """
    with _quiet(), torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return type(make())
        except Exception as error:
            begun = (frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__))
            return next((type(module) for module in begun if isinstance(module, nn.Module)), None) or type(make())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out torchvision's announcements about the initial weights of its Inception networks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The default weight initialization of", category=FutureWarning)
        yield


# torchvision ----------------------------------------------------------------------------------------------------------


def torchvision_names() -> list[str]:
    """Return the names of torchvision's classifiers."""
    from torchvision import models

    return list(models.list_models(module=models))


def torchvision_maker(name: str) -> Callable[..., nn.Module]:
    """Return what makes one of torchvision's networks, of any task, without weights.

    Raises:
        UnknownNameError: It has none of that name.
    """
    from torchvision import models

    known = models.list_models()
    if name not in known:
        raise _unknown("torchvision", "model", name, known, "torchvision.models.list_models()")
    builder = models.get_model_builder(name)
    bare = {"weights": None, "weights_backbone": None, "progress": False}  # a backbone's would be loaded otherwise
    taken = {key: value for key, value in bare.items() if key in signature(builder).parameters}

    def make(**given: Any) -> nn.Module:
        with _quiet():
            model: nn.Module = builder(**taken, **given)
        return model

    return make


def torchvision_card(name: str) -> ZooModel:
    """Return the card of one of torchvision's classifiers.

    Raises:
        UnknownNameError: It has none of that name.
    """
    from torchvision import models

    if name not in (known := torchvision_names()):
        raise _unknown("torchvision", "classifier", name, known, "torchvision.models.list_models(torchvision.models)")
    make, builder = torchvision_maker(name), models.get_model_builder(name)
    published = list(models.get_model_weights(name))

    def files() -> tuple[list[str], str]:
        urls = [
            weights.url for weights in sorted(published, key=lambda w: w is not models.get_model_weights(name).DEFAULT)
        ]
        return _hub_files(urls), _download(urls[:1], f"torchvision.models.get_model({name!r}, weights='DEFAULT')")

    first = next((weights for weights in published if weights.name == "IMAGENET1K_V1"), None)
    kind = _kind(make)
    return ZooModel(
        name=f"torchvision:{name}",
        summary=_first(builder.__doc__) or f"torchvision's {name}.",
        citation=None,
        make=make,
        kind=kind,
        files=files,
        input_size=first.transforms.keywords.get("crop_size", 224) if first else 224,
        origin=kind.__module__,
    )


# timm -----------------------------------------------------------------------------------------------------------------


def timm_maker(name: str) -> Callable[..., nn.Module]:
    """Return what makes one of timm's networks, named with or without the tag of its weights, without these.

    Raises:
        UnknownNameError: It has none of that name or tag.
        ConfigError: timm is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise ConfigError(
            f"model timm:{name} needs timm, which cannot be imported ({error}). Install it: pip install timm."
        ) from error
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise _unknown("timm", "classifier", architecture, timm.list_models(), "timm.list_models()")
    tagged = [other for other in timm.list_pretrained(f"{architecture}.*") if other.startswith(f"{architecture}.")]
    if tag and name not in tagged:
        raise _unknown("timm", "classifier", name, tagged, f"timm.list_pretrained('{architecture}.*')")

    def make(**given: Any) -> nn.Module:
        model: nn.Module = timm.create_model(name, pretrained=False, **given)
        return model

    return make


def timm_card(name: str) -> ZooModel:
    """Return the card of one of timm's classifiers, with or without the tag of its weights (``resnet50.a1_in1k``).

    Raises:
        UnknownNameError: It has none of that name or tag.
        ConfigError: timm is not installed.
    """
    make = timm_maker(name)
    import timm

    published = timm.models.get_pretrained_cfg(name)

    def files() -> tuple[list[str], str]:
        if published is None or not published.has_weights:
            return [], ""
        urls = [published.url] if isinstance(published.url, str) and published.url else []
        return [*_hugging_face_files(published), *_hub_files(urls)], _download(
            [f"https://huggingface.co/{published.hf_hub_id}"] if published.hf_hub_id else urls,
            f"timm.create_model({name!r}, pretrained=True)",
        )

    kind, plain = _kind(make), name.partition(".")[0]
    size = published.input_size[-1] if published is not None and published.input_size else 224
    return ZooModel(
        name=f"timm:{name}",
        summary=_first(timm.model_entrypoint(plain).__doc__) or f"timm's {plain}.",
        make=make,
        kind=kind,
        files=files,
        input_size=size,
        origin=kind.__module__,
    )


MAKERS: Mapping[str, Callable[[str], Callable[..., nn.Module]]] = {"torchvision": torchvision_maker, "timm": timm_maker}
"""What makes a network of a library, by the library's name."""


# Caches ---------------------------------------------------------------------------------------------------------------


def _hub_files(urls: list[str]) -> list[str]:
    """Return where PyTorch's hub keeps what it downloads from some addresses."""
    return [os.path.join(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2]) for url in urls]


def _hugging_face_files(published: Any) -> list[str]:
    """Return the weights that Hugging Face's cache has of a model."""
    if not published.hf_hub_id:
        return []
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return []
    repository, _, revision = published.hf_hub_id.partition("@")
    names = [published.hf_hub_filename] if published.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    cached = [try_to_load_from_cache(repository, name, revision=revision or None) for name in names]
    return [path for path in cached if isinstance(path, str)]


def _download(urls: list[str], call: str) -> str:
    where = f" ({urls[0]})" if urls else ""
    return f'Put them there with a connection: python -c "import torchvision, timm; {call}"{where}.' if urls else ""
