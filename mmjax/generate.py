"""Prompts in, words out: one prefill, then one compiled loop that writes a word of every row per step.

The settings mean what they mean in Hugging Face's `generate` (4.30) when it is given vectors instead of ids, which is
how MiniGPT-4 calls it: the ids of a row begin with one dummy `bos` that the model never sees. It is returned and
counts for the repetition penalty, for `min_length` and for the length in beam scores; the prompt counts for none of
them.

Left out: beam sampling, several results per row.

B rows   T prompt places   S cache slots, T + max_new_tokens   W ids of a row, 1 + max_new_tokens
J beams of a row   A candidates of a row (beam search)   V vocabulary
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from mmjax.batch import Batch


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """How to continue prompts. Every value is compiled in: one config and one row length make one compiled function.

    max_new_tokens:     ids written per row, `eos` or stop ids included
    num_beams:          above 1: beam search
    do_sample:          draw the next id instead of taking the best one
    temperature:        divides the scores before drawing; 0 means greedy, whatever `do_sample` says
    top_k, top_p:       draw from the k best ids (0: all) and from the fewest ids that hold a share p of the probability
    top_p_inclusive:    by LLaMA's own rule: an id stays if those before it hold a share p at most. It keeps more than
                        Hugging Face's where they hold exactly p, and of ids that tie at the border only as many as fit
    repetition_penalty: divides positive and multiplies negative scores of ids already written; works on logits, in beam
                        search on log-probabilities
    length_penalty:     a finished beam scores its summed log-probability / length ** length_penalty
    min_length:         no `eos` while a row has fewer ids than this, the dummy first id included
    early_stopping:     beam search ends a row as soon as it has `num_beams` finished beams
    bos, eos, pad:      the dummy first id; the id that ends a row (-1: none does); what fills finished rows (any
                        number: it is never fed to the model)
    stop:               id sequences that end a row once its new ids end with one of them; they stay in the result. In
                        beam search the beam is finished as by `eos`, but its length counts the stop ids

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
    bos: int = 1
    eos: int = 2
    pad: int = 0
    stop: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self):
        def is_ids(ids: Any) -> bool:
            return isinstance(ids, tuple) and len(ids) > 0 and all(isinstance(i, int) and i >= 0 for i in ids)

        stops = isinstance(self.stop, tuple) and all(map(is_ids, self.stop))
        checks = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("num_beams", self.num_beams >= 1, "at least 1"),
            ("num_beams", self.num_beams == 1 or not self.sampling, "1 when sampling (beam sampling is not supported)"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0 (1 is off)"),
            ("min_length", self.min_length >= 0, "0 or more"),
            ("stop", stops, "a tuple of non-empty tuples of ids"),
        )
        wrong = [f"{name} = {getattr(self, name)!r}, but must be {rule}" for name, holds, rule in checks if not holds]
        if wrong:
            raise ValueError("These generation settings cannot be used:\n  " + "\n  ".join(wrong))

    @property
    def sampling(self) -> bool:
        return self.do_sample and self.temperature > 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generated:
    """What `generate` wrote.

    sequences:   int32[B,W]  the dummy `bos`, the new ids with their `eos` or stop ids, then `pad`
    lengths:     int32[B]  ids before the padding, the dummy included; Hugging Face returns max(lengths) columns
    scores:      float32[B]  the winning beam's score; None without beam search
    step_scores: float32[max_new_tokens,B·J,V]  what each step chose from, after penalties and filters (beam search:
                 log-probabilities without the running sum); zeros after the last step; None unless asked for
    """

    sequences: jax.Array
    lengths: jax.Array
    scores: jax.Array | None = None
    step_scores: jax.Array | None = None


def generate(module: nn.Module, params: Any, batch: Batch, config: GenerateConfig, key: jax.Array | None = None,
             return_scores: bool = False) -> Generated:
    """Continues every row of `batch`, whose places that are not `valid` (padding on either side, holes) have no effect.

    key: for sampling, one key, or keys [B]; a row with its own key draws the same ids in any batch.
    Raises ValueError when sampling without a key.
    """
    rows = batch.tokens.shape[0]
    if not config.sampling:
        key = None
    elif key is None:
        raise ValueError("Sampling (do_sample with a temperature above 0) needs a key: pass key=jax.random.key(seed).")
    elif key.ndim == 0:
        key = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(rows))
    return _generate(module, config, return_scores, params, batch, key)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(module, config, return_scores, params, batch, keys):
    call = functools.partial(module.apply, {"params": params})
    B, T = batch.tokens.shape
    J, S = config.num_beams, T + config.max_new_tokens
    slots = jnp.arange(S)

    positions = jnp.maximum(jnp.cumsum(batch.valid, axis=1) - 1, 0)
    prompt = jnp.pad(batch.valid, ((0, 0), (0, S - T)))
    mask = prompt[:, None, :] & (slots <= jnp.arange(T)[:, None])
    x, injection = call(batch, method="encode")
    hidden, cache = call(x, positions, mask, module.empty_cache(B, S), 0, injection, method="decode")
    last = T - 1 - jnp.argmax(batch.valid[:, ::-1], axis=1)
    logits = call(jnp.take_along_axis(hidden, last[:, None, None], axis=1), method="logits")[:, 0]

    prompt = jnp.repeat(prompt, J, axis=0)
    injection = None if injection is None else jnp.repeat(injection, J, axis=1)
    prompt_length = prompt.sum(axis=1)

    def forward(tokens, step, cache):
        """(logits [B·J,V] behind the `step`-th new ids, int32[B·J], cache)"""
        # Every row writes slot T + step, so a ragged row keeps a gap that its mask never opens.
        mask = prompt | ((slots >= T) & (slots <= T + step))
        words = call(tokens[:, None], method="embed")
        positions = (prompt_length + step)[:, None]
        hidden, cache = call(words, positions, mask[:, None, :], cache, T + step, injection, method="decode")
        return call(hidden, method="logits")[:, 0], cache

    record = jnp.zeros((config.max_new_tokens, B * J, logits.shape[-1])) if return_scores else None
    if J == 1:
        return _search(config, logits, cache, forward, keys, record)
    cache = jax.tree.map(lambda leaf: jnp.repeat(leaf, J, axis=1), cache)
    return _beam_search(config, logits, cache, forward, record, T)


# Scores [...,V] of the next id, one setting at a time.

def seen_ids(sequences: jax.Array, length: jax.Array | int, vocab: int) -> jax.Array:
    """bool[...,V]: the ids among the first `length` of sequences [...,W]."""
    nowhere = vocab  # out of range, dropped
    ids = jnp.where(jnp.arange(sequences.shape[-1]) < length, sequences, nowhere)
    return jnp.put_along_axis(jnp.zeros((*sequences.shape[:-1], vocab), bool), ids, True, axis=-1, inplace=False,
                              mode="drop")


def repetition_penalty(scores: jax.Array, seen: jax.Array, penalty: float) -> jax.Array:
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def min_length(scores: jax.Array, length: jax.Array | int, minimum: int, eos: int) -> jax.Array:
    """No `eos` for rows that have `length` ids, if that is below the minimum."""
    return jnp.where((length < minimum) & (jnp.arange(scores.shape[-1]) == eos), -jnp.inf, scores)


def top_k(scores: jax.Array, k: int) -> jax.Array:
    """-inf for all but the k best; what ties with the last of them stays."""
    best, _ = jax.lax.top_k(scores, min(k, scores.shape[-1]))
    return jnp.where(scores < best[..., -1:], -jnp.inf, scores)


def top_p(scores: jax.Array, p: float) -> jax.Array:
    """-inf for all but the fewest best ids whose probabilities reach p together; the best one always stays."""
    ascending = jnp.sort(scores, axis=-1)
    removed = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1) <= 1 - p
    removed = removed.at[..., -1].set(False)
    lowest = jnp.min(jnp.where(removed, jnp.inf, ascending), axis=-1, keepdims=True)
    return jnp.where(scores < lowest, -jnp.inf, scores)


def top_p_inclusive(scores: jax.Array, p: float) -> jax.Array:
    """-inf for an id if the probabilities of those before it, best first, exceed p together (LLaMA's sample_top_p)."""
    order = jnp.argsort(scores, axis=-1, descending=True)
    best = jnp.take_along_axis(jax.nn.softmax(scores, axis=-1), order, axis=-1)
    kept = jnp.cumsum(best, axis=-1) - best <= p
    kept = jnp.put_along_axis(jnp.zeros(scores.shape, bool), order, kept, axis=-1, inplace=False)
    return jnp.where(kept, scores, -jnp.inf)


def penalised(config: GenerateConfig, scores: jax.Array, sequences: jax.Array, length: jax.Array) -> jax.Array:
    """What every strategy does to scores [...,V], given the first `length` ids of sequences [...,W]."""
    if config.repetition_penalty != 1:
        seen = seen_ids(sequences, length, scores.shape[-1])
        scores = repetition_penalty(scores, seen, config.repetition_penalty)
    if config.min_length > 1:  # the dummy first id is one
        scores = min_length(scores, length, config.min_length, config.eos)
    return scores


def filtered(config: GenerateConfig, scores: jax.Array) -> jax.Array:
    """What sampling does next."""
    scores = scores / config.temperature
    if config.top_k > 0:
        scores = top_k(scores, config.top_k)
    if config.top_p < 1:
        scores = (top_p_inclusive if config.top_p_inclusive else top_p)(scores, config.top_p)
    return scores


def ends_with(sequences: jax.Array, length: jax.Array | int, stop: tuple[tuple[int, ...], ...]) -> jax.Array:
    """bool[...]: the first `length` ids of sequences [...,W], less the dummy, end with one of the stop sequences."""
    found = jnp.zeros(sequences.shape[:-1], bool)
    for ids in stop:
        if len(ids) < sequences.shape[-1]:
            start = length - len(ids)
            tail = jax.lax.dynamic_slice_in_dim(sequences, jnp.maximum(start, 0), len(ids), axis=-1)
            found |= (start > 0) & (tail == jnp.asarray(ids)).all(axis=-1)
    return found


# Strategies. `step` counts the new ids so far, so a row has step + 1 ids and the next one goes to place step + 1.

class _Rows(NamedTuple):
    step: jax.Array
    sequences: jax.Array  # int32[B,W]
    lengths: jax.Array  # int32[B]
    done: jax.Array  # bool[B]
    record: jax.Array | None


def _search(config, logits, cache, forward, keys, record):
    """Greedy search and sampling."""
    B = logits.shape[0]

    def choose(logits, rows):
        step, length = rows.step, rows.step + 1
        scores = penalised(config, logits, rows.sequences, length)
        if config.sampling:
            scores = filtered(config, scores)
            tokens = jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, step), row))(keys, scores)
        else:
            tokens = jnp.argmax(scores, axis=-1)
        sequences = rows.sequences.at[:, length].set(jnp.where(rows.done, config.pad, tokens))
        ended = (tokens == config.eos) | ends_with(sequences, length + 1, config.stop)
        return _Rows(step + 1, sequences, rows.lengths + ~rows.done, rows.done | ended,
                     None if record is None else rows.record.at[step].set(scores))

    def open_rows(carry):
        rows, _ = carry
        return (rows.step < config.max_new_tokens) & ~rows.done.all()

    def advance(carry):
        rows, cache = carry
        tokens = jnp.where(rows.done, 0, rows.sequences[:, rows.step])  # the pad id may not be in the vocabulary
        logits, cache = forward(tokens, rows.step - 1, cache)
        return choose(logits, rows), cache

    start = jnp.full((B, 1 + config.max_new_tokens), config.pad, jnp.int32).at[:, 0].set(config.bos)
    rows = _Rows(jnp.int32(0), start, jnp.ones(B, jnp.int32), jnp.zeros(B, bool), record)
    rows, _ = jax.lax.while_loop(open_rows, advance, (choose(logits, rows), cache))
    return Generated(rows.sequences, rows.lengths, step_scores=rows.record)


class _Beams(NamedTuple):
    step: jax.Array
    sequences: jax.Array  # int32[B,J,W]  the open beams, best first
    sums: jax.Array  # float32[B,J]  their summed log-probabilities
    parents: jax.Array  # int32[B,J]  which beam of the step before each continues
    pool: jax.Array  # int32[B,J,W]  the finished beams, best first, with their eos
    pool_lengths: jax.Array  # int32[B,J]
    pool_scores: jax.Array  # float32[B,J]  -inf: a free place
    done: jax.Array  # bool[B]
    record: jax.Array | None


def _take(beams, index):
    """beams [B,J,...] at index int[B,A] -> [B,A,...]"""
    return jax.vmap(lambda row, chosen: row[chosen])(beams, index)


def _beam_search(config, logits, cache, forward, record, prompt_slots):
    (B, V), J, W = logits.shape, config.num_beams, 1 + config.max_new_tokens
    # Of one beam's continuations, eos and the last id of each stop sequence finish it. With that many candidates to
    # spare, J always go on.
    endings = 1 + len({ids[-1] for ids in config.stop})
    A = min((1 + endings) * J, J * V)

    def normalised(sums, lengths):
        return sums / lengths**config.length_penalty

    def choose(logits, beams):
        step, length = beams.step, beams.step + 1
        scores = penalised(config, jax.nn.log_softmax(logits), beams.sequences, length)  # [B,J,V]
        sums, index = jax.lax.top_k((scores + beams.sums[..., None]).reshape(B, J * V), A)
        parents, tokens = index // V, index % V
        candidates = _take(beams.sequences, parents).at[:, :, length].set(tokens)
        ended = tokens == config.eos
        finished = ended | ends_with(candidates, length + 1, config.stop)

        # Only the J best candidates may finish; the pool keeps the J best of old and new.
        new_scores = normalised(sums, jnp.where(ended, length, length + 1).astype(jnp.float32))
        new_scores = jnp.where(finished & ~beams.done[:, None], new_scores, -jnp.inf)
        pool_scores, kept = jax.lax.top_k(jnp.concatenate([beams.pool_scores, new_scores[:, :J]], axis=1), J)
        pool = _take(jnp.concatenate([beams.pool, candidates[:, :J]], axis=1), kept)
        pool_lengths = jnp.concatenate([beams.pool_lengths, jnp.full((B, J), length + 1)], axis=1)

        worst = pool_scores[:, -1]
        attainable = normalised(sums[:, 0], (length + 1).astype(jnp.float32))
        done = beams.done | (worst > -jnp.inf) & (config.early_stopping | (worst >= attainable))

        going = jnp.argsort(finished, axis=1, stable=True)[:, :J]
        return _Beams(step + 1, _take(candidates, going), _take(sums, going), _take(parents, going), pool,
                      _take(pool_lengths, kept), pool_scores, done,
                      None if record is None else beams.record.at[step].set(scores.reshape(B * J, V)))

    def reorder(leaf, parents):
        # [L,B·J,S,...]; the beams of a row share its prompt, so only the slots behind it move.
        words = leaf[:, :, prompt_slots:]
        moved = jax.vmap(_take, in_axes=(0, None))(words.reshape(-1, B, J, *words.shape[2:]), parents)
        return leaf.at[:, :, prompt_slots:].set(moved.reshape(words.shape))

    def open_rows(carry):
        beams, _ = carry
        return (beams.step < config.max_new_tokens) & ~beams.done.all()

    def advance(carry):
        beams, cache = carry
        cache = jax.tree.map(lambda leaf: reorder(leaf, beams.parents), cache)
        logits, cache = forward(beams.sequences[:, :, beams.step].reshape(B * J), beams.step - 1, cache)
        return choose(logits.reshape(B, J, V), beams), cache

    start = jnp.full((B, J, W), config.pad, jnp.int32).at[:, :, 0].set(config.bos)
    beams = _Beams(
        jnp.int32(0), start,
        sums=jnp.full((B, J), -1e9).at[:, 0].set(0.0),  # the beams start equal: only the first may continue
        parents=jnp.zeros((B, J), jnp.int32), pool=start, pool_lengths=jnp.ones((B, J), jnp.int32),
        pool_scores=jnp.full((B, J), -jnp.inf), done=jnp.zeros(B, bool), record=record)
    first = choose(jnp.broadcast_to(logits[:, None], (B, J, V)), beams)
    beams, _ = jax.lax.while_loop(open_rows, advance, (first, cache))

    # Beams still open in a row that is not done have all W ids; they compete with the finished ones.
    open_scores = jnp.where(beams.done[:, None], -jnp.inf, normalised(beams.sums, float(W)))
    scores = jnp.concatenate([beams.pool_scores, open_scores], axis=1)
    lengths = jnp.concatenate([beams.pool_lengths, jnp.full((B, J), W)], axis=1)
    best = jnp.argmax(scores, axis=1, keepdims=True)
    sequences = _take(jnp.concatenate([beams.pool, beams.sequences], axis=1), best)[:, 0]
    return Generated(sequences, _take(lengths, best)[:, 0], _take(scores, best)[:, 0], beams.record)
