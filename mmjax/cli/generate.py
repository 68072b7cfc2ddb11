"""`mmjax generate`: the words of a model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro


def generate(args: Sequence[str]) -> None:
    """Print the model's answer to a prompt, with or without pictures and other senses."""
    tyro.cli(answer, args=args, prog="mmjax generate")


def answer(
    checkpoint: Path,
    prompt: str,
    image: tuple[Path, ...] = (),
    media: dict[str, str] | None = None,
    weights: dict[str, float] | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    num_beams: int = 1,
    stop: tuple[str, ...] | None = None,
    prompt_template: str | None = None,
    dtype: str | None = None,
    frozen_dtype: Literal["int8"] | None = None,
    seed: int = 0,
) -> None:
    """Print the model's answer to a prompt, with or without pictures and other senses.

    Args:
        checkpoint: converted checkpoint or run folder
        prompt: the question; MiniGPT-4's pictures are put in front of it unless it says where with <ImageHere>
        image: picture files
        media: other senses of ImageBind-LLM by name: audio FILE.wav, text WORDS, or an array in a FILE.npy (video,
            depth, thermal, imu)
        weights: of the senses in their mix, by name: image 1.0 audio 0.5
        max_new_tokens: longest answer
        temperature: 0 takes the best word, above 0 draws
        num_beams: above 1 searches with beams
        stop: strings that end the answer (default: the end symbol the model was trained with)
        prompt_template: put around the prompt at its {} (default: the checkpoint's)
        dtype: float32 or bfloat16 (default: what suits the device)
        frozen_dtype: int8 holds the large matrices in half the memory of bfloat16
        seed: of the draws
    """
    import numpy as np

    from mmjax import compilation
    from mmjax.batch import Sample
    from mmjax.data.conversation import PICTURE
    from mmjax.loaded import load

    compilation.enable()
    model = load(checkpoint, dtype=dtype, frozen_dtype=frozen_dtype)
    if image and model.config.image_tokens and "<ImageHere>" not in prompt:
        prompt = PICTURE * len(image) + " " + prompt
    sample = Sample(images=list(image), prompt=prompt, weights=weights or {}, media={
        name: np.load(value, allow_pickle=False) if value.endswith(".npy") else value
        for name, value in (media or {}).items()})
    settings = {} if prompt_template is None else {"prompt_template": prompt_template}
    words = model.generate(
        [sample], max_new_tokens, temperature, num_beams, [model.text.end_sym] if stop is None else stop, seed=seed,
        **settings)
    print(words[0])
