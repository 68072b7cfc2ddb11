"""Pixels as the picture towers of all families were trained on them, made on the host or on the device."""

import einops
import jax
import numpy as np

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)  # of red, green, blue; CLIP's
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def normalise(images: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """uint8[...,H,W,3] -> float32[...,3,H,W]; normalised pictures pass unchanged.

    A numpy array is worked on by numpy, bit-equal to the original; XLA may differ in the last two bits.
    """
    if images.dtype != np.uint8:
        return images
    scaled = (images.astype(np.float32) / np.float32(255) - MEAN) / STD
    return einops.rearrange(scaled, "... H W C -> ... C H W")
