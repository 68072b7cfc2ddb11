"""The model of a case: the reference set's files converted by mmjax and loaded in float32."""

import functools
import tempfile
from pathlib import Path

from mmjax.convert import write
from mmjax.inference.loaded import Loaded, load
from tests.parity import golden


def model(case: golden.Case) -> Loaded:
    return _model(golden.checkpoint(case))


@functools.cache
def _model(files: golden.Checkpoint) -> Loaded:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "converted"
        write.command("minigpt4")(
            files.vit, files.llm, out, qformer=files.qformer, projector=files.projector or files.lora,
            lora=files.lora, arch=golden.folder() / "model_sizes.json")
        return load(out, dtype="float32")
