"""Time from the start of a process to the first step of the default job, with a cold and a warm compilation cache.

    python -m benchmarks.run --only startup

The job is `train.py --config configs/tiny_minigpt4.py`. Its first step has ended when its line is in `metrics.jsonl`;
then the process is killed. The first time it also converts its towers and draws its scenes.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.machine import ROOT
from benchmarks.rows import Row
from benchmarks.sizes import Size

CONFIG = ROOT / "configs" / "tiny_minigpt4.py"
TIMEOUT = 300  # seconds
WARM = 10.0  # target in seconds


def first_step(folder: Path, config: Path = CONFIG, out: str = "runs/tiny_minigpt4") -> float:
    """Returns the seconds; the cache is in `folder`. Raises RuntimeError with the log if the job fails."""
    metrics = folder / out / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    log_file = folder / "log"
    environment = os.environ | {"MMJAX_COMPILATION_CACHE": str(folder / "compiled")}
    begun = time.perf_counter()
    with log_file.open("wb") as log:
        job = subprocess.Popen([sys.executable, ROOT / "train.py", "--config", config], cwd=folder, env=environment,
                               stdout=log, stderr=log)
    try:
        while not (metrics.exists() and metrics.stat().st_size):
            if job.poll() is not None or time.perf_counter() - begun > TIMEOUT:
                raise RuntimeError(f"{config.name} had no first step after {TIMEOUT} s, or ended before with status "
                                   f"{job.poll()}:\n{log_file.read_text()[-4000:]}")
            time.sleep(0.01)
        return time.perf_counter() - begun
    finally:
        job.kill()
        job.wait()


def start(size: Size, rounds: int, names: Sequence[str]) -> list[Row]:
    """Returns the rows of the default job, for any size; the warm figure is the median of three."""
    with tempfile.TemporaryDirectory() as folder:
        times = [first_step(Path(folder)) for _ in range(4)]
    warm = sorted(times[1:])[1]
    return [Row("start-up, the first time", "s", times[0], lower=True, note="converts towers, draws scenes, compiles"),
            Row("start-up, warm", "s", warm, lower=True, note=f"target: at most {WARM:.0f} s")]


PARTS = {"startup": start}
