"""Ahead-of-time compilation reports what the compiled code does, and its lint finds each fault of a grid barrier.

The checks run in one process of their own, without the interpreter.
"""

import pytest
import triton
import triton.language as tl
from support.aot import GENERATIONS, SHARED_MEMORY_PER_BLOCK, compile_ahead, compile_for
from support.barrier_lint import lint_grid_barrier
from support.process import run_checks, run_without_interpreter


@pytest.mark.long
def test_compiled_kernels():
    assert "checks passed" in run_without_interpreter(__file__)


def test_a_failing_script_is_reported(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import os, sys; print('TRITON_INTERPRET' in os.environ, sys.argv[1:]); sys.exit('broken')")
    with pytest.raises(AssertionError, match=r"False \['a', 'b'\]\s+broken"):
        run_without_interpreter(script, "a", "b")


def test_the_interpreter_compiles_nothing(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_ahead(_sum_kernel, [], {}, arch=90, num_warps=4, num_stages=1)


# ---- resources -------------------------------------------------------------------------------------------------------


@triton.jit
def _sum_kernel(x_ptr, y_ptr, bias_ptr, steps, stride, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + i * stride)
    for step in range(steps):
        total += tl.load(x_ptr + (step * BLOCK + i) * stride)
    tl.store(y_ptr + i, total)


def _sum_report(arch=90, **types):
    signature = {"x_ptr": "*fp32:16", "y_ptr": "*fp32:16", "bias_ptr": None, "steps": "i32", "stride": "i32:1"}
    options = {"arch": arch, "num_warps": 4, "num_stages": 1}
    return compile_ahead(_sum_kernel, {**signature, **types}, {"BLOCK": 512}, **options)


def check_every_architecture_compiles():
    for arch in SHARED_MEMORY_PER_BLOCK:
        report = _sum_report(arch)
        assert report.name == "_sum_kernel" and report.arch == arch and report.threads == 128, report
        assert 8 <= report.registers <= 128 and report.stack_bytes == 0, report
        assert f".target sm_{arch}" in report.ptx and "ttg.num-warps" in report.ttgir
        assert report.counts["STG"] == 1 and report.counts["EXIT"] >= 1, report.counts
        assert 1 <= report.global_loads_in_loop() <= report.counts["LDG"], report.counts
        assert report.local_memory_in_loops() == report.matrix_instructions() == 0


@triton.jit
def _product_kernel(x_ptr, w_ptr, y_ptr, K, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, K, BLOCK):
        x = tl.load(x_ptr + i[:, None] * K + k + i[None, :])
        total = tl.dot(x, tl.load(w_ptr + i[:, None] * K + k + i[None, :]).T, total)
    tl.store(y_ptr + i[:, None] * BLOCK + i[None, :], total)


def check_a_generation_has_one_ptx():
    """What is assembled for an architecture is what is compiled for it."""
    signature = {"x_ptr": "*bf16:16", "w_ptr": "*bf16:16", "y_ptr": "*fp32:16", "K": "i32:16"}
    options = {"num_warps": 4, "num_stages": 3}
    assert GENERATIONS[0][1:], "there is one with several architectures"
    for archs in GENERATIONS:
        assembled = compile_for(archs, _product_kernel, signature, {"BLOCK": 64}, **options)
        for arch, report in list(zip(archs, assembled))[1:]:
            compiled = compile_ahead(_product_kernel, signature, {"BLOCK": 64}, arch=arch, **options)
            assert compiled.matrix_instructions() and compiled.instructions == report.instructions, arch
            assert compiled.kernel is not report.kernel, arch
            assert (compiled.registers, compiled.stack_bytes) == (report.registers, report.stack_bytes), arch


def check_nothing_is_disassembled_before_it_is_asked_for():
    report = _sum_report()
    assert "sass" not in vars(report)
    assert "_sum_kernel" in report.sass and report.sass is report.sass


def check_arguments_are_specialised_as_the_jit_would():
    plain = _sum_report()
    unaligned = _sum_report(x_ptr="*fp32")
    strided = _sum_report(stride="i32")
    with_bias = _sum_report(bias_ptr="*fp32:16")
    assert "ld.global.v4" in plain.ptx, "16-byte loads of aligned data"
    assert "ld.global.v4" not in unaligned.ptx and "ld.global.v4" not in strided.ptx
    assert unaligned.counts["LDG"] == 4 * plain.counts["LDG"]
    assert with_bias.counts["LDG"] == plain.counts["LDG"] + 1
    assert with_bias.global_loads_in_loop() == plain.global_loads_in_loop(), "the bias is loaded before the loop"


def check_the_signature_may_be_in_order_of_the_parameters():
    options = {"arch": 90, "num_warps": 4, "num_stages": 1}
    in_order = ["*fp32:16", "*fp32:16", None, "i32", "i32:1"]
    assert compile_ahead(_sum_kernel, in_order, {"BLOCK": 512}, **options).ptx == _sum_report().ptx


def check_a_wrong_signature_is_refused():
    complete = {"x_ptr": "*fp32", "y_ptr": "*fp32", "bias_ptr": None, "steps": "i32", "stride": "i32"}
    missing = {name: type_ for name, type_ in complete.items() if name != "steps"}
    unknown = {**complete, "step": "i32"}
    twice = {**complete, "BLOCK": "i32"}
    for signature, name in ((missing, "steps"), (unknown, "step"), (twice, "BLOCK")):
        try:
            compile_ahead(_sum_kernel, signature, {"BLOCK": 512}, arch=90, num_warps=4, num_stages=1)
        except ValueError as error:
            assert f"['{name}']" in str(error), error
        else:
            raise AssertionError(f"{name} was accepted")


@triton.jit
def _wide_kernel(x_ptr, y_ptr, steps, HAS_LOOP: tl.constexpr, BLOCK: tl.constexpr):
    """The whole tile is needed at once: for its maximum, then for its change."""
    i = tl.arange(0, BLOCK)
    tile = tl.load(x_ptr + i)
    if HAS_LOOP:
        for _ in range(steps):
            tile = tl.exp(tile - tl.max(tile, 0))
    else:
        tile = tl.exp(tile - tl.max(tile, 0))
    tl.store(y_ptr + i, tile)


def check_spills_are_found_and_placed():
    def compiled(has_loop, **options):
        signature = {"x_ptr": "*fp32:16", "y_ptr": "*fp32:16", "steps": "i32"}
        constants = {"HAS_LOOP": has_loop, "BLOCK": 8192}
        return compile_ahead(_wide_kernel, signature, constants, arch=90, num_warps=4, num_stages=1, **options)

    roomy, tight, tight_without_loop = compiled(True), compiled(True, maxnreg=48), compiled(False, maxnreg=48)
    assert roomy.stack_bytes == 0 and roomy.local_memory_in_loops() == 0, roomy
    assert tight.registers <= 48 and tight.stack_bytes > 0, tight
    assert 0 < tight.local_memory_in_loops() <= tight.counts["LDL"] + tight.counts["STL"]
    assert tight_without_loop.stack_bytes > 0 and tight_without_loop.counts["LDL"] > 0
    assert tight_without_loop.local_memory_in_loops() == 0


@triton.jit
def _matmul_kernel(a_ptr, b_ptr, c_ptr, K, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    i, k = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + i[:, None] * K + (start + k)[None, :])
        b = tl.load(b_ptr + i[:, None] * K + (start + k)[None, :])
        acc = tl.dot(a, b.T, acc)
    tl.store(c_ptr + i[:, None] * BLOCK + i[None, :], acc)


def check_matrix_instructions_and_shared_memory():
    signature = {"a_ptr": "*bf16:16", "b_ptr": "*bf16:16", "c_ptr": "*fp32:16", "K": "i32:16"}
    for arch, opcode in ((80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA"), (120, "HMMA")):
        constants = {"BLOCK": 64, "BLOCK_K": 64}
        report = compile_ahead(_matmul_kernel, signature, constants, arch=arch, num_warps=4, num_stages=3)
        assert report.matrix_instructions() == report.counts[opcode] > 0, report.counts
        assert report.global_loads_in_loop() > 0, "a software-pipelined loop loads with LDGSTS"
        assert report.fits() and report.fits(80) and report.fits(86)
    big = compile_ahead(_matmul_kernel, signature, {"BLOCK": 128, "BLOCK_K": 128}, arch=90, num_warps=8, num_stages=3)
    assert 163 << 10 < big.shared_memory <= 227 << 10, big
    assert big.fits() and big.fits(100) and not (big.fits(80) or big.fits(86) or big.fits(89) or big.fits(120))


# ---- the lint of grid barriers ---------------------------------------------------------------------------------------


@triton.jit
def _right_barrier(counter_ptr, target):
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < target:
        pass


@triton.jit
def _barrier_with_relaxed_arrive(counter_ptr, target):
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="relaxed", scope="gpu")
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < target:
        pass


@triton.jit
def _barrier_with_volatile_poll(counter_ptr, target):
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")
    while tl.load(counter_ptr, volatile=True) < target:
        pass


# Thread 0 arrives and polls between two bar.sync. Triton does not look inside, and may move loads across it.
_ASSEMBLY = """
{
    .reg .pred others, waiting;
    .reg .u32 thread, count;
    bar.sync 0;
    mov.u32 thread, %tid.x;
    setp.ne.u32 others, thread, 0;
    @others bra DONE_${:uid};
    red.release.gpu.global.add.u32 [$1], 1;
SPIN_${:uid}:
    ld.acquire.gpu.global.u32 count, [$1];
    setp.lt.u32 waiting, count, $2;
    @waiting bra SPIN_${:uid};
DONE_${:uid}:
    bar.sync 0;
    mov.u32 $0, 0;
}
"""
_RIGHT_ASSEMBLY = tl.constexpr(_ASSEMBLY)
_ASSEMBLY_WITHOUT_FIRST_BAR_SYNC = tl.constexpr(_ASSEMBLY.replace("bar.sync 0;", "", 1))
_ASSEMBLY_WITHOUT_LAST_BAR_SYNC = tl.constexpr("".join(_ASSEMBLY.rsplit("bar.sync 0;", 1)))
_OPERANDS = tl.constexpr("=r,l,r,~{memory}")


@triton.jit
def _right_barrier_in_assembly(counter_ptr, target):
    tl.inline_asm_elementwise(_RIGHT_ASSEMBLY, _OPERANDS, [counter_ptr, target], tl.int32, is_pure=False, pack=1)


@triton.jit
def _barrier_in_assembly_without_first_bar_sync(counter_ptr, target):
    asm: tl.constexpr = _ASSEMBLY_WITHOUT_FIRST_BAR_SYNC
    tl.inline_asm_elementwise(asm, _OPERANDS, [counter_ptr, target], tl.int32, is_pure=False, pack=1)


@triton.jit
def _barrier_that_holds_one_thread_back(counter_ptr, target):
    asm: tl.constexpr = _ASSEMBLY_WITHOUT_LAST_BAR_SYNC
    tl.inline_asm_elementwise(asm, _OPERANDS, [counter_ptr, target], tl.int32, is_pure=False, pack=1)


@triton.jit
def _steps_kernel(
    h_ptr,  # [T + 1, M, H]
    w_ptr,  # [H, H]
    counter_ptr,
    T,
    M: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    BARRIER: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """h_t = h_{t-1} W: the shape of a persistent recurrent kernel."""
    m, k = tl.arange(0, M), tl.arange(0, H)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(w_ptr + k[:, None] * H + n[None, :])
    for t in tl.range(0, T, num_stages=NUM_STAGES):
        h = tl.load(h_ptr + t * M * H + m[:, None] * H + k[None, :])
        tl.store(h_ptr + (t + 1) * M * H + m[:, None] * H + n[None, :], tl.dot(h, w).to(tl.bfloat16))
        BARRIER(counter_ptr, (t + 1) * tl.num_programs(0))


def _faults(barrier, num_stages=1, arch=90, num_warps=4):
    signature = {"h_ptr": "*bf16:16", "w_ptr": "*bf16:16", "counter_ptr": "*i32:16", "T": "i32"}
    constants = {"M": 16, "H": 128, "BLOCK": 32, "BARRIER": barrier, "NUM_STAGES": num_stages}
    options = {"arch": arch, "num_warps": num_warps, "num_stages": 3}
    return lint_grid_barrier(compile_ahead(_steps_kernel, signature, constants, **options))


def check_right_barriers_have_no_faults():
    for arch, num_warps in ((80, 4), (90, 1), (90, 4), (100, 4)):
        assert _faults(_right_barrier, arch=arch, num_warps=num_warps) == []
    assert _faults(_right_barrier_in_assembly) == []
    assert _faults(_right_barrier, num_stages=3) == [], "an atomic keeps the pipeliner away"


def check_stores_of_other_threads_left_out_of_the_release():
    """In assembly: some versions of Triton put a bar.sync before every release of their own."""
    (fault,) = _faults(_barrier_in_assembly_without_first_bar_sync)
    assert fault.startswith("no bar.sync between the stores and the release: "), fault


def check_missing_release():
    (fault,) = _faults(_barrier_with_relaxed_arrive)
    assert fault.startswith("no release"), fault


def check_missing_acquire():
    (fault,) = _faults(_barrier_with_volatile_poll)
    assert fault.startswith("no acquire"), fault


def check_threads_not_held_back_after_the_acquire():
    faults = _faults(_barrier_that_holds_one_thread_back)
    assert faults and all(f.startswith("no bar.sync between the acquire and the load") for f in faults), faults


def check_loop_pipelined_across_the_barrier():
    for arch in (80, 90, 100):
        (fault,) = _faults(_right_barrier_in_assembly, num_stages=3, arch=arch)
        assert fault.startswith("the loop around the barrier is software-pipelined: "), fault


if __name__ == "__main__":
    run_checks(globals())
