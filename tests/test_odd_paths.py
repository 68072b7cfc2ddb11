"""A model below folders of odd names: some that are refused, and one life with `pytest -m faults`.

`benchmarks/odd_paths.py` takes all of `odd_paths.CASES`. tests/training/test_run.py compares runs below odd names with
others.
"""

import pytest

from tests import odd_paths, small
from tests.odd_paths import Case


@pytest.mark.faults
def test_a_model_lives_below_a_pattern(tmp_path):
    plain = odd_paths.converted(small.checkpoint())
    assert len(plain) > 20
    assert odd_paths.check(Case("[1] *?{x}/x[/b]~"), tmp_path, plain) == odd_paths.WORKS


@pytest.mark.parametrize("case", [case for case in odd_paths.CASES if case.expected == odd_paths.REFUSED],
                         ids=lambda case: ascii(case.name[:20]))
def test_a_name_that_cannot_be_is_refused_before_anything_is_written(tmp_path, case):
    assert odd_paths.check(case, tmp_path, {}) == odd_paths.REFUSED
