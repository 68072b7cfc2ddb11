"""LLaMA-Adapter 7B (v1): trains prompts of the top 30 layers and their gates on Alpaca's instructions.

    python convert_weights.py llama-adapter --llm LLAMA_FOLDER --out checkpoints/llama-adapter-7b
    python train.py --config configs/llama_adapter.py --data.path alpaca.yaml

`alpaca.yaml` is one line, `META: [alpaca_data.json]`. The original's recipe (alpaca_finetuning_v1/finetuning.sh):
8 GPUs x batch 4, 5 epochs, 2 of them warm-up, learning rate 9e-3 x 32 / 256. Set `optim.steps_per_epoch` to
rows / 32 of your data.
Weights: 6.7 billion frozen parameters, 13.5 GB in bfloat16; 1.2 million trained ones, 15 MB with their optimizer state.

Memory and time (compiled with libtpu 0.0.42):

    mmjax plan --config configs/llama_adapter.py --topology v5e:4x4 --mesh.fsdp 16
        1.76 of 15.75 GiB a device; a step takes 284 ms at least (links)
"""

from mmjax.config import ALPACA, ALPACA_INPUT, DataConfig, OptimConfig, RunConfig, TextConfig, WeightsConfig

STEPS_PER_EPOCH = 1_625  # Alpaca's 52,002 rows


def config() -> RunConfig:
    return RunConfig(
        out="runs/llama_adapter",
        weights=WeightsConfig(checkpoint="checkpoints/llama-adapter-7b", family="llama_adapter"),
        phase="pretrain",
        data=DataConfig(format="imagebind_llm_finetune", path="data/alpaca.yaml", batch_size=32),
        text=TextConfig(
            prompt_template=ALPACA, input_template=ALPACA_INPUT, end_sym="</s>", joint=True, max_txt_len=512),
        optim=OptimConfig(
            schedule="half_cycle", init_lr=1.125e-3, min_lr=0.0, warmup_steps=2 * STEPS_PER_EPOCH, epochs=5,
            steps_per_epoch=STEPS_PER_EPOCH, weight_decay=0.02, beta2=0.95, average=True),
        remat=True,
        save_every=STEPS_PER_EPOCH,
    )
