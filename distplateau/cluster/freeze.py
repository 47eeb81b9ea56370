"""What a job runs, as it was at the submission: a requeue days later must not run what was edited since."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import distplateau
from distplateau.cluster.secrets import SECRET_FILES, is_secret_file, secret_in
from distplateau.config import dump_config
from distplateau.errors import InputError

if TYPE_CHECKING:
    from distplateau.config import Config

_LARGEST_FILE = 2 * 2**20
_LARGEST_SUM = 200 * 2**20
_SKIPPED = frozenset({"__pycache__", "node_modules", "venv", "env", "runs", "wandb", "data"})
_NO_SECRETS = [f":(top,exclude,glob)**/{name}" for name in SECRET_FILES]


def freeze(config: Config, run_dir: Path, folder: Path) -> Path:
    """Write configuration, code and its git state into ``<run>/submission``; return the configuration's path.

    Parameters
    ----------
    folder
        Where the user's own modules lie: the current folder.

    Raises
    ------
    InputError
        If the code is too large to be copied or holds a key, or the run folder cannot be written.
    """
    target = run_dir / "submission"
    try:
        make_private(target)
        _copy_package(target / "code")
        if uses_own_code(config):
            _copy_folder(folder, target / "code", Path(config.run.dir).expanduser().absolute())
        (target / "failures.json").unlink(missing_ok=True)  # of the submission before
        for name, text in _git_state(folder).items():
            (target / name).unlink(missing_ok=True)  # of the submission before
            if text is not None:
                _refuse_secrets(f"git diff in {folder}", text.encode(errors="surrogateescape"))
                (target / name).write_text(text, encoding="utf-8")
        path = target / "config.toml"
        path.write_text(dump_config(_absolute(config)), encoding="utf-8")
        make_private(target)  # copies have the mode of what they are copies of
    except OSError as error:
        raise InputError(
            str(target), f"cannot be written ({error.strerror or error})", "choose another run.dir"
        ) from error
    return path


def make_private(folder: Path) -> None:
    """Make a folder that others cannot write to, and take away their right to write into what lies there already.

    A job loads a pickle and code from there: who may write to them may run what they like as its user.

    Raises
    ------
    InputError
        If the folder cannot be made, or belongs to somebody else.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if folder.stat().st_uid != os.geteuid():
            raise InputError(str(folder), "belongs to another user", "choose another run.dir or run.name")
        for path in [folder, *folder.rglob("*")]:
            mode = path.lstat().st_mode
            if mode & stat.S_IWOTH and not stat.S_ISLNK(mode):
                path.chmod(stat.S_IMODE(mode) & ~stat.S_IWOTH)
    except OSError as error:
        raise InputError(
            str(folder), f"cannot be written ({error.strerror or error})", "choose another run.dir"
        ) from error


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


def _copy_folder(source: Path, target: Path, runs: Path) -> None:
    """Copy the user's folder: what git knows or does not ignore, else all but the usual byproducts, and no runs."""
    total = 0
    for path in _files(source, runs):
        size = path.stat().st_size
        if size > _LARGEST_FILE and path.suffix != ".py":
            continue
        total += size
        if total > _LARGEST_SUM:
            raise InputError(str(source), "holds more than 200 MiB of code", "submit from the folder of the code alone")
        copy = target / path.relative_to(source.absolute())
        if copy.is_relative_to(target / "distplateau"):
            continue  # copied from where it is imported
        _refuse_secrets(str(path), path.read_bytes())
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)


def _refuse_secrets(where: str, content: bytes) -> None:
    """Say where the value of a secret of this shell would be copied from, without saying it."""
    name = secret_in(content)
    if name is not None:
        fix = "read it from the environment instead, which jobs inherit"
        raise InputError(where, f"holds the value of {name}, and would be copied into the run folder", fix)


def _files(folder: Path, runs: Path) -> list[Path]:
    # Submodules are listed only with what is committed, and need a call of their own.
    known = _git(folder, "ls-files", "-z", "--cached", "--recurse-submodules")
    new = _git(folder, "ls-files", "-z", "--others", "--exclude-standard")
    if known is not None and new is not None:
        paths = {folder.absolute() / name for name in (known + new).split("\0") if name}
    else:
        paths = {
            path for path in folder.absolute().rglob("*") if not _is_byproduct(path.relative_to(folder.absolute()))
        }
    paths |= _imported(folder)
    # Earlier runs hold copies of this folder, and this one does soon.
    skipped = {path.parent for path in paths if path.name == "ledger.jsonl"}
    skipped |= {path.parent for path in paths if path.match("submission/config.toml")}
    # Unless this folder is that of the runs.
    skipped |= set() if folder.absolute().is_relative_to(runs) else {runs}
    return sorted(
        path
        for path in paths
        if path.is_file() and not is_secret_file(path) and skipped.isdisjoint(path.absolute().parents)
    )


def _imported(folder: Path) -> set[Path]:
    """Return what the check of the configuration imported from there: needed, whatever git or its name says."""
    files = {
        Path(file).absolute() for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None))
    }
    return {path for path in files if path.is_relative_to(folder.absolute()) and "site-packages" not in path.parts}


def _is_byproduct(path: Path) -> bool:
    return any(part in _SKIPPED or part.startswith(".") for part in path.parts)


def _git_state(folder: Path) -> dict[str, str | None]:
    """Return the commit and what was changed since, for the record; they are not sent anywhere."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return {"commit.txt": None, "diff.patch": None}
    # What can be applied again, whatever the user's settings for looking at it are.
    plain = ("--binary", "--no-color", "--no-ext-diff", "--no-textconv", "--submodule=diff")
    # From the top of the repository, less what is not copied either.
    return {"commit.txt": commit, "diff.patch": _git(folder, "diff", *plain, "HEAD", "--", ":/", *_NO_SECRETS) or ""}


def _git(folder: Path, *arguments: str) -> str | None:
    if shutil.which("git") is None:
        return None
    command = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    return done.stdout if done.returncode == 0 else None
