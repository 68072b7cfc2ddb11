"""Everything a run can be told, as frozen dataclasses; a config file is Python that builds a `RunConfig`.

A config file defines `config() -> RunConfig`. Every field can be overridden on the command line with its dotted name:
`python train.py --config configs/minigpt4_stage2.py --optim.init-lr 1e-5`.
"""

import dataclasses
import runpy
import traceback
from pathlib import Path

from mmjax import files

REMOTE = {"webdataset": ("gs", "s3", "az", "hf")}  # formats that read URLs, and of which schemes


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """How samples become rows of tokens.

    prompt_template: wraps every prompt and every question of a conversation at its `{}`; "" leaves them as they are.
                     MiniGPT-4 on Vicuna: "###Human: {} ###Assistant: ", on LLaMA-2: "[INST] {} [/INST] ",
                     MiniGPT-v2: "[INST] {} [/INST]" (the final space matters to the tokens)
    input_template:  the same for samples with an `input`: its first `{}` is the prompt, its second the input
    end_sym:         ends every answer
    joint:           prompt and answer are tokenised as one string, without special tokens in it, and `max_txt_len` is
                     what is kept of the whole row (ImageBind-LLM, LLaMA-Adapter)
    max_txt_len:     tokens kept of an answer, or of everything behind the first question of a conversation
    max_context_len: tokens kept of a prompt with images (soft tokens counted); the right end is cut
    """

    prompt_template: str = ""
    input_template: str = ""
    end_sym: str = "###"
    joint: bool = False
    max_txt_len: int = 160
    max_context_len: int = 3800


@dataclasses.dataclass(frozen=True)
class WeightsConfig:
    """The converted checkpoint a run starts from.

    checkpoint: folder written by `convert_weights.py`
    family:     what the sources are of: a command of `convert_weights.py`. Also where `mmjax plan` looks for a preset
    sources:    released files by option name (`vit`, `qformer`, `llm`, `projector`, `lora`, `arch`); converted into
                `checkpoint` first if that folder does not exist yet
    start_from: a finished run whose trained parameters this one starts from (stage 2 after stage 1)
    dtype:      frozen parameters and activations; trained parameters are float32 always
    frozen_dtype: "int8" holds the large frozen matrices as int8 with a scale for each output channel, half the memory
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
    """The procedural world of the embedded default, drawn to disk before training.

    count:    training images
    held_out: images of each evaluation split
    most:     things in an image, at most
    """

    count: int = 3000
    held_out: int = 200
    seed: int = 0
    most: int = 3


@dataclasses.dataclass(frozen=True)
class Source:
    """One of several sources of a mixture; `format`, `path` and `root` are those of `DataConfig`.

    ratio: its share of the samples, relative to the other sources' (stage 1 of MiniGPT-4: LAION 115, CC-SBU 14)
    """

    format: str
    path: str
    ratio: float = 1.0
    root: str | None = None

    def url_problems(self, path: str, root: str, drawn: bool = False) -> list[str]:
        """A line for its path and its root where they are URLs that the format does not read.

        path, root: what these options are called
        drawn:      the data are written to the path first
        """
        place = self.path
        if self.format == "tfds" and isinstance(place, str):
            place = place.removeprefix("tfds:")
        remote = () if drawn else REMOTE.get(self.format, ())
        return files.url_problems({path: place}, remote) + files.url_problems({root: self.root})


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is trained on.

    format:          how the data lie on disk, one of `mmjax.data.formats.FORMATS`
    path:            the folder or file of that format, such as one with `filter_cap.json` and `image/IMAGE_ID.jpg`
    root:            folder that the images lie below, where that is not the data file's own
    mixture:         several sources in place of `format`, `path` and `root`
    prompts:         one is drawn for each batch, as in the original; empty for image tokens and caption alone (stage 1)
    clean_captions:  the original's stage-1 cleaning: lower case, no punctuation, 50 words
    random_crop:     images are cut at random to 90 to 100 % of their area, anew in every pass (ImageBind-LLM,
                     LLaMA-Adapter v2)
    batch_size:      rows of a batch, over all devices
    length_multiple: rows are padded to the batch's longest, rounded up to this, so that few lengths are compiled
    pack_length:     tokens of a row into which several samples go, as many as fit, so that little is padding; None: one
                     sample a row. A step then learns from more samples than `batch_size`
    pack_images:   images that a packed row has room for. What it does not hold is filled up with black ones, which
                     cost as much time: about `pack_length` over the mean length of a sample
    features:        folder of what the run's frozen encoder makes of the images (`mmjax data features`), read in
                     place of them: the encoder is not loaded. Of random crops, one of those that are stored is drawn
    threads:         that read and decode images
    max_bad_share:   a record that cannot be used is replaced by another one of its source; the run stops once there are
                     more such records than this share of all that were tried, these counted as 1,000 at least: with
                     0.01 the eleventh among the first thousand, with 0 the first one
    scenes:          draw this world into `path` first
    """

    format: str = "cc_sbu_align"
    path: str = ""
    root: str | None = None
    mixture: tuple[Source, ...] = ()
    prompts: tuple[str, ...] = ()
    clean_captions: bool = False
    random_crop: bool = False
    batch_size: int = 12
    length_multiple: int = 32
    pack_length: int | None = None
    pack_images: int = 4
    features: str | None = None
    seed: int = 42
    threads: int = 2
    max_bad_share: float = 0.01
    scenes: ScenesConfig | None = None

    @property
    def sources(self) -> tuple[Source, ...]:
        """The mixture, or the one source that `format`, `path` and `root` name."""
        return self.mixture or (Source(self.format, self.path, root=self.root),)

    def url_problems(self, prefix: str = "data.") -> list[str]:
        """A line for every path that is a URL where a local one is needed. prefix: in front of the fields' names"""
        named = {f"{prefix}mixture.{number}.": source for number, source in enumerate(self.mixture)}
        named[prefix] = Source(self.format, self.path, root=self.root)
        return [problem for where, source in named.items()
                for problem in source.url_problems(f"{where}path", f"{where}root", self.scenes is not None)
                ] + files.url_problems({f"{prefix}features": self.features})

    def too_bad(self, bad: int, tried: int) -> bool:
        """Whether so many unusable records, of so many tried, are more than `max_bad_share` allows."""
        return bad > self.max_bad_share * max(tried, 1000)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW and the originals' schedules; see `mmjax.training.optim`.

    schedule:                "whole_cosine" (MiniGPT-4) or "half_cycle" (ImageBind-LLM, LLaMA-Adapter)
    epochs, steps_per_epoch: an epoch is a number of steps, not a pass over the data
    warmup_lr:               a negative value means `init_lr`; "half_cycle" starts from 0
    clip:                    largest global gradient norm; None as in the originals: no clipping
    accumulate:              steps whose gradients are summed (not averaged, as in MiniGPT-4) before an update
    average:                 they are averaged, and what is left over at the end of an epoch is dropped (ImageBind-LLM)
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
    """Devices along each axis; one of them may be -1: whatever is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class HostsConfig:
    """The processes of a run, one a host. Under SLURM, Open MPI and on Cloud TPU all of it is found out.

    coordinator: ADDRESS:PORT of process 0, as the others reach it
    processes:   how many there are
    process:     which one this is, from 0 on
    timeout:     seconds that they wait for each other when they start, and while the first one prepares the run
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    timeout: int = 3600


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One training run.

    out:         folder of the run: metrics, checkpoints, report
    phase:       which of the family's phases this is ("pretrain" or "finetune" of ImageBind-LLM); it says what trains
    trained:     path rules of the trained parameters; None for the phase's or the family's own.
                 `("projector/.*", "qformer/.*")` unfreezes the Q-Former as well, with its dropout
    image_size:  images of another size than the checkpoint's; the position table is resized
    drop_path:   stochastic depth of the image tower while it is trained
    remat:       recompute layers in the backward pass: less memory, about a third more work
    log_every, save_every: steps
    keep:        checkpoints kept, the newest ones
    keep_best:   keep one more: that before which the mean loss of `save_every` steps was lowest
    score:       write scores and a report at the end, if the data are scenes
    check_first_loss: stop if the first loss says that the language model predicts nothing (off for random weights)
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
    remat: bool = False
    seed: int = 42
    log_every: int = 10
    save_every: int = 200
    keep: int = 2
    keep_best: bool = False
    score: bool = True
    check_first_loss: bool = True

    def url_problems(self, prefix: str = "") -> list[str]:
        """A line for every path that is a URL where a local one is needed. prefix: in front of the fields' names"""
        weights = self.weights
        stored = {f"{prefix}out": self.out, f"{prefix}weights.checkpoint": weights.checkpoint,
                  f"{prefix}weights.start_from": weights.start_from}
        sources = {f"{prefix}weights.sources.{name}": path for name, path in weights.sources.items()
                   if name != "prompt_template"}  # words; all else names a file
        return files.url_problems(stored | sources) + self.data.url_problems(f"{prefix}data.")


def load(path: str) -> RunConfig | dict[str, RunConfig]:
    """What a config file's `config()` returns: a run, or several by name, one after the other.

    Raises FileNotFoundError or ValueError saying what is wrong.
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
        raise ValueError(f"{where}: {type(error).__name__}: {error}") from error
    phases = built if isinstance(built, dict) else {"": built}
    if not phases or not all(isinstance(phase, RunConfig) for phase in phases.values()):
        raise ValueError(f"{path} must define a function `config()` that returns a mmjax.config.RunConfig, or several "
                         "by name.")
    return built


# The prompts of Alpaca, ImageBind-LLM and LLaMA-Adapter, without and with an input (imagebind_LLM/llama/utils.py).
ALPACA = ("Below is an instruction that describes a task. Write a response that appropriately completes the request."
          "\n\n### Instruction:\n{}\n\n### Response:")
ALPACA_INPUT = ("Below is an instruction that describes a task, paired with an input that provides further context. "
                "Write a response that appropriately completes the request."
                "\n\n### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:")
