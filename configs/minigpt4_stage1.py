"""MiniGPT-4 7B, stage 1: the projector from a random start, image tokens and cleaned captions without a prompt.

    python train.py --config configs/minigpt4_stage1.py --data.path data/captions

The original's recipe (train_configs/minigpt4_stage1_pretrain.yaml): 4 epochs of 5,000 steps, 64 pictures a GPU on four
GPUs, 1e-4 to 8e-5. The data must lie in the CC-SBU-align layout (`filter_cap.json` and `image/`); the webdataset
shards of LAION and CC are not read yet.
"""

from mmjax.config import DataConfig, OptimConfig, RunConfig, TextConfig, WeightsConfig


def config() -> RunConfig:
    return RunConfig(
        out="runs/minigpt4_stage1",
        weights=WeightsConfig(checkpoint="checkpoints/minigpt4-7b"),
        data=DataConfig(path="data/captions", clean_captions=True, batch_size=256),
        text=TextConfig(end_sym="\n", max_txt_len=32),
        optim=OptimConfig(init_lr=1e-4, min_lr=8e-5, warmup_lr=1e-6, warmup_steps=5000, epochs=4, steps_per_epoch=5000),
        remat=True,
        save_every=1000,
    )
