"""What devices exchange in a training step, read off the compiled program: eight_traffic.py."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def on_eight_devices(**environment):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/eight_traffic.py"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_of_virtual_devices():
    on_eight_devices(JAX_PLATFORMS="cpu")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra `tpu`)")
def test_of_a_tpu_slice():
    on_eight_devices(TPU="v5e:2x4", JAX_DISABLE_MOST_OPTIMIZATIONS="0", TPU_SKIP_MDS_QUERY="1")
