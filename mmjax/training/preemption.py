"""Being told to end: a run finishes its step, saves its state, and ends with a status that says so.

SIGTERM, and a preemption notice where JAX joins several processes: exit status 75 (EX_TEMPFAIL: start me again).
Ctrl-C: exit status 130; a second one ends the run where it stands.

Before its first step, and while it is scored behind its last one, a run has nothing to save and ends at once, as any
program does (143 in a shell). Status 2 means that something is wrong, and that starting again alone will not help.
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
    """The run was told to end, and what it had learnt is saved: the same command goes on."""

    def __init__(self) -> None:
        super().__init__(STATUS)


class StopSignal:
    """Takes note, inside a `with`, of what tells a run at `step` to end; leaving it ends the run, if it was told so.

    From the first SIGTERM on every further one is ignored, until the process has ended. Where several processes have
    found each other, JAX takes note of SIGTERM and they agree on the step behind which all of them end; Ctrl-C is not
    waited for there.
    """

    def __init__(self, step: int) -> None:
        self._together = jax.distributed.is_initialized()
        self._before: dict[int, Any] = {}
        self._signal: int | None = None
        self._step = step

    def __enter__(self) -> "StopSignal":
        if not self._together and threading.current_thread() is threading.main_thread():
            self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._note)
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self._signal is None:
            again = "; Ctrl-C again ends it at once" if number == signal.SIGINT else ""
            # `print` might be at work just where the signal came
            os.write(2, f"\n{signal.Signals(number).name}: saving behind this step{again}.\n".encode())
        self._signal = number

    def should_stop(self, step: int) -> bool:
        """Whether to end behind this step. Of several processes each must ask behind every step."""
        self._step = step
        if self._together:
            from orbax.checkpoint import multihost

            if multihost.reached_preemption(step):
                self._signal = signal.SIGTERM
        return self._signal is not None

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        for number, before in self._before.items():
            ending = number == self._signal == signal.SIGTERM
            signal.signal(number, signal.SIG_IGN if ending else before)
        if kind is None and self._signal is not None:
            print(f"Saved at step {self._step}; the same command goes on from there.", file=sys.stderr)
            raise KeyboardInterrupt if self._signal == signal.SIGINT else Preempted
