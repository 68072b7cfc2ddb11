"""What needs eight (virtual) devices runs in a process of its own, for there is one here."""

import importlib.util

import pytest

from tests.processes import on_eight_devices

FILES = ("eight_devices.py", "eight_answers.py", "eight_plan.py", "eight_traffic.py")


def test_training():
    on_eight_devices("not extended", "eight_devices.py")


@pytest.mark.extended
def test_generation_and_compiled_programs():
    """Texts and sizes are those of programs that are compiled here, and not read from the cache."""
    on_eight_devices("extended", *FILES, JAX_ENABLE_COMPILATION_CACHE="false")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra `tpu`)")
def test_traffic_of_a_tpu_slice():
    on_eight_devices("extended", "eight_traffic.py", TPU="v5e:2x4", JAX_DISABLE_MOST_OPTIMIZATIONS="0",
                     TPU_SKIP_MDS_QUERY="1")
