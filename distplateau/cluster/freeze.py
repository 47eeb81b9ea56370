"""What a job runs, as it was at the submission: a requeue days later must not run what was edited since."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import distplateau
from distplateau.config import dump_config
from distplateau.errors import InputError

if TYPE_CHECKING:
    from distplateau.config import Config

_LARGEST_FILE = 2 * 2**20
_LARGEST_SUM = 200 * 2**20
_SKIPPED = frozenset({"__pycache__", "node_modules", "venv", "env", "runs", "wandb", "data"})


def freeze(config: Config, run_dir: Path, folder: Path) -> Path:
    """Write configuration, code and its git state into ``<run>/submission``; return the configuration's path.

    Parameters
    ----------
    folder
        Where the user's own modules lie: the current folder.

    Raises
    ------
    InputError
        If the code is too large to be copied, or the run folder cannot be written.
    """
    target = run_dir / "submission"
    try:
        make_private(target)
        _copy_package(target / "code")
        if uses_own_code(config):
            _copy_folder(folder, target / "code")
        for name, text in _git_state(folder).items():
            (target / name).write_text(text, encoding="utf-8")
        path = target / "config.toml"
        path.write_text(dump_config(_absolute(config)), encoding="utf-8")
    except OSError as error:
        raise InputError(
            str(target), f"cannot be written ({error.strerror or error})", "choose another run.dir"
        ) from error
    return path


def make_private(folder: Path) -> None:
    """Make a folder that others cannot write to, whatever the umask is."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(folder.stat().st_mode & ~0o002)


def uses_own_code(config: Config) -> bool:
    """Return whether the configuration names a function of the user's."""
    names = (config.data.name, config.model.name, config.training.loss, config.training.metrics or "")
    return any(":" in name for name in names)


def _absolute(config: Config) -> Config:
    """Tie the folders of a configuration to where it was submitted."""
    run = config.run.model_copy(update={"dir": str(Path(config.run.dir).expanduser().absolute())})
    data = config.data.model_copy(update={"root": str(Path(config.data.root).expanduser().absolute())})
    return config.model_copy(update={"run": run, "data": data})


def _copy_package(target: Path) -> None:
    source = Path(distplateau.__file__).parent
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target / "distplateau", ignore=shutil.ignore_patterns("__pycache__"))


def _copy_folder(source: Path, target: Path) -> None:
    """Copy the user's folder: what git knows or does not ignore, else all but the usual byproducts."""
    total = 0
    for path in _files(source):
        size = path.stat().st_size
        if size > _LARGEST_FILE and path.suffix != ".py":
            continue
        total += size
        if total > _LARGEST_SUM:
            raise InputError(str(source), "holds more than 200 MiB of code", "submit from the folder of the code alone")
        copy = target / path.relative_to(source)
        if copy.is_relative_to(target / "distplateau"):
            continue  # copied from where it is imported
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)


def _files(folder: Path) -> list[Path]:
    listed = _git(folder, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if listed is not None:
        paths = [folder / name for name in listed.split("\0") if name]
    else:
        paths = [path for path in folder.rglob("*") if not _is_byproduct(path.relative_to(folder))]
    return sorted(path for path in paths if path.is_file())


def _is_byproduct(path: Path) -> bool:
    return any(part in _SKIPPED or part.startswith(".") for part in path.parts)


def _git_state(folder: Path) -> dict[str, str]:
    """Return the commit and what was changed since, for the record; they are not sent anywhere."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return {}
    return {"commit.txt": commit, "diff.patch": _git(folder, "diff", "HEAD") or ""}


def _git(folder: Path, *arguments: str) -> str | None:
    if shutil.which("git") is None:
        return None
    command = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    return done.stdout if done.returncode == 0 else None
