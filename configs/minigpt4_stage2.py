"""MiniGPT-4 7B, stage 2: trains the projector of a stage-1 run on CC-SBU-align.

    python train.py --config configs/minigpt4_stage2.py --weights.start-from runs/minigpt4_stage1

The original's recipe (train_configs/minigpt4_stage2_finetune.yaml): 5 epochs of 200 steps, batch 12, 3e-5 to 1e-5.
Weights: 7.8 billion frozen parameters, 15.7 GB in bfloat16; 3.1 million trained ones with 38 MB of optimizer state.

Memory and time (compiled with libtpu 0.0.42):

    mmjax plan --config configs/minigpt4_stage2.py --topology v5e:2x2 --mesh.fsdp 4
        5.23 of 15.75 GiB a device; a step takes 229 ms at least (links)
"""

from mmjax.config import DataConfig, OptimConfig, RunConfig, TextConfig, WeightsConfig


def config() -> RunConfig:
    return RunConfig(
        out="runs/minigpt4_stage2",
        weights=WeightsConfig(checkpoint="checkpoints/minigpt4-7b", family="minigpt4"),
        data=DataConfig(
            path="data/cc_sbu_align",
            prompts=(
                "<Img><ImageHere></Img> Describe this image in detail.",
                "<Img><ImageHere></Img> Take a look at this image and describe what you notice.",
                "<Img><ImageHere></Img> Please provide a detailed description of the picture.",
                "<Img><ImageHere></Img> Could you describe the contents of this image for me?",
            ),
            batch_size=12,
        ),
        text=TextConfig(prompt_template="###Human: {} ###Assistant: ", end_sym="###", max_txt_len=160),
        optim=OptimConfig(init_lr=3e-5, min_lr=1e-5, warmup_lr=1e-6, warmup_steps=200, epochs=5, steps_per_epoch=200),
        remat="feed_forward",
    )
