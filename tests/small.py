"""A tiny converted MiniGPT-4 and a folder of scenes, for tests that need something real to load or to train."""

import functools
import tempfile
from pathlib import Path

from mmjax.config import DataConfig, OptimConfig, RunConfig, TextConfig, WeightsConfig
from mmjax.convert import write
from mmjax.data import scenes

GOLDEN = Path(__file__).parent / "golden" / "minigpt4"
PROMPT = "<Img><ImageHere></Img> Describe this image in detail."


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="mmjax-tests-")


@functools.cache
def checkpoint() -> Path:
    """The reference set's MiniGPT-4, converted (images of 56 pixels, vocabulary 600)."""
    ckpt, out = GOLDEN / "ckpt", Path(_folder().name) / "checkpoint [1]"  # a name that is a pattern, too
    write.command("minigpt4")(ckpt / "eva_vit.pth", ckpt / "llama_hf", out, qformer=ckpt / "blip2_pretrained.pth",
                              projector=ckpt / "minigpt4_proj.pth", arch=GOLDEN / "model_sizes.json")
    return out


@functools.cache
def images() -> Path:
    """Eight scenes in the CC-SBU-align layout."""
    out = Path(_folder().name) / "images"
    scenes.write(out, scenes.scenes("train", 8))
    return out


def run_config(out: Path, steps: int = 4, **changes) -> RunConfig:
    defaults = dict(
        out=str(out),
        weights=WeightsConfig(checkpoint=str(checkpoint()), dtype="float32"),
        data=DataConfig(path=str(images()), prompts=(PROMPT,), batch_size=2, length_multiple=64),
        text=TextConfig(prompt_template="###Human: {} ###Assistant: ", end_sym="###", max_txt_len=32),
        optim=OptimConfig(init_lr=1e-3, warmup_steps=1, epochs=1, steps_per_epoch=steps),
        log_every=1, save_every=2)
    return RunConfig(**(defaults | changes))
