"""Scores. `steady` is for tests of generated cases: always the same ones, however busy the machine is."""

from hypothesis import settings

steady = settings(deadline=None, derandomize=True)
