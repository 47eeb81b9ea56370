"""The user's own functions, written ``package.module:function``."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distplateau.errors import InputError, closest

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

_KEYWORD_KINDS = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}


def import_function(key: str, name: str) -> Callable[..., Any]:
    """Return the function ``package.module:function``; its module may lie in the current folder.

    In a job that was submitted, the folder with the code as it was then takes the place of the current one.

    Parameters
    ----------
    key
        Dotted key that holds `name`, for the error.

    Raises
    ------
    InputError
        If the module cannot be imported, whatever it raises, or has no callable of that name.
    """
    module_name, _, function_name = name.partition(":")
    here = os.environ.get("DISTPLATEAU_CODE") or str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever the user's module does while it is imported
        raise InputError(
            key,
            f"{module_name!r} cannot be imported ({type(error).__name__}: {short(error)})",
            "write package.module:function, with the module in the current folder or installed",
            value=name,
        ) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        fix = nearest(function_name, names) + "name a function of that module"
        raise InputError(key, f"{module_name} has no such function", fix, value=name)
    return function


def check_arguments(
    key: str, name: str, function: Callable[..., Any], args: Mapping[str, Any], provided: Collection[str]
) -> None:
    """Compare keyword arguments with the signature, where there is one: some functions written in C have none.

    Parameters
    ----------
    key
        Dotted key of the table that holds `args`.
    name
        What the user calls the function.
    provided
        Parameters that the caller fills in; the user need not and may not.

    Raises
    ------
    InputError
        For an argument that the signature does not have, or lacks.
    """
    parameters = signature_of(function)
    if parameters is None:
        return
    by_keyword = {word for word, parameter in parameters.items() if parameter.kind in _KEYWORD_KINDS} - set(provided)
    for word, value in args.items():
        if word not in by_keyword and not takes_any(parameters):
            fix = closest(word, by_keyword) if by_keyword else "it takes none"
            raise InputError(f"{key}.{word}", f"unknown argument of {name}", fix, value=value)
    for word in sorted(by_keyword - args.keys()):
        if parameters[word].default is inspect.Parameter.empty:
            raise InputError(f"{key}.{word}", f"is missing, {name} needs it", "set it")


def signature_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    """Return the parameters of a function by name, None where it does not tell."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None


def takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Return whether a function has ``**arguments``."""
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())


def nearest(name: str, valid: Iterable[str]) -> str:
    """Suggest up to three of many names; `closest` would list them all."""
    near = difflib.get_close_matches(name, list(valid), n=3, cutoff=0.4)
    return f"did you mean {' or '.join(map(repr, near))}? " if near else ""


def short(error: BaseException) -> str:
    """Return the beginning of an error's message, on one line."""
    return " ".join(str(error).split())[:200]
