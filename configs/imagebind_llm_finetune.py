"""ImageBind-LLM 7B, fine-tuning: trains norms, biases and LoRA of the language model on instructions.

    python train.py --config configs/imagebind_llm_finetune.py --data.path finetune.yaml

The original's recipe (imagebind_LLM/exps/finetune.sh): 8 GPUs x batch 4, 4 epochs, 1 of them warm-up, learning rate
1e-3 x 32 / 256. It starts from the pretraining run; to start from a released adapter (7B-pretrained.pth) convert it
with `--adapter` and set `weights.start_from` to None. Set `optim.steps_per_epoch` to rows / 32 of your data.
Weights: 8.5 billion frozen parameters, 17.1 GB in bfloat16; 41 million trained ones, 0.5 GB with their optimizer state.

Memory and time (compiled with libtpu 0.0.42):

    mmjax plan --config configs/imagebind_llm_finetune.py --topology v5e:4x4 --mesh.fsdp 16
        2.65 of 15.75 GiB a device; a step takes 310 ms at least (links)
"""

from mmjax.config import ALPACA, ALPACA_INPUT, DataConfig, OptimConfig, RunConfig, TextConfig, WeightsConfig

STEPS_PER_EPOCH = 6_500  # Alpaca's 52,000 rows and LLaVA-Instruct's 158,000


def config() -> RunConfig:
    return RunConfig(
        out="runs/imagebind_llm_finetune",
        weights=WeightsConfig(checkpoint="checkpoints/imagebind-llm-7b", family="imagebind_llm",
                              start_from="runs/imagebind_llm_pretrain"),
        phase="finetune",
        data=DataConfig(format="imagebind_llm_finetune", path="data/finetune.yaml", random_crop=True, batch_size=32),
        text=TextConfig(
            prompt_template=ALPACA, input_template=ALPACA_INPUT, end_sym="</s>", joint=True, max_txt_len=512),
        optim=OptimConfig(
            schedule="half_cycle", init_lr=1.25e-4, min_lr=0.0, warmup_steps=STEPS_PER_EPOCH, epochs=4,
            steps_per_epoch=STEPS_PER_EPOCH, weight_decay=0.02, beta2=0.95, average=True),
        remat=True,
        save_every=STEPS_PER_EPOCH,
    )
