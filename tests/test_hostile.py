"""Small files that would take a machine down: a few of `benchmarks/hostile.py`, each read in a process of its own."""

import subprocess
import sys

from benchmarks import hostile
from benchmarks.machine import ROOT

READ = ("rate_41_large.wav", "rate_44101_large.wav", "thin_1x3000.png", "refs.p")
REFUSED = ("rate_1_large.wav", "tile.tiff", "frame.gif", "claim.npy", "tuples_key.p", "doubling_deep.p")


def test_memory_is_bounded(tmp_path):
    """The command fails for a process that dies, that raises anything but a refusal, and above 500 MB."""
    made = dict(hostile.cases())
    for name in (*READ, *REFUSED):
        (tmp_path / name).write_bytes(made[name]())
    done = subprocess.run([sys.executable, "benchmarks/hostile.py", *(tmp_path / name for name in (*READ, *REFUSED))],
                          cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, counts = done.stdout.splitlines()
    assert counts == f"read {len(READ)}, refused {len(REFUSED)}"
    assert [line.split()[0] for line in lines] == [*READ, *REFUSED]
    assert ["refused: " in line for line in lines] == [False] * len(READ) + [True] * len(REFUSED)


def test_what_takes_more_is_told(tmp_path):
    (tmp_path / "a.npy").write_bytes(hostile.npy("'<f4'", "(2,)"))
    done = subprocess.run([sys.executable, "benchmarks/hostile.py", "--most", "1", tmp_path / "a.npy"], cwd=ROOT,
                          capture_output=True, text=True, timeout=240)
    assert done.returncode == 1 and "more than 1 MB: a.npy" in done.stderr
