"""Text generation: a prefill of the prompts, then a compiled loop that adds one token to every row per step.

The settings mean what they mean in Hugging Face's `generate` (4.30) with `inputs_embeds`, which is how MiniGPT-4 calls
it: the tokens of a row begin with one dummy `bos` that the model never sees. It is returned and counts for the
repetition penalty, for `min_length` and for the length in beam scores; the prompt counts for none of them. With
`GenerateConfig.dummy` False the settings mean what they mean in transformers 5.

The loop can stop at any step and continue, which is how text is streamed. Numbers such as the temperature are
operands, so changing one needs no compilation.

Left out: beam sampling, several results per row.

B rows   T prompt slots   R slots for new tokens   S cache slots, T + R   W tokens of a row, 1 + R
J beams of a row   A candidates of a row (beam search)   V vocabulary
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mmjax.batch import Batch
from mmjax.models.masks import cached_mask

MIN_TEMPERATURE = 1e-6  # smaller ones overflow float32 scores
ROWS, SLOTS = -4, -3  # axes of a cache's leaves, [..., rows, slots, heads, head]


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """How to continue prompts.

    max_new_tokens:     tokens generated per row, `eos` or stop tokens included
    num_beams:          above 1: beam search
    do_sample:          sample the next token instead of taking the best one
    temperature:        divides the scores before sampling; 0 means greedy, whatever `do_sample` is
    top_k, top_p:       sample from the k best tokens (0: all), and from the fewest tokens whose probabilities reach p
    top_p_inclusive:    use LLaMA's rule: a token stays if the probabilities of all better ones sum to p at most. It
                        keeps one more than Hugging Face's rule if they sum to exactly p, and fewer of tied tokens
    repetition_penalty: divides positive and multiplies negative scores of tokens already generated; applies to logits,
                        in beam search to log-probabilities
    length_penalty:     a finished beam scores its summed log-probability / length ** length_penalty
    min_length:         no `eos` while a row has fewer tokens than this, the dummy included
    early_stopping:     beam search ends a row as soon as it has `num_beams` finished beams
    dummy:              the dummy counts (see the top of this file). False: only new tokens count, and the last step
                        of a beam search finishes its best beams as if they had ended, as in transformers 5
    bos, eos, pad:      the dummy; the token that ends a row (-1: none does); the padding of finished rows (any number:
                        the model never reads it)
    stop:               token sequences that end a row once its new tokens end with one; they stay in the result. In
                        beam search the beam is finished as by `eos`, but its length counts the stop tokens
    suppress_tokens:    tokens that are never generated, such as rows of the embedding table without a token

    max_new_tokens, temperature, top_p, repetition_penalty, min_length and suppress_tokens are operands of the compiled
    function, but whether the last four are on is compiled in, like all other settings.

    Raises ValueError naming every value out of range.
    """

    max_new_tokens: int = 20
    num_beams: int = 1
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    top_p_inclusive: bool = False
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0
    min_length: int = 1
    early_stopping: bool = False
    dummy: bool = True
    bos: int = 1
    eos: int = 2
    pad: int = 0
    stop: tuple[tuple[int, ...], ...] = ()
    suppress_tokens: tuple[int, ...] = ()

    def __post_init__(self):
        def is_tokens(value: Any) -> bool:
            return isinstance(value, tuple) and len(value) > 0 and all(isinstance(i, int) and i >= 0 for i in value)

        def is_token(value: Any) -> bool:
            return isinstance(value, int | np.integer)

        stops = isinstance(self.stop, tuple) and all(map(is_tokens, self.stop))
        checks = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("num_beams", self.num_beams >= 1, "at least 1"),
            ("num_beams", self.num_beams == 1 or not self.sampling, "1 when sampling (beam sampling is not supported)"),
            ("temperature", self.temperature == 0 or MIN_TEMPERATURE <= self.temperature < math.inf,
             f"0 (greedy), or {MIN_TEMPERATURE} and more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0 (1 is off)"),
            ("length_penalty", math.isfinite(self.length_penalty), "a number (above 0 favours long answers)"),
            ("min_length", self.min_length >= 0, "0 or more"),
            ("bos", is_token(self.bos), "a token id"),
            ("eos", is_token(self.eos), "a token id (of several give the others as `stop`; -1: nothing ends a row)"),
            ("pad", is_token(self.pad), "a token id (a model without one takes `eos`)"),
            ("stop", stops, "a tuple of non-empty tuples of token ids"),
            ("suppress_tokens", self.suppress_tokens == () or is_tokens(self.suppress_tokens), "a tuple of token ids"),
        )
        wrong = [f"{name} = {getattr(self, name)!r}, but must be {rule}" for name, holds, rule in checks if not holds]
        if wrong:
            raise ValueError("These generation settings cannot be used:\n  " + "\n  ".join(wrong))

    @property
    def sampling(self) -> bool:
        return self.do_sample and self.temperature > 0


@dataclasses.dataclass(frozen=True)
class Strategy:
    """The static arguments of the compiled functions: fields of `GenerateConfig`, which of the others are on, and R."""

    room: int
    num_beams: int
    sampling: bool
    repetition: bool
    minimum: bool
    top_k: int
    nucleus: bool
    top_p_inclusive: bool
    length_penalty: float
    early_stopping: bool
    dummy: bool
    bos: int
    eos: int
    pad: int
    stop: tuple[tuple[int, ...], ...]


class Operands(NamedTuple):
    """The traced arguments of the compiled functions: fields of `GenerateConfig`."""

    max_new_tokens: int | jax.Array
    temperature: float | jax.Array
    top_p: float | jax.Array
    repetition_penalty: float | jax.Array
    min_length: int | jax.Array
    suppress_tokens: np.ndarray | jax.Array | None = None  # int32[...]


def compiled(config: GenerateConfig, room: int | None = None) -> tuple[Strategy, Operands]:
    """Splits a config into static and traced arguments. `room` is R, by default `max_new_tokens`; ValueError if less.
    """
    room = config.max_new_tokens if room is None else room
    if room < config.max_new_tokens:
        raise ValueError(f"room = {room} is less than max_new_tokens = {config.max_new_tokens}.")
    return Strategy(
        room, config.num_beams, config.sampling, config.repetition_penalty != 1,
        config.min_length > config.dummy, config.top_k, config.top_p < 1, config.top_p_inclusive,
        config.length_penalty, config.early_stopping, config.dummy, config.bos, config.eos, config.pad, config.stop,
    ), Operands(config.max_new_tokens, config.temperature, config.top_p, config.repetition_penalty, config.min_length,
                np.array(config.suppress_tokens, np.int32) if config.suppress_tokens else None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generated:
    """The result of `generate`.

    sequences:   int32[B,W]  the dummy `bos`, the new tokens with their `eos` or stop tokens, then `pad`; W = 1 +
                 max_new_tokens
    lengths:     int32[B]  tokens before the padding, the dummy included; Hugging Face returns max(lengths) columns
    scores:      float32[B]  the winning beam's score; None without beam search
    step_scores: float32[max_new_tokens,B·J,V]  each step's scores after penalties and filters (beam search:
                 log-probabilities without the running sum); zeros after the last step; None unless requested
    """

    sequences: jax.Array
    lengths: jax.Array
    scores: jax.Array | None = None
    step_scores: jax.Array | None = None


def generate(module: nn.Module, params: Any, batch: Batch, config: GenerateConfig, key: jax.Array | None = None,
             return_scores: bool = False) -> Generated:
    """Continues every row of `batch`. Slots that are not `valid` (padding on either side, holes) have no effect.

    key: for sampling, one key, or keys [B]; a row with its own key draws the same tokens in any batch.
    Raises ValueError when sampling without a key.
    """
    generation = Generation(module, params, batch, config, key, return_scores=return_scores)
    generation.advance()
    return generation.result()


class Generation:
    """A generation in progress: does what `generate` does, in steps whose results can be read.

    room: R, at least `max_new_tokens`, which is the default. Batches of one shape and one R share their compiled
          functions, whatever their `max_new_tokens`.
    """

    def __init__(self, module: nn.Module, params: Any, batch: Batch, config: GenerateConfig,
                 key: jax.Array | None = None, room: int | None = None, return_scores: bool = False):
        rows = batch.tokens.shape[0]
        if not config.sampling:
            key = None
        elif key is None:
            raise ValueError("Sampling (do_sample with a temperature above 0) needs a key: pass "
                             "key=jax.random.key(seed).")
        elif key.ndim == 0:
            key = row_keys(key, np.arange(rows))
        self._config, self._module, self._params = config, module, params
        self._strategy, self._operands = compiled(config, room)
        self._state = _prefill(module, self._strategy, return_scores, params, batch, key, self._operands)

    def advance(self, until: int | None = None) -> None:
        """Generates until the rows have `until` new tokens (None: `max_new_tokens`, the upper limit), or end."""
        limit = self._config.max_new_tokens
        self._state = _decode(self._module, self._strategy, self._params, self._state, self._operands,
                              limit if until is None else min(until, limit))

    @property
    def step(self) -> int:
        """The number of new tokens of a row that has not ended."""
        return int(self._state.search.step)

    @property
    def beams(self) -> bool:
        """Whether this is a beam search, whose result is known only at its end."""
        return self._strategy.num_beams > 1

    @property
    def tokens(self) -> list[list[int]]:
        """Each row's new tokens so far, its `eos` or stop tokens included; not of a beam search."""
        search = self._state.search
        return [row[1:length].tolist()
                for row, length in zip(np.asarray(search.sequences), np.asarray(search.lengths), strict=True)]

    @property
    def done(self) -> np.ndarray:
        """bool[B]: which rows have ended."""
        return np.asarray(self._state.search.done) | (self.step >= self._config.max_new_tokens)

    def close(self, rows: np.ndarray) -> None:
        """Ends the rows of a mask bool[B]."""
        search = self._state.search
        self._state = self._state._replace(search=search._replace(done=search.done | rows))

    def result(self) -> Generated:
        """Returns the tokens so far; for beam search the best beam of each row, finished or not."""
        search, limit = self._state.search, self._config.max_new_tokens
        record = None if search.record is None else search.record[:limit]
        if isinstance(search, _Rows):
            return Generated(search.sequences[:, :1 + limit], search.lengths, step_scores=record)
        sequences, lengths, scores = _best(self._strategy, search)
        return Generated(sequences[:, :1 + limit], lengths, scores, record)


def row_keys(key: jax.Array, rows: np.ndarray) -> jax.Array:
    """Returns keys [B], one for each row number, folded from one key."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)


class _State(NamedTuple):
    """The state between two steps. It includes constants, so that the loop can donate all of its memory."""

    search: Any  # _Rows or _Beams
    cache: Any
    prompt: jax.Array  # bool[B·J,S]  the slots of the prompt that are attended to
    injection: Any  # [L,B·J,P,D] or None
    keys: Any  # [B] or None


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _prefill(module, strategy, return_scores, params, batch, keys, operands):
    """Computes the prompts' cache and the first token of every row."""
    call = functools.partial(module.apply, {"params": params})
    B, T = batch.tokens.shape
    J, R = strategy.num_beams, strategy.room
    S = T + R

    positions = jnp.maximum(jnp.cumsum(batch.valid, axis=1) - 1, 0)
    prompt = jnp.pad(batch.valid, ((0, 0), (0, R)))
    x, injection = call(batch, method="encode")
    hidden, cache = call(x, positions, cached_mask(prompt, 0), module.empty_cache(B, S), 0, injection, method="decode")
    last = T - 1 - jnp.argmax(batch.valid[:, ::-1], axis=1)
    logits = call(jnp.take_along_axis(hidden, last[:, None, None], axis=1), method="logits")[:, 0]

    record = jnp.zeros((R, B * J, logits.shape[-1])) if return_scores else None
    if J > 1:
        prompt = jnp.repeat(prompt, J, axis=0)
        injection = None if injection is None else jnp.repeat(injection, J, axis=1)
        cache = jax.tree.map(lambda leaf: jnp.repeat(leaf, J, axis=ROWS), cache)
        return _State(_first_beams(strategy, operands, logits, record), cache, prompt, injection, keys)
    return _State(_first_tokens(strategy, operands, logits, keys, record), cache, prompt, injection, keys)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _decode(module, strategy, params, state, operands, until):
    """Generates until every row that is not done has `until` new tokens."""
    call = functools.partial(module.apply, {"params": params})
    prompt, injection = state.prompt, state.injection
    S = prompt.shape[1]
    T = S - strategy.room
    prompt_length = prompt.sum(axis=1)

    def forward(tokens, step, cache):
        """Returns (logits [B·J,V] after the new tokens int32[B·J] of step `step`, cache)."""
        # Every row writes slot T + step, so a shorter prompt leaves a gap, which the mask hides.
        mask = cached_mask(prompt | (jnp.arange(S) >= T), T + step)
        x = call(tokens[:, None], method="embed")
        positions = (prompt_length + step)[:, None]
        hidden, cache = call(x, positions, mask, cache, T + step, injection, method="decode")
        return call(hidden, method="logits")[:, 0], cache

    def open_rows(carry):
        search, _ = carry
        return (search.step < until) & ~search.done.all()

    def advance(carry):
        search, cache = carry
        if strategy.num_beams > 1:
            cache = jax.tree.map(lambda leaf: _reorder(leaf, search.parents, T), cache)
            logits, cache = forward(search.sequences[:, :, search.step].reshape(-1), search.step - 1, cache)
            return _next_beams(strategy, operands, logits, search), cache
        tokens = jnp.where(search.done, 0, search.sequences[:, search.step])  # pad may not be in the vocabulary
        logits, cache = forward(tokens, search.step - 1, cache)
        return _next_tokens(strategy, operands, logits, state.keys, search), cache

    search, cache = jax.lax.while_loop(open_rows, advance, (state.search, state.cache))
    return state._replace(search=search, cache=cache)


# ---- scores [...,V] of the next token, one function a setting ----

def seen_tokens(sequences: jax.Array, length: jax.Array | int, vocab: int) -> jax.Array:
    """Returns bool[...,V]: which tokens are among the first `length` of sequences [...,W]."""
    dropped = vocab  # out of range
    tokens = jnp.where(jnp.arange(sequences.shape[-1]) < length, sequences, dropped)
    return jnp.put_along_axis(jnp.zeros((*sequences.shape[:-1], vocab), bool), tokens, True, axis=-1, inplace=False,
                              mode="drop")


def repetition_penalty(scores: jax.Array, seen: jax.Array, penalty: float) -> jax.Array:
    """Divides positive and multiplies negative scores of seen tokens by the penalty."""
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def min_length(scores: jax.Array, length: jax.Array | int, minimum: int, eos: int) -> jax.Array:
    """Sets the score of `eos` to -inf if `length`, the rows' tokens, is below the minimum."""
    return jnp.where((length < minimum) & (jnp.arange(scores.shape[-1]) == eos), -jnp.inf, scores)


def top_k(scores: jax.Array, k: int) -> jax.Array:
    """Sets all but the k best scores to -inf; scores that tie with the last of them stay."""
    best, _ = jax.lax.top_k(scores, min(k, scores.shape[-1]))
    return jnp.where(scores < best[..., -1:], -jnp.inf, scores)


def top_p(scores: jax.Array, p: float) -> jax.Array:
    """Sets all but the fewest best tokens whose probabilities sum to p to -inf; the best one always stays."""
    ascending = jnp.sort(scores, axis=-1)
    removed = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1) <= 1 - p
    removed = removed.at[..., -1].set(False)
    lowest = jnp.min(jnp.where(removed, jnp.inf, ascending), axis=-1, keepdims=True)
    return jnp.where(scores < lowest, -jnp.inf, scores)


def top_p_inclusive(scores: jax.Array, p: float) -> jax.Array:
    """Sets a token to -inf if the probabilities of all better tokens sum to more than p (LLaMA's sample_top_p)."""
    order = jnp.argsort(scores, axis=-1, descending=True)
    best = jnp.take_along_axis(jax.nn.softmax(scores, axis=-1), order, axis=-1)
    kept = jnp.cumsum(best, axis=-1) - best <= p
    kept = jnp.put_along_axis(jnp.zeros(scores.shape, bool), order, kept, axis=-1, inplace=False)
    return jnp.where(kept, scores, -jnp.inf)


def penalise(strategy: Strategy, operands: Operands, scores: jax.Array, sequences: jax.Array,
             length: jax.Array | int) -> jax.Array:
    """Applies the penalties and `suppress_tokens` to scores [...,V], given the first `length` tokens of sequences
    [...,W]."""
    if not strategy.dummy:
        sequences, length = sequences[..., 1:], length - 1
    if strategy.repetition:
        seen = seen_tokens(sequences, length, scores.shape[-1])
        scores = repetition_penalty(scores, seen, operands.repetition_penalty)
    if strategy.minimum:
        scores = min_length(scores, length, operands.min_length, strategy.eos)
    if operands.suppress_tokens is not None:
        scores = scores.at[..., operands.suppress_tokens].set(-jnp.inf, mode="drop")
    return scores


def filter_scores(strategy: Strategy, operands: Operands, scores: jax.Array) -> jax.Array:
    """Applies temperature, top-k and top-p to scores [...,V]."""
    scores = scores / operands.temperature
    if strategy.top_k > 0:
        scores = top_k(scores, strategy.top_k)
    if strategy.nucleus:
        scores = (top_p_inclusive if strategy.top_p_inclusive else top_p)(scores, operands.top_p)
    return scores


def ends_with(sequences: jax.Array, length: jax.Array | int, stop: tuple[tuple[int, ...], ...]) -> jax.Array:
    """Returns bool[...]: whether the first `length` tokens of sequences [...,W], without the dummy, end with a stop."""
    result = jnp.zeros(sequences.shape[:-1], bool)
    for tokens in stop:
        if len(tokens) < sequences.shape[-1]:
            start = length - len(tokens)
            tail = jax.lax.dynamic_slice_in_dim(sequences, jnp.maximum(start, 0), len(tokens), axis=-1)
            result |= (start > 0) & (tail == jnp.asarray(tokens)).all(axis=-1)
    return result


# ---- strategies ----
# `step` is the number of new tokens so far: a row has step + 1 tokens, and the next one gets the index step + 1.

class _Rows(NamedTuple):
    """The state of greedy search and sampling."""

    step: jax.Array
    sequences: jax.Array  # int32[B,W]
    lengths: jax.Array  # int32[B]
    done: jax.Array  # bool[B]
    record: jax.Array | None


def _first_tokens(strategy, operands, logits, keys, record):
    B = len(logits)
    start = jnp.full((B, 1 + strategy.room), strategy.pad, jnp.int32).at[:, 0].set(strategy.bos)
    rows = _Rows(jnp.int32(0), start, jnp.ones(B, jnp.int32), jnp.zeros(B, bool), record)
    return _next_tokens(strategy, operands, logits, keys, rows)


def _next_tokens(strategy, operands, logits, keys, rows):
    step, length = rows.step, rows.step + 1
    scores = penalise(strategy, operands, logits, rows.sequences, length)
    if strategy.sampling:
        scores = filter_scores(strategy, operands, scores)
        tokens = jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, step), row))(keys, scores)
    else:
        tokens = jnp.argmax(scores, axis=-1)
    sequences = rows.sequences.at[:, length].set(jnp.where(rows.done, strategy.pad, tokens))
    ended = (tokens == strategy.eos) | ends_with(sequences, length + 1, strategy.stop)
    return _Rows(step + 1, sequences, rows.lengths + ~rows.done, rows.done | ended,
                 None if rows.record is None else rows.record.at[step].set(scores))


class _Beams(NamedTuple):
    """The state of beam search."""

    step: jax.Array
    sequences: jax.Array  # int32[B,J,W]  the open beams, best first
    sums: jax.Array  # float32[B,J]  their summed log-probabilities
    parents: jax.Array  # int32[B,J]  the beam of the previous step that each continues
    pool: jax.Array  # int32[B,J,W]  the finished beams, best first, with their eos
    pool_lengths: jax.Array  # int32[B,J]
    pool_scores: jax.Array  # float32[B,J]  -inf: unused
    done: jax.Array  # bool[B]
    record: jax.Array | None


def _take(beams, index):
    """Gathers beams [B,J,...] at index int[B,A]: [B,A,...]."""
    return jax.vmap(lambda row, chosen: row[chosen])(beams, index)


def _reorder(leaf, parents, prompt_slots):
    """Reorders the beams of a cache leaf by `parents`. Beams share their prompt, so only the slots after it move."""
    B, J = parents.shape
    index = (jnp.arange(B)[:, None] * J + parents).reshape(-1)
    new = jax.lax.slice_in_dim(leaf, prompt_slots, leaf.shape[SLOTS], axis=SLOTS)
    moved = jnp.take(new, index, axis=ROWS, mode="clip")
    return jax.lax.dynamic_update_slice_in_dim(leaf, moved, prompt_slots, axis=SLOTS)


def _normalise(strategy, sums, lengths):
    return sums / lengths**strategy.length_penalty


def _first_beams(strategy, operands, logits, record):
    (B, V), J, W = logits.shape, strategy.num_beams, 1 + strategy.room
    start = jnp.full((B, J, W), strategy.pad, jnp.int32).at[:, :, 0].set(strategy.bos)
    beams = _Beams(
        jnp.int32(0), start,
        sums=jnp.full((B, J), -1e9).at[:, 0].set(0.0),  # the beams start equal: only the first may continue
        parents=jnp.zeros((B, J), jnp.int32), pool=start, pool_lengths=jnp.ones((B, J), jnp.int32),
        pool_scores=jnp.full((B, J), -jnp.inf), done=jnp.zeros(B, bool), record=record)
    return _next_beams(strategy, operands, jnp.broadcast_to(logits[:, None], (B, J, V)), beams)


def _next_beams(strategy, operands, logits, beams):
    (B, J, _), V = beams.sequences.shape, logits.shape[-1]
    # A beam can be finished by eos and by the last token of each stop sequence. With that many more candidates, at
    # least J continue.
    endings = 1 + len({tokens[-1] for tokens in strategy.stop})
    A = min((1 + endings) * J, J * V)

    step, length = beams.step, beams.step + 1
    scores = penalise(strategy, operands, jax.nn.log_softmax(logits.reshape(B, J, V)), beams.sequences, length)
    sums, index = jax.lax.top_k((scores + beams.sums[..., None]).reshape(B, J * V), A)
    parents, tokens = index // V, index % V
    candidates = _take(beams.sequences, parents).at[:, :, length].set(tokens)
    ended = tokens == strategy.eos
    finished = ended | ends_with(candidates, length + 1, strategy.stop)
    active = jnp.argsort(finished, axis=1, stable=True)[:, :J]

    # Only the J best candidates may finish; the pool keeps the J best of old and new.
    if strategy.dummy:
        lengths, best, reached = jnp.where(ended, length, length + 1), sums[:, 0], length + 1
    else:
        finished |= length == operands.max_new_tokens
        lengths, best, reached = jnp.full((B, A), length), _take(sums, active)[:, 0], length
    new_scores = _normalise(strategy, sums, lengths.astype(jnp.float32))
    new_scores = jnp.where(finished & ~beams.done[:, None], new_scores, -jnp.inf)
    pool_scores, kept = jax.lax.top_k(jnp.concatenate([beams.pool_scores, new_scores[:, :J]], axis=1), J)
    pool = _take(jnp.concatenate([beams.pool, candidates[:, :J]], axis=1), kept)
    pool_lengths = jnp.concatenate([beams.pool_lengths, jnp.full((B, J), length + 1)], axis=1)

    worst = pool_scores[:, -1]
    attainable = _normalise(strategy, best, reached.astype(jnp.float32))
    done = beams.done | (worst > -jnp.inf) & (strategy.early_stopping | (worst >= attainable))
    return _Beams(step + 1, _take(candidates, active), _take(sums, active), _take(parents, active), pool,
                  _take(pool_lengths, kept), pool_scores, done,
                  None if beams.record is None else beams.record.at[step].set(scores.reshape(B * J, V)))


@functools.partial(jax.jit, static_argnums=0)
def _best(strategy, beams):
    """Returns (sequences [B,W], lengths [B], scores [B]) of the best beams."""
    # Open beams of a row that is not done have step + 1 tokens; they compete with the finished ones.
    length = beams.step + 1
    open_scores = _normalise(strategy, beams.sums, length.astype(jnp.float32))
    closed = beams.done[:, None] | ((not strategy.dummy) & (beams.pool_scores[:, :1] > -jnp.inf))
    scores = jnp.concatenate([beams.pool_scores, jnp.where(closed, -jnp.inf, open_scores)], axis=1)
    lengths = jnp.concatenate([beams.pool_lengths, jnp.broadcast_to(length, beams.sums.shape)], axis=1)
    best = jnp.argmax(scores, axis=1, keepdims=True)
    sequences = _take(jnp.concatenate([beams.pool, beams.sequences], axis=1), best)[:, 0]
    return sequences, _take(lengths, best)[:, 0], _take(scores, best)[:, 0]
