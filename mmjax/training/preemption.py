"""Handling of stop signals: a run finishes the steps in progress, saves its state, and exits with a status that says
why.

SIGTERM, and a preemption notice in a run of several processes: exit status 75 (EX_TEMPFAIL: start it again).
Ctrl-C: exit status 130; a second Ctrl-C ends the run at once.

Before its first step, and while its result is scored, a run has nothing to save and ends at once, as any program does
(143 in a shell). Status 2 means an error that starting again does not fix.
"""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

import jax

STATUS = 75


class Preempted(SystemExit):
    """The run was stopped by a signal and its state is saved; the same command resumes it."""

    def __init__(self) -> None:
        super().__init__(STATUS)


class StopSignal:
    """A context manager that records stop signals for a run at `step`, and ends the run on exit if one was received.

    After the first SIGTERM all further ones are ignored until the process ends. With several processes JAX handles
    SIGTERM, and the processes agree on the step after which all of them end; Ctrl-C then ends a process at once.
    """

    def __init__(self, step: int) -> None:
        self._distributed = jax.distributed.is_initialized()
        self._previous_handlers: dict[int, Any] = {}
        self._signal: int | None = None
        self._step = step

    def __enter__(self) -> "StopSignal":
        if not self._distributed and threading.current_thread() is threading.main_thread():
            self._previous_handlers[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._record)
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                self._previous_handlers[signal.SIGINT] = signal.signal(signal.SIGINT, self._record)
        return self

    def _record(self, number: int, frame: FrameType | None) -> None:
        if number == self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self._signal is None:
            again = "; Ctrl-C again ends it at once" if number == signal.SIGINT else ""
            # the signal may have interrupted a `print`
            os.write(2, f"\n{signal.Signals(number).name}: saving after the steps in progress{again}.\n".encode())
        self._signal = number

    def should_stop(self, step: int) -> bool:
        """Returns whether to end after this step. With several processes, each must call it after every step."""
        self._step = step
        if self._distributed:
            from orbax.checkpoint import multihost

            if multihost.reached_preemption(step):
                self._signal = signal.SIGTERM
        return self._signal is not None

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        for number, previous in self._previous_handlers.items():
            ending = number == self._signal == signal.SIGTERM
            signal.signal(number, signal.SIG_IGN if ending else previous)
        if kind is None and self._signal is not None:
            print(f"Saved at step {self._step}; the same command resumes from there.", file=sys.stderr)
            raise KeyboardInterrupt if self._signal == signal.SIGINT else Preempted
