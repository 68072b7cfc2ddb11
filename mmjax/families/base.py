"""What a family of models is, as one declaration that every command asks: `Family`, and the registry of them.

A family declares itself with `register(Family(...))`. Those in this package do so when `mmjax.families` is imported;
another package does it with the same line and names its module in the entry-point group `mmjax.families`, or imports
it from a config file.
"""

import dataclasses
import difflib
import functools
import importlib.metadata
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import numpy as np

from mmjax import trees
from mmjax.batch import Batch
from mmjax.config import TextConfig
from mmjax.convert import torch_file
from mmjax.convert.tables import Entry, Inspected
from mmjax.models import pixels

NUMBER = "{i}"  # in the names of a `Stage`: the number of a layer


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """How an image becomes the input of an encoder.

    size:      side of the square, in pixels
    fit:       "stretch" resizes the whole image to the square, "center_crop" resizes the short side and cuts out the
               middle, "pad" first pads the short side with the mean color
    mean, std: of the normalisation, for channels in RGB order and values between 0 and 1
    reverse:   the channels go in as BGR, each normalised by the mean and deviation of its place in RGB order
    tokens:    soft tokens that an image becomes; 0: it takes no slots of the text
    """

    size: int
    fit: Literal["stretch", "center_crop", "pad"] = "stretch"
    mean: tuple[float, float, float] = pixels.MEAN
    std: tuple[float, float, float] = pixels.STD
    reverse: bool = False
    tokens: int = 0

    def normalise(self, images: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
        """uint8[...,H,W,3] -> float32[...,3,H,W]; float32 images are taken to be normalised and pass unchanged."""
        if self.reverse and images.dtype == np.uint8:
            images = images[..., ::-1]
        return pixels.normalise(images, self.mean, self.std)


@dataclasses.dataclass(frozen=True)
class PromptStyle:
    """How prompts of a family are written where the user says nothing.

    text:  templates, end symbol and lengths that the released weights were trained with
    image: what stands for an image in a prompt, with one `<ImageHere>`; "" where images take no slots
    """

    text: TextConfig = TextConfig()
    image: str = ""

    def with_images(self, prompt: str, count: int) -> str:
        """The prompt with `count` images in front of it."""
        return f"{self.image * count} {prompt}" if self.image and count else prompt


class FamilyConfig:
    """What every family's config declares beside its own fields. A family's `Config` is a frozen dataclass that
    inherits this, has a field `llm`, and overrides what differs.

    llm:        the language model's config; `llm.build(...)` makes its module, see `mmjax.families.model`
    images:     how images are read; None: the model reads no images
    media:      the encoder of the other senses (`mmjax.models.imagebind.ImageBindConfig`); None: there are none
    injects:    whether vectors are injected into the layers of the language model, one set a row
    """

    llm: Any
    images: ImageSpec | None = None
    media: Any = None
    injects: bool = False

    @property
    def image_size(self) -> int | None:
        return self.images.size if self.images else None

    @property
    def image_tokens(self) -> int:
        """Soft tokens that an image becomes; 0: images take no slots of the text."""
        return self.images.tokens if self.images else 0

    @property
    def senses(self) -> tuple[str, ...]:
        """The senses whose mix the model reads; empty: it does not mix senses."""
        return tuple(self.media.towers) if self.media else ()


@dataclasses.dataclass(frozen=True)
class Stage:
    """A place at which a model and its original can be compared.

    name:     in the reference file; `{i}` is the number of a layer
    path:     of the module that gives it; layers that are scanned are one module
    reads:    the parameters that act in it
    original: the same in the original's names
    kind:     "encoder", "embedding" (what enters the first layer), or "decoder": [B,T,...], ignored at padding
    flatten:  leading axes of ours that are one axis in the original, counted from the first: (start, stop)
    """

    name: str
    path: str
    reads: str
    original: str
    kind: Literal["encoder", "embedding", "decoder"] = "encoder"
    flatten: tuple[int, int] | None = None

    def of(self, number: str | int) -> "Stage":
        """The stage of one layer."""
        names = (text.replace(NUMBER, str(number)) for text in (self.name, self.path, self.reads, self.original))
        return Stage(*names, self.kind, self.flatten)


@dataclasses.dataclass(frozen=True)
class Conversion:
    """How released files become a checkpoint.

    inspect: reads the files and checks everything, `(options) -> Inspected`; its parameters are the options of
             `mmjax convert FAMILY`, its docstring their help
    origins: (pattern of a parameter's path, option whose file holds it) in order, for messages
    """

    inspect: Callable[..., Inspected]
    origins: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class ExportContext:
    """What an export may need beside the tensors."""

    config: Any
    generation: Mapping[str, Any]
    tokenizer: Path


def save_model(out: Path, tensors: Mapping[str, Any], context: ExportContext) -> None:
    """A .pth with the tensors under "model", as the originals' runners save it."""
    torch_file.save(out, {"model": tensors})


def save_flat(out: Path, tensors: Mapping[str, Any], context: ExportContext) -> None:
    """A .pth with the tensors alone."""
    torch_file.save(out, tensors)


@dataclasses.dataclass(frozen=True)
class Export:
    """A part of a model that has a released format of its own.

    entries: `(config, replaced) -> table`; `replaced` are the paths that an adapter has its own parameters for
    write:   `(out, tensors, context)`
    exists:  whether a model of this config has the part
    base:    it is written as it was before an adapter replaced parameters of it
    """

    entries: Callable[[Any, Mapping[str, Any]], list[Entry]]
    write: Callable[[Path, Mapping[str, Any], ExportContext], None] = save_model
    exists: Callable[[Any], bool] = lambda cfg: True
    base: bool = False


class Resize(Protocol):
    """`(cfg, image_size, drop_path) -> cfg`: another image size (None: as it is), stochastic depth of the encoder."""

    def __call__(self, cfg: Any, image_size: int | None, drop_path: float) -> Any: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """One kind of model, everything that the commands ask about it.

    name:       in config.json and on the command line
    Config:     frozen dataclass, see `FamilyConfig`
    Model:      `Model(cfg, dtype, remat)`, see `mmjax.families.model.LanguageModel`
    axes:       what each dimension of a parameter is, without the language model's (`cfg.llm.axes`)
    presets:    configs by name
    example:    `cfg -> Batch` of zeros that reaches every parameter
    trained:    path rules of what is trained, if a run says nothing
    phases:     the same by phase
    with_phase: `(cfg, phase) -> cfg`, the architecture that a phase trains
    resize:     see `Resize`; None: the encoder has one size and no stochastic depth
    encoder:    parts that an image passes before anything trained, `{field of Config: path rule}`. They are also the
                names of the options of the conversion that give their files
    prompt:     how prompts are written
    conversion: how released files become a checkpoint; None: there is none
    exports:    parts that can be written back, by name
    replaces:   paths that an adapter may replace in the language model
    stages:     places to compare with the original, in the order in which data pass through them
    """

    name: str
    Config: type
    Model: type
    axes: tuple[tuple[str, tuple[str, ...]], ...]
    presets: Mapping[str, Any]
    example: Callable[[Any], Batch]
    trained: tuple[str, ...] = ()
    phases: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    with_phase: Callable[[Any, str], Any] = lambda cfg, phase: cfg
    resize: Resize | None = None
    encoder: Mapping[str, str] = dataclasses.field(default_factory=dict)
    prompt: PromptStyle = PromptStyle()
    conversion: Conversion | None = None
    exports: Mapping[str, Export] = dataclasses.field(default_factory=dict)
    replaces: tuple[str, ...] = ()
    stages: tuple[Stage, ...] = ()

    def __str__(self) -> str:
        return self.name

    def all_axes(self, cfg: Any) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """`axes` with those of the language model of a config."""
        return (*self.axes, *trees.prefixed("llm", cfg.llm.axes))

    def in_encoder(self, path: str) -> bool:
        """Whether the parameter at a path is of the encoder."""
        return trees.matches(path, self.encoder.values())

    def rules(self, phase: str | None = None, trained: tuple[str, ...] | None = None) -> tuple[str, ...]:
        """What a run trains: its own rules, its phase's, or the family's. Raises ValueError for an unknown phase."""
        if phase is not None and phase not in self.phases:
            raise ValueError(f"phase = {phase!r}: the family {self.name} has "
                             + (f"{', '.join(self.phases)}." if self.phases else "no phases."))
        return trained or (self.phases[phase] if phase else self.trained)


# ---- the registry ----


class _Registry(Mapping[str, Family]):
    """The families by name. One that another package declares is imported when it is asked for."""

    GROUP = "mmjax.families"

    def __init__(self):
        self._known: dict[str, Family] = {}

    def add(self, family: Family) -> None:
        held = self._known.get(family.name)
        if held is not None and held.Model.__module__ != family.Model.__module__:
            raise ValueError(f"Two families are named {family.name!r}: {held.Model.__module__} and "
                             f"{family.Model.__module__} each register one. Rename one of them.")
        self._known[family.name] = family

    def __getitem__(self, name: str | Family) -> Family:
        if isinstance(name, Family):
            return name
        if name not in self._known:
            self._import_others()
        if name not in self._known:
            raise KeyError(name)
        return self._known[name]

    def _import_others(self) -> None:
        for point in importlib.metadata.entry_points(group=self.GROUP):
            loaded = point.load()
            if isinstance(loaded, Family):
                self.add(loaded)

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


FAMILIES = _Registry()


def register(family: Family) -> Family:
    """Makes a family known to every command. Raises ValueError if another module has registered one of that name."""
    FAMILIES.add(family)
    return family


def find(name: str | Family) -> Family:
    """The family of a name. Raises ValueError naming the known ones."""
    try:
        return FAMILIES[name]
    except KeyError:
        close = difflib.get_close_matches(str(name), FAMILIES, n=1)
        raise ValueError(f"There is no family {name!r}. " + (f"Did you mean {close[0]!r}? " if close else "")
                         + f"Known are {', '.join(FAMILIES)}; a family of another package is known once its module "
                         f"is imported or named in the entry-point group {_Registry.GROUP!r}.") from None


# ---- looking at a family without allocating anything ----


def shapes(family: str | Family, cfg: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Every parameter of a family at these sizes as `{path: float32 shape}`; nothing is allocated."""
    return dict(_shapes(find(family), cfg))


@functools.lru_cache(maxsize=32)
def _shapes(family: Family, cfg: Any) -> dict[str, jax.ShapeDtypeStruct]:
    key = jax.eval_shape(jax.random.key, 0)
    return trees.flatten(jax.eval_shape(initial(family, cfg), key))


def initial(family: str | Family, cfg: Any) -> Callable[[jax.Array], dict[str, Any]]:
    """A compiled `key -> tree` of every parameter of a family at these sizes, in float32, as it starts.

    JAX keeps its trace, so under one mesh the shapes and what is compiled of it cost one look at the model.
    """
    return _initial(find(family), cfg)


@functools.lru_cache(maxsize=32)  # to trace a model takes seconds
def _initial(family: Family, cfg: Any) -> Callable[[jax.Array], dict[str, Any]]:
    return jax.jit(lambda key: family.Model(cfg).init(key, family.example(cfg))["params"])


def config_from_dict(cls: type, values: Mapping[str, Any], where: str = "architecture") -> Any:
    """The inverse of `dataclasses.asdict`; raises ValueError naming every unknown field."""
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]
    unknown = sorted(values.keys() - set(known))
    if unknown:
        raise ValueError(f"{where} has fields that {cls.__name__} does not know: {', '.join(unknown)}. "
                         f"It knows {', '.join(known)}.")
    built = {}
    for name, value in values.items():
        choices = typing.get_args(hints[name]) if isinstance(hints[name], types.UnionType) else (hints[name],)
        nested = next((choice for choice in choices if dataclasses.is_dataclass(choice)), None)
        if nested is not None and value is not None:
            value = config_from_dict(nested, value, f"{where}.{name}")
        built[name] = tuple(value) if isinstance(value, list) else value
    return cls(**built)
