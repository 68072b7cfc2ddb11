"""Injects faults into runs and checks that nothing is lost.

    python benchmarks/faults.py                  about 160 processes, a quarter of an hour on two busy cores
    python benchmarks/faults.py --series 50      seeded from 0 on; --seed begins elsewhere

Each run is a fork of one process that has imported everything, and trains a small MiniGPT-4 for 24 steps with the real
`mmjax train`. It is killed (SIGKILL) several times, at random times or at critical points of the program, and resumed.
It must end with the same arrays, metrics and data errors, bit for bit, as an undisturbed run, and no process may leave
less saved than it started with. The other faults are: one and many SIGTERM, a full disk (by a limit on the size of
files, and on a small tmpfs where mounting is allowed), a read-only folder, and a changed or truncated file in the
newest checkpoint, each file in turn.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.faults import harness


def small_disk(campaign: harness.Campaign) -> str:
    """Runs on a file system that is full, then read-only, then large enough; returns a summary."""
    out = campaign.new()
    out.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=220k", "none", str(out)]
    if subprocess.run(mount, capture_output=True).returncode:
        campaign.counts.runs -= 1
        return "not done: mounting is not allowed here"
    results = []
    try:
        for options, expected in (("size=220k", "No space left on device"), ("remount,ro", "Read-only file system")):
            if "remount" in options:
                subprocess.run(["mount", "-o", options, str(out)], check=True)
            end = campaign.bench.run(out, options=campaign.options)
            results.append(f"status {end.status} at steps {harness.whole(out)}")
            if end.status != 2 or expected not in end.log or "Traceback" in end.log:
                campaign.counts.problems.append(f"{options}: status {end.status}\n{end.log}")
        subprocess.run(["mount", "-o", "remount,rw,size=50m", str(out)], check=True)
        campaign.finish(out)
    finally:
        subprocess.run(["umount", str(out)], check=True)
    return ", ".join(results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", type=int, default=12, help="runs that are killed seven times each")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mmjax-faults-") as folder:
        bench = harness.Bench(Path(folder))
        campaign = harness.Campaign(bench)
        print(f"the untouched run: {campaign.steps} steps in {campaign.seconds:.1f} s")
        for number in range(options.series):
            campaign.series(np.random.default_rng([options.seed, number]), faults=6)
            print(f"{campaign.counts.kills} kills, {campaign.counts.same} of {campaign.counts.runs} runs the same",
                  flush=True)
        random = np.random.default_rng([options.seed, options.series])
        for name in ("SIGTERM", "SIGTERM storm", "full disk"):
            for _ in range(2):
                campaign.named(name, tuple(map(int, random.integers(8, size=4))))
        for file in harness.damageable(campaign.untouched):
            for cut in (False, True):
                campaign.damaged(file, random, cut)
        print(f"a small disk: {small_disk(campaign)}")
        bench.close()
    counts = campaign.counts
    for what, number in sorted(counts.ended.items()):
        print(f"{number:5} {what}")
    print(f"{counts.kills} kills; {counts.runs} runs, {counts.same} of them ended as the untouched one; "
          f"{counts.lost} lost anything; {time.monotonic() - begun:.0f} s")
    if counts.problems:
        sys.exit("\n".join(counts.problems))


if __name__ == "__main__":
    main()
