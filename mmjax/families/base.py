"""`Family`, the declaration of a family of models that every command reads, and the registry of families.

A family is registered with `register(Family(...))`. The families of this package are registered when `mmjax.families`
is imported. Another package calls `register` too, and either names its module in the entry-point group
`mmjax.families` or is imported by a config file.
"""

import dataclasses
import difflib
import functools
import importlib.metadata
import reprlib
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import numpy as np
from rich.console import Console

from mmjax import trees
from mmjax.batch import Batch
from mmjax.config import TextConfig
from mmjax.convert import safetensors, torch_file
from mmjax.convert.tables import Entry, SourceCheckpoint
from mmjax.models import int8, pixels
from mmjax.models.language_model import LanguageModelConfig

NUMBER = "{i}"  # the number of a layer in the names of a `Stage`
console = Console(stderr=True, markup=False)


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """How an image is preprocessed for an encoder.

    size:      side of the square, in pixels
    fit:       "stretch" resizes the whole image to the square, "center_crop" resizes the short side and crops the
               center, "pad" first pads the short side with the mean color
    mean, std: of the normalisation, for channels in RGB order and values between 0 and 1
    reverse:   reorder the channels to BGR before the normalisation, which stays in RGB order
    tokens:    soft tokens per image; 0: images use no slots
    """

    size: int
    fit: Literal["stretch", "center_crop", "pad"] = "stretch"
    mean: tuple[float, float, float] = pixels.MEAN
    std: tuple[float, float, float] = pixels.STD
    reverse: bool = False
    tokens: int = 0

    def normalise(self, images: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
        """Normalises images: uint8[...,H,W,3] -> float32[...,3,H,W]. Images of another dtype are returned unchanged."""
        if self.reverse and images.dtype == np.uint8:
            images = images[..., ::-1]
        return pixels.normalise(images, self.mean, self.std)


@dataclasses.dataclass(frozen=True)
class PromptStyle:
    """The default format of a family's prompts.

    text:  templates, end symbol and lengths that the released weights were trained with
    image: the text that represents an image in a prompt, with one `<ImageHere>`; "" if images use no slots
    """

    text: TextConfig = TextConfig()
    image: str = ""

    def with_images(self, prompt: str, count: int) -> str:
        """Returns the prompt with `count` images before it."""
        return f"{self.image * count} {prompt}" if self.image and count else prompt


class FamilyConfig:
    """Base class of the families' configs. A family's `Config` is a frozen dataclass that inherits this, has a field
    `llm`, and overrides what differs.

    llm:        the language model's config, see `mmjax.models.language_model`
    images:     how images are preprocessed; None: the model reads no images
    media:      the encoder of the other senses (`mmjax.models.imagebind.ImageBindConfig`); None: there is none
    injects:    whether the family injects vectors into the layers of the language model, one set per row
    injected_layers: how many layers, the last ones, read the injection; None: all of them
    """

    llm: LanguageModelConfig
    images: ImageSpec | None = None
    media: Any = None
    injects: bool = False
    injected_layers: int | None = None

    @property
    def image_size(self) -> int | None:
        return self.images.size if self.images else None

    @property
    def image_tokens(self) -> int:
        """Soft tokens per image; 0: images use no slots."""
        return self.images.tokens if self.images else 0

    @property
    def senses(self) -> tuple[str, ...]:
        """The senses that the model mixes; empty: it does not mix senses."""
        return tuple(self.media.towers) if self.media else ()


@dataclasses.dataclass(frozen=True)
class Stage:
    """An intermediate result at which a model and its original are compared.

    name:     name in the reference file; `{i}` is the number of a layer
    path:     module that returns the result; scanned layers are one module
    reads:    parameters that the module uses
    original: the same in the original's names
    kind:     "encoder", "embedding" (the input of the first layer), or "decoder": [B,T,...], ignored at padding
    flatten:  leading axes of our result that are one axis in the original: (start, stop)
    """

    name: str
    path: str
    reads: str
    original: str
    kind: Literal["encoder", "embedding", "decoder"] = "encoder"
    flatten: tuple[int, int] | None = None

    def __str__(self) -> str:
        return self.name

    def of(self, number: str | int) -> "Stage":
        """Returns the stage of one layer."""
        names = (text.replace(NUMBER, str(number)) for text in (self.name, self.path, self.reads, self.original))
        return Stage(*names, self.kind, self.flatten)


LOGITS = Stage("logits", "", "the language model's head", "the output head", "decoder")
LOSS = Stage("loss", "", "nothing: `targets` against `logits`", "loss")
EMBEDDING = Stage("embedding", "", "the language model's table, and the slots of soft tokens",
                  "the input of the first layer", "embedding")


@dataclasses.dataclass(frozen=True)
class Conversion:
    """How released files are converted to a checkpoint.

    inspect: reads and checks the files, `(options) -> SourceCheckpoint`; its parameters are the options of
             `mmjax convert FAMILY`, its docstring their help
    origins: (pattern of a parameter's path, option whose file contains it), first match wins; for messages
    """

    inspect: Callable[..., SourceCheckpoint]
    origins: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class ExportContext:
    """What an export needs in addition to the tensors. safetensors: write that format instead of torch.save's"""

    config: Any
    generation: Mapping[str, Any]
    tokenizer: Path
    safetensors: bool = False


def save_model(out: Path, tensors: Mapping[str, Any], context: ExportContext) -> None:
    """Writes a .pth with the tensors under "model", as the originals' runners do; or a .safetensors, which is flat."""
    if context.safetensors:
        return safetensors.save(out, tensors)
    torch_file.save(out, {"model": tensors})


def save_flat(out: Path, tensors: Mapping[str, Any], context: ExportContext) -> None:
    """Writes a .pth or .safetensors with the tensors alone."""
    (safetensors if context.safetensors else torch_file).save(out, tensors)


@dataclasses.dataclass(frozen=True)
class Export:
    """A part of a model that can be exported in its released format.

    entries: `(config, replaced) -> table`; `replaced` are the paths that an adapter has replaced
    write:   `(out, tensors, context)`, writes the file or folder
    exists:  whether a model of this config has the part
    base:    export the parameters from before an adapter replaced them
    """

    entries: Callable[[Any, Mapping[str, Any]], list[Entry]]
    write: Callable[[Path, Mapping[str, Any], ExportContext], None] = save_model
    exists: Callable[[Any], bool] = lambda cfg: True
    base: bool = False


class Resize(Protocol):
    """`(cfg, image_size, drop_path) -> cfg`: sets the image size (None: keep it) and the encoder's drop path."""

    def __call__(self, cfg: Any, image_size: int | None, drop_path: float) -> Any: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """The declaration of one kind of model.

    name:       name in config.json and on the command line
    Config:     frozen dataclass, see `FamilyConfig`
    Model:      `Model(cfg, dtype, remat)`, see `mmjax.families.model.LanguageModel`
    axes:       logical axes of the parameters, without the language model's (`cfg.llm.axes`)
    matrices:   matrices that can be stored as int8, without the language model's (`cfg.llm.matrices`)
    presets:    configs by name
    example:    `cfg -> Batch` of zeros, to initialize every parameter
    trained:    path rules of the trained parameters, unless a run sets its own
    phases:     the same by phase
    with_phase: `(cfg, phase) -> cfg`, the architecture that a phase trains
    resize:     see `Resize`; None: the encoder has a fixed size and no stochastic depth
    encoder:    parts before the first trained parameter, `{field of Config: path rule}`. The names are also
                the conversion's options for their files
    prompt:     the default format of prompts
    conversion: how released files are converted; None: there is no conversion
    exports:    parts that can be exported, by name
    replaces:   paths that an adapter may replace in the language model
    stages:     intermediate results to compare with the original, in the order of computation. The doctor needs one
                of kind "embedding" and one named "logits"; without them ValueError
    """

    name: str
    Config: type
    Model: type
    axes: tuple[tuple[str, tuple[str, ...]], ...]
    presets: Mapping[str, Any]
    example: Callable[[Any], Batch]
    matrices: int8.Matrices = int8.MATRICES
    trained: tuple[str, ...] = ()
    phases: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    with_phase: Callable[[Any, str], Any] = lambda cfg, phase: cfg
    resize: Resize | None = None
    encoder: Mapping[str, str] = dataclasses.field(default_factory=dict)
    prompt: PromptStyle = PromptStyle()
    conversion: Conversion | None = None
    exports: Mapping[str, Export] = dataclasses.field(default_factory=dict)
    replaces: tuple[str, ...] = ()
    stages: tuple[Stage, ...] = (EMBEDDING, LOGITS, LOSS)

    def __post_init__(self):
        if not any(stage.kind == "embedding" for stage in self.stages) or LOGITS.name not in map(str, self.stages):
            raise ValueError(f"The family {self.name} has the stages {', '.join(map(str, self.stages)) or 'none'}; it "
                             "needs one of kind 'embedding' and one named 'logits', such as `mmjax.families.base."
                             "EMBEDDING` and `LOGITS`.")

    def __str__(self) -> str:
        return self.name

    def all_axes(self, cfg: Any) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """Returns `axes` with those of a config's language model."""
        return (*self.axes, *trees.prefixed("llm", cfg.llm.axes))

    def all_matrices(self, cfg: Any) -> int8.Matrices:
        """Returns `matrices` with those of a config's language model."""
        return (*self.matrices, *trees.prefixed("llm", cfg.llm.matrices))

    def in_encoder(self, path: str) -> bool:
        """Returns whether the parameter at a path is part of the encoder."""
        return trees.matches(path, self.encoder.values())

    def rules(self, phase: str | None = None, trained: tuple[str, ...] | None = None) -> tuple[str, ...]:
        """Returns a run's rules: `trained`, its phase's, or the family's. Raises ValueError for an unknown phase."""
        if phase is not None and phase not in self.phases:
            raise ValueError(f"phase = {phase!r}: the family {self.name} has "
                             + (f"{', '.join(self.phases)}." if self.phases else "no phases."))
        return trained or (self.phases[phase] if phase else self.trained)


# ---- the registry ----


class _Registry(Mapping[str, Family]):
    """The families by name. Families of other packages are imported when an unknown name is looked up for the first
    time, or when the families are listed."""

    GROUP = "mmjax.families"

    def __init__(self):
        self._known: dict[str, Family] = {}
        self._imported = False

    def add(self, family: Family) -> None:
        known = self._known.get(family.name)
        if known is not None and known.Model.__module__ != family.Model.__module__:
            raise ValueError(f"Two families are named {family.name!r}: {known.Model.__module__} and "
                             f"{family.Model.__module__} each register one. Rename one of them.")
        self._known[family.name] = family

    def remove(self, family: Family) -> None:
        del self._known[family.name]

    def __getitem__(self, name: str | Family) -> Family:
        if isinstance(name, Family):
            return name
        if name not in self._known:
            self._import_entry_points()
        if name not in self._known:
            raise KeyError(name)
        return self._known[name]

    def _import_entry_points(self) -> None:
        if self._imported:
            return
        self._imported = True
        for point in importlib.metadata.entry_points(group=self.GROUP):
            try:
                loaded = point.load()
                if isinstance(loaded, Family):
                    self.add(loaded)
            except Exception as error:  # of the other package, whatever it does when it is imported
                console.print(f"The family of {point.value} (entry-point group {self.GROUP!r}) is not available: "
                              f"{type(error).__name__}: {error}. Repair or uninstall the package that names it.",
                              highlight=False, soft_wrap=True)

    def __iter__(self) -> Iterator[str]:
        self._import_entry_points()
        return iter(self._known)

    def __len__(self) -> int:
        self._import_entry_points()
        return len(self._known)


FAMILIES = _Registry()


def register(family: Family) -> Family:
    """Registers a family and returns it. Raises ValueError if another module has registered one of that name."""
    FAMILIES.add(family)
    return family


def find(name: str | Family) -> Family:
    """Returns the family of a name. Raises ValueError listing the known ones."""
    try:
        return FAMILIES[name]
    except KeyError:
        close = difflib.get_close_matches(str(name), FAMILIES, n=1)
        raise ValueError(f"There is no family {name!r}. " + (f"Did you mean {close[0]!r}? " if close else "")
                         + f"Known are {', '.join(FAMILIES)}; a family of another package is known once its module "
                         f"is imported or named in the entry-point group {_Registry.GROUP!r}.") from None


# ---- shapes and initial values ----


def shapes(family: str | Family, cfg: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns `{path: jax.ShapeDtypeStruct}` of a family's parameters, in float32; nothing is allocated."""
    return dict(_shapes(find(family), cfg))


@functools.lru_cache(maxsize=32)
def _shapes(family: Family, cfg: Any) -> dict[str, jax.ShapeDtypeStruct]:
    key = jax.eval_shape(jax.random.key, 0)
    try:
        return trees.flatten(jax.eval_shape(initial(family, cfg), key))
    except Exception as error:  # sizes that do not fit together raise errors of any type while tracing
        first = (str(error).splitlines() or [""])[0]
        raise ValueError(f"No model of {family.name} can be built with these sizes ({type(error).__name__}: {first}): "
                         f"{cfg}") from error


def initial(family: str | Family, cfg: Any) -> Callable[[jax.Array], dict[str, Any]]:
    """Returns a jitted `key -> tree` that initializes every parameter of a family, in float32.

    The function is cached, and JAX caches its trace, so under one mesh the model is traced once.
    """
    return _initial(find(family), cfg)


@functools.lru_cache(maxsize=32)  # tracing a model takes seconds
def _initial(family: Family, cfg: Any) -> Callable[[jax.Array], dict[str, Any]]:
    return jax.jit(lambda key: family.Model(cfg).init(key, family.example(cfg))["params"])


LARGEST, DEEPEST = 2**31, 10_000  # maximum size, and maximum number of layers, in a config from a file


def config_from_dict(cls: type, values: Mapping[str, Any], where: str = "architecture") -> Any:
    """Returns the inverse of `dataclasses.asdict`.

    Raises ValueError listing every unknown field, or naming a field whose value has another type, is out of range, or
    is refused by the config itself.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} is {reprlib.repr(values)}, but must be an object with the fields of {cls.__name__}.")
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]
    unknown = sorted(map(str, values.keys() - set(known)))
    if unknown:
        raise ValueError(f"{where} has fields that {cls.__name__} does not know: {', '.join(unknown)}. "
                         f"It knows {', '.join(known)}.")
    built = {name: _typed(hints[name], value, f"{where}.{name}") for name, value in values.items()}
    try:
        return cls(**built)
    except Exception as error:  # of the checks of a config, or a field without a default is missing
        raise ValueError(f"{where} cannot be used: {error}") from error


def _typed(hint: Any, value: Any, where: str) -> Any:
    """Returns a value from JSON as an annotation describes it; raises ValueError for a value of another type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, types.UnionType) or origin is typing.Union:
        if value is None and type(None) in args:
            return None
        hint = next(choice for choice in args if choice is not type(None))
        return _typed(hint, value, where)
    if dataclasses.is_dataclass(hint):
        return config_from_dict(hint, value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        if args[1:] != (...,) and len(args) != len(value):
            raise ValueError(f"{where} has {len(value)} values, but must have {len(args)}.")
        kinds = [args[0]] * len(value) if args[1:] == (...,) else args
        return tuple(_typed(kind, each, f"{where}.{number}")
                     for number, (kind, each) in enumerate(zip(kinds, value, strict=True)))
    kind = origin or hint
    if kind not in (bool, int, float, str, tuple, dict):
        return tuple(value) if isinstance(value, list) else value
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or isinstance(value, bool) != (kind is bool):
        raise ValueError(f"{where} is {reprlib.repr(value)}, but must be "
                         f"{'a number' if kind is float else kind.__name__}.")
    most = DEEPEST if where.rpartition(".")[2] == "depth" else LARGEST
    if kind in (int, float) and not -LARGEST <= value <= (most if kind is int else sys.float_info.max):
        raise ValueError(f"{where} is {reprlib.repr(value)}, but may be {most:,} at most.")
    return value
