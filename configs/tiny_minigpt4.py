"""The embedded default: a small MiniGPT-4 that trains on a laptop CPU, without a download.

    python train.py --config configs/tiny_minigpt4.py

It converts the small encoders that are part of mmjax (in the released PyTorch formats), draws 3,000 scenes of one to
three shapes, trains only the projector (9,312 parameters), and is evaluated on captions and questions about held-out
scenes. The language model was trained on text alone.
"""

from importlib.resources import files

from mmjax.config import DataConfig, OptimConfig, RunConfig, ScenesConfig, TextConfig, WeightsConfig


def config() -> RunConfig:
    shipped = files("mmjax") / "assets" / "scenes"
    return RunConfig(
        out="runs/tiny_minigpt4",
        weights=WeightsConfig(
            checkpoint="runs/tiny_minigpt4/base",
            family="minigpt4",
            sources={
                "vit": str(shipped / "eva_vit.pth"),
                "qformer": str(shipped / "blip2_pretrained.pth"),
                "llm": str(shipped / "llama"),
                "arch": str(shipped / "arch.json"),
            },
            dtype="float32",
        ),
        data=DataConfig(
            path="runs/tiny_minigpt4/scenes",
            prompts=(
                "<Img><ImageHere></Img> Describe this image in detail.",
                "<Img><ImageHere></Img> Take a look at this image and describe what you notice.",
                "<Img><ImageHere></Img> Please provide a detailed description of the picture.",
                "<Img><ImageHere></Img> Could you describe the contents of this image for me?",
            ),
            batch_size=48,
            length_multiple=16,
            scenes=ScenesConfig(count=3000, held_out=200),
        ),
        text=TextConfig(prompt_template="###Human: {} ###Assistant: ", end_sym="###", max_txt_len=60),
        optim=OptimConfig(
            init_lr=1e-2, min_lr=0.0, warmup_lr=1e-4, warmup_steps=30, epochs=1, steps_per_epoch=300, weight_decay=0.0),
        save_every=100,
    )
