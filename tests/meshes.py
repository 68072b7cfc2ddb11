"""Ten training steps on every mesh that divides the tiny model, as JSON: {"data,fsdp,tensor": losses}.

    python tests/meshes.py DEVICES [PORT PROCESS PROCESSES]

DEVICES are virtual ones of each process. Started by test_meshes.py.
"""

import itertools
import json
import sys

import jax

devices, *others = map(int, sys.argv[1:])
jax.config.update("jax_num_cpu_devices", devices)

from mmjax import sharding, trees  # noqa: E402
from mmjax.config import HostsConfig, MeshConfig, OptimConfig  # noqa: E402
from mmjax.families import FAMILIES, minigpt4  # noqa: E402
from mmjax.training import distributed, optim, steps  # noqa: E402
from tests import tiny  # noqa: E402

ROWS, STEPS = 8, 10
RULES = (*minigpt4.TRAINED, "llm/norm/.*", "llm/layers/attn/[qv]/w")
ADAMW = optim.optimizer(OptimConfig(init_lr=1e-3, min_lr=1e-3, warmup_steps=0))
MODULE = minigpt4.MiniGPT4(tiny.MINIGPT4)
AXES = FAMILIES["minigpt4"].all_axes(tiny.MINIGPT4)


def train(mesh):
    """The losses; None if the mesh does not divide the model."""
    flat = trees.flatten(tiny.params("minigpt4", tiny.MINIGPT4))
    try:
        places = sharding.shardings(flat, AXES, mesh)
    except ValueError:
        return None
    with sharding.use_mesh(mesh):
        params = trees.unflatten({path: jax.device_put(leaf, places[path]) for path, leaf in flat.items()})
        trained, frozen = trees.split(params, trees.mask(params, RULES))
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        state = jax.tree.map(lambda leaf: leaf if leaf.ndim else jax.device_put(leaf, everywhere),
                             steps.start(trained, ADAMW, 0))
        step, rows, losses = steps.train_step(MODULE, ADAMW), sharding.process_local_rows(mesh, ROWS), []
        shards = sharding.num_shards(mesh, "batch")
        lists = sorted({row * shards // ROWS for row in rows})  # of images, one for each shard
        for seed in range(STEPS):
            batch = tiny.share_images(tiny.batch(ROWS, seed=seed), shards)
            own = jax.tree.map(lambda array: array[rows if len(array) == ROWS else lists], batch)
            state, metrics = step(state, frozen, sharding.put_batch(own, mesh, ROWS))
            losses.append(float(metrics["loss"]))
    return losses


if others:
    distributed.initialize(HostsConfig(f"localhost:{others[0]}", others[2], others[1], timeout=120))
count = jax.device_count()
found = {}
for data, fsdp in itertools.product((1, 2, 4, 8), repeat=2):
    if count % (data * fsdp) == 0:
        cfg = MeshConfig(data, fsdp, count // (data * fsdp))
        if (losses := train(sharding.make_mesh(cfg))) is not None:
            found[f"{cfg.data},{cfg.fsdp},{cfg.tensor}"] = losses
print(json.dumps(found))
