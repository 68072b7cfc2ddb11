"""Signals that tell a run to end."""

import os
import signal
import threading

import pytest

from mmjax.training import preemption


@pytest.fixture(autouse=True)
def as_before():
    """The handlers of this process, afterwards as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


def now(as_before):
    return {number: signal.getsignal(number) for number in as_before}


def test_nothing_happens_to_a_run_that_is_left_alone(as_before):
    with preemption.StopSignal(0) as notice:
        assert not notice.should_stop(1)
    assert now(as_before) == as_before


def test_sigterm_is_noted_and_further_ones_are_ignored(as_before, capfd):
    with pytest.raises(SystemExit) as ended, preemption.StopSignal(3) as notice:
        assert not notice.should_stop(4)
        for _ in range(20):
            os.kill(os.getpid(), signal.SIGTERM)
        assert notice.should_stop(5)
    assert ended.type is preemption.Preempted
    assert ended.value.code == preemption.STATUS == 75
    for _ in range(20):
        os.kill(os.getpid(), signal.SIGTERM)
    assert now(as_before) == as_before | {signal.SIGTERM: signal.SIG_IGN}
    said = capfd.readouterr().err
    assert said.count("SIGTERM: saving after the steps in progress.") == 1
    assert said.count("Saved at step 5; the same command resumes from there.") == 1


def test_the_first_ctrl_c_is_noted(as_before, capfd):
    with pytest.raises(KeyboardInterrupt), preemption.StopSignal(0) as notice:
        os.kill(os.getpid(), signal.SIGINT)
        assert notice.should_stop(7)
    said = capfd.readouterr().err
    assert "SIGINT: saving after the steps in progress; Ctrl-C again ends it at once." in said
    assert "Saved at step 7" in said
    assert now(as_before) == as_before


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_again_ends_it_at_once(as_before, first, capfd):
    with pytest.raises(KeyboardInterrupt), preemption.StopSignal(0):
        os.kill(os.getpid(), first)
        os.kill(os.getpid(), signal.SIGINT)
        if first == signal.SIGTERM:
            os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("it goes on")
    assert "Saved" not in capfd.readouterr().err


def test_what_goes_wrong_meanwhile_is_what_ends_the_run(as_before, capfd):
    with pytest.raises(OSError, match="disk"), preemption.StopSignal(0):
        os.kill(os.getpid(), signal.SIGTERM)
        raise OSError("disk")
    assert "Saved" not in capfd.readouterr().err


def test_a_signal_that_was_ignored_stays_so(as_before):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as behind `&` in a script
    with preemption.StopSignal(0) as notice:
        os.kill(os.getpid(), signal.SIGINT)
        assert not notice.should_stop(1)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_other_threads_leave_signals_alone(as_before):
    seen = []

    def work():
        with preemption.StopSignal(0) as notice:
            seen.extend((now(as_before), notice.should_stop(1)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [as_before, False]


def test_processes_that_have_found_each_other_ask_jax(as_before, monkeypatch):
    asked = []

    def reached(step):
        asked.append(step)
        return step == 2

    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("orbax.checkpoint.multihost.reached_preemption", reached)
    with pytest.raises(preemption.Preempted), preemption.StopSignal(0) as notice:
        assert now(as_before) == as_before  # JAX's own handler must stay
        assert [notice.should_stop(step) for step in (1, 2)] == [False, True]
    assert asked == [1, 2]
