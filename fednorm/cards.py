"""The one table of names: a name, an entry point, an import path or an object becomes a card.

A **card** is what a file declares of its method: its name, what it does in a sentence, who published it, how it is made
and where it differs; ``SPEC`` in that file. Eight families of cards::

    family       built in                     entry points             an import path names
    norms        fednorm/norms/NAME.py        fednorm.norms            a NormSpec, a Norm's class
    models       fednorm/models/NAME.py       fednorm.models           a ModelSpec, a callable that returns a network
    strategies   strategies/NAME.py           fednorm.strategies       a StrategySpec, a NormStrategy's class
    scenarios    scenarios/NAME.py            fednorm.scenarios        a ScenarioSpec, a callable that returns a stream
    learners     scenarios/learners/NAME.py   fednorm.learners         a LearnerSpec, a Learner's class
    data         fednorm/data/sets/NAME.py    fednorm.data             a Benchmark, a callable that returns domains
    optimizers   fednorm/optimizers/NAME.py   fednorm.optimizers       an OptimizerSpec, a callable that returns one
    adaptations  fednorm/adaptation/NAME.py   fednorm.adaptations      an AdaptationSpec, an Adaptation's class

Adding a method is adding its file: no list of names is kept by hand. A method's **options** are the keyword-only
parameters of what its card makes, with their annotations and defaults; there is no other place to declare them.

A stranger's method is given as ``package.module:attribute``, or as ``package.module`` whose ``SPEC`` it is. A family
may know libraries of its methods: ``timm:resnet26d`` is no import path but timm's model of that name.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import pkgutil
import secrets
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

from fednorm.errors import ConfigError, UnknownNameError, canonical, unknown_name
from fednorm.importing import import_object
from fednorm.literals import literal

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from fednorm.adaptation import AdaptationSpec
    from fednorm.data.benchmarks import Benchmark
    from fednorm.federation.spec import StrategySpec
    from fednorm.models import ModelSpec
    from fednorm.optimizers import OptimizerSpec
    from fednorm.spec import NormSpec
    from fednorm.streams.learner import LearnerSpec
    from fednorm.streams.spec import ScenarioSpec

Scalar = bool | int | float | str


@dataclass(frozen=True)
class Citation:
    """Where a method was published."""

    title: str
    authors: str
    year: int
    arxiv: str = ""
    where: str = ""


@dataclass(frozen=True)
class Option:
    """One option of a method.

    Attributes:
        name: Its key beside the method's name in the configuration.
        type: The annotation of its parameter.
        default: Its value where nobody sets it.
    """

    name: str
    type: Any
    default: Any


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a method's file declares, whatever the family.

    Attributes:
        name: The method's name, equal to its file's stem.
        summary: One sentence.
        citation: Where it was published; None where it was not.
        deviations: Where we differ from the paper or its official code.
        verified: How it was verified, and against what: a golden trace, a formula written out, another implementation.
        reconstruction: What of the formula could not be read in the paper or its code, and is our best guess; empty
            where nothing is. Shown wherever the method's results are, as "reconstruction, unverified".
        origin: The module that declares it, e.g. ``fednorm.norms.batch_norm``; set by the table.
    """

    name: str
    summary: str
    citation: Citation | None = None
    deviations: tuple[str, ...] = ()
    verified: tuple[str, ...] = ()
    reconstruction: str = ""
    origin: str = field(default="", compare=False)

    expects: ClassVar[str] = ""
    """What an import path may name, as a sentence of an error."""

    @classmethod
    def adopt(cls, method: Any, reference: str) -> Self | None:
        """Return a card for what a stranger gave in place of one, or None where it is nothing of the family's.

        Args:
            method: What was given: a class, a callable, an object.
            reference: Its name or import path, which becomes the card's name.
        """
        del method, reference
        return None

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse options that the method itself would refuse, where that can be told without a model or data.

        Raises:
            ConfigError: An option is out of range.
        """
        del options

    @property
    def maker(self) -> Callable[..., Any] | None:
        """What is called with the options; None for a method without any."""
        return None

    @property
    def beyond(self) -> frozenset[str]:
        """The names of the maker's keyword-only parameters that are no options: the run gives those."""
        return frozenset()

    @cached_property
    def declared(self) -> Mapping[str, Option]:
        """The method's options, by name, in the order of their declaration."""
        return {} if self.maker is None else options_of(self.maker, self.beyond)

    @property
    def options(self) -> dict[str, Any]:
        """The method's options with their defaults."""
        return {name: option.default for name, option in self.declared.items()}


def options_of(maker: Callable[..., Any], beyond: frozenset[str]) -> dict[str, Option]:
    """Return the keyword-only parameters of a maker that have a default, but for those that the run gives."""
    hints = type_hints(maker)
    parameters = inspect.signature(maker).parameters.values()
    return {
        p.name: Option(p.name, hints.get(p.name, Any), p.default)
        for p in parameters
        if p.kind is p.KEYWORD_ONLY and p.name not in beyond and p.default is not p.empty
    }


def type_hints(maker: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations of what is called; none where they name what only a type checker can see."""
    try:
        return typing.get_type_hints(maker.__init__ if inspect.isclass(maker) else maker)
    except Exception:  # a stranger's annotations may raise anything
        return {}


C = TypeVar("C", bound=Card)


@dataclass(frozen=True)
class Family(Generic[C]):
    """One kind of thing that has a name.

    Attributes:
        noun: What one is called in an error, e.g. ``strategy``.
        plural: The family's name, and that of its entry points behind ``fednorm.``.
        package: The package whose modules are the built-in methods.
        card: Import path of the card's class.
        libraries: For each library whose methods are known by name, the import path of what makes a card from such a
            name; a reference is the library's name, a colon and the method's.
    """

    noun: str
    plural: str
    package: str
    card: str
    libraries: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def built_in(self) -> tuple[str, ...]:
        """The names of the methods that ship: the package's modules, those with an underscore first left out."""
        found = pkgutil.iter_modules(_folders(self.package))
        return tuple(sorted(m.name for m in found if not m.name.startswith("_") and not m.ispkg))

    @cached_property
    def installed(self) -> Mapping[str, EntryPoint]:
        """The entry points of other packages, by name; a built-in name cannot be taken."""
        from importlib.metadata import entry_points  # its import takes longer than this file's own

        points = entry_points(group=f"fednorm.{self.plural}")
        return {canonical(p.name): p for p in points if canonical(p.name) not in self.built_in}

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that needs no import path, sorted."""
        return tuple(sorted({*self.built_in, *self.installed}))

    def require(self, reference: str) -> None:
        """Refuse a name that nothing has, before anything is imported; what is imported by it may still be refused.

        Raises:
            UnknownNameError: Nothing has that name.
        """
        reference = spelled(reference)
        if not is_path(reference) and reference not in self.built_in and reference not in self.installed:
            raise self.unknown(reference)

    def stated(self, reference: str, field_name: str, default: Any) -> Any:
        """Return a field of a card, of a built-in one without importing its file where the file states it as a literal.

        Tables of results need a word of a card now and then, and importing PyTorch for it takes longer than the table.

        Args:
            reference: The name or import path.
            field_name: Which field.
            default: What the field is where a file does not state it.

        Raises:
            UnknownNameError: Nothing has that name.
            ConfigError: The import path cannot be imported, or names something else.
        """
        name = spelled(reference)
        if name in self.built_in and name not in _CARDS.get(self.plural, {}):
            for folder in _folders(self.package):
                with contextlib.suppress(OSError, SyntaxError, ValueError):
                    source = Path(folder, f"{name}.py").read_text(encoding="utf-8")
                    return literal(source, self.card.rpartition(":")[2], field_name, default)
        return getattr(self[reference], field_name)

    def is_foreign(self, reference: str) -> bool:
        """Return whether a reference is of a stranger's method, which fednorm's version does not identify."""
        return spelled(reference) not in self.built_in

    def __iter__(self) -> Iterator[C]:
        """Yield the card of every name."""
        return (self[name] for name in self.names)

    def __getitem__(self, reference: str) -> C:
        """Return the card that a name or an import path stands for.

        Raises:
            UnknownNameError: Nothing has that name.
            ConfigError: The import path cannot be imported, or names something else.
        """
        reference = spelled(reference)
        if reference not in _CARDS.setdefault(self.plural, {}):
            _CARDS[self.plural][reference] = self._find(reference)
        return typing.cast(C, _CARDS[self.plural][reference])

    @property
    def met(self) -> tuple[C, ...]:
        """The cards of strangers' methods that this process has been given so far, in that order."""
        cards, ours = _CARDS.get(self.plural, {}), frozenset(self.built_in)  # every layer of a network asks
        return tuple(typing.cast(C, card) for reference, card in cards.items() if reference not in ours)

    def add(self, method: Any) -> str:
        """Return the reference by which an object is found again: a name, an import path, or a name in this process.

        Args:
            method: A name or import path; a card; or what an import path may name.

        Raises:
            ConfigError: It is none of these.
        """
        if isinstance(method, str):
            return method
        reference = _import_path(method)
        card = self._adopted(method, reference)
        if in_process(card.name) and card.name != reference:  # a card may tell what has no import path by its content
            reference = card.name
        elif in_process(reference) and (others := _serial(method, reference)):
            reference = f"{reference}#{others + 1}"
            card = self._adopted(method, reference)
        _CARDS.setdefault(self.plural, {})[reference] = card
        return reference

    def _find(self, reference: str) -> C:
        library, colon, name = reference.partition(":")
        if colon and library in self.libraries:
            return self._adopted(import_object(self.libraries[library], self.noun)(name), reference)
        if in_process(reference):
            raise ConfigError(
                f"{reference} is a Python object that was given as {self.noun} in another process, and is not here. "
                "Give it again from Python, or by an import path: package.module:attribute."
            )
        if is_path(reference):
            return self._imported(reference)
        if reference in self.built_in:
            module = f"{self.package}.{reference}"
            return self._with_origin(import_module(module).SPEC, module)
        if reference in self.installed:
            return self._imported(self.installed[reference].value)
        raise self.unknown(reference)

    def unknown(self, reference: str) -> UnknownNameError:
        """Return the error for a name that nothing of the family has."""
        return unknown_name(self.noun, reference, self.names, f"fednorm list {self.plural}")

    def _imported(self, reference: str) -> C:
        return self._adopted(import_object(reference, self.noun), reference)

    def _adopted(self, method: Any, reference: str) -> C:
        kind = self.card_class
        made = method if isinstance(method, kind) else kind.adopt(method, reference)
        if made is None:
            raise ConfigError(
                f"{reference} is a {type(method).__name__}, which is no {self.noun}. {kind.expects} "
                f"`fednorm new {self.noun} NAME` writes one to begin with."
            )
        return self._with_origin(made, getattr(method, "__module__", "") or reference.partition(":")[0])

    def _with_origin(self, card: C, module: str) -> C:
        if not card.origin:
            object.__setattr__(card, "origin", module)
        return card

    @property
    def card_class(self) -> type[C]:
        """The class of the family's cards; imported when it is asked for."""
        return typing.cast(type[C], import_object(self.card, self.noun))


_CARDS: dict[str, dict[str, Card]] = {}
"""Cards by family and reference, each found once a process; objects of this process have no other place."""


NORMS: Family[NormSpec] = Family("norm", "norms", "fednorm.norms", "fednorm.spec:NormSpec")
MODELS: Family[ModelSpec] = Family(
    "model",
    "models",
    "fednorm.models",
    "fednorm.models:ModelSpec",
    {"timm": "fednorm.models._zoo:timm_card", "torchvision": "fednorm.models._zoo:torchvision_card"},
)
STRATEGIES: Family[StrategySpec] = Family(
    "strategy", "strategies", "strategies", "fednorm.federation.spec:StrategySpec"
)
SCENARIOS: Family[ScenarioSpec] = Family("scenario", "scenarios", "scenarios", "fednorm.streams.spec:ScenarioSpec")
LEARNERS: Family[LearnerSpec] = Family(
    "learner", "learners", "scenarios.learners", "fednorm.streams.learner:LearnerSpec"
)
DATA: Family[Benchmark] = Family("benchmark", "data", "fednorm.data.sets", "fednorm.data.benchmarks:Benchmark")
OPTIMIZERS: Family[OptimizerSpec] = Family(
    "optimizer", "optimizers", "fednorm.optimizers", "fednorm.optimizers:OptimizerSpec"
)
ADAPTATIONS: Family[AdaptationSpec] = Family(
    "adaptation", "adaptations", "fednorm.adaptation", "fednorm.adaptation:AdaptationSpec"
)

FAMILIES: Mapping[str, Family[Any]] = {
    family.plural: family for family in (NORMS, STRATEGIES, MODELS, DATA, SCENARIOS, LEARNERS, OPTIMIZERS, ADAPTATIONS)
}
"""The families by their plurals, as ``fednorm list`` takes them."""


IN_PROCESS = "object:"
"""How references begin that no other process knows."""


def in_process(reference: str) -> bool:
    """Return whether a reference stands for an object of this process alone."""
    return reference.startswith(IN_PROCESS)


def is_path(reference: str) -> bool:
    """Return whether a reference is an import path rather than a name."""
    return ":" in reference or "." in reference


def spelled(reference: str) -> str:
    """Return a reference in the spelling by which it is compared: an import path as it is, a name canonical."""
    return reference.strip() if is_path(reference) else canonical(reference)


def _import_path(method: Any) -> str:
    """Return where an object can be imported from; else a name under which it is known in this process alone."""
    owner = method if hasattr(method, "__qualname__") else type(method)
    module, name = getattr(owner, "__module__", ""), getattr(owner, "__qualname__", "")
    if isinstance(method, Card):
        module, name = method.origin, "SPEC"
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return f"{module}:{name}" if found is method else f"{IN_PROCESS}{name}"


def _serial(method: Any, reference: str) -> int:
    """Return how many other objects of this process had a reference before this one; they are kept alive for it."""
    known = _OBJECTS.setdefault(reference, [])
    for number, other in enumerate(known):
        if other is method:
            return number
    known.append(method)
    return len(known) - 1


_OBJECTS: dict[str, list[Any]] = {}


def source_digest(reference: str, card: Card) -> str:
    """Return what identifies a stranger's method beside its name: 12 hexadecimal digits of its module's source.

    Two closures of one function have one source. So what is known in this process alone, and what was typed at a
    prompt, is identified by the process and a number instead: no other run has its record.

    Args:
        reference: The name or import path by which it was given.
        card: Its card.

    Returns:
        The digest.
    """
    module = sys.modules.get(card.origin)
    if module is not None and not in_process(reference):
        try:
            return hashlib.sha256(inspect.getsource(module).encode()).hexdigest()[:12]
        except (OSError, TypeError):
            pass
    return f"{UNIDENTIFIED}{_PROCESS}-{_serial(card.maker, f'source of {reference}')}"


UNIDENTIFIED = "process-"
"""What a digest begins with that tells nothing but the process: no other can find the method, or know its source."""

_PROCESS = secrets.token_hex(4)


FEDNORM_API = 1


def _folders(package: str) -> list[str]:
    """Return where a package of built-in methods is; of what is on the way to it the first package alone is imported.

    Raises:
        ConfigError: It is a stranger's package of the same name.
    """
    first, *rest = package.split(".")
    top = import_module(first) if rest else _package(first)
    return [str(Path(folder, *rest)) for folder in top.__path__]


def _package(name: str) -> ModuleType:
    """Import a package of built-in methods.

    Raises:
        ConfigError: It is a stranger's package of the same name.
    """
    package = import_module(name)
    if "." not in name and getattr(package, "FEDNORM_API", None) != FEDNORM_API:
        raise ConfigError(
            f"The package {name!r} that Python found at {package.__file__} is not fednorm's. A folder of that name "
            "in the working directory hides it: run the console script 'fednorm', or 'python -P', or rename the folder."
        )
    return package
