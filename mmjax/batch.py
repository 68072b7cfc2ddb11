"""What goes into a model: `Sample`, as a person writes it, and `Batch`, as a compiled function takes it."""

import dataclasses
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Sample:
    """One example, before tokenisation.

    images:  images for the `<ImageHere>` places of the prompt, in order: a path, a PIL image, `uint8[H,W,3]`, or
             an already normalised `float32[3,H,W]`
    media:   other senses by name (ImageBind families): "video", "audio", "depth", "thermal", "imu", "text"
    weights: of "image" and of the media in the mix of senses; 1 where nothing is said
    prompt:  the text before the answer; empty for none
    input:   what the prompt is about, where a model has a template for prompts with an input (Alpaca's)
    answer:  the text to learn or to score; None when there is nothing to learn (generation)
    turns:   a conversation, `(question, answer)` pairs; takes the place of `prompt` and `answer`
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
    """Rows of one static length. B rows, T places, F images a row, Q soft tokens an image.

    tokens:        int32[B,T]  ids; the places of soft tokens and of padding hold the pad id
    soft_index:    int32[B,T]  which of the row's F·Q soft tokens stands here; -1 where a word stands
    valid:         bool[B,T]   seen by attention; False at padding (and at the original's holes)
    loss_mask:     bool[B,T]   the token here is a target (to be predicted from the place before it)
    positions:     int32[B,T]  rotary positions: 0, 1, 2, ... in every row, or in every segment of a packed one
    padded_length: int32[B]    length of the rows as the original pads them; its per-row loss divides by that minus 1
    images:        uint8[B,F,H,W,3] (normalised by the model) or normalised float32[B,F,3,H,W]; None for text alone
    image_valid:   bool[B,F]   of models that read one image a row: False where a row has none, which is then zeros after
                   the normalisation. None: every image is one, or the model does not look at those that are none
    features:      what `Model.feature` gives, ready-made, in place of images and media: what MiniGPT-4's projector reads
                   [B,F,Q,E], the mix of all senses [B,E]
    media:         what ImageBind's towers take besides images, by name: "video" [B,clips,3,2,S,S], "audio"
                   [B,clips,1,M,T], "depth" and "thermal" [B,1,H,W], "imu" [B,6,steps], "text" int32[B,77]. None where
                   there are no other senses
    weights:       float32[B] for "image" and each of the media: its weight in the mix of senses, 0 where a row has no
                   such sense. None where a family does not mix senses
    segments:      int32[B,T]  of packed rows (`mmjax.data.packing`): which of the row's samples stands here, from 0 on;
                   -1 at padding. None: one sample a row
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
