"""How much one of two processes reads of frozen weights that are cut into eight.

Started by tests/training/test_distributed.py:

    python tests/reads.py WEIGHTS PORT PROCESS

Prints the bytes read from disk.
"""

import sys

import jax
import jax.numpy as jnp
import tensorstore as ts

jax.config.update("jax_num_cpu_devices", 4)

from mmjax import sharding  # noqa: E402
from mmjax.checkpoints import frozen as frozen_weights  # noqa: E402
from mmjax.config import HostsConfig, MeshConfig  # noqa: E402
from mmjax.families import FAMILIES  # noqa: E402
from mmjax.training import distributed  # noqa: E402
from tests import tiny  # noqa: E402

folder, port, process = sys.argv[1:]
distributed.initialize(HostsConfig(f"localhost:{port}", 2, int(process), timeout=120))
mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=-1))
stored = frozen_weights.metadata(folder)
places = sharding.shardings(stored, FAMILIES["minigpt4"].all_axes(tiny.MINIGPT4), mesh)
wanted = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[path]) for path, leaf in stored.items()}


def read() -> int:
    found = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(metric["values"][0]["value"] for metric in found)


before = read()
leaves = jax.block_until_ready(frozen_weights.restore(folder, wanted))
assert all(bool(jnp.all(leaf == 1)) for leaf in jax.tree.leaves(leaves))
print("read", read() - before)
