"""What tests share that start processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def on_eight_devices(tier: str, *files: str, **environment: str) -> None:
    """Runs the tests of a tier (a marker expression) in one process, which their files give eight virtual devices."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", tier,
               *(f"tests/{name}" for name in files)]
    settings = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
