"""MiniGPT-v2 on Llama-2 7B chat at 448 px: trains the projector and LoRA on q and v.

    python train.py --config configs/minigpt_v2.py --data.path data/captions

The learning rates of the original's fine-tuning (train_configs/minigptv2_finetune.yaml): 50 epochs of 1,000 steps, 1e-5
to 1e-6. The original mixes 22 data sets; this trains on one in the CC-SBU-align layout. Convert the checkpoint with
`--lora FILE` (to continue from the released one) or `--lora-rank 64` (new LoRA), without `--qformer`.

Memory and time (compiled with libtpu 0.0.42):

    mmjax plan --config configs/minigpt_v2.py --topology v5e:2x2 --mesh.fsdp 4
        6.01 of 15.75 GiB a device; a step takes 288 ms at least (arithmetic)
"""

from mmjax.config import DataConfig, OptimConfig, RunConfig, TextConfig, WeightsConfig


def config() -> RunConfig:
    return RunConfig(
        out="runs/minigpt_v2",
        weights=WeightsConfig(checkpoint="checkpoints/minigpt-v2-7b", family="minigpt4"),
        data=DataConfig(
            path="data/captions",
            prompts=("<Img><ImageHere></Img> [caption] Please describe this image as detailed as possible. ",),
            batch_size=4,
        ),
        text=TextConfig(prompt_template="[INST] {} [/INST]", end_sym="</s>", max_txt_len=1024),
        optim=OptimConfig(
            init_lr=1e-5, min_lr=1e-6, warmup_lr=1e-6, warmup_steps=1000, epochs=50, steps_per_epoch=1000),
        trained=(r"projector/.*", r"llm/.*/lora_[ab]"),
        remat=True,
        save_every=1000,
    )
