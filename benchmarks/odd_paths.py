"""Checks the commands in folders with unusual names: each works as in a plain folder, or refuses the name.

    python benchmarks/odd_paths.py           prints a line for each of 66 names; ten seconds each
    python benchmarks/odd_paths.py 'exp [1]' only these names

Each name gets a new folder in which the reference set's tiny MiniGPT-4 is converted, trained for a step, resumed for
another, loaded, and its projector exported, all with the commands of `mmjax`. The parameters and the exported file must
be the same, bit for bit, as in a folder with a plain name; or each command with the name ends with status 2 and one
message, and writes nothing. The status is 1 if any name ends otherwise.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # read when jax is imported

from tests import odd_paths
from tests.odd_paths import Case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="instead of the ones listed in tests/odd_paths.py")
    cases = [Case(name) for name in parser.parse_args().names] or odd_paths.CASES
    wrong, counts = 0, {}
    with tempfile.TemporaryDirectory(prefix="mmjax-odd-") as folder:
        os.environ["MMJAX_COMPILATION_CACHE"] = str(Path(folder) / "compiled")
        (plain := Path(folder) / "plain").mkdir()
        expected = odd_paths.live(plain)
        for number, case in enumerate(cases):
            (root := Path(folder) / str(number)).mkdir()
            begun = time.monotonic()
            found = odd_paths.check(case, root, expected)
            counts[found] = counts.get(found, 0) + 1
            wrong += found != case.expected
            shown = ascii(case.name)
            if len(shown) > 40:
                shown = f"{shown[:20]}... ({len(case.name)} characters)"
            print(f"{shown:46} {found}  ({time.monotonic() - begun:.1f} s)", flush=True)
    print(f"{len(cases)} names: " + "; ".join(f"{count} {found.splitlines()[0]}" for found, count in counts.items()))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
