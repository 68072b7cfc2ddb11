"""Several processes of one run: how they are told of each other, and that they do what one does."""

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from mmjax.checkpoints import frozen as frozen_weights
from mmjax.checkpoints import training as training_checkpoints
from mmjax.config import HostsConfig
from mmjax.training import distributed
from tests import small
from tests.processes import free_port

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("environment", "launcher"), [
    ({}, None), ({"SLURM_NTASKS": "1"}, None), ({"SLURM_NTASKS": "4"}, "SLURM"),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"), ({"OMPI_COMM_WORLD_SIZE": "many"}, None)])
def test_launchers_are_known_by_their_environment(environment, launcher):
    assert distributed.launcher(environment | {"JAX_PLATFORMS": "cpu"}) == launcher


@pytest.mark.parametrize(("cfg", "message"), [
    (HostsConfig(process=1), "hosts.coordinator, hosts.processes: name all of"),
    (HostsConfig("here:1", processes=2), "hosts.process: name all of"),
    (HostsConfig("here:1", 2, 2), "hosts.process = 2: from 0 to hosts.processes - 1 = 1"),
])
def test_half_a_configuration_is_refused(cfg, message):
    with pytest.raises(ValueError, match=message):
        distributed.initialize(cfg)


def test_one_process_needs_nobody():
    distributed.initialize(HostsConfig())
    done = []
    distributed.run_on_primary(lambda: done.append(1), "work", timeout=1)
    assert done == [1] and distributed.is_primary()
    assert distributed.all_sum(2, 3) == [2, 3] and distributed.all_gather_objects([{"a": 1}]) == [{"a": 1}]


@functools.cache
def broken_images():
    folder = Path(tempfile.mkdtemp(prefix="mmjax-tests-")) / "images"
    atexit.register(shutil.rmtree, folder.parent)
    shutil.copytree(small.images(), folder)
    file = folder / "image" / "2.jpg"
    file.write_bytes(file.read_bytes()[:100])
    return folder


def start(out, mesh, process=0, processes=1, devices=8, port=0, kill=()):
    """A process of a run of ten steps; one of its images is broken."""
    words = (small.checkpoint(), broken_images(), out, port, process, processes, devices, mesh, *kill)
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "one_of_two.py"), *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def both(out, mesh, kill=()):
    """Two processes of four devices each; their exit statuses and what they printed."""
    port = free_port()
    running = [start(out, mesh, process, 2, 4, port, kill) for process in range(2)]
    try:
        printed = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:  # none of them stays behind in the folder; one that has ended is left alone
            process.kill()
    return [process.returncode for process in running], "\n".join(printed)


def lines(out, name="metrics.jsonl"):
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


@pytest.mark.extended
def test_two_processes_are_killed_and_go_on_as_one_that_never_stopped(tmp_path):
    """Both see the broken image's replacement, the first one writes, and the second time they go on at step 4."""
    alone = start(tmp_path / "alone", "4,2,1")
    printed = alone.communicate(timeout=300)[0]
    assert alone.returncode == 0, printed
    codes, printed = both(tmp_path / "two", "4,2,1", kill=("kill", 6))
    assert codes == [-9, -9], printed
    assert [line["step"] for line in lines(tmp_path / "two")] == list(range(7))
    codes, printed = both(tmp_path / "two", "4,2,1")
    assert codes == [0, 0], printed
    assert "Resuming at step 4 of 10" in printed
    expected, found = lines(tmp_path / "alone"), lines(tmp_path / "two")
    assert [line["step"] for line in found] == list(range(10))
    np.testing.assert_allclose([line["loss"] for line in found], [line["loss"] for line in expected], rtol=1e-6)
    errors, again = (lines(tmp_path / name, "data_errors.jsonl") for name in ("alone", "two"))
    assert errors == again and len(errors) > 1
    one, two = (training_checkpoints.trained(tmp_path / name / "checkpoints") for name in ("alone", "two"))
    for path, leaf in one.items():
        np.testing.assert_allclose(two[path], leaf, atol=2e-6, err_msg=path)


class Ones:
    """A parameter of ones, a layer at a time; see `mmjax.checkpoints.frozen.SlicedParameter`."""

    dtype, rows = np.dtype(np.float16), 1

    def __init__(self, *shape):
        self.shape = shape

    def slices(self):
        for _ in range(self.shape[0]):
            yield np.ones((1, *self.shape[1:]), self.dtype)


@pytest.mark.extended
def test_each_process_reads_its_part_of_the_frozen_weights(tmp_path):
    parameters = {"llm/layers/attn/q/w": Ones(2, 2048, 16, 128), "llm/layers/attn/o/w": Ones(2, 16, 128, 2048),
                  "llm/layers/mlp/up/w": Ones(2, 2048, 5504), "llm/layers/mlp/down/w": Ones(2, 5504, 2048)}
    frozen_weights.save(tmp_path / "weights", parameters)
    whole = sum(np.prod(leaf.shape) * 2 for leaf in parameters.values())
    port = free_port()
    running = [subprocess.Popen([sys.executable, str(ROOT / "tests" / "reads.py"), tmp_path / "weights", str(port), n],
                                cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                env=os.environ | {"PYTHONPATH": str(ROOT)}) for n in "01"]
    for process in running:
        printed = process.communicate(timeout=300)[0]
        assert process.returncode == 0, printed
        found = int(next(line for line in printed.splitlines() if line.startswith("read ")).split()[1])
        assert 0.49 * whole < found < 0.6 * whole  # on a busy machine some chunks are read twice


WAITING = """
import sys, time
from mmjax.config import HostsConfig
from mmjax.training import distributed
distributed.initialize(HostsConfig(sys.argv[1], 2, int(sys.argv[2]), timeout=120))
if distributed.is_primary():
    distributed.barrier("save the last state", 2)
time.sleep(6)
"""


def test_who_waits_in_vain_says_for_what():
    address = f"localhost:{free_port()}"
    first, second = [subprocess.Popen([sys.executable, "-c", WAITING, address, n], cwd=ROOT, stderr=subprocess.PIPE,
                                      text=True) for n in "01"]
    errors = first.communicate(timeout=120)[1]
    second.communicate(timeout=120)
    assert first.returncode != 0
    assert "Process 0 of 2 waited 2 s for the others (save the last state)" in errors
