"""The inputs of a model: `Sample`, written by the user, and `Batch`, the input of compiled functions."""

import dataclasses
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Sample:
    """One example, before tokenisation.

    images:  images for the `<ImageHere>` placeholders of the prompt, in order: a path, a PIL image, `uint8[H,W,3]`, or
             an already normalised `float32[3,H,W]`
    media:   other senses by name (ImageBind families): "video", "audio", "depth", "thermal", "imu", "text"
    weights: of "image" and of the media in the mix of senses; 1 by default
    prompt:  the text before the answer; empty for none
    input:   the text that the prompt refers to, for models with a template for prompts with an input (Alpaca's)
    answer:  the text to learn or to score; None if there is none (generation)
    turns:   a conversation, `(question, answer)` pairs, in place of `prompt` and `answer`
    """

    images: list[Any] = dataclasses.field(default_factory=list)
    media: dict[str, Any] = dataclasses.field(default_factory=dict)
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    prompt: str = ""
    input: str = ""
    answer: str | None = None
    turns: list[tuple[str, str]] = dataclasses.field(default_factory=list)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of one static length. B rows, T slots, Q soft tokens an image; G lists of N images.

    Images are in lists. A list belongs to B/G consecutive rows, whose slots refer to its images. Each row has a list of
    its own (G = B), except packed rows (`mmjax.data.packing`): there all rows of a shard have one.

    tokens:        int32[B,T]  the pad token in the slots of soft tokens and of padding
    soft_index:    int32[B,T]  index of the slot's soft token among the N·Q of the row's list; -1 in the slot of a token
    valid:         bool[B,T]   visible to attention; False at padding (and in the slots that the original masks)
    loss_mask:     bool[B,T]   the token is a target (predicted from the slot before it)
    positions:     int32[B,T]  rotary positions: 0, 1, 2, ... in every row, or in every segment of a packed row
    padded_length: int32[B]    length to which the original pads the rows; its per-row loss divides by that minus 1
    images:        uint8[G,N,H,W,3] (normalised by the model) or normalised float32[G,N,3,H,W]; None for text alone
    image_valid:   bool[B,N]   for models that read one image a row: False where a row has no image, which is then zeros
                   after the normalisation. None: all images are valid, or no soft token refers to the others
    features:      precomputed output of `Model.feature`, in place of images and media: the input of MiniGPT-4's
                   projector [G,N,Q,E], the mix of all senses [B,E]
    media:         inputs of ImageBind's towers other than images, by name: "video" [B,clips,3,2,S,S], "audio"
                   [B,clips,1,M,T], "depth" and "thermal" [B,1,H,W], "imu" [B,6,steps], "text" int32[B,77]. None if
                   there are no other senses
    weights:       float32[B] for "image" and each of the media: its weight in the mix of senses, 0 if a row does not
                   have that sense. None if a family does not mix senses
    segments:      int32[B,T]  of packed rows (`mmjax.data.packing`): index of the slot's sample in the row; -1 at
                   padding. None: one sample a row
    """

    tokens: jax.Array | np.ndarray
    soft_index: jax.Array | np.ndarray
    valid: jax.Array | np.ndarray
    loss_mask: jax.Array | np.ndarray
    positions: jax.Array | np.ndarray
    padded_length: jax.Array | np.ndarray
    images: jax.Array | np.ndarray | None = None
    image_valid: jax.Array | np.ndarray | None = None
    features: jax.Array | np.ndarray | None = None
    media: dict[str, jax.Array | np.ndarray] | None = None
    weights: dict[str, jax.Array | np.ndarray] | None = None
    segments: jax.Array | np.ndarray | None = None
