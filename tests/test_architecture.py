"""The arrows between the rooms go one way, the pure parts stay pure, and nothing heavy is loaded by reading a run."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import distplateau

PACKAGE = Path(distplateau.__file__).parent
# Each room may import itself and the ones before it.
ROOMS = ["errors", "lockstep", "config", "record", "training", "cluster", "recipes", "arguments", "cli", "__main__"]
STDLIB_ONLY = ["distplateau.errors", "distplateau.lockstep.plateau", "distplateau.lockstep.schedules"]
HEAVY = {"torch", "accelerate", "wandb", "matplotlib"}
NO_TORCH = ["distplateau", "distplateau.config", "distplateau.cli"]
NO_TORCH += [
    f"distplateau.record.{name}"
    for name in (
        "ledger", "verify", "report.page", "replay.curves", "replay.rerun", "replay.table", "replay.figure",
        "tracking.mirror", "tracking.sync", "tracking.hosted", "tracking.tracker",
    )
]  # fmt: skip


def module_name(path, root=PACKAGE.parent):
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules():
    """Return every module of the package with its source; the root hands names on and is left out."""
    files = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]
    return {module_name(path): path.read_text(encoding="utf-8") for path in files}


def imports(source, known):
    """Return what a module imports, anywhere in it: in functions and under TYPE_CHECKING as well."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports are not followed here"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            # `from package import name` imports the module of that name, or the one that has the name.
            found |= {resolve(name, node.module, known) for name in names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "distplateau":
            found.add(resolve(f"distplateau.{node.attr}", "distplateau", known))
    return found


def resolve(name, module, known):
    """Follow the root's lazy names to their home."""
    if module == "distplateau" and name not in known:
        home = distplateau._HOME.get(name.rpartition(".")[2])
        return f"distplateau.{home}" if home else module
    return name if name in known else module


def graph(sources):
    return {name: imports(source, sources.keys()) for name, source in sources.items()}


def ours(imported):
    return {name for name in imported if name.startswith("distplateau.")}


def room(name):
    return name.split(".")[1]


def wrong_arrows(sources):
    return [
        f"{name} imports {other}"
        for name, imported in graph(sources).items()
        for other in sorted(ours(imported))
        if ROOMS.index(room(other)) > ROOMS.index(room(name))
    ]


def cycle(sources):
    """Return the names of an import cycle, or nothing. A package's own `__init__` counts as a module."""
    try:
        TopologicalSorter({name: ours(found) - {name} for name, found in graph(sources).items()}).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_every_module_is_in_a_room():
    assert {room(name) for name in modules()} <= set(ROOMS), "a new room: give it its place in ROOMS"


def test_arrows_only_go_up_the_list():
    assert wrong_arrows(modules()) == []


def test_there_is_no_import_cycle():
    assert cycle(modules()) == []


@pytest.mark.parametrize("name", STDLIB_ONLY)
def test_the_pure_parts_need_the_standard_library_only(name):
    imported = graph(modules())[name]
    assert ours(imported) <= set(STDLIB_ONLY)
    foreign = {other.split(".")[0] for other in imported - ours(imported)} - {"distplateau"}
    assert foreign <= sys.stdlib_module_names


@pytest.mark.parametrize(
    ("source", "arrow"),
    [
        ("from distplateau.record.ledger import Ledger", "distplateau.record.ledger"),
        ("import distplateau.record.ledger as x", "distplateau.record.ledger"),
        ("from distplateau.record import ledger", "distplateau.record.ledger"),
        ("from distplateau import config", "distplateau.config"),
        ("def f():\n    from distplateau.cli import main", "distplateau.cli"),
        ("if TYPE_CHECKING:\n    from distplateau.config import Config", "distplateau.config"),
        ("from distplateau import load_model", "distplateau.training.parts.models"),
        ("import distplateau\nx = distplateau.load_model", "distplateau.training.parts.models"),
    ],
)
def test_a_wrong_arrow_is_found(source, arrow):
    """Negative control."""
    sources = {**modules(), "distplateau.lockstep.wrong": source}
    assert wrong_arrows(sources) == [f"distplateau.lockstep.wrong imports {arrow}"]


def test_a_cycle_is_found():
    """Negative control."""
    sources = {**modules(), "distplateau.errors": "def f():\n    from distplateau.config import Config"}
    assert {"distplateau.errors", "distplateau.config"} <= set(cycle(sources))


def loaded_by(*names):
    """Return which heavy packages a fresh interpreter has loaded after importing the modules."""
    code = (
        f"import sys, {', '.join(names)}; print(*{{'torch', 'accelerate', 'wandb', 'matplotlib'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_reading_a_run_does_not_import_torch():
    assert loaded_by(*NO_TORCH, "distplateau.lockstep.schedules") == []


def test_the_probe_sees_torch():
    """Negative control."""
    assert "torch" in loaded_by("distplateau.lockstep.exact")


_RUN_CLI = """
import sys
import tomllib
from distplateau.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["verify", "--help"],
        ["replay", "--help"],
        ["sync", "--help"],
        ["report", "--help"],
        ["--version"],
    ],
)
def test_help_does_not_import_torch(arguments):
    subprocess.run([sys.executable, "-c", _RUN_CLI, *arguments], capture_output=True, text=True, check=True)


def test_every_folder_of_the_package_is_installed():
    """Setuptools is given a list, because two of its packages lie elsewhere in the repository."""
    listed = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {module_name(path) for path in PACKAGE.rglob("__init__.py")}
    assert found == {name for name in listed if "_recipes" not in name}
