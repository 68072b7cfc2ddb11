"""`mmjax generate`: the words of a model, for one prompt or for many samples."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from mmjax.config import MeshConfig
from mmjax.predictions import Decoding

GREEDY, EVERY_DEVICE = Decoding(), MeshConfig()


def generate(args: Sequence[str]) -> None:
    """Print the model's answer to a prompt, or write those to many samples or a folder of pictures into a file."""
    tyro.cli(answer, args=args, prog="mmjax generate")


def answer(
    checkpoint: Path,
    prompt: str | None = None,
    image: tuple[Path, ...] = (),
    media: dict[str, str] | None = None,
    weights: dict[str, float] | None = None,
    samples: Path | None = None,
    pictures: Path | None = None,
    out: Path | None = None,
    root: Path | None = None,
    decoding: tyro.conf.OmitArgPrefixes[Decoding] = GREEDY,
    recall: Path | None = None,
    prompt_template: str | None = None,
    batch_size: int = 16,
    mesh: MeshConfig = EVERY_DEVICE,
    dtype: str | None = None,
    frozen_dtype: Literal["int8"] | None = None,
) -> None:
    """Print the model's answer to a prompt, or write those to many samples or a folder of pictures into a file.

    One prompt:     --prompt "What is this?" --image a.jpg
    Many samples:   --samples in.jsonl --out out.jsonl        A line: {"image": "a.jpg", "prompt": "What is this?"}
    Many pictures:  --pictures FOLDER --prompt "Describe this image." --out out.jsonl

    Of many, the same command goes on where it was stopped. A sample that cannot be used has an "error" in its line;
    then the exit status is 1.

    Args:
        checkpoint: converted checkpoint or run folder
        prompt: the question; MiniGPT-4's pictures are put in front of it unless it says where with <ImageHere>
        image: picture files
        media: other senses of ImageBind-LLM by name: audio FILE.wav, text WORDS, or an array in a FILE.npy (video,
            depth, thermal, imu)
        weights: of the senses in their mix, by name: image 1.0 audio 0.5
        samples: a file with one JSON object a line: image or images, prompt; where needed media, weights, id
        pictures: a folder, all of whose pictures get the prompt
        out: the answers to samples or pictures, one JSON object a line, in their order
        root: the folder below which the files of samples lie (default: that of the samples)
        recall: vectors that ImageBind-LLM's senses are drawn towards (its visual cache): .npy or a flat faiss index
        prompt_template: put around the prompt at its {} (default: the checkpoint's)
        batch_size: of many, samples at once
        mesh: of many, the devices; all of them share the samples unless this says otherwise
        dtype: float32 or bfloat16 (default: what suits the device)
        frozen_dtype: int8 holds the large matrices in half the memory of bfloat16
    """
    from mmjax import compilation, loaded, sharding
    from mmjax.data import asked

    _check_form(prompt, samples, pictures, out, image or media or weights)
    asks: list[asked.Ask] = []
    if samples is not None:
        asks = asked.lines(samples, root)
    elif pictures is not None:
        asks = asked.pictures(pictures, prompt)
    compilation.enable()
    cache = visual_cache(recall)
    model = loaded.load(checkpoint, sharding.make_mesh(mesh) if out else None, dtype, frozen_dtype=frozen_dtype)
    text = {} if prompt_template is None else {"prompt_template": prompt_template}
    if out is None:
        print(_one(model, prompt, image, media or {}, weights or {}, decoding, cache, text))
    else:
        _many(model, checkpoint, asks, out, decoding, batch_size, cache, text)


def visual_cache(recall: Path | None) -> Any:
    """The `mmjax.data.neighbours.Recall` of a file of vectors; None without one."""
    from mmjax.data import neighbours

    return None if recall is None else neighbours.Recall(neighbours.read(recall))


def _check_form(prompt: str | None, samples: Path | None, pictures: Path | None, out: Path | None, shown: Any) -> None:
    """Raises ValueError naming what does not go together."""
    many, wrong = samples is not None or pictures is not None, []
    if samples is not None and pictures is not None:
        wrong.append("--samples and --pictures: name one of them")
    if samples is not None and prompt is not None:
        wrong.append("--prompt: every line of --samples has its own")
    if samples is None and prompt is None:
        wrong.append("--prompt is missing; or name a file of --samples")
    if many and out is None:
        wrong.append("--out is missing: the file for the answers")
    if many and shown:
        wrong.append("--image, --media and --weights are for one prompt")
    if not many and out is not None:
        wrong.append("--out is for --samples or --pictures; the answer to one prompt is printed")
    if wrong:
        raise ValueError("These do not go together:\n  " + "\n  ".join(wrong))


def _one(model: Any, prompt: str, image: Sequence[Path], media: dict[str, str], weights: dict[str, float],
         decoding: Decoding, recall: Any, text: dict[str, Any]) -> str:
    from mmjax.batch import Sample
    from mmjax.data import asked

    sample = Sample(images=list(image), prompt=prompt, weights=weights,
                    media={name: asked.sense(name, value) for name, value in media.items()})
    sample = asked.placed(sample, model.config.image_tokens)
    return model.generate([sample], **decoding.settings(model), recall=recall, **text)[0]


def _many(model: Any, checkpoint: Path, asks: Sequence[Any], out: Path, decoding: Decoding, batch_size: int,
          recall: Any, text: dict[str, Any]) -> None:
    from rich.console import Console

    from mmjax import predictions

    console = Console(stderr=True)
    words = predictions.Words(model, decoding, batch_size, recall, text)
    made = predictions.card(asks, words, predictions.identity(checkpoint))
    done = predictions.predict(out, asks, words, made, console)
    for line in predictions.summary(done):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if done.errors:
        sys.exit(1)
