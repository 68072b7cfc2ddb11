"""One of the processes of a run, each with its own virtual devices; started by tests/training/test_distributed.py.

    python tests/one_of_two.py CHECKPOINT IMAGES OUT PORT PROCESS PROCESSES DEVICES MESH [kill|term STEP]

MESH is data,fsdp,tensor. With `kill` each process ends by SIGKILL behind a step; with `term` the second gets SIGTERM.
"""

import dataclasses
import os
import signal
import sys

import jax

from mmjax.config import DataConfig, HostsConfig, MeshConfig, OptimConfig, RunConfig, TextConfig, WeightsConfig
from mmjax.training import metrics_log, run

checkpoint, images, out, port, process, processes, devices, mesh, *kill = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", int(devices))
CONFIG = RunConfig(
    out=out,
    weights=WeightsConfig(checkpoint=checkpoint, dtype="float32"),
    data=DataConfig(path=images, prompts=("<Img><ImageHere></Img> What is it?",), batch_size=8, length_multiple=64,
                    max_bad_share=0.5),
    text=TextConfig(prompt_template="###Human: {} ###Assistant: ", end_sym="###", max_txt_len=32),
    optim=OptimConfig(init_lr=1e-3, warmup_steps=1, epochs=1, steps_per_epoch=10),
    mesh=MeshConfig(*map(int, mesh.split(","))),
    log_every=1, save_every=4)
if int(processes) > 1:
    hosts = HostsConfig(f"localhost:{port}", int(processes), int(process), 120)
    CONFIG = dataclasses.replace(CONFIG, hosts=hosts)
if kill:
    add = metrics_log.MetricsLog.add

    def killed(self, item, *rest):
        add(self, item, *rest)
        if item.number == int(kill[1]) and (kill[0] == "kill" or int(process) == 1):
            os.kill(os.getpid(), signal.SIGKILL if kill[0] == "kill" else signal.SIGTERM)

    metrics_log.MetricsLog.add = killed
run.train(CONFIG)
