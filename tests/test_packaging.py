"""The wheel: three packages, what they read at run time, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"fednorm", "strategies", "scenarios"}


def test_the_project_names_its_packages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) == PACKAGES
    assert project["project"]["scripts"] == {"fednorm": "fednorm.cli.app:main"}
    for package in PACKAGES:
        assert (ROOT / package / "__init__.py").is_file()
    components = project["tool"]["flwr"]["app"]["components"]
    assert components == {
        "serverapp": "fednorm.federation.server:app",
        "clientapp": "fednorm.federation.client:app",
    }


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    for tool in ("build", "hatchling"):
        if find_spec(tool) is None or find_spec(f"{tool}.__main__") is None:
            pytest.skip(f"{tool} is not installed: it is in the test extra")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_the_wheel_holds_three_packages(names: list[str]) -> None:
    top = {name.split("/")[0] for name in names}
    (metadata,) = {name for name in top if name.endswith(".dist-info")}
    assert metadata.startswith("fednorm-")
    assert top - {metadata} == PACKAGES


def test_the_wheel_holds_what_is_read_at_run_time(names: list[str]) -> None:
    recipes = {str(path.relative_to(ROOT)) for path in (ROOT / "fednorm/recipes").glob("*.toml")}
    modules = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assets = {str(path.relative_to(ROOT)) for path in (ROOT / "fednorm/report/assets").iterdir()}
    assert recipes
    assert assets
    assert recipes | assets | modules | {"fednorm/py.typed"} <= set(names)


def test_the_wheel_holds_nothing_else(names: list[str]) -> None:
    for name in names:
        assert not {"tests", "shared", "runs", "golden", "__pycache__"} & set(name.split("/"))
        assert (
            ".dist-info/" in name
            or name.endswith((".py", ".toml", ".js", ".css", ".j2", "py.typed", "recipes/index.json"))
            or "/templates/" in name
        )
