"""MiniGPT-4 7B, stage 1: trains the projector from random values on images and cleaned captions, without a prompt.

    python train.py --config configs/minigpt4_stage1.py

The original's recipe (train_configs/minigpt4_stage1_pretrain.yaml): 4 epochs of 5,000 steps, 64 images a GPU on four
GPUs, 1e-4 to 8e-5. The data are webdataset shards as img2dataset writes them, LAION and CC with SBU as 115 to 14. All
headers are read when the first run starts, some 16,000 images a second: minutes for CC and SBU, two hours for all of
LAION. Their index is then stored in ~/.cache/mmjax/tars (the environment variable MMJAX_TAR_INDEX names another
folder), and later runs start within minutes.

Memory and time (compiled with libtpu 0.0.42):

    mmjax plan --config configs/minigpt4_stage1.py --topology v5e:4x4 --mesh.fsdp 16
        2.36 of 15.75 GiB a device; a step takes 329 ms at least (arithmetic)
"""

from mmjax.config import DataConfig, OptimConfig, RunConfig, Source, TextConfig, WeightsConfig


def config() -> RunConfig:
    return RunConfig(
        out="runs/minigpt4_stage1",
        weights=WeightsConfig(checkpoint="checkpoints/minigpt4-7b", family="minigpt4"),
        data=DataConfig(
            mixture=(Source("webdataset", "data/laion/{00000..10488}.tar", 115),
                     Source("webdataset", "data/cc_sbu/{00000..01255}.tar", 14)),
            clean_captions=True,
            batch_size=256,
        ),
        text=TextConfig(end_sym="\n", max_txt_len=32),
        optim=OptimConfig(init_lr=1e-4, min_lr=8e-5, warmup_lr=1e-6, warmup_steps=5000, epochs=4, steps_per_epoch=5000),
        remat=True,
        save_every=1000,
    )
