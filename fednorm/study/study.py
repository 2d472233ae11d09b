"""A study: the runs that one TOML file stands for, chosen hyper-parameters among them.

    [study]                          # optional, as all of its keys are
    title = "Digits, five strategies"
    about = "A sentence or two for the page."
    baseline = { strategy = { name = "fedavg" } }    # the method that others are compared with: part of its keys

    [base]                           # configuration keys that all runs share
    kind = "federated"               # or "continual"
    data = { name = "digits", train_per_client = 743 }

    [[points]]                       # optional: methods, each a table of keys laid over the base
    strategy.name = "fedbn"
    [[points]]
    strategy.name = "fedwon"
    search = { train = { learning_rate = [0.03, 0.1], agc = [0.16, 0.64] } }

    [grid]                           # lists; every combination with every point is a run
    seed = [1, 2, 3]

    [search]                         # lists of hyper-parameters that every method chooses from
    train.learning_rate = [0.003, 0.01, 0.03, 0.1]

    [select]                         # keys laid over all others while choosing
    seed = 1                         # or a list; a configuration is judged by the mean over them
    data.validation = 0.2
    rounds.num_rounds = 12

    [[paper]]                        # numbers of a paper, shown beside ours
    match = { strategy = { name = "fedbn" } }        # part of the keys of the runs that they belong to
    score = "per_domain.mnist"       # a dotted key of a result's "final"
    value = 0.9604                   # a share in [0, 1]
    std = 0.001                      # optional
    source = "Table 1"

*Keys.* Points lie over the base, the grid over the points, ``--set`` over everything; a key of the grid or of the
search that is ``--set`` loses its list.

*Choosing.* A method is a point with its values of the grid, but for the seed and keys that ``[select]`` fixes. Each
runs every combination of its search lists: those of ``[search]``, its own in place of those of the same key. ``search``
may also be several tables, ``search = [{...}, {...}]``: then it is their combinations, one table's after the other's,
and ``[search]`` does not enter. All methods must have the same number of configurations. They are scored on validation
images (``data.validation`` must be above 0), or on test images if the caller asks for it (``--select-on-test``); a
memorization stream has no images to hold out and is scored by plasticity. The best by :mod:`fednorm.study.select` then
makes the runs of the grid, scored on test images. ``--set select.KEY=VALUE`` changes the table ``[select]``; nothing
else that is set reaches its keys or its seed, so that one choice serves all seeds.

A file without ``[search]`` is a plain grid, whatever it is scored on. :mod:`fednorm.study.search` says how a search may
draw from ranges (``method = "random"`` or ``"optuna"``, ``budget = 9``) in place of every combination of lists.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fednorm.config import KeyPath, RunConfig, flatten, merge, nest, read_config
from fednorm.errors import ConfigError
from fednorm.limits import require_plain, shown
from fednorm.study.adaptive import Adaptive, Proposer
from fednorm.study.cases import Candidate, Case, Choice, Study, smaller
from fednorm.study.grid import (
    Axis,
    Planned,
    axes,
    combinations,
    labels,
    origin,
    require_different,
    require_few,
    without,
)
from fednorm.study.reduction import require_factor
from fednorm.study.search import How, drawn, how_of, spaces_of
from fednorm.study.sections import Table, about_study, paper_number, require_sections
from fednorm.study.select import kind_of

__all__ = ["Candidate", "Case", "Choice", "Study", "make_study", "read_study"]


def read_study(
    path: Path, overrides: Table | None = None, *, select_on_test: bool = False, reduce: float | None = None
) -> Study:
    """Read a study's file; all of its configurations are checked.

    Args:
        path: The TOML file; the module says what stands in it.
        overrides: Nested keys laid over every run, e.g. the data folder; a table ``select`` is laid over the file's.
        select_on_test: Whether hyper-parameters are chosen on test images.
        reduce: A factor below 1 by which rounds, images and clients are fewer (:mod:`fednorm.study.reduction`).

    Raises:
        ConfigError: The file is not a study, two of its runs are the same, budgets differ, or a configuration is wrong.
        UnknownNameError: A name is not registered.
    """
    return make_study(
        read_config(path), path.stem, overrides, select_on_test=select_on_test, reduce=reduce, where=str(path)
    )


def make_study(
    document: Table,
    name: str = "study",
    overrides: Table | None = None,
    *,
    select_on_test: bool = False,
    reduce: float | None = None,
    where: str = "The study",
) -> Study:
    """Make a study of the tables of a study's file; arguments and errors are those of :func:`read_study`.

    Args:
        document: The tables.
        name: The study's name.
        overrides: As for :func:`read_study`.
        select_on_test: As for :func:`read_study`.
        reduce: As for :func:`read_study`.
        where: What the file is called in an error.
    """
    require_plain(document, where, lines=True)
    over = dict(overrides or {})
    require_plain(over, "The keys laid over every run")
    plan = _Plan(document, over.pop("select", {}), over, where, None if reduce is None else require_factor(reduce))
    cases = plan.cases()
    searches = plan.searches(on_test=select_on_test) if plan.searching else ()
    if select_on_test and not searches:
        raise ConfigError(
            f"{where} has no [search]: there is nothing to select, on test images (--select-on-test) or others."
        )
    about = plan.about
    less = "" if reduce is None else f" (reduced to {reduce:g})"
    study = Study(
        name=f"{name}{less}",
        title=f"{about.get('title', name)}{less}",
        about=str(about.get("about", "")),
        baseline=about.get("baseline"),
        paper=plan.paper(),
        cases=tuple(cases),
        overrides=over,
        searches=searches,
        on_test=select_on_test,
        reduced=reduce,
        varied=plan.varied,
        drawn=plan.how.sentence if searches else "",
        adaptive=plan.adaptive(on_test=select_on_test) if searches and plan.how.method == "optuna" else None,
    )
    _require_baseline(study, where)
    if searches:
        _require_tested(study, where)
    return study


class _Plan:
    """The tables of a study's file, on their way to cases and searches."""

    def __init__(self, document: Table, select: Any, overrides: Table, where: str, reduce: float | None = None) -> None:
        self.where, self.overrides, self.reduce = where, overrides, reduce
        require_sections(document, where)
        self.base: Table = document["base"]
        self.about = about_study(document.get("study", {}), self.base, where)
        points: Sequence[Table] = document.get("points", [{}])
        self.how, self.shared = how_of(document.get("search", {}), where)
        self.spaces = [_spaces(self.how, self.shared, point.get("search"), where) for point in points]
        self.points = [{key: value for key, value in point.items() if key != "search"} for point in points]
        self.searching = any(self.spaces)
        if "search" in document and not self.searching:
            raise ConfigError(f"{where}: [search] names no key to choose. Give it a list or a range, or leave it out.")
        if not self.searching and (document.get("select") or select):
            raise ConfigError(f"{where} has [select], which says how hyper-parameters are chosen, and no [search].")
        if not isinstance(select, Mapping):
            raise ConfigError(f"select is a table: set its keys, e.g. select.seed=2; got select = {shown(select)}.")
        self.select = merge(document.get("select", {}), select)
        self.grid = without(axes(document.get("grid", {})), overrides)
        self.document = document
        self.methods: dict[tuple[int, str], tuple[int, dict[KeyPath, Any]]] = {}

    @property
    def varied(self) -> frozenset[KeyPath]:
        """Return the keys that the grid or a search varies."""
        spaces = [space for of_point in self.spaces for space in of_point]
        return frozenset(axis.path for space in (self.grid, *spaces) for axis in space if len(axis.values) > 1)

    def cases(self) -> list[Case]:
        """Return the runs of the grid, and take down which method each belongs to."""
        fixed = {("seed",), *flatten(self.select)}
        require_few([self.grid], len(self.points), self.where, "[grid]")
        cases = []
        for number, point in enumerate(self.points):
            for values in combinations(self.grid):
                own = {path: value for path, value in values.items() if path not in fixed}
                method, _ = self.methods.setdefault((number, repr(own)), (len(self.methods), own))
                layered = merge(merge(self.base, point), nest(values))
                cases.append(Case(layered, origin(number, self.points, values), method))
        return cases

    def searches(self, *, on_test: bool) -> tuple[tuple[Candidate, ...], ...]:
        """Return what each method may choose, all of it checked."""
        planned: list[Planned] = []
        searches = []
        self._require_few()
        for (number, _), (_, own) in self.methods.items():
            candidates = []
            for keys in self._candidates(number):
                candidates.append(self._candidate(number, own, keys, on_test))
                said = origin(number, self.points, {**own, **keys})
                planned += [Planned(run, f"{said} (search, seed {run.seed})") for run in candidates[-1].configs]
            searches.append(tuple(candidates))
        require_different(planned, self.overrides)
        self._require_equal_budgets(searches)
        return tuple(searches)

    def adaptive(self, *, on_test: bool) -> Adaptive:
        """Return the search whose configurations are proposed as results come in."""
        methods = [(number, own) for (number, _), (_, own) in self.methods.items()]
        spaces = [next(iter(self._open_spaces(number)), []) for number, _ in methods]

        def make(method: int, keys: Mapping[KeyPath, Any]) -> Candidate:
            number, own = methods[method]
            return self._candidate(number, own, keys, on_test)

        return Adaptive(self.how, tuple(map(tuple, spaces)), make, self.where)

    def _select_seeds(self) -> tuple[Any, ...]:
        """Return the seeds of the runs that configurations are judged by."""
        written = self.select.get("seed", self.base.get("seed", 1))
        return axes({"seed": written if isinstance(written, list) else [written]}, "select")[0].values

    def _candidate(
        self, point: int, own: Mapping[KeyPath, Any], keys: Mapping[KeyPath, Any], on_test: bool
    ) -> Candidate:
        """Return a configuration that a method may choose: its point, its values of the grid, hyper-parameters."""
        select = {key: value for key, value in self.select.items() if key != "seed"}
        values = merge(merge(merge(self.base, self.points[point]), nest(own)), self.overrides)
        values = merge(merge(values, select), nest(keys))
        configs = (self._scored({**values, "seed": seed}, on_test) for seed in self._select_seeds())
        return Candidate(keys, tuple(configs))

    def _open_spaces(self, point: int) -> list[list[Axis]]:
        """Return what a point's methods choose from, keys left out that are set for all."""
        return [without(space, self.overrides) for space in self.spaces[point]]

    def _require_few(self) -> None:
        seeds = len(self._select_seeds())
        if self.how.method == "grid":
            spaces = [space for number, _ in self.methods for space in self._open_spaces(number)]
            require_few(spaces, seeds, self.where, "its search")
            return
        budget = [Axis(("budget",), tuple(range(self.how.budget)))]
        require_few([budget] * len(self.methods), seeds, self.where, "its search")

    def _candidates(self, point: int) -> Iterable[dict[KeyPath, Any]]:
        """Yield the hyper-parameters that a point's methods may choose."""
        if not self.spaces[point]:
            yield {}
        for space in self.spaces[point]:
            if both := {axis.path for axis in space} & {axis.path for axis in self.grid}:
                key = ".".join(min(both))
                raise ConfigError(
                    f"{self.where} has {key} in [grid] and in a search. A key is either reported for each of its "
                    "values ([grid]) or chosen ([search])."
                )
            yield from self._of(without(space, self.overrides))

    def _of(self, space: list[Axis]) -> Iterable[dict[KeyPath, Any]]:
        """Return the configurations of a space; of Optuna's those that it would propose if it learned nothing."""
        if self.how.method == "grid":
            return combinations(space)
        if self.how.method == "random":
            return drawn(self.how, space, self.where)
        proposer = Proposer(self.how, space, self.where)
        return [proposer.ask() for _ in range(self.how.budget if space else 1)]

    def _scored(self, values: Table, on_test: bool) -> RunConfig:
        """Return the configuration of a run that hyper-parameters are chosen by."""
        wanted = "test" if on_test else "validation"
        kept = (self.varied | flatten(self.overrides).keys()) - flatten(self.select).keys()
        config = smaller((values, {}), self.reduce, kept)
        kind = kind_of(config)
        if kind == "memorization":
            return config
        asked = flatten(self.select).get(("evaluate", "split"), wanted)
        if asked != wanted:
            raise ConfigError(
                f"{self.where} asks in [select] for evaluate.split = {asked!r}, and hyper-parameters are chosen on "
                f"{wanted} images. Leave it out; choosing on test images takes --select-on-test."
            )
        if not on_test and not config.data.validation:
            raise ConfigError(
                f"{self.where} has a search, which is scored on validation images, and none are held back. Set "
                "data.validation, e.g. to 0.2, in [select] or in [base]; or choose on test images with "
                "--select-on-test."
            )
        if kind == "continual" and flatten(values).get(("evaluate", "experiences")) == "current":
            raise ConfigError(
                f"{self.where} chooses by the average accuracy after the last experience, and evaluate.experiences is "
                "'current'. Set it to 'seen' or 'all'."
            )
        return smaller((values, {"evaluate": {"split": wanted}}), self.reduce, kept)

    def _require_equal_budgets(self, searches: Sequence[Sequence[Candidate]]) -> None:
        counts = [len(search) for search in searches]
        if len(set(counts)) > 1:
            tuned = {path for search in searches for candidate in search for path in candidate.keys}
            tuned |= flatten(self.overrides).keys()
            names = labels([search[0].configs[0] for search in searches], seed=False, apart_from=tuned)
            told = ", ".join(f"{count} for {name}" for name, count in zip(names, counts, strict=True))
            raise ConfigError(
                f"{self.where} must let every method choose among the same number of configurations; there are {told}. "
                "Give the others as many values in their search; a key that is set for all (--set) has no list."
            )

    def paper(self) -> tuple[dict[str, Any], ...]:
        """Return the numbers of the paper, checked."""
        return tuple(
            paper_number(entry, number, self.base, self.where)
            for number, entry in enumerate(self.document.get("paper", []), start=1)
        )


def _spaces(how: How, shared: Table, own: Any, where: str) -> list[list[Axis]]:
    """Return the spaces that a point's methods choose from, lists each; none where nothing is chosen."""
    if own is None:
        return [spaces_of(how, shared, where)] if shared else []
    if isinstance(own, Mapping):
        return [spaces_of(how, _over(shared, own), where)]
    if isinstance(own, list) and own and all(isinstance(table, Mapping) and table for table in own):
        if how.method != "grid":
            raise ConfigError(
                f'{where}: a point\'s search is one table where search.method is "{how.method}"; got {len(own)}.'
            )
        return [spaces_of(how, table, where) for table in own]
    raise ConfigError(f"{where}: a point's search is a table of lists, or several of them; got {shown(own)}.")


def _require_baseline(study: Study, where: str) -> None:
    """Refuse a baseline that no run is of; what was set for this call alone may leave it out."""
    wanted = flatten(study.baseline or {})
    if not wanted or wanted.keys() & flatten(study.overrides).keys():
        return
    for config in study.configs or study.drafts():
        if wanted.items() <= flatten(config.to_dict()).items():
            return
    told = ", ".join(f"{'.'.join(path)} = {value!r}" for path, value in wanted.items())
    raise ConfigError(
        f"{where}: no run of the study is of its baseline ({told}). Name keys that one method has and others have not; "
        "options at their default are left out."
    )


def _require_tested(study: Study, where: str) -> None:
    """Refuse to report what was chosen on the images it was chosen on."""
    for config in study.drafts():
        if kind_of(config) != "memorization" and config.evaluate.split != "test":
            raise ConfigError(
                f"{where} has a search, so its runs are reported on test images, and evaluate.split is "
                f"{config.evaluate.split!r}. Leave it out: the search is scored on validation images by itself."
            )


def _over(shared: Table, own: Table) -> dict[str, Any]:
    """Return a point's search laid over the shared one; a list or range takes the place of the other."""
    values = dict(shared)
    for key, value in own.items():
        nested = isinstance(value, Mapping) and not {"low", "high"} & value.keys()
        before = values.get(key)
        values[key] = _over(before, value) if nested and isinstance(before, Mapping) else value
    return values
