"""One device, eight of them, and two processes of four train alike, on every mesh. Minutes: `pytest -m slow`.

The other tiers have one mesh of each: test_eight_devices.py (eight_devices.py) and training/test_distributed.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.processes import free_port

ROOT = Path(__file__).parents[1]


def start(*words):
    return subprocess.Popen([sys.executable, str(ROOT / "tests" / "meshes.py"), *map(str, words)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)})


def losses(process):
    """{mesh: losses of ten steps}."""
    printed, errors = process.communicate(timeout=1500)
    assert process.returncode == 0, errors
    return json.loads(next(line for line in printed.splitlines() if line.startswith("{")))


@pytest.mark.slow
def test_every_mesh_trains_as_one_device():
    alone = losses(start(1))["1,1,1"]
    eight = losses(start(8))
    port = free_port()
    first, second = [start(4, port, process, 2) for process in range(2)]
    two = losses(first)
    assert losses(second) == two
    assert two.keys() == eight.keys() == {"1,4,2", "1,8,1", "2,2,2", "2,4,1", "4,1,2", "4,2,1", "8,1,1"}
    for mesh in eight:
        np.testing.assert_allclose(eight[mesh], alone, rtol=1e-6, err_msg=f"8 devices, {mesh}")
        np.testing.assert_allclose(two[mesh], alone, rtol=1e-6, err_msg=f"2 processes of 4, {mesh}")
