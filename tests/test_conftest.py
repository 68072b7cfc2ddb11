"""An XLA flag is set for the tests only where the installed XLA knows it."""

import os
import subprocess
import sys

from tests import conftest


def test_a_flag_that_xla_does_not_know_is_noticed():
    other = "--xla_of_another_year=false"
    known = conftest.known(conftest.FLAGS)  # a newer XLA may have dropped some
    assert conftest.are_known(known) and set(known) <= set(conftest.FLAGS)
    assert conftest.known((other, *conftest.FLAGS)) == known
    assert not conftest.are_known((other,))


def test_jax_starts_with_the_flags_of_the_tests():
    """Also those that conftest.py found in the environment."""
    done = subprocess.run([sys.executable, "-c", "import jax; print(jax.devices())"], env=os.environ | {
        "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
