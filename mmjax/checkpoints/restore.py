"""`ModelSpec`: a model's module, the dtype and sharding of its parameters, and their restoration onto a mesh.

Training, plans, features, the doctor and `mmjax.load` all use it, so they see the same model.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mmjax import sharding, trees
from mmjax.checkpoints import frozen as frozen_weights
from mmjax.checkpoints.converted import ConvertedCheckpoint
from mmjax.families import initial, shapes
from mmjax.models import int8, kernels
from mmjax.models.int8 import Int8


@dataclasses.dataclass(frozen=True, eq=False)
class ModelSpec:
    """The specification of a model, without its weights.

    source:       its checkpoint, with the architecture of the model
    dtype:        of activations and frozen parameters
    frozen_dtype: "int8" stores the large frozen matrices as int8; None: as `dtype`
    trained:      path rules of the trained parameters, which are float32
    exact:        paths that are never stored as int8
    remat:        what the layers recompute in the backward pass, see `mmjax.config.RunConfig`
    attention:    how attention is computed, see `mmjax.models.kernels.select`
    """

    source: ConvertedCheckpoint
    mesh: jax.sharding.Mesh
    dtype: Any
    frozen_dtype: str | None = None
    trained: tuple[str, ...] = ()
    exact: Collection[str] = ()
    remat: bool | str = False
    attention: str = "auto"

    @property
    def module(self) -> nn.Module:
        chosen = kernels.select(self.mesh.devices.flat[0].platform, self.attention)
        return self.source.family.Model(self.source.config, jnp.dtype(self.dtype), self.remat, kernels=chosen)

    @property
    def matrices(self) -> int8.Matrices:
        """The matrices that can be stored as int8."""
        return self.source.family.all_matrices(self.source.config)

    def param_dtype(self, path: str) -> Any:
        """Returns float32 for trained parameters, int8 for frozen ones of `matrices` if enabled, else `dtype`."""
        if trees.matches(path, self.trained):
            return jnp.float32
        quantised = self.frozen_dtype == "int8" and path not in self.exact and int8.holds(path, self.matrices)
        return jnp.int8 if quantised else jnp.dtype(self.dtype)

    def param_specs(self, only: Callable[[str], bool] = lambda path: True) -> dict[str, Any]:
        """Returns `{path: jax.ShapeDtypeStruct with its sharding, or an Int8 of two}`.

        Raises ValueError naming every parameter that the mesh cannot divide.
        """
        every = shapes(self.source.family, self.source.config)
        shardings = sharding.shardings(every, self.source.family.all_axes(self.source.config), self.mesh)
        return {path: self._param_spec(path, shape.shape, shardings[path])
                for path, shape in every.items() if only(path)}

    @property
    def sharding_note(self) -> str | None:
        """A line about the parameters that the mesh's fsdp axis does not divide; None if it divides all."""
        return sharding.exceptions(self.param_specs(), self.source.family.all_axes(self.source.config), self.mesh)

    def restore(
        self,
        init_fresh: int | None = None,
        trained: Mapping[str, Any] | None = None,
        only: Callable[[str], bool] = lambda path: True,
    ) -> dict[str, Any]:
        """Returns all parameters, or some, each read directly into its sharding on the mesh.

        init_fresh: seed of the parameters that no source file had; if None, ValueError names them
        trained:    `{path: array}` to use in place of the checkpoint's, such as an earlier run's; ValueError names
                    those with another shape than in this model
        only:       which paths to restore
        """
        source, trained = self.source, trained or {}
        fresh = [path for path in source.fresh if path not in trained and only(path)]
        if fresh and init_fresh is None:
            raise ValueError(
                f"{source.folder} was converted without {', '.join(fresh)}. Convert it with the trained "
                "file (--projector, --lora, --adapter), load the run that trained them, or initialise them with "
                "init_fresh=SEED.")
        every, specs = shapes(source.family, source.config), self.param_specs(only)
        formats = {path: jax.tree.map(lambda leaf: leaf.format, spec) for path, spec in specs.items()}
        if wrong := trees.compare({path: every[path] for path in trained.keys() & every.keys()}, trained):
            raise ValueError("The trained parameters are of another model:\n  " + "\n  ".join(wrong))
        flat = trees.flatten(frozen_weights.restore(
            source.folder / "weights", specs, only=lambda path: path not in trained and path not in fresh))
        flat |= {path: jax.device_put(self._cast(path, leaf, specs[path]), formats[path])
                 for path, leaf in trained.items() if only(path)}

        def init() -> dict[str, jax.Array]:
            params = trees.flatten(initial(source.family, source.config)(jax.random.key(init_fresh)))
            return {path: self._cast(path, params[path], specs[path]) for path in fresh}

        if fresh:
            flat |= jax.jit(init, out_shardings={path: formats[path] for path in fresh})()
        return trees.unflatten(flat)

    def _param_spec(self, path: str, shape: tuple[int, ...], sharding: Any) -> Any:
        """Returns the spec of a parameter on the devices: `jax.ShapeDtypeStruct`, or an `Int8` of two.

        Frozen matrices get the memory layout in which a TPU multiplies them. Trained ones keep the default layout,
        which their optimizer state has.
        """
        dtype = self.param_dtype(path)
        if jnp.dtype(dtype) == jnp.int8:
            return int8.shapes(shape, sharding, int8.summed(path, len(shape), self.matrices))
        if not trees.matches(path, self.trained) and int8.holds(path, self.matrices):
            sharding = int8.ordered(shape, sharding, int8.summed(path, len(shape), self.matrices))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def _cast(self, path: str, leaf: jax.Array, spec: Any) -> Any:
        if isinstance(spec, Int8):
            return int8.quantise(leaf, int8.summed(path, leaf.ndim, self.matrices))
        return leaf.astype(spec.dtype)
