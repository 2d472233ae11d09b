"""fednorm beside Avalanche: streams as its benchmarks, learners as its strategies, norms in its own strategies.

    benchmark = to_avalanche(stream)                                          # a fednorm stream as a benchmark
    learner = ERACE(model=model, optimizer=optimizer, num_classes=10)         # from scenarios.learners.er_ace
    mine = strategy_of(MyLearner)(model=model, ...)                           # a learner of one's own
    strategy = SCR(model=fednorm.convert(model, "adab2n"), ..., plugins=[NormPlugin()])
    for experience in benchmark.train_stream:
        learner.train(experience)

Avalanche itself is imported when one of them is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fednorm.avalanche.benchmark import joint_to_avalanche, to_avalanche
    from fednorm.avalanche.plugin import NormPlugin
    from fednorm.avalanche.strategy import strategy_of
    from fednorm.streams.learner import Learner

__all__ = ["NormPlugin", "joint_to_avalanche", "strategies", "strategy_of", "to_avalanche"]

_HOMES = {"NormPlugin": "plugin", "joint_to_avalanche": "benchmark", "to_avalanche": "benchmark"} | {
    "strategy_of": "strategy"
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fednorm.avalanche' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"fednorm.avalanche.{_HOMES[name]}"), name)


def strategies(module: str, **learners: type[Learner]) -> Callable[[str], Any]:
    """Return a module's ``__getattr__``: its learners as Avalanche strategies, made when one is first asked for.

        def __getattr__(name: str) -> Any:
            return strategies(__name__, ERACE=ERACELearner)(name)

    Args:
        module: The module's name.
        **learners: The learners' classes, by the strategies' names.
    """

    def of(name: str) -> Any:
        if name not in learners:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return import_module("fednorm.avalanche.strategy").make_strategy(module, name, learners[name])

    return of
