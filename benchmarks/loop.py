"""Time for which the devices of a training run have no step to compute, because of the host.

    python -m benchmarks.loop                       half a minute
    python -m benchmarks.loop --code CHECKOUT       also with the mmjax of another checkout, such as an older one

Runs `mmjax.training.run.train` on the tests' tiny MiniGPT-4: pipeline, copies to the device, logs and checkpoints are
real. Only the training step is simulated, so that the host has its cores for itself, as beside an accelerator: a step
begins when it is dispatched and the one before has ended, takes `--milliseconds`, and whoever reads its metrics earlier
waits for its end. Idle is the time from the end of a step to the dispatch of the next one; 0 if that was earlier.
Medians over the steps without a checkpoint.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

STEPS, SKIPPED = 120, 10
METRICS = {"loss": np.float32(5), "grad_norm": np.float32(1), "tokens": np.int32(20), "finite": np.True_,
           "applied": np.True_, "unusable": np.int32(0)}


@dataclasses.dataclass(frozen=True)
class Number:
    """A metric that is computed at a time (`time.monotonic`); reading it earlier waits."""

    value: Any
    end: float

    def block_until_ready(self) -> "Number":
        time.sleep(max(0.0, self.end - time.monotonic()))
        return self

    def copy_to_host_async(self) -> None:
        pass

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        return np.asarray(self.block_until_ready().value)

    def __float__(self) -> float:
        return float(self.block_until_ready().value)

    def __int__(self) -> int:
        return int(self.block_until_ready().value)

    def __bool__(self) -> bool:
        return bool(self.block_until_ready().value)


class SimulatedStep:
    """A training step that takes some seconds of a device and computes nothing.

    idle: seconds before each step without a step
    """

    def __init__(self, seconds: float):
        self._seconds, self._end, self.idle = seconds, 0.0, []

    def __call__(self, state: Any, *_: Any) -> tuple[Any, dict[str, Number]]:
        now = time.monotonic()
        self.idle.append(max(0.0, now - self._end))
        self._end = max(now, self._end) + self._seconds
        return dataclasses.replace(state, step=state.step + 1), {
            name: Number(value, self._end) for name, value in METRICS.items()}

    def trace(self, *_: Any) -> Any:
        raise ValueError("a simulated step has no operations")


def measure(seconds: float, count: int = STEPS) -> dict[str, float]:
    """Returns the medians {"idle", "period"} in seconds of a run of `count` steps that take `seconds` each."""
    from mmjax.training import run, steps
    from tests import small

    train_step, simulated = steps.train_step, SimulatedStep(seconds)
    steps.train_step = lambda *_: simulated
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            run.train(small.run_config(Path(folder) / "run", count, save_every=count))
    finally:
        steps.train_step = train_step
    idle = statistics.median(simulated.idle[SKIPPED:])
    return {"idle": idle, "period": idle + seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--code", type=Path, help="another checkout")
    parser.add_argument("--milliseconds", type=float, nargs="+", default=[10, 50], help="of a step")
    parser.add_argument("--json", action="store_true", help="print the figures of this checkout as JSON")
    args = parser.parse_args()
    if args.json:
        print(json.dumps([measure(each / 1e3) for each in args.milliseconds]))
        return
    root = Path(__file__).parents[1]
    for checkout in (args.code, root) if args.code else (root,):
        words = [sys.executable, Path(__file__).resolve(), "--json", "--milliseconds", *map(str, args.milliseconds)]
        done = subprocess.run(words, cwd=checkout, capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": str(checkout)})
        if done.returncode:
            sys.exit(f"{checkout}: status {done.returncode}:\n{done.stderr[-4000:]}")
        for each, found in zip(args.milliseconds, json.loads(done.stdout.splitlines()[-1]), strict=True):
            print(f"{checkout.name:20} steps of {each:5.0f} ms: idle {1e3 * found['idle']:6.2f} ms between steps, "
                  f"{each / 1e3 / found['period']:.3f} of the time computing")


if __name__ == "__main__":
    main()
