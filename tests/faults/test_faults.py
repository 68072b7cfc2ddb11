"""Runs that are killed, told to end, or have no room, end as the one that was left alone.

`pytest -m extended` does a few of them, `pytest -m faults` many, which takes minutes; `benchmarks/faults.py` does more
and prints the counts.
"""

import numpy as np
import pytest

from mmjax import files
from mmjax.checkpoints import training as training_checkpoints
from mmjax.training import preemption
from tests.faults import harness, worker
from tests.training import test_distributed


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    made = harness.Bench(tmp_path_factory.mktemp("faults"))
    yield made
    made.close()


def check(counts):
    assert not counts.problems, "\n".join(counts.problems)
    assert counts.same == counts.runs
    assert counts.lost == 0


@pytest.mark.extended
def test_killed_in_a_save_then_told_to_end_then_without_room(bench):
    campaign = harness.Campaign(bench, ("--optim.steps-per-epoch", "9"))
    out = campaign.new()
    campaign.fault(out, "killed behind a seal", 1)
    assert harness.whole(out) == [3]
    campaign.fault(out, "SIGTERM storm", 1)
    kept, last = harness.whole(out)
    # when step 4 is logged, step 5 has been dispatched; the signals come from outside: behind it, or behind the next
    assert kept == 3 and last in (6, 7)
    campaign.fault(out, "full disk", 0)
    campaign.finish(out)
    check(campaign.counts)
    assert campaign.counts.ended == {"killed behind a seal": 1, "SIGTERM storm": 1, "full disk": 1}


def test_a_refusal_for_another_reason_is_not_the_fault(bench, tmp_path):
    """The lock has the status of a full disk, and is called by its name."""
    campaign = harness.Campaign.__new__(harness.Campaign)  # without the run that is left alone
    campaign.bench, campaign.options, campaign.counts = bench, (), harness.Counts()
    with files.exclusive_lock(tmp_path):
        campaign.fault(tmp_path, "full disk", 0)
    assert campaign.counts.ended == {"otherwise": 1}
    (problem,) = campaign.counts.problems
    assert "full disk 0: status 2" in problem and f"Another process is writing in {tmp_path}" in problem


@pytest.mark.faults
def test_many_faults(bench, tmp_path):
    assert set(worker.FAULTS) == {*harness.KILLS, "full disk", "SIGTERM", "SIGTERM storm"}
    campaign, random = harness.Campaign(bench), np.random.default_rng(0)
    for _ in range(10):
        campaign.series(random, faults=6)
    for name, calls in (("SIGTERM", (0, 3, 5, 7)), ("SIGTERM storm", (1, 4, 4, 8)), ("full disk", (0, 2, 5, 7))):
        campaign.named(name, calls)
    for file in harness.damageable(campaign.untouched):
        for cut in (False, True):
            campaign.damaged(file, random, cut)
    check(campaign.counts)
    assert campaign.counts.kills >= 50


@pytest.mark.faults
def test_two_processes_end_behind_the_same_step_when_one_of_them_is_told_to(tmp_path):
    codes, printed = test_distributed.both(tmp_path / "told", "4,2,1", ("term", 1))
    assert codes == [preemption.STATUS] * 2, printed
    step = training_checkpoints.saved(tmp_path / "told" / "checkpoints")[-1]
    assert 2 <= step < 10 and printed.count(f"Saved at step {step};") == 2
    for folder in ("told", "alone"):
        codes, printed = test_distributed.both(tmp_path / folder, "4,2,1")
        assert codes == [0, 0], printed
    assert harness.differences(*(harness.outcome(tmp_path / folder) for folder in ("told", "alone"))) == []
