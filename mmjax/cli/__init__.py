"""The command line: typed options for the functions of the package; one file for each command.

An error in the user's input ends with one message and exit status 2, without a traceback.
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
    """The entry point. Scripts for one command pass `command`."""
    gc.freeze()  # imported objects are never freed; collecting them takes 7 % of the start-up time
    args = sys.argv[1:]
    if command is None:
        command, args = (args[0], args[1:]) if args else ("--help", [])
    if command not in COMMANDS:
        print("usage: mmjax {" + ",".join(COMMANDS) + "} ...\n")
        for name, function in COMMANDS.items():
            print(f"  {name:9} {function.__doc__.splitlines()[0]}")
        print("\nmmjax COMMAND --help lists the options.")
        sys.exit(0 if command in ("--help", "-h") else 2)
    from mmjax.training.run import TrainingStopped

    try:
        COMMANDS[command](args)
    except (ValueError, OSError, TrainingStopped) as error:
        print(f"mmjax {command}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Interrupted. The same command continues: a run from its last checkpoint, answers after their last line.",
              file=sys.stderr)
        sys.exit(130)
