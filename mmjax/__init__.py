"""mmjax: MiniGPT-4 and its kin in JAX.

    m = mmjax.load("checkpoints/minigpt4-7b")
    batch = m.batch([mmjax.Sample(images=["a.png"], prompt="<Img><ImageHere></Img> What is this?", answer="A dog.")])
    loss, aux = mmjax.loss(m.module, m.params, batch)
    m.generate([mmjax.Sample(images=["a.png"], prompt="<Img><ImageHere></Img> What is this?")])
    mmjax.train(run_config)
"""

from mmjax.batch import Batch, Sample
from mmjax.config import RunConfig
from mmjax.convert.export import export
from mmjax.evaluate.scenes import score_job
from mmjax.inference.loaded import Loaded, load
from mmjax.training import run
from mmjax.training.steps import loss

__all__ = ["Batch", "Loaded", "Sample", "export", "load", "loss", "train"]
__version__ = "0.1.0"


def train(config: RunConfig) -> run.RunResult:
    """`mmjax.training.run.train`, with the scores of a run on scenes."""
    return run.train(config, score_job)
