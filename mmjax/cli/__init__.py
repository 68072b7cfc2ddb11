"""The command line: the same functions as from Python, behind typed options; a file for each command.

A mistake in what the user gave ends with one message and exit status 2, without a traceback.
"""

import gc
import sys
from collections.abc import Callable, Sequence

from mmjax.cli import chat, convert, data, doctor, evaluate, generate, parity, plan, train

COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train.train,
    "convert": convert.convert,
    "export": convert.export,
    "generate": generate.generate,
    "evaluate": evaluate.evaluate,
    "chat": chat.chat,
    "data": data.data,
    "plan": plan.plan,
    "doctor": doctor.doctor,
    "parity": parity.parity,
}


def main(command: str | None = None) -> None:
    """The entry point; `command` is given by the scripts that stand for one."""
    gc.freeze()  # what was imported stays: to look through it for garbage is a fifteenth of a start
    args = sys.argv[1:]
    if command is None:
        command, args = (args[0], args[1:]) if args else ("--help", [])
    if command not in COMMANDS:
        print("usage: mmjax {" + ",".join(COMMANDS) + "} ...\n")
        for name, what in COMMANDS.items():
            print(f"  {name:9} {what.__doc__.splitlines()[0]}")
        print("\nmmjax COMMAND --help tells more.")
        sys.exit(0 if command in ("--help", "-h") else 2)
    from mmjax.training.run import TrainingStopped

    try:
        COMMANDS[command](args)
    except (ValueError, OSError, TrainingStopped) as error:
        print(f"mmjax {command}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on: a run from its last checkpoint, answers behind their last line.",
              file=sys.stderr)
        sys.exit(130)
