"""The options of a training run, as frozen dataclasses; a config file is Python that builds a `RunConfig`.

A config file defines `config() -> RunConfig`. Every field can be overridden on the command line with its dotted name:
`python train.py --config configs/minigpt4_stage2.py --optim.init-lr 1e-5`.
"""

import dataclasses
import re
import runpy
import traceback
from pathlib import Path
from typing import Literal

from mmjax import files

REMOTE = {"webdataset": ("gs", "s3", "az", "hf")}  # URL schemes of the formats that read URLs
RENAMED = {"data.pack_pictures": "data.pack_images"}  # former field -> field


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """How samples become rows of tokens.

    prompt_template: wraps every prompt and every question of a conversation at its `{}`; "" leaves them unchanged.
                     MiniGPT-4 on Vicuna: "###Human: {} ###Assistant: ", on LLaMA-2: "[INST] {} [/INST] ",
                     MiniGPT-v2: "[INST] {} [/INST]" (the final space changes the tokens)
    input_template:  the template of samples with an `input`: its first `{}` is the prompt, its second the input
    end_sym:         ends every answer
    joint:           prompt and answer are tokenised as one string, without special tokens in it, and `max_txt_len`
                     limits the whole row (ImageBind-LLM, LLaMA-Adapter)
    max_txt_len:     tokens kept of an answer, or of everything after the first question of a conversation
    max_context_len: tokens kept of a prompt with images, including soft tokens; the right end is cut
    """

    prompt_template: str = ""
    input_template: str = ""
    end_sym: str = "###"
    joint: bool = False
    max_txt_len: int = 160
    max_context_len: int = 3800


@dataclasses.dataclass(frozen=True)
class WeightsConfig:
    """The converted checkpoint that a run starts from.

    checkpoint: folder written by `convert_weights.py`
    family:     family of the sources: a command of `convert_weights.py`. `mmjax plan` looks for a preset in it
    sources:    released files by option name (`vit`, `qformer`, `llm`, `projector`, `lora`, `arch`); converted into
                `checkpoint` first if that folder does not exist
    start_from: a finished run whose trained parameters this run starts from (stage 2 after stage 1)
    dtype:      of frozen parameters and activations; trained parameters are always float32
    frozen_dtype: "int8" stores the large frozen matrices as int8 with a scale for each output channel, half the memory
                  of bfloat16 (`mmjax.models.int8`); None: all frozen parameters as `dtype`
    """

    checkpoint: str = ""
    family: str = ""
    sources: dict[str, str] = dataclasses.field(default_factory=dict)
    start_from: str | None = None
    dtype: str = "bfloat16"
    frozen_dtype: str | None = None


@dataclasses.dataclass(frozen=True)
class ScenesConfig:
    """The procedural images of the embedded default, drawn to disk before training.

    count:    number of training images
    held_out: number of images of each evaluation split
    most:     maximum number of shapes in an image
    """

    count: int = 3000
    held_out: int = 200
    seed: int = 0
    most: int = 3


@dataclasses.dataclass(frozen=True)
class Source:
    """One source of a mixture; `format`, `path` and `root` are those of `DataConfig`.

    ratio:        share of the samples, relative to the other sources (stage 1 of MiniGPT-4: LAION 115, CC-SBU 14)
    follow_links: as in `DataConfig`
    """

    format: str
    path: str
    ratio: float = 1.0
    root: str | None = None
    follow_links: bool = False

    def url_problems(self, path: str, root: str, drawn: bool = False) -> list[str]:
        """Returns a line for each of the path and the root that is a URL which the format does not read.

        path, root: names of these options
        drawn:      whether the data are written to the path first
        """
        value = self.path
        if self.format == "tfds" and isinstance(value, str):
            value = value.removeprefix("tfds:")
        remote = () if drawn else REMOTE.get(self.format, ())
        return files.url_problems({path: value}, remote) + files.url_problems({root: self.root})


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The training data.

    format:          layout of the data on disk, one of `mmjax.data.formats.FORMATS`
    path:            the folder or file of that format, such as a folder with `filter_cap.json` and `image/IMAGE_ID.jpg`
    root:            folder of the images, if it is not that of the data file
    follow_links:    whether links may lead out of the folder of the images, as on shared disks and in snapshots of
                     Hugging Face. By default such a link is an error
    mixture:         several sources in place of `format`, `path` and `root`
    prompts:         one is drawn for each batch, as in the original; empty for image tokens and caption alone (stage 1)
    clean_captions:  apply the original's stage-1 cleaning: lower case, no punctuation, 50 words
    random_crop:     crop images at random to 90 to 100 % of their area, anew in every pass (ImageBind-LLM,
                     LLaMA-Adapter v2)
    batch_size:      rows of a batch, over all devices
    length_multiple: rows are padded to the batch's longest, rounded up to this, so that few lengths are compiled
    pack_length:     tokens of a row that is filled with as many samples as fit, which avoids padding; None: one
                     sample a row. A step then learns from more samples than `batch_size`
    pack_images:     images for which there is room per packed row. The rows of a device share theirs: more in one of
                     them leave less for the others. Room that stays unused is encoded as a black image, too little
                     leaves tokens unused (docs/data.md). None: one image every 160 tokens
    features:        folder of the frozen encoder's outputs for the images (`mmjax data features`), read in place of
                     the images: the encoder is not loaded. With random crops, one of the stored crops is drawn
    threads:         number of threads that read and decode images
    max_bad_share:   a record that cannot be used is replaced by another one of its source; the run stops once the share
                     of such records among all that were tried (counted as at least 1,000) exceeds this: with 0.01 at
                     the eleventh among the first thousand, with 0 at the first one
    scenes:          draw these images into `path` first
    """

    format: str = "cc_sbu_align"
    path: str = ""
    root: str | None = None
    follow_links: bool = False
    mixture: tuple[Source, ...] = ()
    prompts: tuple[str, ...] = ()
    clean_captions: bool = False
    random_crop: bool = False
    batch_size: int = 12
    length_multiple: int = 32
    pack_length: int | None = None
    pack_images: float | None = None
    features: str | None = None
    seed: int = 42
    threads: int = 2
    max_bad_share: float = 0.01
    scenes: ScenesConfig | None = None

    @property
    def sources(self) -> tuple[Source, ...]:
        """The mixture, or the one source that `format`, `path` and `root` name."""
        return self.mixture or (Source(self.format, self.path, root=self.root, follow_links=self.follow_links),)

    def url_problems(self, prefix: str = "data.") -> list[str]:
        """Returns a line for every path that is a URL but must be local. prefix: of the fields' names"""
        named = {f"{prefix}mixture.{number}.": source for number, source in enumerate(self.mixture)}
        named[prefix] = Source(self.format, self.path, root=self.root)
        return [problem for names, source in named.items()
                for problem in source.url_problems(f"{names}path", f"{names}root", self.scenes is not None)
                ] + files.url_problems({f"{prefix}features": self.features})

    def too_bad(self, bad: int, tried: int) -> bool:
        """Returns whether `bad` unusable records among `tried` records exceed `max_bad_share`."""
        return bad > self.max_bad_share * max(tried, 1000)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW and the learning rate schedules of the originals; see `mmjax.training.optim`.

    schedule:                "whole_cosine" (MiniGPT-4) or "half_cycle" (ImageBind-LLM, LLaMA-Adapter)
    epochs, steps_per_epoch: an epoch is a number of steps, not a pass over the data
    warmup_lr:               a negative value means `init_lr`; "half_cycle" starts from 0
    clip:                    maximum global gradient norm; None: no clipping, as in the originals
    accumulate:              steps whose gradients are summed (not averaged, as in MiniGPT-4) before an update
    average:                 average them instead, and drop an incomplete group at the end of an epoch (ImageBind-LLM)
    """

    schedule: str = "whole_cosine"
    init_lr: float = 3e-5
    min_lr: float = 1e-5
    warmup_lr: float = 1e-6
    warmup_steps: int = 200
    epochs: int = 5
    steps_per_epoch: int = 200
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip: float | None = None
    accumulate: int = 1
    average: bool = False

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The number of devices along each mesh axis; one may be -1, which means all that remain."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class HostsConfig:
    """The processes of a run, one for each host. SLURM, Open MPI and Cloud TPU are detected automatically.

    coordinator: ADDRESS:PORT at which the other processes reach process 0
    processes:   number of processes
    process:     index of this process
    timeout:     seconds that processes wait for each other at the start, and while process 0 prepares the run
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    timeout: int = 3600


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One training run.

    out:         folder of the run: metrics, checkpoints, report
    phase:       phase of the family ("pretrain" or "finetune" of ImageBind-LLM); it determines what is trained
    trained:     path rules of the trained parameters; None for those of the phase or the family.
                 `("projector/.*", "qformer/.*")` also trains the Q-Former, with its dropout
    image_size:  size of the images if it is not the checkpoint's; the position table is resized
    drop_path:   stochastic depth of the image tower while it is trained
    remat:       what the layers of the language model recompute in the backward pass, which saves memory and takes
                 time. From the most memory to the least: "none" (or False) recomputes no product with a matrix, "gate"
                 one of the three products of the feed-forward, "feed_forward" two of them, "full" (or True) all of a
                 layer, about a third of the step's operations
    attention:   "auto" computes causal attention with a fused kernel where the devices have one (TPU: splash attention,
                 in bfloat16) and all other attention with XLA, "xla" uses XLA alone, "splash" requires the kernel
    log_every, save_every: number of steps
    keep:        number of checkpoints kept, the newest ones
    keep_best:   also keep the checkpoint for which the mean loss of the `save_every` steps before it is lowest
    score:       write scores and a report at the end, if the data are scenes
    allow_changed_inputs: resume although annotation files, tars, the tokenizer or the architecture of the checkpoint
                 have changed since the run began. By default the run is refused, with the differences
    check_first_loss: stop if the first loss is that of a language model that predicts nothing (off for random weights)
    """

    out: str = ""
    weights: WeightsConfig = WeightsConfig()
    data: DataConfig = DataConfig()
    text: TextConfig = TextConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    hosts: HostsConfig = HostsConfig()
    phase: str | None = None
    trained: tuple[str, ...] | None = None
    image_size: int | None = None
    drop_path: float = 0.0
    remat: bool | Literal["none", "gate", "feed_forward", "full"] = False
    attention: Literal["auto", "xla", "splash"] = "auto"
    seed: int = 42
    log_every: int = 10
    save_every: int = 200
    keep: int = 2
    keep_best: bool = False
    score: bool = True
    allow_changed_inputs: bool = False
    check_first_loss: bool = True

    def url_problems(self, prefix: str = "") -> list[str]:
        """Returns a line for every path that is a URL but must be local. prefix: of the fields' names"""
        weights = self.weights
        stored = {f"{prefix}out": self.out, f"{prefix}weights.checkpoint": weights.checkpoint,
                  f"{prefix}weights.start_from": weights.start_from}
        sources = {f"{prefix}weights.sources.{name}": path for name, path in weights.sources.items()
                   if name != "prompt_template"}  # a text; all others are paths
        return files.url_problems(stored | sources) + self.data.url_problems(f"{prefix}data.")


def load(path: str) -> RunConfig | dict[str, RunConfig]:
    """Returns the result of a config file's `config()`: one run, or several by name, which run one after the other.

    Raises FileNotFoundError or ValueError describing the problem.
    """
    files.require_local({"--config": path})
    if not Path(path).is_file():
        raise FileNotFoundError(f"No config file at {path}. The shipped ones are in configs/.")
    try:
        build = runpy.run_path(path).get("config")
        built = build() if callable(build) else None
    except Exception as error:  # the file's own code may raise anything
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        where = f"{path}, line {lines[-1]}" if lines else path
        message = _renamed_keyword(error) or f"{type(error).__name__}: {error}"
        raise ValueError(f"{where}: {message}") from error
    phases = built if isinstance(built, dict) else {"": built}
    if not phases or not all(isinstance(phase, RunConfig) for phase in phases.values()):
        raise ValueError(f"{path} must define a function `config()` that returns an mmjax.config.RunConfig, or several "
                         "by name.")
    return built


def _renamed_keyword(error: Exception) -> str | None:
    """Returns the message for a TypeError about a keyword that is the former name of a field; None for other errors."""
    match = re.search(r"unexpected keyword argument '(\w+)'", str(error)) if isinstance(error, TypeError) else None
    names = {old.rpartition(".")[2]: new.rpartition(".")[2] for old, new in RENAMED.items()}
    return f"{match[1]} is called {names[match[1]]} now" if match and match[1] in names else None


# The prompts of Alpaca, ImageBind-LLM and LLaMA-Adapter, without and with an input (imagebind_LLM/llama/utils.py).
ALPACA = ("Below is an instruction that describes a task. Write a response that appropriately completes the request."
          "\n\n### Instruction:\n{}\n\n### Response:")
ALPACA_INPUT = ("Below is an instruction that describes a task, paired with an input that provides further context. "
                "Write a response that appropriately completes the request."
                "\n\n### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:")
