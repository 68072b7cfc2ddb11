"""From released PyTorch files to a checkpoint folder: plan, check everything, write beside the place, rename.

    OUT/weights/      an Orbax checkpoint with every parameter in its source's dtype
    OUT/config.json   family, architecture, text settings, generation ids, and the sources' sizes and SHA-256
    OUT/tokenizer/    the language model's tokenizer files, as they were
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from mmjax import trees, weights
from mmjax.config import TextConfig
from mmjax.convert import llama as llama_files
from mmjax.convert import minigpt4 as minigpt4_files
from mmjax.convert.lazy import LazyTensor
from mmjax.convert.tables import Computed, Entry, Parameter, Problems, forward
from mmjax.families import FAMILIES, shapes
from mmjax.families.minigpt4 import JOINED
from mmjax.tokenizer import Tokenizer

FORMAT = 1  # of the checkpoint folder
TEXT = {  # what the released models were trained with; which template belongs to a projector no weight file says
    "minigpt4": TextConfig(end_sym="###", max_txt_len=160),
    "minigpt4, no Q-Former": TextConfig(end_sym="</s>", max_txt_len=160),
    "minigpt_v2": TextConfig(end_sym="</s>", max_txt_len=1024),
}


@dataclasses.dataclass
class Plan:
    """A conversion that was checked and not yet begun.

    fresh:    parameters of the model that no source holds: training starts them anew
    constant: parameters that no source holds and that have a known value
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

    @property
    def nbytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.parameters.values())


def llama(llama: Path, out: Path, *, delta: Path | None = None, overwrite: bool = False) -> None:
    """Converts a language model alone: for text, and as a base for others.

    Args:
        llama: folder as transformers saves it: config.json, weights (.safetensors or .bin), tokenizer
        out: checkpoint folder to write; must not exist, or be empty
        delta: folder of a Vicuna delta to add to the weights
        overwrite: replace `out` if it exists

    Raises ConversionError listing everything that is wrong; then nothing is written.
    """
    llama, delta, out = map(_path, (llama, delta, out))
    _check_out(out, overwrite)
    problems = Problems()
    release = llama_files.open_release(llama, delta, problems)
    if release and release.tensors:
        parameters = forward(llama_files.entries(release.cfg), release.tensors, llama_files.ignored(release.cfg),
                             llama.name, problems)
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
        llama: folder of LLaMA, Vicuna or Llama-2 as transformers saves it
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

    release = llama_files.open_release(llama, delta, problems)
    trained = {path: minigpt4_files.read_trained(path, problems) for path in (projector, lora) if path}
    if release:
        cfg = release.cfg
        if is_v2:
            cfg = minigpt4_files.with_lora(cfg, trained.get(lora, {}), lora_rank, told, problems)
        if release.tensors:
            parameters |= forward(
                llama_files.entries(cfg), release.tensors, llama_files.ignored(cfg), llama.name, problems)
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
    problems = Problems()
    wanted = shapes(plan.family, plan.architecture)
    held = {**plan.parameters, **{path: wanted[path] for path in plan.fresh if path in wanted}}
    problems.extend(trees.compare(wanted, held))
    problems.extend(f"fresh       {path} is no parameter of the model" for path in plan.fresh if path not in wanted)
    free = shutil.disk_usage(next(parent for parent in out.parents if parent.exists())).free
    if free < plan.nbytes * 1.02:
        problems.append(f"{out.parent} has {free / 1e9:.1f} GB free, the checkpoint needs {plan.nbytes / 1e9:.1f} GB.")
    problems.check("Cannot convert")

    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    fingerprints = Fingerprints({path for paths in plan.sources.values() for path in paths})
    try:
        partial.mkdir()
        with progress_bar("Converting", plan.nbytes) as advance:
            weights.save(partial / "weights", plan.parameters, advance)
        _copy_tokenizer(plan.tokenizer, partial / "tokenizer")
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
    """One spelling for one file; links stay what they are (their targets may have names that say nothing)."""
    return Path(os.path.abspath(path)) if path else None


def _check_out(out: Path, overwrite: bool) -> None:
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
