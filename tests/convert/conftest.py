"""Conversions that several files of tests look at."""

import pytest

from mmjax.convert import write
from tests.convert.released import ADAPTER_V1, ADAPTER_V2, IMAGEBIND, IMAGEBIND_LLM


@pytest.fixture(scope="session")
def adapted(tmp_path_factory):
    """The golden set's language models with adapters, one folder each."""
    folder = tmp_path_factory.mktemp("adapted")
    for name, more in {
        "finetune": {"adapter": IMAGEBIND / "adapter.pth", "words": IMAGEBIND / "bpe_tiny.txt.gz"},
        "pretrain": {"adapter": IMAGEBIND / "adapter_pretrain.pth"},
        "legacy": {"adapter": IMAGEBIND / "adapter_legacy.pth"},
        "article": {"adapter": IMAGEBIND / "bind_network.pth"},
        "token": {"adapter": IMAGEBIND / "adapter.pth", "injection": "token"},
    }.items():
        write.command("imagebind_llm")(out=folder / name, **IMAGEBIND_LLM, **more)
    write.command("llama_adapter")(out=folder / "v1", **ADAPTER_V1)
    write.command("llama_adapter")(out=folder / "v2", **ADAPTER_V2)
    return folder
