"""Families by name. Each is one file with `Config`, `Model`, `AXES`, `TRAINED`, `PHASES`, `PRESETS` and `example(cfg)`;
one that has phases also says what architecture a phase trains, in `with_phase(cfg, phase)`.

`ENCODER` says what a picture passes before anything that is trained: by the name of a part, which is that of a field of
`Config` and of the released file, the rule of its parameters. `Model.feature(batch)` is what comes out of it.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Callable
from typing import Any

import jax

from mmjax import trees
from mmjax.families import imagebind_llm, llama, llama_adapter, minigpt4

FAMILIES = {"minigpt4": minigpt4, "imagebind_llm": imagebind_llm, "llama_adapter": llama_adapter, "llama": llama}


def shapes(family: str, cfg: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Every parameter of a family at these sizes as `{path: float32 shape}`; nothing is allocated."""
    return dict(_shapes(family, cfg))


@functools.lru_cache(maxsize=32)
def _shapes(family: str, cfg: Any) -> dict[str, jax.ShapeDtypeStruct]:
    key = jax.eval_shape(jax.random.key, 0)
    return trees.flatten(jax.eval_shape(initial(family, cfg), key))


@functools.lru_cache(maxsize=32)  # to trace a model takes seconds
def initial(family: str, cfg: Any) -> Callable[[jax.Array], dict[str, Any]]:
    """A compiled `key -> tree` of every parameter of a family at these sizes, in float32, as it starts.

    JAX keeps its trace, so under one mesh the shapes and what is compiled of it cost one look at the model.
    """
    module = FAMILIES[family]
    return jax.jit(lambda key: module.Model(cfg).init(key, module.example(cfg))["params"])


def config_from_dict(cls: type, values: dict[str, Any], where: str = "architecture") -> Any:
    """The inverse of `dataclasses.asdict`; raises ValueError naming every unknown field."""
    hints = typing.get_type_hints(cls)
    unknown = sorted(values.keys() - {field.name for field in dataclasses.fields(cls)})
    if unknown:
        raise ValueError(f"{where} has fields that {cls.__name__} does not know: {', '.join(unknown)}. "
                         f"It knows {', '.join(hints)}.")
    built = {}
    for name, value in values.items():
        choices = typing.get_args(hints[name]) if isinstance(hints[name], types.UnionType) else (hints[name],)
        nested = next((choice for choice in choices if dataclasses.is_dataclass(choice)), None)
        if nested is not None and value is not None:
            value = config_from_dict(nested, value, f"{where}.{name}")
        built[name] = tuple(value) if isinstance(value, list) else value
    return cls(**built)
