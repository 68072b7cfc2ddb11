"""Checks that the paths in a command's options are local."""

import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

import tyro

from mmjax import files


def local(command: Callable[..., Any], *texts: str) -> Callable[..., Any]:
    """Wraps a command to first raise ValueError naming every option that is a URL but must be a local path.

    texts: the options that are paths but not annotated as `Path`
    """

    @functools.wraps(command)
    def checked(*args: Any, **kwargs: Any) -> Any:
        require_local(command, inspect.signature(command).bind(*args, **kwargs).arguments, *texts)
        return command(*args, **kwargs)

    return checked


def require_local(command: Callable[..., Any], values: Mapping[str, Any], *texts: str) -> None:
    """Raises ValueError as `local` does.

    command: a function, or a dataclass of options
    values:  of its arguments or fields, by name
    """
    hints, paths = typing.get_type_hints(command, include_extras=True), {}
    for name, hint in hints.items():
        if name not in values or not (name in texts or files.is_path(hint)):
            continue
        option, value = _option_name(name, hint), values[name]
        if isinstance(value, Mapping):  # --media audio FILE text WORDS
            paths |= {f"{option} {key}": path for key, path in value.items() if key != "text"}
        else:
            paths[option] = value
    files.require_local(paths)


def _option_name(name: str, hint: Any) -> str:
    """Returns the option as on the command line: `--the-name`, or `THE-NAME` for a positional one."""
    option = name.replace("_", "-")
    return option.upper() if tyro.conf.Positional in typing.get_args(hint) else f"--{option}"
