"""What is read from HLO: of short texts, in the forms of TPUs, GPUs and lowered programs."""

import pytest

from jaxgpt.analysis.compiled_program import Collective, CompiledProgram, FlashAttention

# As libtpu prints it: a product as a convolution inside of a fusion, buffers in vector memory (S(1)), comments between
# operands, attributes with line breaks, a loop of known length inside of the loop over steps, whose length is an
# argument.
TPU = """HloModule jit_step, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias), {1}: (1, {}) }, other={}

%fused.1 (p.0: bf16[8,64], p.1: f32[64,32]) -> f32[8,32] {
  %p.0 = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = f32[64,32]{1,0:T(8,128)} parameter(1)
  %convert.1 = bf16[64,32]{1,0:T(8,128)(2,1)} convert(%p.1)
  ROOT %convolution.1 = f32[8,32]{1,0:T(8,128)} convolution(%p.0, %convert.1), dim_labels=bf_io->bf
}

%inner_body (state.1: (s32[], bf16[8,64], f32[64,32])) -> (s32[], bf16[8,64], f32[64,32]) {
  %state.1 = (s32[]{:T(128)}, bf16[8,64]{1,0:T(8,128)(2,1)}, /*index=2*/f32[64,32]{1,0:T(8,128)S(1)}) parameter(0)
  %x.1 = bf16[8,64]{1,0:T(8,128)(2,1)} get-tuple-element(%state.1), index=1
  %w.1 = f32[64,32]{1,0:T(8,128)S(1)} get-tuple-element(%state.1), index=2
  %product.1 = f32[8,32]{1,0:T(8,128)} fusion(%x.1, /*index=1*/%w.1), kind=kOutput, calls=%fused.1, \
backend_config={"estimated_cycles":"100"}
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[8,64]{1,0}, f32[64,32]{1,0:T(8,128)S(1)}) tuple(%x.1, %x.1, %w.1)
}

%inner_condition (state.2: (s32[], bf16[8,64], f32[64,32])) -> pred[] {
  %limit = s32[]{:T(128)} constant(4)
  %state.2 = (s32[]{:T(128)}, bf16[8,64]{1,0}, f32[64,32]{1,0:T(8,128)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state.2), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (state.3: (s32[], bf16[8,64], f32[64,32])) -> (s32[], bf16[8,64], f32[64,32]) {
  %state.3 = (s32[]{:T(128)}, bf16[8,64]{1,0:T(8,128)(2,1)}, f32[64,32]{1,0:T(8,128)}) parameter(0)
  %x.3 = bf16[8,64]{1,0:T(8,128)(2,1)} get-tuple-element(%state.3), index=1
  %splash_mha_fwd_residuals.1 = (bf16[8,64]{1,0:T(8,128)(2,1)}, f32[8]{0:T(128)}) custom-call(%x.3), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(step)/jvp()/splash_attention/pallas_call"}
  %splash_mha_dkv.1 = bf16[8,64]{1,0:T(8,128)(2,1)} custom-call(%x.3), custom_call_target="tpu_custom_call"
  %splash_mha_dq_no_residuals.1 = bf16[8,64]{1,0:T(8,128)(2,1)} custom-call(%x.3), custom_call_target="tpu_custom_call"
  %other_kernel.1 = bf16[8,64]{1,0:T(8,128)(2,1)} custom-call(%x.3), custom_call_target="tpu_custom_call"
  ROOT %while.1 = (s32[]{:T(128)}, bf16[8,64]{1,0}, f32[64,32]{1,0}) while(%state.3), \
condition=%inner_condition, body=%inner_body
}

%condition (state.4: (s32[], bf16[8,64], f32[64,32])) -> pred[] {
  %state.4 = (s32[]{:T(128)}, bf16[8,64]{1,0}, f32[64,32]{1,0}) parameter(0)
  %k = s32[]{:T(128)} get-tuple-element(%state.4), index=0
  ROOT %lt.2 = pred[]{:T(512)} compare(%k, %k), direction=LT
}

ENTRY %main (arg.0: bf16[8,64], arg.1: f32[64,32]) -> (s32[], bf16[8,64], f32[64,32]) {
  %arg.0 = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %arg.1 = f32[64,32]{1,0:T(8,128)} parameter(1)
  %tuple.2 = (s32[]{:T(128)}, bf16[8,64]{1,0}, f32[64,32]{1,0}) tuple(%arg.0, %arg.0, %arg.1)
  ROOT %while.2 = (s32[]{:T(128)}, bf16[8,64]{1,0}, f32[64,32]{1,0}) while(%tuple.2), condition=%condition, body=%body
}
"""

# As XLA's GPU compiler prints it.
GPU = """HloModule jit_step, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }, num_partitions=2

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%gemm (q.0: f32[16,32], q.1: bf16[32,8]) -> f32[16,8] {
  %q.0 = f32[16,32]{1,0} parameter(0)
  %q.1 = bf16[32,8]{1,0} parameter(1)
  ROOT %dot.1 = f32[16,8]{1,0} dot(%q.0, %q.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%row (r.0: f32[100,8], r.1: s32[]) -> f32[1,8] {
  %r.0 = f32[100,8]{1,0} parameter(0)
  %r.1 = s32[] parameter(1)
  ROOT %one = f32[1,8]{1,0} dynamic-slice(%r.0, %r.1, %r.1), dynamic_slice_sizes={1,8}
}

ENTRY %main (p: f32[16,32], w: bf16[32,8], table: f32[100,8], at: s32[]) -> f32[16,8] {
  %p = f32[16,32]{1,0} parameter(0)
  %w = bf16[32,8]{1,0} parameter(1)
  %table = f32[100,8]{1,0} parameter(2)
  %at = s32[] parameter(3)
  %start = ((f32[16,32]{1,0}), f32[16,32]{1,0}) all-reduce-start(%p), replica_groups={{0,1}}, to_apply=%add
  %gemm_fusion = f32[16,8]{1,0} fusion(%p, %w), kind=kCustom, calls=%gemm
  %done = f32[16,32]{1,0} all-reduce-done(%start)
  %gathered = f32[32,32]{1,0} all-gather(%done), dimensions={0}
  %row_fusion = f32[1,8]{1,0} fusion(%table, %at), kind=kLoop, calls=%row
  %attention = (bf16[2,4]{1,0}, u8[0]{0}) custom-call(%w), custom_call_target="__cudnn$fmhaSoftmax"
  %attention.1 = (bf16[2,4]{1,0}, u8[0]{0}) custom-call(%w), custom_call_target="__cudnn$fmhaSoftmaxBackward"
  %matmul = (f32[16,8]{1,0}, s8[16]{0}) custom-call(%p, %w), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %called = () custom-call(%at), custom_call_target="xla_ffi_python_cpu_callback"
  ROOT %copy = f32[16,8]{1,0} copy(%gemm_fusion)
}
"""

# A lowered program: names without %, an instruction of a called computation, donated buffers in the header.
LOWERED = """HloModule jit_step, buffer_donor={ (0, {}), (1, {}) }, entry_computation_layout={(f32[4]{0})->f32[4]{0}}

product.1 {
  x.1 = f32[4,2]{1,0} parameter(0)
  y.1 = bf16[2,3]{1,0} parameter(1)
  ROOT dot.1 = f32[4,3]{1,0} dot(x.1, y.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY main.1 {
  x.2 = f32[4,2]{1,0} parameter(0)
  y.2 = bf16[2,3]{1,0} parameter(1)
  ROOT call.1 = f32[4,3]{1,0} call(x.2, y.2), to_apply=product.1
}
"""


def entry(*lines: str) -> str:
    """A module of parameters and these instructions."""
    return "\n".join(["HloModule m", "", "ENTRY %main () -> f32[] {", *(f"  {line}" for line in lines), "}", ""])


def test_a_loop_counts_as_often_as_it_runs_and_the_loop_over_steps_once():
    program = CompiledProgram(TPU)
    (product,) = program.products
    assert (str(product.lhs), str(product.rhs), str(product.result)) == ("bf16[8,64]", "bf16[64,32]", "f32[8,32]")
    assert (product.times, product.flop, product.is_float32) == (4, 4 * 2 * 8 * 64 * 32, False)
    assert program.estimated_cycles == 400


def test_gpus_tell_the_length_of_a_loop_beside_it():
    text = TPU.replace("body=%inner_body", 'body=%inner_body, backend_config={"known_trip_count":{"n":"3"}}')
    assert CompiledProgram(text).products[0].times == 3


def test_vector_memory_is_no_traffic():
    program = CompiledProgram(TPU)
    of_attention = 1024 + (1024 + 32) + 3 * (1024 + 1024)  # bf16[8,64] in, and out; the first gives f32[8] besides
    of_products = 4 * (1024 + 1024)  # bf16[8,64] in, f32[8,32] out; the weights are on the chip
    assert program.bytes_accessed == of_attention + of_products
    assert CompiledProgram(TPU.replace("S(1)", "")).bytes_accessed == of_attention + of_products + 4 * 64 * 32 * 4


def test_attention_of_pallas_is_counted_by_layer():
    assert CompiledProgram(TPU).flash_attention == FlashAttention(forward=1, backward=1)
    assert CompiledProgram(TPU.replace("splash", "other")).flash_attention == FlashAttention(0, 0)


def test_products_of_gpus():
    dot, matmul = CompiledProgram(GPU).products
    assert dot.flop == matmul.flop == 2 * 16 * 8 * 32
    assert dot.is_float32 and (dot.lhs.dtype, dot.rhs.dtype) == ("f32", "bf16")


def test_attention_of_cudnn():
    assert CompiledProgram(GPU).flash_attention == FlashAttention(forward=1, backward=1)


def test_what_runs_beside_a_collective():
    product = 2 * 16 * 8 * 32
    assert CompiledProgram(GPU).collectives == [
        Collective("all-reduce", 1, 16 * 32 * 4, product, 16 * 32 * 4 + 32 * 8 * 2 + 16 * 8 * 4, group_size=2),
        Collective("all-gather", 1, 32 * 32 * 4),
    ]


def test_a_collective_beside_several_fusions_counts_once():
    """libtpu writes it into each of them, with the same chain, and products of all run meanwhile."""
    fused = "".join(
        f"""
%fused.{number} (x: bf16[8,16], y: bf16[16,8], s: f32[4]) -> (bf16[8,8], f32[16]) {{
  %x = bf16[8,16]{{1,0}} parameter(0)
  %y = bf16[16,8]{{1,0}} parameter(1)
  %s = f32[4]{{0}} parameter(2)
  %z = bf16[8,8]{{1,0}} dot(%x, %y), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  %g = f32[16]{{0}} all-gather(%s), dimensions={{0}}, frontend_attributes={{chain_id="{chain}"}}
  ROOT %t = (bf16[8,8]{{1,0}}, f32[16]{{0}}) tuple(%z, %g)
}}
"""
        for number, chain in enumerate([0, 0, 1])
    )
    module = entry(
        "%x = bf16[8,16]{1,0} parameter(0)",
        "%y = bf16[16,8]{1,0} parameter(1)",
        "%s = f32[4]{0} parameter(2)",
        *(
            f"{'ROOT ' * (n == 2)}%f.{n} = (bf16[8,8]{{1,0}}, f32[16]{{0}}) fusion(%x, %y, %s), kind=kOutput, "
            f"calls=%fused.{n}"
            for n in range(3)
        ),
    )
    program, flop = CompiledProgram(module.replace("\nENTRY", f"{fused}\nENTRY")), 2 * 8 * 16 * 8
    assert program.collectives == [Collective("all-gather", 1, 64, n * flop) for n in (2, 1)]


@pytest.mark.parametrize(
    "groups, size",
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("{{0},{1}}", 1),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['data'=2,'fsdp'=4] {'fsdp'}", 4),
        ("mesh['data'=2,'fsdp'=4] {'data','fsdp'}", 8),
        ("{}", None),
    ],
)
def test_among_how_many_devices_a_collective_runs(groups, size):
    module = entry(
        "%p = f32[64]{0} parameter(0)",
        f"ROOT %sum = f32[64]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add",
    )
    assert CompiledProgram(module).collectives == [Collective("all-reduce", 1, 256, group_size=size)]


@pytest.mark.parametrize("opcode", ["async", "call"])
def test_a_collective_in_an_asynchronous_call(opcode):
    role = {"async": "calls", "call": "to_apply"}[opcode]
    module = entry(
        "%p = f32[64]{0} parameter(0)",
        f"%start = ((f32[64]{{0}}), f32[16]{{0}}) {opcode}-start(%p), {role}=%scattered",
        f"%done = f32[16]{{0}} {opcode}-done(%start)",
        "ROOT %copy = f32[16]{0} copy(%done)",
    )
    called = """
%scattered (s: f32[64]) -> f32[16] {
  %s = f32[64]{0} parameter(0)
  ROOT %part = f32[16]{0} reduce-scatter(%s), dimensions={0}, to_apply=%add
}
"""
    program = CompiledProgram(module.replace("\nENTRY", f"{called}\nENTRY"))
    assert program.collectives == [Collective("reduce-scatter", 1, 256)]


def test_donation_and_callbacks():
    assert [CompiledProgram(text).donated for text in (TPU, GPU, LOWERED)] == [2, 1, 2]
    assert [CompiledProgram(text).host_callbacks for text in (TPU, GPU, LOWERED)] == [0, 1, 0]


@pytest.mark.parametrize(
    "line",
    [
        "ROOT %in = ((f32[4]{0}), token[]) infeed(%t)",
        "ROOT %s = (f32[4]{0}, u32[], token[]) send(%x, %t), channel_id=1, is_host_transfer=true",
    ],
)
def test_transfers_to_the_host_count_as_callbacks(line):
    assert CompiledProgram(entry(line)).host_callbacks == 1


def test_a_lowered_program_has_names_without_percent():
    (product,) = CompiledProgram(LOWERED).products
    assert (product.flop, product.is_float32) == (2 * 4 * 3 * 2, True)
    assert CompiledProgram(LOWERED).estimated_cycles is None


def test_a_batched_product_as_a_dilated_convolution_has_the_products_operations():
    """TPUs write [2, 3, 8, 16] x [2, 3, 16, 4] as a convolution over both batch axes; most pairs meet no element."""
    program = CompiledProgram(
        entry(
            "%l = bf16[2,3,8,16]{3,2,1,0} parameter(0)",
            "%r = bf16[2,3,16,4]{3,2,1,0} parameter(1)",
            "ROOT %c = f32[2,3,8,4]{3,2,1,0} convolution(%l, %r), window={size=2x3 stride=1x2 pad=0_0x0_0 "
            "lhs_dilate=2x3}, dim_labels=01bf_01io->01bf",
        )
    )
    assert program.products[0].flop == 2 * (2 * 3 * 8 * 4) * 16


def test_slices_and_updates_count_what_they_move():
    assert (
        CompiledProgram(
            entry(
                "%t = f32[1000,8]{1,0} parameter(0)",
                "%i = s32[] parameter(1)",
                "%u = f32[1,8]{1,0} dynamic-slice(%t, %i, %i), dynamic_slice_sizes={1,8}",
                "ROOT %d = f32[1000,8]{1,0} dynamic-update-slice(%t, %u, %i, %i)",
            )
        ).bytes_accessed
        == 2 * 32 + 2 * 32
    )
    row = 32 + 4 + 32  # of the GPU program's fusion: the row that is read, the index, the row that is written
    whole = GPU.replace("dynamic-slice(%r.0, %r.1, %r.1)", "reduce(%r.0, %r.1)")
    assert CompiledProgram(whole).bytes_accessed - CompiledProgram(GPU).bytes_accessed == 100 * 32 + 4 + 32 - row


def test_a_fusion_that_updates_in_place_writes_the_update():
    fused = """
%update (b.0: f32[1000,8], b.1: f32[1,8], b.2: s32[]) -> f32[1000,8] {
  %b.0 = f32[1000,8]{1,0} parameter(0)
  %b.1 = f32[1,8]{1,0} parameter(1)
  %b.2 = s32[] parameter(2)
  ROOT %u = f32[1000,8]{1,0} dynamic-update-slice(%b.0, %b.1, %b.2, %b.2)
}
"""
    module = entry(
        "%t = f32[1000,8]{1,0} parameter(0)",
        "%x = f32[1,8]{1,0} parameter(1)",
        "%i = s32[] parameter(2)",
        "ROOT %f = f32[1000,8]{1,0} fusion(%t, %x, %i), kind=kLoop, calls=%update",
    )
    assert CompiledProgram(module.replace("\nENTRY", f"{fused}\nENTRY")).bytes_accessed == 32 + 4 + 32


def test_a_copy_into_vector_memory_counts_its_source():
    program = CompiledProgram(
        entry(
            "%w = f32[64]{0:T(128)} parameter(0)",
            "%s = (f32[64]{0:T(128)S(1)}, f32[64]{0:T(128)}, u32[]{:S(2)}) copy-start(%w)",
            "ROOT %d = f32[64]{0:T(128)S(1)} copy-done(%s)",
        )
    )
    assert program.bytes_accessed == 256


def test_another_text_is_refused():
    with pytest.raises(ValueError, match="no HLO module"):
        CompiledProgram("module @jit_step {\n}\n")
