"""The recipes of ``launch/`` and ``slurm/``, for somebody who installed a wheel."""

from __future__ import annotations

import shutil
from pathlib import Path

from distplateau.errors import InputError

FOLDERS = ("launch", "slurm")


def write_recipes(target: str | Path) -> list[Path]:
    """Write the recipes into a folder and return the files that were written.

    A file that is there already with the same content is passed over.

    Raises
    ------
    InputError
        If a file is there with other content, or the folder cannot be written; nothing is overwritten.
    """
    source, target = _source(), Path(target)
    files = [path for folder in FOLDERS for path in sorted((source / folder).iterdir()) if path.is_file()]
    missing = [path for path in files if not _is_there(path, target / path.relative_to(source))]
    written = []
    for path in missing:
        place = target / path.relative_to(source)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
        except OSError as error:
            raise InputError(str(place), f"cannot be written ({error.strerror})", "name another folder") from None
        written.append(place)
    return written


def _is_there(recipe: Path, place: Path) -> bool:
    if not place.exists():
        return False
    try:
        same = place.read_bytes() == recipe.read_bytes()
    except OSError as error:
        raise InputError(str(place), f"cannot be read ({error.strerror})", "name another folder") from None
    if not same:
        raise InputError(str(place), "is there already, with other content", "name another folder, or move it away")
    return True


def _source() -> Path:
    """Return where the recipes lie: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parent
