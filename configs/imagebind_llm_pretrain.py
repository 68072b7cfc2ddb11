"""ImageBind-LLM 7B, pretraining: trains the bind network, queries and gates on images with captions.

    python convert_weights.py imagebind-llm --imagebind imagebind_huge.pth --llm LLAMA_FOLDER \\
        --out checkpoints/imagebind-llm-7b
    python train.py --config configs/imagebind_llm_pretrain.py --data.path pretrain.yaml

The original's recipe (imagebind_LLM/exps/pretrain.sh): 8 GPUs x batch 4, 150 epochs of a fiftieth of the data each, 5
of them warm-up, learning rate 1e-4 x 32 / 256. Set `optim.steps_per_epoch` to images / 50 / 32 of your data, and
`optim.warmup_steps` to five times that; the value here is for 4.8 million images.
Weights: 7.9 billion frozen parameters, 15.9 GB in bfloat16; 608 million trained ones, 7.3 GB with optimizer state.

Memory and time (compiled with libtpu 0.0.42):

    mmjax plan --config configs/imagebind_llm_pretrain.py --topology v5e:4x4 --mesh.fsdp 16
        1.98 of 15.75 GiB a device; a step takes 279 ms at least (links)
"""

from mmjax.config import ALPACA, ALPACA_INPUT, DataConfig, OptimConfig, RunConfig, TextConfig, WeightsConfig

STEPS_PER_EPOCH = 3_000


def config() -> RunConfig:
    return RunConfig(
        out="runs/imagebind_llm_pretrain",
        weights=WeightsConfig(checkpoint="checkpoints/imagebind-llm-7b", family="imagebind_llm"),
        phase="pretrain",
        data=DataConfig(format="imagebind_llm_pretrain", path="data/pretrain.yaml", random_crop=True, batch_size=32),
        text=TextConfig(
            prompt_template=ALPACA, input_template=ALPACA_INPUT, end_sym="</s>", joint=True, max_txt_len=96),
        optim=OptimConfig(
            schedule="half_cycle", init_lr=1.25e-5, min_lr=0.0, warmup_steps=5 * STEPS_PER_EPOCH, epochs=150,
            steps_per_epoch=STEPS_PER_EPOCH, weight_decay=0.05, beta2=0.95, average=True),
        remat=True,
        save_every=2 * STEPS_PER_EPOCH,
    )
