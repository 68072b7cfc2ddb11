"""A tiny converted MiniGPT-4, a folder of scenes and a finished run, for tests that need something real.

They are made once a session, by whichever process asks first (tests/conftest.py), and are not to be changed: copy them.
"""

import fcntl
import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from mmjax.config import DataConfig, OptimConfig, RunConfig, TextConfig, WeightsConfig
from mmjax.convert import write
from mmjax.data import scenes

GOLDEN = Path(__file__).parent / "golden" / "minigpt4"
PROMPT = "<Img><ImageHere></Img> Describe this image in detail."


@functools.cache
def _own_folder() -> tempfile.TemporaryDirectory:
    """For benchmarks, which use this file outside of a session of tests."""
    return tempfile.TemporaryDirectory(prefix="mmjax-tests-")


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """Returns the session's folder of this name, which `make` fills: one process does it, the others wait for it."""
    shared = Path(os.environ.get("MMJAX_TESTS_FOLDER") or _own_folder().name)
    out, done = shared / name, shared / f"{name}.done"
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            make(out)
            done.touch()
    return out


@functools.cache
def checkpoint() -> Path:
    """The reference set's MiniGPT-4, converted (images of 56 pixels, vocabulary 600)."""
    ckpt = GOLDEN / "ckpt"
    return made_once("checkpoint [1]", lambda out: write.command("minigpt4")(  # a name that is a pattern, too
        ckpt / "eva_vit.pth", ckpt / "llama_hf", out, qformer=ckpt / "blip2_pretrained.pth",
        projector=ckpt / "minigpt4_proj.pth", arch=GOLDEN / "model_sizes.json"))


@functools.cache
def images() -> Path:
    """Eight scenes in the CC-SBU-align layout."""
    return made_once("images", lambda out: scenes.write(out, scenes.scenes("train", 8)))


@functools.cache
def finished() -> Path:
    """A run of `run_config` that nothing disturbed, with checkpoints at steps 2 and 4."""
    from mmjax.training import run

    return made_once("finished", lambda out: run.train(run_config(out)))


def run_config(out: Path, steps: int = 4, **changes) -> RunConfig:
    defaults = dict(
        out=str(out),
        weights=WeightsConfig(checkpoint=str(checkpoint()), dtype="float32"),
        data=DataConfig(path=str(images()), prompts=(PROMPT,), batch_size=2, length_multiple=64),
        text=TextConfig(prompt_template="###Human: {} ###Assistant: ", end_sym="###", max_txt_len=32),
        optim=OptimConfig(init_lr=1e-3, warmup_steps=1, epochs=1, steps_per_epoch=steps),
        log_every=1, save_every=2)
    return RunConfig(**(defaults | changes))
