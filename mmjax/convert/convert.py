"""From released PyTorch files to a checkpoint folder: plan, check everything, write beside the place, rename.

    OUT/weights/      an Orbax checkpoint with every parameter in its source's dtype; under `replaced/` what an adapter
                      put its own in place of (the language model's norms), for export
    OUT/config.json   family, architecture, text settings, generation ids, and the sources' sizes and SHA-256
    OUT/tokenizer/    the language model's tokenizer files, as they were
"""

import contextlib
import dataclasses
import gzip
import hashlib
import itertools
import json
import os
import re
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from mmjax import files, storage, trees, weights
from mmjax.config import ALPACA, ALPACA_INPUT, TextConfig
from mmjax.convert import adapter as adapter_files
from mmjax.convert import imagebind as imagebind_files
from mmjax.convert import llama as llama_files
from mmjax.convert import llama_adapter as llama_adapter_files
from mmjax.convert import meta as meta_files
from mmjax.convert import minigpt4 as minigpt4_files
from mmjax.convert.lazy import LazyTensor
from mmjax.convert.tables import Computed, Entry, Parameter, Problems, forward
from mmjax.families import FAMILIES, shapes
from mmjax.families.minigpt4 import JOINED
from mmjax.models.clip import ClipConfig
from mmjax.models.imagebind import ImageBindConfig
from mmjax.models.llama import LlamaConfig
from mmjax.tokenizer import WORDS, Tokenizer

FORMAT = 1  # of the checkpoint folder
TEXT = {  # what the released models were trained with; which template belongs to a projector no weight file says
    "minigpt4": TextConfig(end_sym="###", max_txt_len=160),
    "minigpt4, no Q-Former": TextConfig(end_sym="</s>", max_txt_len=160),
    "minigpt_v2": TextConfig(end_sym="</s>", max_txt_len=1024),
}
ALPACA_TEXT = TextConfig(ALPACA, ALPACA_INPUT, end_sym="</s>", joint=True, max_txt_len=512)


@dataclasses.dataclass
class Plan:
    """A conversion that was checked and not yet begun.

    fresh:    parameters of the model that no source holds: training starts them anew
    constant: parameters that no source holds and that have a known value
    replaced: the base's parameters that an adapter has others for
    words:    the merges file of the text sense
    """

    family: str
    architecture: Any
    parameters: dict[str, Parameter]
    text: TextConfig
    generation: dict[str, Any]
    sources: dict[str, Sequence[Path]]
    tokenizer: Path
    fresh: tuple[str, ...] = ()
    constant: dict[str, float] = dataclasses.field(default_factory=dict)
    replaced: dict[str, Parameter] = dataclasses.field(default_factory=dict)
    words: Path | None = None

    @property
    def stored(self) -> dict[str, Parameter]:
        return self.parameters | {adapter_files.REPLACED + path: parameter for path, parameter in self.replaced.items()}

    @property
    def nbytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.stored.values())


def llama(llama: Path, out: Path, *, delta: Path | None = None, overwrite: bool = False) -> None:
    """Converts a language model alone: for text, and as a base for others.

    Args:
        llama: folder as transformers saves it (config.json, weights in .safetensors or .bin, tokenizer) or as Meta
            ships it (params.json, consolidated.NN.pth; tokenizer.model in it or beside it)
        out: checkpoint folder to write; must not exist, or be empty
        delta: folder of a Vicuna delta to add to the weights
        overwrite: replace `out` if it exists

    Raises ConversionError listing everything that is wrong; then nothing is written.
    """
    llama, delta, out = map(_path, (llama, delta, out))
    _check_out(out, overwrite)
    problems = Problems()
    release, parameters = _language_model(llama, delta, problems)
    problems.check(f"Cannot convert {llama}")
    architecture = FAMILIES["llama"].Config(llama=release.cfg)
    words = Tokenizer.from_folder(release.tokenizer)
    text = TextConfig(end_sym=words.decode([words.eos], skip_special=False))
    write(Plan("llama", architecture, parameters, text, release.generation, {"llama": release.files},
               release.tokenizer), out, overwrite)


def minigpt4(
    vit: Path, llama: Path, out: Path, *, qformer: Path | None = None, delta: Path | None = None,
    projector: Path | None = None, lora: Path | None = None, lora_rank: int = 0, arch: Path | None = None,
    prompt_template: str = "", overwrite: bool = False,
) -> None:
    """Converts MiniGPT-4 or MiniGPT-v2 from its parts.

    Args:
        vit: eva_vit_g.pth
        llama: folder of LLaMA, Vicuna or Llama-2 as transformers saves it, or as Meta ships it
        out: checkpoint folder to write; must not exist, or be empty
        qformer: blip2_pretrained*.pth; left out for the models without Q-Former (on Llama-2, and MiniGPT-v2)
        delta: folder of a Vicuna delta to add to `llama`
        projector: trained checkpoint that holds llama_proj; without it the projector starts fresh
        lora: trained checkpoint that holds LoRA; may be the same file as `projector`
        lora_rank: rank of a fresh LoRA to train, when there is no `lora`
        arch: JSON file with what tensors do not show (head counts, picture size, ...); released sizes need none
        prompt_template: put around every prompt at its {} from now on, such as "###Human: {} ###Assistant: " (Vicuna),
            "[INST] {} [/INST] " (Llama-2) or "[INST] {} [/INST]" (MiniGPT-v2); without it prompts are taken as they are
        overwrite: replace `out` if it exists

    Raises ConversionError listing everything that is wrong; then nothing is written.
    """
    vit, llama, out, qformer, delta, projector, lora, arch = map(
        _path, (vit, llama, out, qformer, delta, projector, lora, arch))
    _check_out(out, overwrite)
    problems, parameters, constant = Problems(), {}, {}
    told = minigpt4_files.read_arch(arch, problems)
    is_v2 = lora is not None or lora_rank > 0

    vit_tensors = minigpt4_files.read(vit, problems)
    vit_cfg = minigpt4_files.vit_config(vit_tensors, told, is_v2, problems)
    if vit_cfg:
        parameters |= forward(minigpt4_files.vit_entries(vit_cfg), vit_tensors, minigpt4_files.vit_ignored(vit_cfg),
                              vit.name, problems)
    qformer_cfg = None
    if qformer:
        tensors = minigpt4_files.read(qformer, problems)
        qformer_cfg = minigpt4_files.qformer_config(tensors, told, problems)
        if qformer_cfg and vit_cfg:
            parameters |= forward(minigpt4_files.qformer_entries(qformer_cfg, vit_cfg.dim), tensors,
                                  minigpt4_files.BLIP2_IGNORED, qformer.name, problems)
    elif vit_cfg:  # the original never reads ln_vision then: it stays as it was initialised
        constant = {"ln_vision/scale": 1.0, "ln_vision/bias": 0.0}
        parameters |= {path: _filled(path, value, vit_cfg.dim) for path, value in constant.items()}
        if vit_cfg.grid**2 % JOINED:
            problems.append(f"Without Q-Former {JOINED} patches become one token, but pictures of "
                            f"{vit_cfg.image_size} pixels have {vit_cfg.grid**2} patches.")

    release, found = _language_model(llama, delta, problems)
    parameters |= found
    trained = {path: minigpt4_files.read_trained(path, problems) for path in (projector, lora) if path}
    if release:
        cfg = release.cfg
        if is_v2:
            cfg = minigpt4_files.with_lora(cfg, trained.get(lora, {}), lora_rank, told, problems)
        if vit_cfg and (qformer_cfg or not qformer):
            inputs = qformer_cfg.dim if qformer_cfg else JOINED * vit_cfg.dim
            found, fresh = _trained(
                trained, (("projector", projector, minigpt4_files.projector_entries(inputs, cfg.dim)),
                          ("lora", lora, llama_files.lora_entries(cfg))), problems)
            parameters |= found
    problems.check("Cannot convert")

    architecture = FAMILIES["minigpt4"].Config(vit=vit_cfg, qformer=qformer_cfg, llama=cfg)
    text = TEXT["minigpt_v2" if is_v2 else "minigpt4" if qformer else "minigpt4, no Q-Former"]
    text = dataclasses.replace(text, prompt_template=prompt_template)
    sources = {"vit": vit, "qformer": qformer, "projector": projector, "lora": lora}
    sources = {name: (path,) for name, path in sources.items() if path} | {"llama": release.files}
    write(Plan("minigpt4", architecture, parameters, text, release.generation, sources, release.tokenizer,
               tuple(fresh), constant), out, overwrite)


def imagebind_llm(
    imagebind: Path, llama: Path, out: Path, *, adapter: Path | None = None,
    injection: Literal["released", "token", "token-shared"] = "released", arch: Path | None = None,
    words: Path | None = None, prompt_template: str = ALPACA, overwrite: bool = False,
) -> None:
    """Converts ImageBind-LLM from its parts.

    Args:
        imagebind: imagebind_huge.pth or imagebind_w3D.pth
        llama: folder of LLaMA as Meta ships it (params.json, consolidated.NN.pth) or as transformers saves it
        out: checkpoint folder to write; must not exist, or be empty
        adapter: released adapter or training checkpoint of either phase, or a bind network alone (bind_network.pth);
            what it does not hold, and without it everything that is trained, starts fresh
        injection: how features reach the layers: through each head's gate as in the release, or added to every token
            through a gate of each layer (token) or one gate for all (token-shared)
        arch: JSON file with what tensors do not show (head counts, picture size, ...); released sizes need none
        words: merges of the text sense (CLIP's bpe_simple_vocab_16e6.txt.gz); without it that sense cannot be read
        prompt_template: put around every prompt at its {}; the default is Alpaca's, which the release was trained with
        overwrite: replace `out` if it exists

    Raises ConversionError listing everything that is wrong; then nothing is written.
    """
    imagebind, llama, out, adapter, arch, words = map(_path, (imagebind, llama, out, adapter, arch, words))
    _check_out(out, overwrite)
    problems = Problems()
    told = adapter_files.read_arch(arch, problems)
    form = adapter_files.INJECTIONS.get(injection)
    if form is None:
        problems.append(f"--injection is {injection!r}; there are {', '.join(adapter_files.INJECTIONS)}.")
    towers, parameters = _imagebind(imagebind, told["imagebind"], words, problems)

    def fit(cfg: LlamaConfig, tensors: Mapping[str, LazyTensor] | None) -> adapter_files.Adapter | None:
        if towers is None or form is None:
            return None
        return adapter_files.imagebind_llm(towers, dataclasses.replace(cfg, injection=form), tensors, told, problems)

    sources = {"imagebind": imagebind, "adapter": adapter, "words": words, "llama": llama}
    write(_adapted("imagebind_llm", sources, parameters, fit, prompt_template, problems), out, overwrite)


def llama_adapter(
    llama: Path, out: Path, *, adapter: Path | None = None, clip: Path | None = None, arch: Path | None = None,
    raw_gates: bool = False, prompt_template: str = ALPACA, overwrite: bool = False,
) -> None:
    """Converts LLaMA-Adapter, v1 (text) or v2 (pictures), from its parts.

    Args:
        llama: folder of LLaMA as Meta ships it (params.json, consolidated.NN.pth) or as transformers saves it
        out: checkpoint folder to write; must not exist, or be empty
        adapter: released adapter or training checkpoint; without it everything that is trained starts fresh, of v2 if
            `clip` is given
        clip: state dict of CLIP, of which v2 reads the picture tower (released: ViT-L/14)
        arch: JSON file with what tensors do not show (adapter_v1: adapter_layer, adapter_len; adapter_v2: clip_heads,
            v_num_heads, ...); released sizes need none
        raw_gates: multiply by the gates themselves and not by their tanh, as v1's inference code does
        prompt_template: put around every prompt at its {}; the default is Alpaca's, which the release was trained with
        overwrite: replace `out` if it exists

    Raises ConversionError listing everything that is wrong; then nothing is written.
    """
    llama, out, adapter, clip, arch = map(_path, (llama, out, adapter, clip, arch))
    _check_out(out, overwrite)
    problems = Problems()
    told = adapter_files.read_arch(arch, problems)
    tower, parameters = _clip(clip, told["adapter_v2"], problems)

    def fit(cfg: LlamaConfig, tensors: Mapping[str, LazyTensor] | None) -> adapter_files.Adapter | None:
        if clip and tower is None:
            return None
        cfg = dataclasses.replace(cfg, injection="head", gate_tanh=not raw_gates)
        return adapter_files.llama_adapter(tower, cfg, tensors, told, problems)

    sources = {"adapter": adapter, "clip": clip, "llama": llama}
    write(_adapted("llama_adapter", sources, parameters, fit, prompt_template, problems), out, overwrite)


def _imagebind(
    path: Path, told: Mapping[str, Any], words: Path | None, problems: Problems
) -> tuple[ImageBindConfig | None, dict[str, Parameter]]:
    tensors = minigpt4_files.read(path, problems)
    towers = imagebind_files.config(tensors, told, problems) if tensors else None
    if towers is None:
        return None, {}
    if words:
        _check_words(words, towers.text and towers.text.vocab, problems)
    return towers, forward(imagebind_files.entries(towers), tensors, imagebind_files.IGNORED, path.name, problems)


def _clip(
    path: Path | None, arch: Mapping[str, Any], problems: Problems
) -> tuple[ClipConfig | None, dict[str, Parameter]]:
    told = llama_adapter_files.told(arch, problems)["clip"]
    tensors = minigpt4_files.read(path, problems) if path else {}
    cfg = llama_adapter_files.clip_config(tensors, told, problems) if tensors else None
    if cfg is None:
        return None, {}
    return cfg, forward(
        llama_adapter_files.clip_entries(cfg), tensors, llama_adapter_files.CLIP_IGNORED, path.name, problems)


def _language_model(
    folder: Path, delta: Path | None, problems: Problems
) -> tuple[llama_files.Release | None, dict[str, Parameter]]:
    """(release, parameters) of a folder in either format."""
    if meta_files.recognised(folder):
        release = meta_files.open_release(folder, problems)
        if delta:
            problems.append(f"--delta is a difference to a folder as transformers saves it, and {folder} is Meta's. "
                            "Export that first: convert it with `llama`, then `mmjax export OUT llama FOLDER`.")
    else:
        release = llama_files.open_release(folder, delta, problems)
    if release is None or not release.tensors:
        return release, {}
    return release, forward(release.entries, release.tensors, release.ignored, folder.name, problems)


def _adapted(
    family: str, sources: Mapping[str, Path | None], towers: dict[str, Parameter],
    fit: Callable[[LlamaConfig, Mapping[str, LazyTensor] | None], adapter_files.Adapter | None], prompt_template: str,
    problems: Problems,
) -> Plan:
    """The plan for a language model with an adapter, which may bring norms in place of the base's.

    sources: by option; "llama" is a folder, and without an "adapter" it starts fresh
    towers:  all other parameters
    fit:     what the adapter's tensors (None: no file) are to a base; None if that cannot be said
    """
    llama, adapter = sources["llama"], sources["adapter"]
    release, base = _language_model(llama, None, problems)
    tensors = adapter_files.read(adapter, problems) if adapter else None
    found = fit(release.cfg, tensors) if release and (tensors or not adapter) else None
    own = forward(found.entries, tensors, found.ignored, adapter.name, problems) if found and tensors else {}
    problems.check("Cannot convert")
    files = {name: (path,) for name, path in sources.items() if path} | {"llama": release.files}
    replaced = {path: base[path] for path in base.keys() & own.keys()}
    text = dataclasses.replace(ALPACA_TEXT, prompt_template=prompt_template)
    return Plan(family, found.config, towers | base | own, text, release.generation, files, release.tokenizer,
                tuple(found.fresh), replaced=replaced, words=sources.get("words"))


def _check_words(path: Path, vocab: int | None, problems: Problems) -> None:
    """Has a merges file as many merges as the text sense's embedding wants? Bytes, twice, and two marks go before."""
    if vocab is None:
        problems.append(f"{path.name} was given as --words, but ImageBind's file has no text tower.")
        return
    count = vocab - 2 * 256 - 2
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            merges = [line.split() for line in itertools.islice(file, 1, count + 1)]
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        problems.append(f"--words {path} cannot be read as a gzip file of merges: {error}")
        return
    if (found := sum(len(merge) == 2 for merge in merges)) != count:
        problems.append(f"--words {path} holds {found} merges, but the text tower's {vocab} words need {count}.")


def _trained(
    files: Mapping[Path, Mapping[str, LazyTensor]], parts: Sequence[tuple[str, Path | None, list[Entry]]],
    problems: Problems,
) -> tuple[dict[str, Parameter], list[str]]:
    """(parameters, fresh paths) of the trained parts, given as (option, its file, entries).

    One file may serve both. A part that a file holds and nobody asked for would silently be lost, as it was in the
    original: that is a problem.
    """
    parameters: dict[str, Parameter] = {}
    for path, tensors in files.items():
        entries, ignored = [], list(minigpt4_files.TRAINED_IGNORED)
        for option, given, wanted in parts:
            pattern = minigpt4_files.TRAINED_KEYS[option]
            if given == path:
                entries += wanted
                continue
            ignored.append((pattern, f"--{option} is another file"))
            if given is None and any(re.fullmatch(pattern, key) for key in tensors):
                problems.append(f"{path.name} holds a trained {option} as well, which would be lost: give the same "
                                f"file as --{option}, too.")
        if tensors:
            parameters |= forward(entries, tensors, ignored, path.name, problems)
    return parameters, [entry.path for _, given, wanted in parts if given is None for entry in wanted]


def _filled(path: str, value: float, size: int) -> Parameter:
    tensor = Computed(path, (size,), np.float32, lambda: np.full(size, value, np.float32))
    return Parameter((size,), np.dtype(np.float32), "D -> D", {}, (tensor,), False)


def write(plan: Plan, out: Path, overwrite: bool = False) -> None:
    """Carries out a plan. On any error, and when interrupted, nothing is left behind and `out` is as it was."""
    problems, out = Problems(), Path(os.path.realpath(out))  # a link goes on leading to the checkpoint
    wanted = shapes(plan.family, plan.architecture)
    held = {**plan.parameters, **{path: wanted[path] for path in plan.fresh if path in wanted}}
    problems.extend(trees.compare(wanted, held))
    problems.extend(f"fresh       {path} is no parameter of the model" for path in plan.fresh if path not in wanted)
    free = shutil.disk_usage(next(parent for parent in out.parents if parent.exists())).free
    if free < plan.nbytes * 1.02:
        problems.append(f"{out.parent} has {free / 1e9:.1f} GB free, the checkpoint needs {plan.nbytes / 1e9:.1f} GB.")
    problems.check("Cannot convert")

    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name[:40]}.partial-{os.getpid()}"  # a long name becomes no longer
    fingerprints = Fingerprints({path for paths in plan.sources.values() for path in paths})
    try:
        partial.mkdir()
        with progress_bar("Converting", plan.nbytes) as advance:
            weights.save(partial / "weights", plan.stored, advance)
        _copy_tokenizer(plan.tokenizer, partial / "tokenizer")
        if plan.words:
            shutil.copyfile(plan.words, partial / "tokenizer" / WORDS)
        (partial / "config.json").write_text(json.dumps(_config(plan, fingerprints.join()), indent=2) + "\n")
        _move(partial, out, overwrite)
    finally:
        fingerprints.stop()
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def progress_bar(task: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows bytes, speed and time left on the error stream; gives the function that moves it on by some bytes."""
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        number = bar.add_task(task, total=total)
        yield lambda size: bar.advance(number, size)


class Fingerprints:
    """SHA-256 of files, computed in a thread while they are converted."""

    def __init__(self, paths: set[Path]):
        self._files: dict[Path, dict[str, Any]] = {}
        self._error: OSError | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(sorted(paths),), daemon=True)
        self._thread.start()

    def _run(self, paths: Sequence[Path]) -> None:
        try:
            for path in paths:
                digest = hashlib.sha256()
                with open(path, "rb") as file:
                    while (block := file.read(2**20)) and not self._stopped.is_set():
                        digest.update(block)
                self._files[path] = {"file": path.name, "bytes": path.stat().st_size, "sha256": digest.hexdigest()}
        except OSError as error:
            self._error = error

    def join(self) -> Mapping[Path, dict[str, Any]]:
        """Waits; {path: {"file", "bytes", "sha256"}}. Raises the OSError that stopped it."""
        self._thread.join()
        if self._error:
            raise self._error
        return self._files

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()


def _config(plan: Plan, files: Mapping[Path, dict[str, Any]]) -> dict[str, Any]:
    sources = {name: [files[path] for path in paths] for name, paths in plan.sources.items()}
    return {
        "format": FORMAT,
        "family": plan.family,
        "architecture": dataclasses.asdict(plan.architecture),
        "text": dataclasses.asdict(plan.text),
        "generation": plan.generation,
        "sources": {name: found if name == "llama" else found[0] for name, found in sources.items()},
        "fresh": list(plan.fresh),
        "constant": plan.constant,
    }


def _copy_tokenizer(source: Path, target: Path) -> None:
    target.mkdir()
    for name in llama_files.TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _path(path: str | Path | None) -> Path | None:
    """One spelling for one file; links stay what they are (their targets may have names that say nothing).

    Raises ValueError for a URL.
    """
    files.refuse([problem] if (problem := files.url_problem(path)) else [])
    if not path:
        return None
    path = Path(path).absolute()
    return path.parent.resolve() / path.name


def _check_out(out: Path, overwrite: bool) -> None:
    storage.local(out)  # refused here rather than when everything has been read
    if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not empty. Choose another folder, or replace it with --overwrite.")


def _move(partial: Path, out: Path, overwrite: bool) -> None:
    _check_out(out, overwrite)  # it may have appeared meanwhile
    old = partial.with_name(partial.name + "-old")
    if out.exists():
        out.rename(old)
    partial.rename(out)
    if old.is_dir():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.unlink(missing_ok=True)
