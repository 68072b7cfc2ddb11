"""`mmjax generate`: generated text, for one prompt or for many samples."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mmjax.cli.options import require_local
from mmjax.config import MeshConfig
from mmjax.inference.predictions import Decoding

GREEDY, EVERY_DEVICE = Decoding(), MeshConfig()


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """Print the model's answer to a prompt, or write those to many samples or a folder of images into a file.

    One prompt:     --prompt "What is this?" --image a.jpg
    Many samples:   --samples in.jsonl --out out.jsonl        A line: {"image": "a.jpg", "prompt": "What is this?"}
    Many images:    --images FOLDER --prompt "Describe this image." --out out.jsonl

    With many samples the same command continues after an interruption. The line of a sample that cannot be used has an
    "error"; then the exit status is 1.

    Args:
        checkpoint: converted checkpoint or run folder
        prompt: the question; MiniGPT-4's images come first unless <ImageHere> marks their positions
        image: image files
        media: other senses of ImageBind-LLM by name: audio FILE.wav, text TEXT, or an array in a FILE.npy (video,
            depth, thermal, imu)
        weights: weights of the senses in the mix, by name: image 1.0 audio 0.5
        samples: a file with one JSON object a line: image or images, prompt; where needed media, weights, id
        images: a folder of images; the prompt is used for each
        out: the answers to samples or images, one JSON object a line, in their order
        root: the folder of the files in samples (default: the folder of samples)
        follow_links: allow links that lead out of the folder of samples or images
        list_all: print every file or line that is left out, not only their numbers
        recall: ImageBind-LLM's visual cache: vectors in a .npy file or a flat faiss index
        prompt_template: template with {} for the prompt (default: the checkpoint's)
        batch_size: samples in a batch, for many samples
        mesh: the devices, for many samples; by default all of them share the samples
        dtype: float32 or bfloat16 (default: depends on the device)
        frozen_dtype: int8 stores the large matrices in half the memory of bfloat16
    """

    checkpoint: Path
    prompt: str | None = None
    image: tuple[Path, ...] = ()
    media: dict[str, str] | None = None
    weights: dict[str, float] | None = None
    samples: Path | None = None
    images: Annotated[Path | None, tyro.conf.arg(aliases=("--pictures",))] = None
    out: Path | None = None
    root: Path | None = None
    follow_links: bool = False
    list_all: bool = False
    decoding: tyro.conf.OmitArgPrefixes[Decoding] = GREEDY
    recall: Path | None = None
    prompt_template: str | None = None
    batch_size: int = 16
    mesh: MeshConfig = EVERY_DEVICE
    dtype: str | None = None
    frozen_dtype: Literal["int8"] | None = None

    @property
    def text(self) -> dict[str, Any]:
        """Fields of `TextConfig` that differ from the checkpoint's."""
        return {} if self.prompt_template is None else {"prompt_template": self.prompt_template}


def generate(args: Sequence[str]) -> None:
    """Print the model's answer to a prompt, or write those to many samples or a folder of images into a file."""
    answer(tyro.cli(GenerateOptions, args=args, prog="mmjax generate"))


def answer(options: GenerateOptions) -> None:
    """Runs the command. Raises ValueError naming all options that cannot be combined."""
    from mmjax import compilation, sharding
    from mmjax.data.formats import Account
    from mmjax.inference import loaded, requests

    require_local(GenerateOptions, vars(options), "media")
    _check_form(options)
    samples: list[requests.Request] = []
    account = Account("samples")
    if options.samples is not None:
        samples = requests.read_jsonl(options.samples, options.root, options.follow_links, account)
    elif options.images is not None:
        samples = requests.images(options.images, options.prompt, options.follow_links, account)
    compilation.enable()
    recall = visual_cache(options.recall)
    mesh = sharding.make_mesh(options.mesh) if options.out else None
    model = loaded.load(options.checkpoint, mesh, options.dtype, frozen_dtype=options.frozen_dtype)
    if options.out is None:
        print(_one(model, options, recall))
    else:
        _many(model, options, samples, account, recall)


def visual_cache(recall: Path | None) -> Any:
    """Returns the `mmjax.data.neighbours.Recall` of a file of vectors; None without one."""
    from mmjax.data import neighbours

    return None if recall is None else neighbours.Recall(neighbours.read(recall))


def _check_form(options: GenerateOptions) -> None:
    """Raises ValueError naming the options that cannot be combined."""
    samples, images, out = (value is not None for value in (options.samples, options.images, options.out))
    prompt, many, wrong = options.prompt is not None, samples or images, []
    if samples and images:
        wrong.append("--samples and --images: name one of them")
    if samples and prompt:
        wrong.append("--prompt: every line of --samples has its own")
    if not samples and not prompt:
        wrong.append("--prompt is missing; or name a file of --samples")
    if not many and (options.follow_links or options.list_all):
        wrong.append("--follow-links and --list-all are for --samples or --images")
    if not samples and options.root is not None:
        wrong.append("--root is for --samples")
    if many and not out:
        wrong.append("--out is missing: the file for the answers")
    if many and (options.image or options.media or options.weights):
        wrong.append("--image, --media and --weights are for one prompt")
    if not many and out:
        wrong.append("--out is for --samples or --images; the answer to one prompt is printed")
    if not many and (options.batch_size, options.mesh) != (GenerateOptions.batch_size, EVERY_DEVICE):
        wrong.append("--batch-size and --mesh are for --samples or --images; one prompt is answered on one device")
    if wrong:
        raise ValueError("These options cannot be combined:\n  " + "\n  ".join(wrong))


def _one(model: Any, options: GenerateOptions, recall: Any) -> str:
    from mmjax.batch import Sample
    from mmjax.inference import requests

    media = {name: requests.read_sense(name, value) for name, value in (options.media or {}).items()}
    sample = Sample(images=list(options.image), prompt=options.prompt, weights=options.weights or {}, media=media)
    sample = requests.with_images(sample, model.family.prompt)
    return model.generate([sample], **options.decoding.settings(model), recall=recall, **options.text)[0]


def _many(model: Any, options: GenerateOptions, samples: Sequence[Any], account: Any, recall: Any) -> None:
    from rich.console import Console

    from mmjax.data.formats.account import printable
    from mmjax.inference import predictions

    console = Console(stderr=True, markup=False)
    answerer = predictions.TextAnswerer(model, options.decoding, options.batch_size, recall, options.text)
    card = predictions.card(samples, answerer, predictions.identity(options.checkpoint))
    done = predictions.predict(options.out, samples, answerer, card, console)
    for line in predictions.summary(done):
        console.print(line, highlight=False, soft_wrap=True)
    if done.errors:
        account.reject("samples with an error in their line", *done.errors)
    lines = [account.line(str(options.samples or options.images)), *(account.listing() if options.list_all else ())]
    for line in lines:
        console.print(printable(line), highlight=False, markup=False, soft_wrap=True)
    if done.errors:
        sys.exit(1)
