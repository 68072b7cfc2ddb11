"""Many small cases in one test: all of them run, each in a folder of its own, and all that fail are named."""

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest


def every(names: str | tuple[str, ...], values: Iterable[Any]) -> Callable[[Callable], Callable]:
    """As `pytest.mark.parametrize`, but in one test, which raises an ExceptionGroup of the cases that fail.

    The test may take `tmp_path`, and no other fixture. Several of these above each other run all combinations.
    """
    names = (names,) if isinstance(names, str) else names
    new = [dict(zip(names, value if len(names) > 1 else (value,), strict=True)) for value in values]

    def decorate(function: Callable) -> Callable:
        test = getattr(function, "of_one_case", function)
        cases = [one | other for one, other in itertools.product(new, getattr(function, "cases", [{}]))]

        def run(tmp_path: Path) -> None:
            failed = []
            for number, case in enumerate(cases):
                folder = tmp_path / str(number)
                folder.mkdir()
                try:
                    test(**case, tmp_path=folder)
                except (Exception, pytest.fail.Exception) as error:
                    failed.append(RuntimeError(", ".join(f"{name} = {value!r:.200}" for name, value in case.items())))
                    failed[-1].__cause__ = error
            if failed:
                raise ExceptionGroup(f"{len(failed)} of {len(cases)} cases failed", failed)

        run.of_one_case, run.cases, run.__name__, run.__doc__ = test, cases, test.__name__, test.__doc__
        run.__module__ = test.__module__
        return run

    return decorate
