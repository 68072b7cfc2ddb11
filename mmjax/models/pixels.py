"""Normalisation of images, on the host or on the device."""

import einops
import jax
import numpy as np

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of red, green, blue; CLIP's
STD = (0.26862954, 0.26130258, 0.27577711)


def normalise(images: jax.Array | np.ndarray, mean: tuple[float, ...] = MEAN,
              std: tuple[float, ...] = STD) -> jax.Array | np.ndarray:
    """Normalises images: uint8[...,H,W,3] -> float32[...,3,H,W]. Arrays of another dtype are returned unchanged.

    numpy arrays are computed with numpy, bit-equal to the original; XLA may differ in the last two bits.
    """
    if images.dtype != np.uint8:
        return images
    mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    scaled = (images.astype(np.float32) / np.float32(255) - mean) / std
    return einops.rearrange(scaled, "... H W C -> ... C H W")
