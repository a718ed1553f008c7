"""The sequence kernels as the configurations launch them, compiled ahead of time for every architecture.

One process per architecture, without the interpreter: this file is also the script that it runs.
"""

import itertools
import sys

import pytest
import torch
from support.process import run_without_interpreter

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
KINDS = {
    "bf16": (torch.bfloat16, "ieee"),
    "fp16": (torch.float16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "tf32x3": (torch.float32, "tf32x3"),
    "fp32": (torch.float32, "ieee"),
    "fp64": (torch.float64, "ieee"),
}
# kind, H, B, D, further features. All features of segments in two directions need most registers.
REPRESENTATIVE = [
    ("bf16", 19, 16, 2, {"segments": True}),
    ("bf16", 64, 64, 2, {"segments": True}),
    ("bf16", 128, 16, 2, {"segments": True}),
    ("bf16", 256, 256, 1, {}),
    ("bf16", 512, 64, 2, {"segments": True}),
    ("bf16", 768, 16, 2, {"segments": True}),
    ("bf16", 1024, 64, 1, {}),
    ("bf16", 1000, 16, 1, {"segments": True}),
    ("bf16", 1536, 16, 1, {"segments": True}),
    ("fp16", 512, 16, 1, {"recompute": True}),
    ("tf32", 64, 16, 1, {}),
    ("tf32", 512, 64, 2, {"segments": True}),
    ("tf32", 768, 16, 1, {}),
    ("fp32", 512, 64, 2, {"segments": True}),
    ("fp64", 19, 16, 2, {"segments": True}),
    ("tf32x3", 64, 64, 1, {}),
]


# The default run compiles for sm_90; the others take as long each, and run with `-m slow`.
@pytest.mark.parametrize("arch", [a if a == 90 else pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES])
def test_representative_configurations_compile_well(arch):
    assert "kernels compiled well" in run_without_interpreter(__file__, str(arch), timeout=1800)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_full_product_compiles_well(arch):
    assert "kernels compiled well" in run_without_interpreter(__file__, str(arch), "all", timeout=4 * 3600)


def test_the_lint_finds_what_the_interpreter_cannot():
    assert "every mutant found" in run_without_interpreter(__file__, "mutants")


# ---- in a process without the interpreter --------------------------------------------------------------------------


def _cases(everything):
    from support.aot_sequence import Case

    chosen = REPRESENTATIVE
    if everything:
        sizes = (
            1,
            16,
            19,
            32,
            63,
            64,
            96,
            100,
            127,
            128,
            192,
            255,
            256,
            384,
            512,
            640,
            768,
            896,
            1000,
            1023,
            1024,
            1280,
            1536,
        )
        features = ({}, {"segments": True}, {"aligned": False}, {"recompute": True})
        chosen = itertools.product(KINDS, sizes, (16, 17, 64, 128, 256, 512, 1024), (1, 2), features)
    for way, (kind, H, B, D, options) in itertools.product(("forward", "backward"), chosen):
        if way == "backward" or not options.get("recompute"):
            yield Case(way, H, B, D, *KINDS[kind], **options)


def _faults(case, config, report):
    from support.aot import lint_grid_barrier
    from support.aot_sequence import LIMITS

    from lstm_triton.kernels.config import uses_tensor_cores

    if report.local_memory_in_loops():
        yield f"{report.local_memory_in_loops()} accesses to local memory in loops"
    if report.shared_memory > LIMITS[report.arch].shared_memory:
        yield f"{report.shared_memory} bytes of shared memory"
    if uses_tensor_cores(case.dtype, case.precision):
        if not report.matrix_instructions():
            yield "no matrix instructions"
        wide = case.way == "forward" and 4 * config.block_h >= 64
        if report.arch == 90 and wide and not report.counts["HGMMA"]:
            yield "no wgmma"
    if not config.persistent:
        return
    if config.programs > 1:
        yield from lint_grid_barrier(report)
    loads = [i.text for i in report.in_loops if i.opcode in ("LDG", "LDGSTS", "UTMALDG", "UBLKCP")]
    data = [text for text in loads if ".STRONG.GPU" not in text]
    polls = len(loads) - len(data)
    if polls > (2 if config.programs > 1 else 0):
        yield f"{polls} polls"
    if case.aligned and not case.segments and case.H % 16 == 0:
        expected = _loads_of_a_step(case, config)
        if len(data) != expected:
            yield f"{len(data)} loads in the time loop, not {expected}: is W_hh among them?"


def _loads_of_a_step(case, config):
    """Of 16 bytes a thread: the exchanged state of all units, and what belongs to the program's own units and rows."""

    def loads(elements):
        return max(elements * case.dtype.itemsize // (16 * 32 * config.num_warps), 1)

    own = config.block_b * config.block_h
    depth = config.split_k * config.block_k
    inner = case.H if case.way == "forward" else 4 * case.H
    exchanged = -(-inner // depth) * loads(config.block_b * depth)
    # Forward the pre-activations; backward the gates, dy, dh_n and the c before the step.
    return exchanged + loads(4 * own) + (3 * loads(own) if case.way == "backward" else 0)


def _compile_all(arch, everything):
    from support.aot_sequence import LIMITS, compile_case, configuration

    seen, faults = set(), []
    for case in _cases(everything):
        config = configuration(case, LIMITS[arch])
        key = (case._replace(B=0), config.block_b, config.block_h, config.block_k, config.persistent)
        if key not in seen:
            seen.add(key)
            faults += [f"{case}, {config}: {fault}" for fault in _faults(case, config, compile_case(case, arch))]
    if faults:
        sys.exit("\n".join(faults))
    print(f"{len(seen)} kernels compiled well")


def _find_mutants():
    """What the threads of one program do among themselves shows in the compiled code alone."""
    import triton
    import triton.language as tl
    from support.aot import lint_grid_barrier
    from support.aot_sequence import Case, compile_case

    from lstm_triton.kernels import sequence, sequence_backward

    @triton.jit
    def arrive_without_barrier(counter_ptr):
        tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")

    @triton.jit
    def relaxed_arrive(counter_ptr):
        tl.debug_barrier()
        tl.atomic_add(counter_ptr, 1, sem="relaxed", scope="gpu")

    @triton.jit
    def wait_relaxed(counter_ptr, target, stall_ptr):
        while tl.atomic_add(counter_ptr, 0, sem="relaxed", scope="gpu") < target:
            pass
        tl.debug_barrier()

    @triton.jit
    def no_wait(counter_ptr, target, stall_ptr):
        pass

    mutants = [
        ("arrive", arrive_without_barrier, "no bar.sync between the stores and the release"),
        ("arrive", relaxed_arrive, "no release"),
        ("wait", wait_relaxed, "no acquire"),
        ("wait", no_wait, "no acquire"),
    ]
    for way, module in (("forward", sequence), ("backward", sequence_backward)):
        case = Case(way, 256, 16, 1, torch.bfloat16, "ieee")
        for name, mutant, fault in mutants:
            sound = getattr(module, name)
            setattr(module, name, mutant)
            found = lint_grid_barrier(compile_case(case, 90))
            setattr(module, name, sound)
            assert any(fault in text for text in found), (way, fault, found)
        assert lint_grid_barrier(compile_case(case, 90)) == []
    print("every mutant found")


if __name__ == "__main__":
    if sys.argv[1] == "mutants":
        _find_mutants()
    else:
        _compile_all(int(sys.argv[1]), sys.argv[2:] == ["all"])
