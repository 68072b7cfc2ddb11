"""Wrote what lies beside it, with mmjax as it was when checkpoints had format 1 (commit dfdaf24):

    git worktree add /tmp/old dfdaf24 && cd /tmp/old
    JAX_PLATFORMS=cpu PYTHONPATH=. python .../tests/data_format1/make.py

    checkpoint/    a MiniGPT-4 with Q-Former and LoRA, random, converted
    pictures/      four pictures in the CC-SBU-align layout
    run/           a run of six steps that was killed in its fourth; the last checkpoint is of step 2
    expected.json  losses of the same run when nothing ended it, SHA-256 of the released tensors, and the versions
    expected.npz   the state with which it ended
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [os.getcwd(), str(HERE)]

import numpy as np  # noqa: E402
from instructions import instructions  # noqa: E402
from PIL import Image  # noqa: E402

import tests.conftest  # noqa: E402, F401  the compiler's settings
from mmjax import families  # noqa: E402
from mmjax.checkpoints import frozen as frozen_weights  # noqa: E402
from mmjax.checkpoints import training as training_checkpoints
from mmjax.config import DataConfig, OptimConfig, RunConfig, TextConfig, WeightsConfig  # noqa: E402
from mmjax.convert import llama, minigpt4, torch_file, write  # noqa: E402
from mmjax.convert.tables import backward  # noqa: E402
from mmjax.models.eva_vit import VitConfig  # noqa: E402
from mmjax.models.llama import LlamaConfig  # noqa: E402
from mmjax.models.qformer import QFormerConfig  # noqa: E402
from mmjax.training import metrics_log, run  # noqa: E402

VIT = VitConfig(image_size=14, patch=7, dim=8, depth=2, heads=2, hidden=12, table=2)
QFORMER = QFormerConfig(queries=2, dim=8, depth=2, heads=2, hidden=12)
LLAMA = LlamaConfig(vocab=600, depth=2, dim=16, heads=2, kv_heads=2, head_dim=8, hidden=24, lora_rank=2)
GOLDEN = Path("tests/golden/minigpt4/ckpt/llama_hf")
RULES = ("projector/.*", "qformer/.*", "llama/.*/lora_[ab]")
CONFIG = RunConfig(
    out="run", trained=RULES, weights=WeightsConfig(checkpoint="checkpoint", dtype="float32"),
    data=DataConfig(path="pictures", prompts=("<Img><ImageHere></Img> What is it?",), batch_size=2, length_multiple=64),
    text=TextConfig(prompt_template="###Human: {} ###Assistant: ", end_sym="###", max_txt_len=32),
    optim=OptimConfig(init_lr=1e-2, warmup_steps=1, epochs=2, steps_per_epoch=3, accumulate=2),
    log_every=1, save_every=2, keep=1, check_first_loss=False)


def released(folder: Path) -> dict[str, np.ndarray]:
    """Random released files, with the tensors of all of them."""
    random = np.random.default_rng(0)
    cfg = families.FAMILIES["minigpt4"].Config(VIT, QFORMER, LLAMA)
    params = {path: random.normal(1.0 if path.endswith("scale") else 0.0, 0.1, shape.shape).astype(np.float16)
              for path, shape in families.shapes("minigpt4", cfg).items()}
    parts = {"vit.pth": minigpt4.vit_entries(VIT), "qformer.pth": minigpt4.qformer_entries(QFORMER, VIT.dim),
             "trained.pth": [*minigpt4.projector_entries(QFORMER.dim, LLAMA.dim), *llama.lora_entries(LLAMA)],
             "llama/pytorch_model.bin": llama.entries(LLAMA)}
    (folder / "llama").mkdir()
    found = {}
    for name, entries in parts.items():
        tensors = {key: tensor.read() for key, tensor in backward(entries, params).items()}
        torch_file.save(folder / name, {"model": tensors} if name in ("qformer.pth", "trained.pth") else tensors)
        found |= {f"{name}:{key}": tensor for key, tensor in tensors.items()}
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        shutil.copyfile(GOLDEN / name, folder / "llama" / name)
    (folder / "llama/config.json").write_text(json.dumps(json.loads((GOLDEN / "config.json").read_text()) | {
        "hidden_size": LLAMA.dim, "intermediate_size": LLAMA.hidden, "num_attention_heads": LLAMA.heads,
        "num_hidden_layers": LLAMA.depth}))
    (folder / "arch.json").write_text(json.dumps({
        "vit": {"image_size": VIT.image_size, "num_heads": VIT.heads, "depth": VIT.depth},
        "qformer": {"num_heads": QFORMER.heads, "cross_attention_freq": QFORMER.cross_every},
        "minigpt_v2": {"image_size": VIT.image_size}}))
    return found


def draw(folder: Path) -> None:
    """Pictures of the size that the model takes, without loss, so that every library reads the same pixels."""
    random = np.random.default_rng(1)
    captions = ("A dog.", "Two red birds on a tree.", "The sea.", "A man with a hat.")
    (folder / "image").mkdir(parents=True)
    for number, _ in enumerate(captions):
        pixels = random.integers(0, 256, (VIT.image_size, VIT.image_size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "image" / f"{number}.jpg", "PNG")
    (folder / "filter_cap.json").write_text(json.dumps({"annotations": [
        {"image_id": str(number), "caption": caption} for number, caption in enumerate(captions)]}))


def prune(folder: Path) -> None:
    """Removes what OCDBT wrote on the way and nothing refers to any more."""

    def whole() -> bool:
        try:
            return all(array.read().result() is not None for array in frozen_weights.arrays(folder).values())
        except ValueError:
            return False

    for path in sorted((folder / "ocdbt.process_0").rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            path.unlink()
            if not whole():
                path.write_bytes(content)
    assert whole()


def killed(config: RunConfig) -> None:
    """The run in this process, which is killed in its fourth step, when the checkpoint of the second is there."""
    add = metrics_log.Metrics.add

    def kill(self, item, *args):
        add(self, item, *args)
        if item.number == 3:
            while not Path(config.out, "checkpoints", "2").exists():
                pass
            os.kill(os.getpid(), signal.SIGKILL)

    metrics_log.Metrics.add = kill
    run.train(config)


def main() -> None:
    for name in ("checkpoint", "pictures", "run"):
        shutil.rmtree(HERE / name, ignore_errors=True)
    with tempfile.TemporaryDirectory() as name:
        files = Path(name)
        tensors = released(files)
        write.minigpt4(files / "vit.pth", files / "llama", HERE / "checkpoint", qformer=files / "qformer.pth",
                         projector=files / "trained.pth", lora=files / "trained.pth", arch=files / "arch.json",
                         prompt_template="###Human: {} ###Assistant: ")
    prune(HERE / "checkpoint" / "weights")
    draw(HERE / "pictures")
    os.chdir(HERE)
    ended = subprocess.run([sys.executable, __file__, "killed"], env=os.environ | {"PYTHONPATH": sys.path[0]})
    assert ended.returncode == -signal.SIGKILL, ended
    whole = Path("whole")
    run.train(dataclasses.replace(CONFIG, out=str(whole)))
    state = training_checkpoints.arrays((whole / "checkpoints" / "6").absolute())
    np.savez_compressed("expected.npz", **{path: np.asarray(leaf) for path, leaf in state.items()})
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    Path("expected.json").write_text(json.dumps({
        "losses": [line["loss"] for line in lines],
        "tensors": {key: hashlib.sha256(value.tobytes()).hexdigest() for key, value in sorted(tensors.items())},
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")},
        "instructions": instructions()}, indent=1) + "\n")
    shutil.rmtree(whole)


if __name__ == "__main__":
    if sys.argv[1:] == ["killed"]:
        killed(CONFIG)
    else:
        main()
