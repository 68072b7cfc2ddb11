"""Operations, cycles and parts of texts written by hand, as libtpu writes them."""

import pytest

from mmjax.cost import estimate, hardware

CHIP = hardware.CHIPS["v5e"]


def config(cycles):
    return f'backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}'


def program(*lines, before=""):
    inside = "\n".join(f"  {line}" for line in lines)
    return f"HloModule jit_f\n{before}\nENTRY %main (p: f32[8]) -> f32[8] {{\n{inside}\n}}\n"


def of(*lines, before="", **options):
    return estimate.estimate(program(*lines, before=before), CHIP, **options)


X, W = "%x = bf16[16,64]{1,0} parameter(0)", "%w = bf16[64,32]{1,0} parameter(1)"
Q = "%q = bf16[8,16,24]{2,1,0} parameter(2)"  # 8 heads of 24 for 16 tokens


@pytest.mark.parametrize(("line", "operations"), [
    ("bf16[16,32] dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}", 2 * 16 * 64 * 32),
    ("bf16[16,32] convolution(%x, %w), dim_labels=bf_io->bf", 2 * 16 * 64 * 32),
    ("bf16[8,16,16] dot(%q, %q), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, "
     "rhs_contracting_dims={2}", 2 * 8 * 16 * 16 * 24),
    # The same as a TPU computes it: the heads are a window of 8 over an input with holes, one position valid at each.
    ("bf16[8,16,16] convolution(%q, %q), window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0oi->0bf",
     2 * 8 * 16 * 16 * 24),
    ("bf16[16,64] negate(%x)", 0),
])
def test_products(line, operations):
    assert of(X, W, Q, f"ROOT %y = {line}").flops == operations


@pytest.mark.parametrize(("size", "out", "kernel", "options", "pairs"), [
    (8, 6, 3, {}, 18), (8, 8, 3, {"low": 1}, 22), (8, 3, 3, {"stride": 2}, 9),
    (4, 7, 1, {"dilate": 2}, 4), (8, 4, 3, {"kernel_dilate": 2}, 12)])
def test_windows(size, out, kernel, options, pairs):
    options = {"stride": 1, "low": 0, "dilate": 1, "kernel_dilate": 1} | options
    assert estimate._positions(size, out, kernel, **options) == pairs


FUSED = """
%inner (c: bf16[64,32]) -> bf16[64,32] {
  %c = bf16[64,32]{1,0} parameter(0)
  ROOT %v = bf16[64,32]{1,0} bitcast(%c)
}

%multiply (a: bf16[16,64], b: bf16[64,32]) -> bf16[16,32] {
  %a = bf16[16,64]{1,0} parameter(0)
  %b = bf16[64,32]{1,0} parameter(1)
  %n = bf16[64,32]{1,0} fusion(%b), kind=kLoop, calls=%inner
  %d = bf16[16,32]{1,0} convolution(%a, %n), dim_labels=bf_io->bf, metadata={op_name="jit(f)/layers/mlp/up/dot_general"}
  ROOT %e = bf16[16,32]{1,0} negate(%d), metadata={op_name="jit(f)/layers/attn_norm/neg"}
}

%body (s: (s32[], bf16[16,64], bf16[64,32])) -> (s32[], bf16[16,64], bf16[64,32]) {
  %s = (s32[], bf16[16,64]{1,0}, bf16[64,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x.1 = bf16[16,64]{1,0} get-tuple-element(%s), index=1
  %w.1 = bf16[64,32]{1,0} get-tuple-element(%s), index=2
  %y.1 = bf16[16,32]{1,0} fusion(%x.1, %w.1), kind=kOutput, calls=%multiply, CONFIG
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %t = (s32[], bf16[16,64]{1,0}, bf16[64,32]{1,0}) tuple(%next, %x.1, %w.1)
}

%cond (s.1: (s32[], bf16[16,64], bf16[64,32])) -> pred[] {
  %s.1 = (s32[], bf16[16,64]{1,0}, bf16[64,32]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %bound = s32[] parameter(1)
  ROOT %lt = pred[] compare(%i.1, %bound), direction=LT
}
""".replace("CONFIG", config(1000))
LOOP = ("%zero = s32[] constant(0)", "%t0 = (s32[], bf16[16,64]{1,0}, bf16[64,32]{1,0}) tuple(%zero, %x, %w)",
        "%loop = (s32[], bf16[16,64]{1,0}, bf16[64,32]{1,0}) while(%t0), condition=%cond, body=%body")
OUTSIDE = f"ROOT %c = bf16[64,32]{{0,1}} copy(%w), {config(50)}"


def test_a_loop_counts_each_iteration():
    known = f'{LOOP[-1]}, backend_config={{"known_trip_count":{{"n":"7"}}}}'
    found = of(X, W, *LOOP[:-1], known, OUTSIDE, before=FUSED)
    assert found.flops == 7 * 2 * 16 * 64 * 32
    assert found.seconds == pytest.approx((7 * 1000 + 50) / CHIP.clock)
    parts = {part.name: part for part in found.parts}
    assert parts["feed-forward"].flops == found.flops  # named by the product in the fusion, not by its last operation
    assert parts["feed-forward"].wasted == pytest.approx(7000 / CHIP.clock - found.flops / CHIP.flops)
    assert parts["copies"].seconds == pytest.approx(50 / CHIP.clock) and parts["copies"].bytes == 2 * 64 * 32 * 2
    assert sum(part.seconds for part in parts.values()) == pytest.approx(found.seconds)


def test_one_iteration_of_a_loop_and_the_rest():
    with pytest.raises(ValueError, match="how often the loop %loop runs"):
        of(X, W, *LOOP, OUTSIDE, before=FUSED)
    found = of(X, W, *LOOP, OUTSIDE, before=FUSED, unknown_trips=1)
    inside = found.main_loop()
    assert inside.flops == found.flops == 2 * 16 * 64 * 32
    assert found.bytes - inside.bytes == 2 * 64 * 32 * 2


@pytest.mark.parametrize(("scope", "part"), [
    ("jit(step)/jvp(M.hidden)/llm/while/body/layers/attn_norm/mul", "norms"),
    ("jit(step)/vit/while/body/blocks/norm1/sub", "norms"), ("jit(step)/ln_vision/mul", "norms"),
    ("jit(step)/llm/while/body/layers/attn/q/q.matmul/BTD,DNH->BTNH/dot_general", "projections"),
    ("jit(step)/llm/while/body/layers/mlp/mul", "feed-forward"), ("jit(step)/vit/blocks/mlp/fc1/add", "feed-forward"),
    ("jit(step)/llm/while/body/layers/attn/BKGTH,BKSH->BKGTS/dot_general", "scores and softmax"),
    ("jit(step)/qformer/layer_0/cross/reduce_max", "scores and softmax"),
    ("jit(step)/llm/while/body/layers/attn/rope/mul", "rope"),
    ("jit(step)/branch_1_fun/jvp(M.logits)/llm.logits/head/dot_general", "logits and loss"),
    ("jit(step)/llm.embed/jit(_take)/gather", "embedding"), ("jit(step)/add", "other"), ("", "other")])
def test_parts(scope, part):
    (found,) = of(X, f'ROOT %y = bf16[16,64] exponential(%x), metadata={{op_name="{scope}"}}').costs
    assert found.part == part and not found.recomputed


def test_what_is_recomputed():
    found = of(X, f'ROOT %y = bf16[16,64] exponential(%x), metadata={{op_name="jit(f)/checkpoint/rematted_computation/'
               f'layers/attn/exp"}}, {config(99)}')
    assert found.recomputed.seconds == found.seconds == pytest.approx(99 / CHIP.clock)


def test_work_in_vmem_alone():
    near = "%x = bf16[16,64]{1,0:S(1)} parameter(0)"
    found = of(near, f"%y = bf16[16,64]{{1,0:S(1)}} exponential(%x), {config(99)}", f"ROOT %z = bf16[16,64]{{1,0}} "
               f"negate(%y), {config(1)}")
    assert found.vmem_seconds == pytest.approx(99 / CHIP.clock) and found.seconds == pytest.approx(100 / CHIP.clock)


# ---- kernels ----

B, N, T, H = 2, 4, 1024, 128
DENSE = 2 * B * N * T * T * H  # operations of one product of attention, without a mask
MASKS = ("%m = s8[1,2,2] parameter(4)", "%n = s8[1,2,2] parameter(5)")
HEADS = tuple(f"%{name} = bf16[{B},{N},{T},{H}] parameter({number})" for number, name in enumerate("qkv"))


def kernel(name, blocks, operands="%m, %n, %q, %k, %v"):
    sizes = ", ".join(f'\\"{key}\\": {value}' for key, value in blocks.items())
    return (f"ROOT %{name}.3 = bf16[{B},{N},{T},{H}] custom-call({operands}), custom_call_target=\"tpu_custom_call\", "
            f'frontend_attributes={{kernel_metadata={{\n"xprof_metadata":"{{{sizes}}}"\n}}}}, '
            f'metadata={{op_name="jit(f)/layers/attn/{name}/pallas_call"}}')


@pytest.mark.parametrize(("name", "blocks", "operations"), [
    ("splash_mha_fwd_segmented_residuals", {"block_q": 512, "block_kv": 512}, 2 * DENSE * 3 / 4),
    ("splash_mha_fwd_no_residuals", {"block_q": 256, "block_kv": 256}, 2 * DENSE * 10 / 16),
    ("splash_mha_fwd_no_residuals", {"block_q": 512, "block_kv": 1024}, 2 * DENSE),
    ("splash_mha_dq_segmented_no_residuals", {"block_q_dq": 512, "block_kv_dq": 512}, 3 * DENSE * 3 / 4),
    ("splash_mqa_dkv_no_residuals", {"block_q_dkv": 512, "block_kv_dkv": 512}, 4 * DENSE * 3 / 4),
    ("splash_mha_dkv_no_residuals", {"block_q_dkv": 512, "block_kv_dkv": 512, "use_fused_bwd_kernel": "true"},
     5 * DENSE * 3 / 4)])
def test_a_kernel_takes_half_of_the_peak_for_the_blocks_that_it_visits(name, blocks, operations):
    found = of(*HEADS, *MASKS, kernel(name, blocks))
    assert found.flops == found.kernel_flops == operations and not found.uncounted
    assert found.seconds == pytest.approx(operations / (0.5 * CHIP.flops))
    (part,) = found.parts
    assert part.name == "attention kernels" and "50%" in estimate.RULE


def test_a_kernel_without_a_mask_visits_everything():
    found = of(*HEADS, kernel("splash_mha_fwd_no_residuals", {"block_q": 512, "block_kv": 512}, "%q, %k, %v"))
    assert found.flops == 2 * DENSE


def test_a_kernel_that_states_its_cost():
    line = kernel("mine", {}) + ', backend_config={"custom_call_config":{"cost_estimate":{"flops":"1000"}}}'
    assert of(*HEADS, *MASKS, line).flops == 1000


def test_an_unknown_kernel_is_named():
    found = of(*HEADS, *MASKS, kernel("mine", {}))
    assert (found.flops, found.uncounted) == (0, ("mine.3",))


# ---- chips ----


def test_clocks_follow_from_the_matrix_units():
    assert {name: round(chip.clock / 1e9, 2) for name, chip in hardware.CHIPS.items()} == {
        "v4": 1.05, "v5e": 1.5, "v5p": 1.75, "v6e": 1.75}
