"""Recipes from a checkout and from a wheel."""

import shutil
import stat
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from distplateau.cli import main
from distplateau.recipes import write_recipes

ROOT = Path(__file__).parents[1]


def tracked(folder):
    listed = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    return sorted(listed.split()) or pytest.skip("not a checkout")


def test_recipes_are_those_of_the_checkout(tmp_path, capsys):
    assert main(["init", str(tmp_path / "new folder")]) == 0
    written = {
        str(path.relative_to(tmp_path / "new folder")): path
        for path in (tmp_path / "new folder").rglob("*")
        if path.is_file()
    }
    assert sorted(written) == sorted(tracked("launch") + tracked("slurm"))
    assert all(path.read_bytes() == (ROOT / name).read_bytes() for name, path in written.items())
    assert written["slurm/localcluster"].stat().st_mode & stat.S_IXUSR
    assert "launch: 13 files written" in capsys.readouterr().out


def test_again_it_writes_what_is_missing_only(tmp_path):
    everything = write_recipes(tmp_path)
    (tmp_path / "launch" / "demo.toml").unlink()
    assert write_recipes(tmp_path) == [tmp_path / "launch" / "demo.toml"]
    assert len(everything) > 10


def test_own_changes_are_not_overwritten(tmp_path, capsys):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "gpu.toml").write_text("mine", encoding="utf-8")
    assert main(["init", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "slurm/gpu.toml: is there already, with other content" in error
    assert (tmp_path / "slurm" / "gpu.toml").read_text(encoding="utf-8") == "mine"
    assert not (tmp_path / "launch").exists(), "nothing is written where something stands in the way"


def test_a_file_in_the_place_of_the_folder_is_one_line(tmp_path, capsys):
    (tmp_path / "taken").touch()
    assert main(["init", str(tmp_path / "taken")]) == 2
    assert "cannot be written (Not a directory)" in capsys.readouterr().err


def test_a_wheel_holds_the_recipes_and_every_package(tmp_path):
    source = tmp_path / "source"
    for name in ("distplateau", "launch", "slurm"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "distplateau").rglob("*.py")}
    assert modules <= names
    (tmp_path / "installed" / "distplateau" / "_recipes" / "slurm" / "localcluster").chmod(0o755)  # as pip does
    code = "import distplateau.recipes as r, sys; r.write_recipes(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        check=True,
        cwd=tmp_path / "installed",
        env={"PYTHONPATH": str(tmp_path / "installed"), "PATH": ""},
    )
    assert (tmp_path / "out" / "launch" / "demo.toml").read_bytes() == (ROOT / "launch" / "demo.toml").read_bytes()
    tomllib.loads((tmp_path / "out" / "slurm" / "gpu.toml").read_text(encoding="utf-8"))
