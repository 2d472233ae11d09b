"""The arrows of the design, read from the imports: config → data → model → step → clients → record → study → report."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("fednorm", "strategies", "scenarios")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "fednorm.errors",
        "fednorm.rng",
        "fednorm.roles",
        "fednorm.threads",
        "fednorm.cores",
        "fednorm.signals",
        "fednorm.literals",
        "fednorm.importing",
        "fednorm.allocation",
        "fednorm.scalar",
    ),
    ("fednorm.limits", "fednorm.memory", "fednorm.device", "fednorm.computed"),
    ("fednorm.cards",),
    ("fednorm.spec", "fednorm.blocks", "fednorm.chain", "fednorm.options", "fednorm.config"),
    ("fednorm.recognition",),
    ("fednorm.data", "fednorm.norms", "fednorm.optim", "fednorm.optimizers"),
    ("fednorm.conversion",),
    ("fednorm.models",),
    ("fednorm.registry",),
    ("fednorm.training", "fednorm.adaptation"),
    ("fednorm.records",),
    ("fednorm.federation", "fednorm.streams", "fednorm.avalanche", "fednorm.federated_continual"),
    ("strategies", "scenarios"),
    ("fednorm.study", "fednorm.api", "fednorm.inspection"),
    ("fednorm.report",),
    (
        "fednorm.verify",
        "fednorm.bench",
        "fednorm.export",
        "fednorm.testing",
        "fednorm.norm_contract",
        "fednorm.analyses",
    ),
    ("fednorm.cli", "fednorm.__main__"),
)
"""Modules import their own layer and those above; the longest prefix counts."""

LATER: dict[str, str] = {
    "fednorm.cards": "the one table of names: a method is imported when it is asked for",
    "fednorm.study.worker": "a run's process imports what trains only then",
    "fednorm.records.result": "what a notebook asks of a result is imported when it is asked for",
    "fednorm.api": "so that importing fednorm stays quick",
    "fednorm": "so that importing fednorm stays quick",
}
"""Modules that import within a function what their layer could not import at once, and why."""


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        yield str(node.module)
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def imports(path: Path, *, now: bool = False) -> frozenset[str]:
    """Return every module and name that a file imports; with ``now`` those that its own import imports."""
    found: set[str] = set()
    pending: list[ast.AST] = [tree(path)]
    while pending:
        node = pending.pop()
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if now and (typing_only or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            continue
        found.update(_imported(node))
        pending.extend(ast.iter_child_nodes(node))
    return frozenset(found)


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def layer(module: str) -> int | None:
    fits = [(len(p), depth) for depth, level in enumerate(LAYERS) for p in level if within(module, p)]
    return max(fits)[1] if fits else None


def importers(package: str) -> set[str]:
    return {name_of(path) for path in FILES if any(within(name, package) for name in imports(path))}


def test_imports_go_one_way() -> None:
    assert [name_of(path) for path in FILES if layer(name_of(path)) is None] == ["fednorm"]
    backward = {
        name_of(path): name
        for path in FILES
        for name in imports(path, now=True)
        if (own := layer(name_of(path))) is not None and (other := layer(name)) is not None and other > own
    }
    assert backward == {}, "a module imports one that comes after it"


def test_only_those_with_a_reason_import_late() -> None:
    late = {name_of(path) for path in FILES if _imports_late(path)}
    assert late <= set(LATER)


def _imports_late(path: Path) -> bool:
    """Return whether a file imports within a function what its layer could not import at once."""
    late = imports(path) - imports(path, now=True)
    guards = [n for n in ast.walk(tree(path)) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)]
    typing = {name for guard in guards for inner in ast.walk(guard) for name in _imported(inner)}
    ours = {name for name in late - typing if within(name, "fednorm") or within(name, "strategies")}
    return any((layer(name) or 0) > (layer(name_of(path)) or 0) for name in ours)


def test_the_test_would_see_an_arrow_that_goes_back(tmp_path: Path) -> None:
    path = tmp_path / "wrong.py"
    path.write_text("from fednorm.report import table\ndef f():\n    import fednorm.cli.app")
    assert imports(path, now=True) == {"fednorm.report", "fednorm.report.table"}
    assert imports(path) == {"fednorm.report", "fednorm.report.table", "fednorm.cli.app"}
    assert (
        (layer("fednorm.records.record") or 0)
        < (layer("fednorm.federation.server") or 0)
        < (layer("fednorm.study.grid") or 0)
    )


def test_only_the_table_of_cards_knows_strategies_and_scenarios() -> None:
    for package in ("strategies", "scenarios"):
        ours = {name for name in importers(package) if within(name, "fednorm")}
        assert ours <= {"fednorm.cards"}
    loaders = {name_of(path) for path in FILES if "import_module" in path.read_text(encoding="utf-8")}
    assert {name for name in loaders if within(name, "fednorm")} <= {
        "fednorm", "fednorm.avalanche", "fednorm.cards", "fednorm.cli.catalogue", "fednorm.importing",
    }  # fmt: skip


def test_strategies_and_scenarios_do_not_know_each_other() -> None:
    assert not {name for name in importers("scenarios") if within(name, "strategies")}
    assert not {name for name in importers("strategies") if within(name, "scenarios")}


def test_nothing_imports_the_command_line() -> None:
    assert importers("fednorm.cli.app") == {"fednorm.__main__"}
    assert all(within(name, "fednorm.cli") for name in importers("fednorm.cli") - {"fednorm.__main__"})


def test_flower_and_avalanche_stay_in_their_places() -> None:
    homes = ("fednorm.federation", "fednorm.federated_continual", "strategies", "fednorm.bench")
    assert {name for name in importers("flwr") if not any(within(name, home) for home in homes)} == set()
    homes = ("fednorm.avalanche", "fednorm.bench.avalanche_apps")
    assert {name for name in importers("avalanche") if not any(within(name, home) for home in homes)} == set()
    public = ("flwr.app", "flwr.clientapp", "flwr.serverapp")
    private = {
        name_of(path)
        for path in FILES
        for name in imports(path)
        if within(name, "flwr") and not any(within(name, package) for package in public)
    }
    assert private == {"fednorm.federation.flower_private"}


def test_models_do_not_name_norms() -> None:
    norms = {path.stem for path in (ROOT / "fednorm/norms").glob("[a-z]*.py")}
    for path in (ROOT / "fednorm/models").glob("*.py"):
        assert not {name for name in imports(path) if within(name, "fednorm.norms") and name.split(".")[2:3] != [] and
                    name.split(".")[2] in norms}  # fmt: skip


def test_files_are_short_and_say_what_they_are_for() -> None:
    assert [name_of(path) for path in FILES if not ast.get_docstring(tree(path))] == []
    assert [name_of(path) for path in FILES if len(path.read_text(encoding="utf-8").splitlines()) > 500] == []


def test_functions_are_short() -> None:
    functions = [
        (name_of(path), node)
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert [f"{module}.{node.name}" for module, node in functions if _lines(node) > 60] == []


def _lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1


def test_nothing_prints() -> None:
    calls = [(name_of(path), node) for path in FILES for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    assert [module for module, call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"] == []


def test_public_names_are_there() -> None:
    for path in FILES:
        module = importlib.import_module(name_of(path))
        for name in getattr(module, "__all__", ()):
            assert hasattr(module, name), f"{module.__name__}.{name}"
    fednorm = importlib.import_module("fednorm")
    names = {
        "__version__",
        "check",
        "compare",
        "continual",
        "convert",
        "declare",
        "declare_tensors",
        "federated",
        "load",
        "load_model",
    }
    assert set(fednorm.__all__) >= names
    with pytest.raises(AttributeError, match="no attribute 'fedrated'; public names"):
        fednorm.fedrated  # noqa: B018


def test_importing_fednorm_is_quick() -> None:
    code = (
        "import sys, fednorm, fednorm.cli.app; heavy = {'torch', 'flwr', 'avalanche', 'ray', 'sklearn', 'matplotlib'};"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
