"""A run of a few seconds that saves often; the faults are done to it. Some of its images are broken."""

from mmjax.config import DataConfig, OptimConfig, RunConfig, TextConfig, WeightsConfig


def config() -> RunConfig:
    return RunConfig(
        weights=WeightsConfig(dtype="float32"),
        data=DataConfig(prompts=("<Img><ImageHere></Img> Describe it.", "<Img><ImageHere></Img> What is it?"),
                        batch_size=2, length_multiple=64, max_bad_share=0.9),
        text=TextConfig(prompt_template="###Human: {} ###Assistant: ", end_sym="###", max_txt_len=32),
        optim=OptimConfig(init_lr=1e-3, warmup_steps=2, epochs=1, steps_per_epoch=24, accumulate=3),
        log_every=1, save_every=3, keep_best=True)
