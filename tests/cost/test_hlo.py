"""Collectives and memory traffic of texts written by hand. Of compiled programs: tests/test_eight_devices.py."""

import types

import numpy as np
import pytest

from mmjax.cost import hlo


def mesh(*sizes):
    return types.SimpleNamespace(devices=np.empty(sizes, object), axis_names=("data", "fsdp", "tensor"))


ADD = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
"""


def program(*lines, before=""):
    inside = "\n".join(f"  {line}" for line in lines)
    return f"HloModule jit_step\n{ADD}{before}\nENTRY %main (p: f32[8]) -> f32[8] {{\n{inside}\n}}\n"


def one(line, *sizes, **wanted):
    """The only collective of a program of one line."""
    (found,) = hlo.collectives(program("%p = bf16[2,4]{1,0} parameter(0)", line), mesh(*sizes))
    for field, value in wanted.items():
        assert getattr(found, field) == value, field
    return found


@pytest.mark.parametrize(("groups", "sizes", "axes", "ways"), [
    ("{{0,1,2,3,4,5,6,7}}", (8, 1, 1), ("data",), 8),
    ("{{0,1},{2,3},{4,5},{6,7}}", (2, 2, 2), ("tensor",), 2),
    ("{{0,2},{4,6},{1,3},{5,7}}", (2, 2, 2), ("fsdp",), 2),
    ("{{0,1,2,3},{4,5,6,7}}", (2, 2, 2), ("fsdp", "tensor"), 4),
    ("[1,8]<=[8]", (2, 4, 1), ("data", "fsdp"), 8),
    ("[4,2]<=[8]", (2, 2, 2), ("tensor",), 2),
    ("[4,2]<=[2,4]T(1,0)", (2, 2, 2), ("data",), 2),
    ("[2,4]<=[2,2,2]T(1,0,2)", (2, 2, 2), ("data", "tensor"), 4),
    ("mesh['axis_0'=8] {'axis_0'}", (1, 8, 1), ("fsdp",), 8),
    ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", (2, 4, 1), ("fsdp",), 4),
    ("mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_0','axis_2'}", (2, 2, 2), ("data", "tensor"), 4),
    ("mesh['axis_0'=2,'axis_1'=4], device_ids=([2,2,2]T(1,0,2)) {'axis_0'}", (2, 2, 2), ("fsdp",), 2),
])
def test_every_way_to_name_the_devices(groups, sizes, axes, ways):
    line = f"%r = bf16[2,4]{{1,0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add"
    one(line, *sizes, kind="all-reduce", axes=axes, ways=ways, dtype="bf16", shape=(2, 4), bytes=16, times=1)


def test_what_each_kind_sends():
    groups = "channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}"
    four = (1, 4, 1)
    gathered = one(f"%r = bf16[8,4]{{1,0}} all-gather(%p), {groups}", *four, kind="all-gather", bytes=64)
    assert gathered.sent == 64 * 3 // 4
    assert one(f"%r = bf16[2,4]{{1,0}} all-reduce(%p), {groups}, to_apply=%add", *four).sent == 16 * 2 * 3 // 4
    scattered = one(f"%r = bf16[1,2]{{1,0}} reduce-scatter(%p), {groups}, to_apply=%add", *four, bytes=16, shape=(2, 4))
    assert scattered.sent == 16 * 3 // 4
    assert one(f"%r = bf16[2,4]{{1,0}} all-to-all(%p), {groups}", *four).sent == 16 * 3 // 4
    pairs = "channel_id=1, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}"
    assert one(f"%r = bf16[2,4]{{1,0}} collective-permute(%p), {pairs}", *four, kind="collective-permute").sent == 16


def test_an_asynchronous_start_is_counted_once():
    groups = "channel_id=1, replica_groups={{0,1,2,3}}"
    one(f"%r = (bf16[2,4]{{1,0}}, bf16[8,4]{{1,0}}) all-gather-start(%p), {groups}, dimensions={{0}}", 4, 1, 1,
        kind="all-gather", shape=(8, 4))
    one("%r = (bf16[2,4]{1,0}, bf16[2,4]{1,0}, u32[], u32[]) collective-permute-start(%p), channel_id=1, "
        "source_target_pairs={{0,1},{1,0}}", 2, 1, 1, kind="collective-permute", shape=(2, 4))


def test_combined_arrays_and_scopes():
    found = hlo.collectives(program(
        "%p = bf16[2,4]{1,0} parameter(0)",
        "%r = (f32[3]{0:T(256)}, /*index=1*/s32[]{:T(128)}) all-reduce(%p, %p), channel_id=3, replica_groups={{0,1}}, "
        'to_apply=%add, metadata={op_name="jit(step)/loss/reduce_sum" stack_frame_id=3}'), mesh(2, 1, 1))
    assert [(one.dtype, one.shape, one.bytes) for one in found] == [("f32", (3,), 12), ("s32", (), 4)]
    assert {one.scope for one in found} == {"jit(step)/loss/reduce_sum"}


def test_what_stays_on_a_device_is_none():
    line = "%r = bf16[2,4]{1,0} all-reduce(%p), channel_id=1, replica_groups={{0},{1}}, to_apply=%add"
    assert hlo.collectives(program("%p = bf16[2,4]{1,0} parameter(0)", line), mesh(2, 1, 1)) == []
    pairs = "%r = bf16[2,4]{1,0} collective-permute(%p), channel_id=1, source_target_pairs={{0,0},{1,1}}"
    assert hlo.collectives(program("%p = bf16[2,4]{1,0} parameter(0)", pairs), mesh(2, 1, 1)) == []


def test_an_unknown_way_is_an_error():
    line = "%r = bf16[2,4]{1,0} all-reduce(%p), channel_id=1, replica_groups=mesh['a'=8] {'a':(2)4}, to_apply=%add"
    with pytest.raises(ValueError, match="Which devices take part in %r .*mesh"):
        hlo.collectives(program("%p = bf16[2,4]{1,0} parameter(0)", line), mesh(8, 1, 1))
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.collectives("nothing", mesh(8, 1, 1))


LOOP = """
%piece (q: bf16[2,4]) -> bf16[8,4] {
  %q = bf16[2,4]{1,0} parameter(0)
  ROOT %g2 = bf16[8,4]{1,0} all-gather(%q), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
}

%body (s: (s32[], bf16[2,4])) -> (s32[], bf16[2,4]) {
  %s = (s32[], bf16[2,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = bf16[2,4]{1,0} get-tuple-element(%s), index=1
  %g = bf16[8,4]{1,0} all-gather(%x), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
  %f = bf16[8,4]{1,0} fusion(%x), kind=kLoop, calls=%piece
  %stride = s32[] constant(STRIDE)
  %copied = s32[] copy(%i)
  %next = s32[] add(%copied, %stride)
  ROOT %t = (s32[], bf16[2,4]{1,0}) tuple(%next, %x)
}

%cond (s.1: (s32[], bf16[2,4])) -> pred[] {
  %s.1 = (s32[], bf16[2,4]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %bound = s32[] constant(32)
  ROOT %lt = pred[] compare(%i.1, %bound), direction=LT
}
"""


def looped(first="constant(0)", stride=1, known=""):
    return program(
        "%p = bf16[2,4]{1,0} parameter(0)", f"%zero = s32[] {first}", "%begin = s32[] copy(%zero)",
        "%t0 = (s32[], bf16[2,4]{1,0}) tuple(%begin, %p)",
        f"ROOT %w = (s32[], bf16[2,4]{{1,0}}) while(%t0), condition=%cond, body=%body{known}",
        before=LOOP.replace("STRIDE", str(stride)))


@pytest.mark.parametrize(("options", "times"), [
    ({}, 32), ({"stride": 2}, 16), ({"stride": 5}, 7), ({"first": "constant(30)"}, 2), ({"first": "constant(40)"}, 0),
    ({"known": ', backend_config={"known_trip_count":{"n":"3"}}'}, 3)])
def test_a_loop_counts_and_its_pieces_are_one(options, times):
    found = hlo.collectives(looped(**options), mesh(1, 4, 1))
    assert [one.times for one in found] == ([times] if times else [])
    assert sum(one.sent for one in found) == times * 48


def test_a_loop_that_nobody_knows_is_an_error():
    with pytest.raises(ValueError, match="How often the loop %w runs"):
        hlo.collectives(looped(first="parameter(1)"), mesh(1, 4, 1))


def test_a_device_sends_its_share_each_time():
    parts = [hlo.Collective("all-gather", ("fsdp",), 4, "bf16", (8, 4), 64, 2), hlo.Collective(
        "all-gather", ("fsdp",), 4, "f32", (4,), 16, 1), hlo.Collective("all-reduce", ("data",), 2, "f32", (), 4, 1)]
    assert [one.sent for one in parts] == [96, 12, 4]


SLICED = """
%as (w.2: bf16[32,64,64]) -> bf16[32,64,64] {
  %w.2 = bf16[32,64,64]{2,1,0} parameter(0)
  ROOT %c = bf16[32,64,64]{2,1,0:T(8,128)(2,1)} copy(%w.2)
}

%take (w: bf16[32,64,64], i.2: s32[], x.2: bf16[4,64]) -> bf16[4,64] {
  %w = bf16[32,64,64]{2,1,0} parameter(0)
  %i.2 = s32[] parameter(1)
  %x.2 = bf16[4,64]{1,0} parameter(2)
  %tiled = bf16[32,64,64]{2,1,0} fusion(%w), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%as
  %slice = bf16[1,64,64]{2,1,0} dynamic-slice(%tiled, %i.2, %i.2, %i.2), dynamic_slice_sizes={1,64,64}
  %flat = bf16[64,64]{1,0} bitcast(%slice)
  ROOT %y = bf16[4,64]{1,0} dot(%x.2, %flat), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%put (all: f32[32,4], row: f32[1,4], i.3: s32[]) -> f32[32,4] {
  %all = f32[32,4]{1,0} parameter(0)
  %row = f32[1,4]{1,0} parameter(1)
  %i.3 = s32[] parameter(2)
  ROOT %u = f32[32,4]{1,0} dynamic-update-slice(%all, %row, %i.3, %i.3)
}
"""


def test_memory_traffic():
    text = program(
        "%w = bf16[32,64,64]{2,1,0} parameter(0)", "%i = s32[]{:S(2)} parameter(1)",
        "%x = bf16[4,64]{1,0:T(8,128)(2,1)S(1)} parameter(2)", "%all = f32[32,4]{1,0} parameter(3)",
        "%row = f32[1,4]{1,0} parameter(4)",
        "%y = bf16[4,64]{1,0:T(8,128)(2,1)} fusion(%w, %i, %x), kind=kOutput, calls=%take",  # reads a layer, writes y
        "%v = f32[32,4]{1,0} fusion(%all, %row, %i), kind=kLoop, calls=%put",  # reads the row, writes it
        "%near = (bf16[4,64]{1,0:S(1)}, bf16[4,64]{1,0}, u32[]{:S(2)}) copy-start(%y)",  # reads y
        "%z = bf16[4,64]{1,0} negate(%y)",  # reads y, writes z
        before=SLICED)
    assert hlo.memory_traffic(text) == (8192 + 512) + (16 + 16) + 512 + (512 + 512)


def test_memory_traffic_of_a_loop():
    body = 16 + 64 + 64 + (4 + 4) + (4 + 4 + 4)  # x gathered, of its piece the result; the counter
    condition = 4 + 4 + 1
    assert hlo.memory_traffic(looped()) == 32 * (body + condition) + 4 + 4
