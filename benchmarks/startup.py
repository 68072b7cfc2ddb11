"""From the start of a process to the first step of the default job, with nothing compiled before and with everything.

    python -m benchmarks.run --only startup

The job is `train.py --config configs/tiny_minigpt4.py` as it stands. Its first step is over when its line is in
`metrics.jsonl`; the process is killed then. The first time it also converts its towers and draws its scenes.
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
PATIENCE = 300  # seconds
WARM = 10.0  # seconds that it may take


def first_step(folder: Path, config: Path = CONFIG, out: str = "runs/tiny_minigpt4") -> float:
    """Seconds. What compiles is kept in the folder. Raises RuntimeError with what the job said if it ends before."""
    told = folder / out / "metrics.jsonl"
    told.unlink(missing_ok=True)
    said = folder / "said"
    environment = os.environ | {"MMJAX_COMPILATION_CACHE": str(folder / "compiled")}
    begun = time.perf_counter()
    with said.open("wb") as log:
        job = subprocess.Popen([sys.executable, ROOT / "train.py", "--config", config], cwd=folder, env=environment,
                               stdout=log, stderr=log)
    try:
        while not (told.exists() and told.stat().st_size):
            if job.poll() is not None or time.perf_counter() - begun > PATIENCE:
                raise RuntimeError(f"{config.name} made no first step in {PATIENCE} s, or ended before with status "
                                   f"{job.poll()}:\n{said.read_text()[-4000:]}")
            time.sleep(0.01)
        return time.perf_counter() - begun
    finally:
        job.kill()
        job.wait()


def start(size: Size, rounds: int, names: Sequence[str]) -> list[Row]:
    """Of the default job, whatever the size; the warm figure is the median of three."""
    with tempfile.TemporaryDirectory() as folder:
        times = [first_step(Path(folder)) for _ in range(4)]
    warm = sorted(times[1:])[1]
    return [Row("start-up, the first time", "s", times[0], lower=True, note="converts towers, draws scenes, compiles"),
            Row("start-up, warm", "s", warm, lower=True, note=f"to be {WARM:.0f} s at most")]


PARTS = {"startup": start}
