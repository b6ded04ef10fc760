"""What is read from the text of a compiled program, on a text in which everything is known."""

from __future__ import annotations

import pytest

from unibiomed_jax.planning import program_text

MESH = {"replica": 2, "fsdp": 4}
# A loop of three over a body that gathers a slice of a stack and updates another stack in place; an exchange
# that starts in a fusion before it, goes on in one of the body and ends in another, under one channel; then a
# loop of unknown length.
TEXT = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%slice_of (p: f32[3,256], i: s32[]) -> f32[1,256] {
  %p = f32[3,256]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %part = f32[1,256]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,256}
}

%within (p.3: f32[3,256], i.3: s32[]) -> f32[1,256] {
  %p.3 = f32[3,256]{1,0} parameter(0)
  %i.3 = s32[] parameter(1)
  ROOT %inner = f32[1,256]{1,0} fusion(%p.3, %i.3), kind=kLoop, calls=%slice_of
}

%put (p.1: f32[3,1024], u: f32[1,1024], i.1: s32[]) -> f32[3,1024] {
  %p.1 = f32[3,1024]{1,0} parameter(0)
  %u = f32[1,1024]{1,0} parameter(1)
  %i.1 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %put.1 = f32[3,1024]{1,0} dynamic-update-slice(%p.1, %u, %i.1, %zero.1)
}

%begins (q: bf16[8,16]) -> (bf16[8,16], bf16[16,16]) {
  %q = bf16[8,16]{1,0} parameter(0)
  %g1 = bf16[16,16]{1,0} all-gather(%q), channel_id=7, replica_groups={{0,4},{1,5},{2,6},{3,7}}
  ROOT %t1 = (bf16[8,16]{1,0}, bf16[16,16]{1,0}) tuple(%q, %g1)
}

%goes_on (q.2: bf16[8,16]) -> (bf16[8,16], bf16[16,16]) {
  %q.2 = bf16[8,16]{1,0} parameter(0)
  %g3 = bf16[16,16]{1,0} all-gather(%q.2), channel_id=7, replica_groups={{0,4},{1,5},{2,6},{3,7}}
  ROOT %t2 = (bf16[8,16]{1,0}, bf16[16,16]{1,0}) tuple(%q.2, %g3)
}

%ends (q.1: bf16[8,16]) -> bf16[16,16] {
  %q.1 = bf16[8,16]{1,0} parameter(0)
  ROOT %g2 = bf16[16,16]{1,0} all-gather(%q.1), channel_id=7, replica_groups={{0,4},{1,5},{2,6},{3,7}}
}

%body (state: (s32[], f32[3,256], f32[3,1024], bf16[8,16])) -> (s32[], f32[3,256], f32[3,1024], bf16[8,16]) {
  %state = (s32[], f32[3,256]{1,0}, f32[3,1024]{1,0}, bf16[8,16]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%state), index=0
  %w = f32[3,256]{1,0} get-tuple-element(%state), index=1
  %o = f32[3,1024]{1,0} get-tuple-element(%state), index=2
  %x.1 = bf16[8,16]{1,0} get-tuple-element(%state), index=3
  %on = (bf16[8,16]{1,0}, bf16[16,16]{1,0}) fusion(%x.1), kind=kCustom, calls=%goes_on
  %part.1 = f32[1,256]{1,0} fusion(%w, %n), kind=kLoop, calls=%within
  %whole = f32[1,1024]{1,0} all-gather(%part.1), channel_id=1, replica_groups=[2,4]<=[8], dimensions={1}
  %o.1 = f32[3,1024]{1,0} fusion(%o, %whole, %n), kind=kLoop, calls=%put
  %one = s32[] constant(1)
  %n.1 = s32[] add(%n, %one)
  ROOT %next = (s32[], f32[3,256]{1,0}, f32[3,1024]{1,0}, bf16[8,16]{1,0}) tuple(%n.1, %w, %o.1, %x.1)
}

%stop (state.1: (s32[], f32[3,256], f32[3,1024], bf16[8,16])) -> pred[] {
  %state.1 = (s32[], f32[3,256]{1,0}, f32[3,1024]{1,0}, bf16[8,16]{1,0}) parameter(0)
  %n.2 = s32[] get-tuple-element(%state.1), index=0
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%n.2, %three), direction=LT
}

%say (s.2: (pred[], f32[32])) -> (pred[], f32[32]) {
  %s.2 = (pred[], f32[32]{0}) parameter(0)
  %go = pred[] get-tuple-element(%s.2), index=0
  %v = f32[32]{0} get-tuple-element(%s.2), index=1
  %sum.1 = f32[32]{0} all-reduce(%v), channel_id=2, replica_groups=mesh['a'=2,'b'=4] {'a'}, to_apply=%add
  ROOT %again = (pred[], f32[32]{0}) tuple(%go, %sum.1)
}

%going (s.3: (pred[], f32[32])) -> pred[] {
  %s.3 = (pred[], f32[32]{0}) parameter(0)
  ROOT %go.1 = pred[] get-tuple-element(%s.3), index=0
}

ENTRY %main (w.1: f32[3,256], x: bf16[8,16], v.1: f32[32], g: pred[]) -> f32[3,1024] {
  %w.1 = f32[3,256]{1,0} parameter(0)
  %x = bf16[8,16]{1,0} parameter(1)
  %v.1 = f32[32]{0} parameter(2)
  %g = pred[] parameter(3)
  %async-collective-start.1 = (bf16[8,16]{1,0}, bf16[16,16]{1,0}) fusion(%x), kind=kCustom, calls=%begins
  %done = bf16[16,16]{1,0} fusion(%x), kind=kCustom, calls=%ends
  %scratch = bf16[16,16]{1,0:T(8,128)S(1)} copy(%done)
  %early = ((f32[3,256]{1,0}), f32[1,256]{1,0:T(8,128)S(1)}, s32[]) slice-start(%w.1), slice={[0:1], [0:256]}
  %late = f32[1,256]{1,0:T(8,128)S(1)} slice-done(%early)
  %away = (f32[32]{0:S(1)}, f32[32]{0}, u32[]{:S(2)}) copy-start(%v.1)
  %moved = f32[32]{0} collective-permute(%v.1), channel_id=3, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %nothing = f32[] constant(0)
  %room = f32[3,1024]{1,0} broadcast(%nothing), dimensions={}, metadata={op_name="jit(step)/jvp()/broadcast"}
  %zero.2 = s32[] constant(0)
  %all = (s32[], f32[3,256]{1,0}, f32[3,1024]{1,0}, bf16[8,16]{1,0}) tuple(%zero.2, %w.1, %room, %x)
  %loop = (s32[], f32[3,256]{1,0}, f32[3,1024]{1,0}, bf16[8,16]{1,0}) while(%all), condition=%stop, body=%body
  %init.1 = (pred[], f32[32]{0}) tuple(%g, %moved)
  %loop.1 = (pred[], f32[32]{0}) while(%init.1), condition=%going, body=%say
  %out = f32[3,1024]{1,0} get-tuple-element(%loop), index=2
  ROOT %back = f32[3,1024]{1,0} negate(%out), metadata={op_name="jit(step)/transpose(jvp())/neg"}
}
"""


@pytest.fixture(scope="module")
def program():
    return program_text.parse(TEXT, unknown_trips=10)


def test_loops_run_as_often_as_their_conditions_say(program):
    assert program.times["body"] == 3 and program.times["say"] == 10
    assert program.unknown_loops == 1
    assert program.depth["body"] == 1 and program.depth["main"] == 0


def test_collectives_by_kind_mesh_axis_and_place(program):
    found = {one.kind + "/" + "+".join(one.axes): one for one in program_text.collectives(program, MESH)}
    assert set(found) == {
        "all-gather/fsdp",
        "all-gather/replica",
        "all-reduce/replica",
        "collective-permute/fsdp",
    }
    layers = found["all-gather/fsdp"]
    assert (layers.group, layers.in_loop, layers.bytes, layers.times) == (4, True, 3 * 4096, 3)
    # It stands in three fusions, under one channel, one of them in the loop.
    once = found["all-gather/replica"]
    assert (once.group, once.in_loop, once.bytes, once.times) == (2, False, 512, 1)
    assert found["all-reduce/replica"].bytes == 10 * 128
    assert found["collective-permute/fsdp"].bytes == 128


@pytest.mark.parametrize(
    ("groups", "axes", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", ("fsdp",), 4),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("replica",), 2),
        ("replica_groups={{0,1,2,3,4,5,6,7}}", ("replica", "fsdp"), 8),
        ("replica_groups={}", ("replica", "fsdp"), 8),
        ("replica_groups=[2,4]<=[8]", ("fsdp",), 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("replica",), 2),
        ("replica_groups=mesh['axis_0'=1,'axis_1'=8] {'axis_1'}", ("replica", "fsdp"), 8),
        ("replica_groups=mesh['replica'=2,'fsdp'=4] {'fsdp'}", ("fsdp",), 4),
        ("source_target_pairs={{0,4},{4,0}}", ("replica",), 2),
    ],
)
def test_groups_are_named_by_the_axes_along_which_they_differ(groups, axes, size):
    assert program_text.axes_of(f"all-gather(%x), channel_id=1, {groups}, dimensions={{0}}", MESH) == (
        axes,
        size,
    )


def test_of_a_stack_that_is_sliced_or_updated_a_part_is_moved(program):
    """In the loop: a slice, a gather and an update, each read and written, and a counter."""
    body = 2 * 1024 + 4 + (1024 + 4096) + (2 * 4096 + 4) + 8 + 4
    said = 2 * 128
    # The exchange, which stands in three fusions, a copy into the compiler's own memory, a permutation, the
    # result's room and the number that it is filled with, the last instruction.
    # Copies that start early, into the compiler's own memory, read alone.
    rest = (256 + 512) + 512 + 2 * 128 + 1024 + 128 + (4 + 12_288) + 2 * 12_288
    assert program_text.traffic(program) == 3 * body + 10 * said + rest


def test_what_is_made_forward_and_read_backward_is_kept(program):
    assert program_text.kept_for_backward(program) == 12_288
    assert program_text.largest(program, 1)[0][:2] == (12_288, "f32[3,1024]")
