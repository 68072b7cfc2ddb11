"""Starts runs of `mmjax train` quickly: everything is imported once, then each run is a fork of this process.

Reads a JSON object a line: `args` of the command, the file `log` for its output, and `fault`, a name of FAULTS with the
number of the call at which it happens. Writes lines: `pid N`, then `steps` when the run has begun its steps (or goes on
with them), then `ended STATUS`, the negative number of the signal if one ended it.
"""

import contextlib
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain  # noqa: F401  imported here once for all runs
import orbax.checkpoint  # noqa: F401
import transformers  # noqa: F401

from mmjax import cli, evaluate, files  # noqa: F401
from mmjax.checkpoints import training as training_checkpoints
from mmjax.training import loop, metrics_log


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at(owner: Any, name: str, call: int, fault: Callable[..., None], behind: bool = False) -> None:
    """Something happens before, or behind, a function's call of that number, the first being 0."""
    function, calls = getattr(owner, name), []

    def faulty(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        now = len(calls) == call + 1
        if now and not behind:
            fault(*args, **kwargs)
        result = function(*args, **kwargs)
        if now and behind:
            fault(*args, **kwargs)
        return result

    setattr(owner, name, faulty)


def torn(lines: metrics_log.JsonlLog, line: dict[str, Any]) -> None:
    lines._file.write(json.dumps(line).encode()[:-5])
    die()


def half_removed(place: Path, **_: Any) -> None:
    next(path for path in Path(place).rglob("*") if path.is_file()).unlink()
    die()


def full_disk(*_: Any) -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    # too little for a checkpoint's arrays, enough for the lines that the run writes
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))


def terms(count: int) -> Callable[..., None]:
    """So many SIGTERMs, some of them while the state is saved.

    The process that sends them may outlive the run. So it keeps nothing of the run open, above all not the lock of its
    folder, and knows the run by a pidfd: a number could meanwhile be another process's, a parent's 1.
    """
    def send(*_: Any) -> None:
        target = os.pidfd_open(os.getpid())
        if os.fork():
            os.close(target)
            return
        os.dup2(target, 0)
        os.closerange(1, os.sysconf("SC_OPEN_MAX"))
        with contextlib.suppress(ProcessLookupError):  # the run has ended
            for _ in range(count):
                signal.pidfd_send_signal(0, signal.SIGTERM)
                signal.sigtimedwait([], 0.002)
        os._exit(0)
    return send


FAULTS: dict[str, Callable[[int], None]] = {
    "killed behind a step": lambda call: at(metrics_log.MetricsLog, "add", call, die, behind=True),
    "killed in a line": lambda call: at(metrics_log.JsonlLog, "write", call, torn),
    "killed as a save begins": lambda call: at(training_checkpoints.Checkpoints, "save", call, die, behind=True),
    "killed before a seal": lambda call: at(training_checkpoints, "seal", call, die),
    "killed with half a seal": lambda call: at(files, "sync", 12 * call + 8, die),
    "killed behind a seal": lambda call: at(training_checkpoints, "seal", call, die, behind=True),
    "killed behind a save": lambda call: at(training_checkpoints.Checkpoints, "_remove_old", call, die),
    "killed in a removal": lambda call: at(training_checkpoints.shutil, "rmtree", call, half_removed),
    "killed as the card is written": lambda call: at(files, "replace", 0, die, behind=bool(call)),
    "full disk": lambda call: at(metrics_log.MetricsLog, "add", call, full_disk, behind=True),
    "SIGTERM": lambda call: at(metrics_log.MetricsLog, "add", call, terms(1)),
    "SIGTERM storm": lambda call: at(metrics_log.MetricsLog, "add", call, terms(300)),
}


def child(task: dict[str, Any], tell: int) -> None:
    """Never returns."""
    log = os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    at(loop, "loop", 0, lambda *_: os.write(tell, b"steps\n"))
    if task["fault"]:
        name, call = task["fault"]
        FAULTS[name](call)
    sys.argv = ["mmjax", *task["args"]]
    status = 1
    try:
        cli.main()
        status = 0
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def main() -> None:
    warnings.simplefilter("ignore")  # JAX has no threads yet, so it can be forked
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            child(json.loads(line), os.dup(1))
        print("pid", pid, flush=True)
        print("ended", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
