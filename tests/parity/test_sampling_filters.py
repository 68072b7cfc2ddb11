"""The filters of sampling, one by one and chained, against the original's."""

import jax
import numpy as np

from mmjax.inference import generate
from tests.parity import golden


@golden.each("sampling")
def test_each_filter_and_their_order(case):
    spec, logits, ids = case.spec, case.arrays["logits"], case.arrays["input_ids"]
    seen = generate.seen_tokens(ids, ids.shape[1], logits.shape[1])
    stages = {"after_repetition_penalty": generate.repetition_penalty(logits, seen, spec["repetition_penalty"])}
    stages["after_temperature"] = stages["after_repetition_penalty"] / spec["temperature"]
    stages["after_top_k"] = generate.top_k(stages["after_temperature"], spec["top_k"])
    stages["after_top_p"] = generate.top_p(stages["after_top_k"], spec["top_p"])
    stages["probs"] = jax.nn.softmax(stages["after_top_p"])
    for name in case.holds(*stages):  # assert_allclose wants the same entries to be -inf
        np.testing.assert_allclose(stages[name], case.arrays[name], rtol=1e-6, atol=1e-7, err_msg=name)

    names = ("repetition_penalty", "temperature", "top_k", "top_p")
    halves = generate.compiled(generate.GenerateConfig(do_sample=True, **{name: spec[name] for name in names}))
    chained = generate.filter_scores(*halves, generate.penalise(*halves, logits, ids, ids.shape[1]))
    np.testing.assert_array_equal(chained, stages["after_top_p"])
