"""The executor sees what it promises: PTX with one mistake each is reported, and the same PTX without it runs."""

import re

import pytest
import torch
from support import executor
from support.executor import ExecutingDriver, KernelFault, Unsupported

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(executor.why_not() is not None, reason=str(executor.why_not())),
]

SEEDS = range(4)


def ptx(body: str, arch: str = "sm_90a", threads: int = 128) -> str:
    """A kernel of two pointers, %rd0 and %rd1; %r0 is the thread, %r1 its word of shared memory, %rd2 that of %rd0."""
    lines = "\n".join(f".loc 1 {n} 0 // kernel.py:{n}\n{line}" for n, line in enumerate(body.strip().splitlines(), 1))
    return f"""
.version 8.7
.target {arch}
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(.param .u64 p, .param .u64 q) .reqntid {threads}
{{
.reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<40>; .reg .b64 %rd<20>;
ld.param.b64 %rd0, [p]; ld.param.b64 %rd1, [q];
mov.u32 %r0, %tid.x; mov.b32 %r2, global_smem; mad.lo.s32 %r1, %r0, 4, %r2; mad.wide.s32 %rd2, %r0, 4, %rd0;
{lines}
ret;
}}"""


# B is 16 x 8 ones in shared memory, A four registers of ones: every sum is 16.
WGMMA = """
st.shared.b32 [%r1], 0x3F803F80;
fence.proxy.async.shared::cta; //! proxy fence missing
bar.sync 0; //! race in shared memory
mov.b64 %rd4, 64;
mov.b32 %r10, 0x3F803F80;
mov.b32 %r20, 0; mov.b32 %r21, 0; mov.b32 %r22, 0; mov.b32 %r23, 0;
mov.pred %p1, -1;
wgmma.fence.sync.aligned; //! wgmma
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r20,%r21,%r22,%r23}, {%r10,%r10,%r10,%r10}, %rd4, %p1, 1, 1, 0;
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0; //! wgmma: wgmma.wait_group.sync.aligned 1;
mov.b32 %r10, 0;
st.global.b32 [%rd2], %r20;
wgmma.wait_group.sync.aligned 0;
bar.sync 0; //! asynchronous copy or product not waited for
st.shared.b32 [%r1], 5;
"""
# A is 128 x 16 and B 8 x 16 ones in shared memory; the sums go to 8 of 32 columns.
TENSOR = """
st.shared.b32 [%r1], 0x3F803F80;
setp.lt.s32 %p1, %r0, 32;
setp.eq.s32 %p2, %r0, 0;
add.s32 %r3, %r2, 512;
add.s32 %r4, %r2, 520;
@%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r3], 32;
@%p2 mbarrier.init.shared::cta.b64 [%r4], 1;
fence.proxy.async.shared::cta; //! proxy fence missing
bar.sync 0; //! race in shared memory
ld.shared.b32 %r5, [%r3];
mov.b64 %rd4, 64;
mov.b32 %r6, 0x8020490;
mov.pred %p3, 0;
@%p2 tcgen05.mma.cta_group::1.kind::f16 [%r5 + 0], %rd4, %rd4, %r6, %p3;
@%p2 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r4];
POLL: mbarrier.try_wait.parity.shared::cta.b64 %p4, [%r4], 0; //! tensor memory: POLL: mov.pred %p4, -1;
@!%p4 bra POLL;
shr.u32 %r8, %r0, 5;
shl.b32 %r8, %r8, 21;
add.s32 %r7, %r5, %r8;
tcgen05.ld.sync.aligned.32x32b.x4.b32 {%r20,%r21,%r22,%r23}, [%r7 + 0];
setp.lt.s32 %p5, %r0, 5; // lanes of the warp may be apart while their registers are loaded
@%p5 bra APART;
APART: mov.b64 %rd5, {%r20,%r21};
mov.b64 %rd6, {%r22,%r23};
tcgen05.wait::ld.sync.aligned; //! asynchronous copy or product not waited for
mov.b64 {%r20,%r21}, %rd5;
st.global.b32 [%rd2], %r20;
tcgen05.st.sync.aligned.32x32b.x4.b32 [%r7 + 8], {%r20,%r21,%r22,%r23};
tcgen05.wait::st.sync.aligned; //! tensor memory
tcgen05.ld.sync.aligned.32x32b.x4.b32 {%r24,%r25,%r26,%r27}, [%r7 + 8];
tcgen05.wait::ld.sync.aligned;
bar.sync 0;
@%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r5, 32; //! left over
"""
# How many programs execute what. A mistake is a line with //! left out, or what stands behind the colon in its place; it is
# reported as what stands in front of it.
CASES = {
    "shared memory": (
        2,
        """
st.shared.b32 [%r1], %r0;
bar.sync 0; //! race in shared memory
xor.b32 %r3, %r1, 256;
ld.shared.b32 %r4, [%r3];
bar.sync 0; //! race in shared memory
st.shared.b32 [%r1], 7;
bar.warp.sync -1; //! race in shared memory
xor.b32 %r3, %r1, 64;
ld.shared.b32 %r4, [%r3];
bar.warp.sync -1; //! race in shared memory
st.shared.b32 [%r1], 8;
""",
    ),
    "undefined values": (
        2,
        """
st.shared.b32 [%r1], %r0; //! uninitialised shared memory
ld.shared.b32 %r4, [%r1];
mov.b32 %r5, 3; //! undefined register
add.s32 %r6, %r5, 1;
st.shared.b32 [%r1], %r6;
setp.lt.s32 %p1, %r0, 5; //! undefined register
@%p1 st.shared.b32 [%r1], %r0;
prmt.b32 %r7, %r9, %r0, 0x3340U; // the first byte and the last two are undefined
mov.b32 %r8, %r7;
prmt.b32 %r10, %r8, 0, 0x7771U; //! undefined register: prmt.b32 %r10, %r8, 0, 0x7770U;
st.shared.b32 [%r1], %r10;
""",
    ),
    "addresses": (
        1,
        """
mov.b32 %r3, 9999; //! out of bounds or misaligned: mov.b32 %r3, 0;
mov.b32 %r4, 9999; //! out of bounds or misaligned: mov.b32 %r4, 127;
mov.b64 %rd3, 0; //! out of bounds or misaligned: mov.b64 %rd3, 2;
setp.eq.s32 %p1, %r0, %r3;
@%p1 add.s64 %rd2, %rd2, 512;
setp.eq.s32 %p1, %r0, %r4;
@%p1 add.s32 %r1, %r1, 4096;
add.s64 %rd2, %rd2, %rd3;
st.global.b32 [%rd2], %r0;
st.shared.b32 [%r1], %r0;
""",
    ),
    "a store and a load behind a counter": (
        2,
        """
mov.u32 %r3, %ctaid.x;
setp.ne.b32 %p1, %r3, 0;
setp.eq.b32 %p2, %r0, 0;
@%p1 bra CONSUMER;
st.global.b32 [%rd2], %r0;
bar.sync 0; //! race in global memory
@%p2 red.global.gpu.release.add.u32 [%rd1], 1; //! race in global memory: @%p2 red.global.gpu.relaxed.add.u32 [%rd1], 1;
bra.uni DONE;
CONSUMER: not.pred %p3, %p2;
@%p3 bra WAITED;
POLL: ld.global.gpu.acquire.b32 %r4, [%rd1]; //! race in global memory: POLL: ld.global.gpu.relaxed.b32 %r4, [%rd1];
setp.lt.u32 %p4, %r4, 1;
@%p4 bra POLL;
WAITED: bar.sync 0; //! race in global memory: WAITED: mov.b32 %r8, 0;
xor.b32 %r5, %r0, 64;
mad.wide.s32 %rd2, %r5, 4, %rd0;
ld.global.b32 %r6, [%rd2];
DONE: mov.b32 %r7, 0;
""",
    ),
    "a store by two programs": (
        2,
        """
mov.u32 %r3, %ctaid.x;
mad.lo.s32 %r4, %r3, 128, %r0; //! race in global memory: mov.b32 %r4, %r0;
mad.wide.s32 %rd2, %r4, 4, %rd0;
st.global.b32 [%rd2], %r4;
add.s32 %r5, %r4, %r3;
st.global.b32 [%rd2], %r5;
""",
    ),
    "a barrier and a shuffle of all": (
        2,
        """
setp.lt.s32 %p1, %r0, 999; //! divergence: setp.lt.s32 %p1, %r0, 96;
@%p1 bar.sync 0;
setp.lt.s32 %p1, %r0, 999; //! divergence: setp.lt.s32 %p1, %r0, 100;
@%p1 shfl.sync.bfly.b32 %r3, %r0, 1, 31, -1;
""",
    ),
    "a wait for all": (
        2,
        """
mov.b32 %r3, 256; //! deadlock: mov.b32 %r3, 257;
atom.global.gpu.relaxed.add.u32 %r4, [%rd1], 1;
POLL: ld.global.gpu.relaxed.b32 %r4, [%rd1];
setp.lt.u32 %p4, %r4, %r3;
@%p4 bra POLL;
""",
    ),
    "cp.async": (
        2,
        """
cp.async.ca.shared.global [%r1], [%rd2], 4;
cp.async.commit_group;
cp.async.wait_group 0; //! asynchronous copy or product not waited for: cp.async.wait_group 1;
bar.sync 0; //! race in shared memory
xor.b32 %r3, %r1, 256;
ld.shared.b32 %r4, [%r3];
cp.async.wait_group 0;
""",
    ),
    "wgmma": (1, WGMMA),
    "tcgen05": (1, TENSOR),
}
MISTAKES = [
    pytest.param(programs, f"{body[: m.start()]}{m[2] or ''}{body[m.end() :]}", m[1], id=f"{name}-{at}")
    for name, (programs, body) in CASES.items()
    for at, m in enumerate(re.finditer(r"(?m)^.* //! ([^:\n]+)(?:: (.*))?$", body))
]


def execute(body: str, seed: int = 1, programs: int = 2, programs_per_sm: int = 1):
    driver = ExecutingDriver(100 if "tcgen05" in body else 90, seed, programs_per_sm)
    data, counter = torch.arange(128 * programs, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    driver.run(ptx(body), (programs, 1, 1), data, counter, shared=1024)
    return data, driver.executed[-1]


@pytest.mark.parametrize("name", CASES)
def test_sound_code_is_not_reported(name):
    programs, body = CASES[name]
    for seed in SEEDS:
        data, executed = execute(body, seed, programs)
        assert body not in (WGMMA, TENSOR) or (data.view(torch.float32) == 16).all()
        assert executed.late_zeros == 0


@pytest.mark.parametrize("programs, body, kind", MISTAKES)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_mistake_is_reported(programs, body, kind, seed):
    with pytest.raises(KernelFault) as fault:
        execute(body, seed, programs)
    assert kind in {report.kind for report in fault.value.reports}, str(fault.value)
    for report in fault.value.reports:
        assert report.kernel == "kernel" and (report.statement is None or report.statement.source in str(fault.value))


def test_only_zeros_may_be_moved_to_accumulators_behind_a_wgmma_fence():
    """Triton 3.7.1 moves them there where a loop is unrolled."""
    zeros, fence = re.search(r"mov.b32 %r20.*\n", WGMMA)[0], re.search(r"wgmma.fence.*\n", WGMMA)[0]
    late = WGMMA.replace(zeros, "").replace(fence, fence + zeros)
    data, executed = execute(late, programs=1)
    assert (data.view(torch.float32) == 16).all() and executed.late_zeros == 4 * 4  # four in each of four warps
    for mistake in (late.replace("%r21, 0;", "%r21, %r10;", 1), late.replace(fence, "")):
        with pytest.raises(KernelFault, match="after the last wgmma.fence"):
            execute(mistake, programs=1)


PAST_THE_END = """
mad.wide.s32 %rd2, %r0, 5, %rd0;
setp.eq.s32 %p1, %r0, 102;
@%p1 ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%rd2 + -6];
"""


def test_a_report_names_kernel_program_thread_line_and_instruction():
    with pytest.raises(KernelFault) as fault:
        execute(PAST_THE_END, programs=1)
    assert str(fault.value) == (
        "out of bounds or misaligned: kernel, program 0, thread 102: 16 bytes at byte 504 of argument 0, which has 512"
        "\n    at kernel.py:3: `@%p1 ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%rd2 + -6]`"
    )


WAIT_FOR_BOTH = """
@%p2 red.global.gpu.release.add.u32 [%rd1], 1;
WAIT: ld.global.gpu.acquire.b32 %r9, [%rd1];
setp.lt.u32 %p5, %r9, 2;
@%p5 bra WAIT;
"""
STORE_APART = """
mov.u32 %r11, %ctaid.x;
mad.wide.s32 %rd2, %r11, 512, %rd2;
st.global.b32 [%rd2], %r20;
"""


def test_tensor_memory_of_an_sm_is_shared():
    """Programs of one SM that take all its columns run one after the other; they never end if one waits for the other."""
    apart = TENSOR.replace("[%r3], 32;", "[%r3], 512;").replace("%r5, 32;", "%r5, 512;")
    apart = apart.replace("st.global.b32 [%rd2], %r20;\n", STORE_APART)
    waiting = apart.replace("bar.sync 0;\n@%p1 tcgen05.dealloc", WAIT_FOR_BOTH + "bar.sync 0;\n@%p1 tcgen05.dealloc")

    execute(apart, programs_per_sm=2)
    execute(waiting)
    with pytest.raises(KernelFault, match="deadlock"):
        execute(waiting, programs_per_sm=2)


@pytest.mark.parametrize(
    "line",
    [
        "frobnicate.b32 %r3, %r0;",
        "add.sat.s32 %r3, %r0, 1;",
        "add.s32 %r3, %r0, %rd0;",
        "add.s32 %r3, %r0;",
        "add.f32 %r3, %r0, 0d3FF0000000000000;",
        "ld.global.gpu.acquire.L2::cache_hint.b32 %r3, [%rd0], %rd1;",
        "ld.acquire.global.b32 %r3, [%rd0];",
        "ld.global.b32 %r3, [%r0];",
        "st.param.b32 [p], %r0;",
        "shfl.sync.bfly.b32 %r3, %r0, 1, 31, 15;",
        "bar.sync 1;",
        "mov.b32 %r3, %clock;",
        "cvt.rzi.ftz.s32.f32 %r3, %r0;",
        "bra NOWHERE;",
        "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r3}, [%r1];",
    ],
)
def test_what_is_not_known_is_an_error_with_its_line(line):
    with pytest.raises(Unsupported, match=r"(?s)PTX line 11, kernel.py:1: .*" + re.escape(line[:-1])):
        execute(line)
