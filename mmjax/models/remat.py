"""What the layers of a language model save for the backward pass, and what they recompute there.

A layer names the arrays that are worth saving with `jax.ad_checkpoint.checkpoint_name`; a policy is a choice of names.
"""

import jax

QKV = "qkv"  # queries, keys and values as attention reads them
ATTENTION = "attention"  # attention's output, and the logsumexp that a fused kernel saves beside it
RESIDUAL = "residual"  # the sum of the layer's input and attention's projected output
GATE, UP = "gate", "up"  # the products of the feed-forward with its input

_saved = jax.checkpoint_policies.save_only_these_names
# By what is recomputed: each line saves fewer arrays and computes more than the one above. The layer's input is always
# saved, norms and elementwise operations are always recomputed.
POLICIES = {
    "none": jax.checkpoint_policies.save_from_both_policies(  # every product with a matrix is saved
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _saved(QKV, ATTENTION, RESIDUAL)),
    "gate": _saved(QKV, ATTENTION, RESIDUAL, UP),
    "feed_forward": _saved(QKV, ATTENTION, RESIDUAL),
    "full": _saved(),
}
NAMES = tuple(POLICIES)
POLICIES |= {False: POLICIES["none"], True: POLICIES["full"]}
