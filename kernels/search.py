"""The choice of a configuration for a sequence kernel: the cheapest candidate, by the cost model, that compiles well.

Only the compiler knows how many registers a tile takes, and each version of it decides anew for each architecture. So at the
first launch of a problem candidates are compiled, cheapest first, until one spills little. None of them is launched, and the
choice is remembered.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator

import torch
from triton.runtime import JITFunction

from . import device as device_module
from . import interpreter
from .config import MAX_REGISTERS, cdiv
from .device import refuse_capture
from .figures import DeviceFigures
from .sequence_config import Problem, SequenceConfig
from .sequence_cost import cost, fits, has_columns, registers
from .specialization import KERNELS, compile_for

# The most compilations of one choice, in all and of kernels that run every step. Each takes about two seconds.
MOST_COMPILATIONS, _MOST_PERSISTENT = 6, 4
# Words of local memory per thread. A few cost little in a step of thousands of cycles, and their number differs between
# processes; some still cost less than a launch for each step. Neither has been measured.
_FEW_WORDS, _SOME_WORDS = 8, 32
MATRIX_INSTRUCTIONS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")

_TILES = tuple(itertools.product((8, 16, 32, 64), (8, 16, 32, 64, 128), (4, 8)))  # block_b, block_h, num_warps
_TILES_ON_CUDA_CORES = tuple(itertools.product((8, 16, 32, 64), (4, 8, 16, 32), (4, 8)))
_DEPTHS = (16, 32, 64, 128, 256, 512, 1024)  # block_k
# Bytes of the exchanged state that each thread loads at once; they take a quarter as many registers.
_BYTES_IN_FLIGHT = (256, 192, 128)
_IN_BAND = (True, False)  # how programs exchange their state: without a barrier, and with one
_IN_FLIGHT_IN_BAND = (384, *_BYTES_IN_FLIGHT)  # loaded straight into the registers of the product
# Bytes of the inner dimension per warp and chunk where state is exchanged without a barrier: 16 for each of four threads.
_CHUNK_BYTES = 64
# More chunks take too long to compile. More L2 round trips are assumed to take longer than a launch per step.
_MOST_CHUNKS, _MOST_ROUNDS = 64, 16
_MOST_LAUNCHES = 4  # of all steps each, one after the other


def candidates(problem: Problem, device: DeviceFigures) -> list[SequenceConfig]:
    """Return all configurations that fit the device, in this order, and each kind by cost:

    those that run all steps in one launch; those that run all steps in a few launches, because their programs do not all fit at
    once, if they cost less than one launch per step; those of one launch per step.
    """
    costs: dict[SequenceConfig, float] = {}
    if problem.dtype != torch.float64 and not problem.stepwise:
        for tile in _TILES if problem.on_tensor_cores else _TILES_ON_CUDA_CORES:
            found = (c for c in _persistent(problem, device, *tile) if fits(problem, c, device))
            costs |= {c: cost(problem, c, device) for c in found}
    stepwise = list(_stepwise(problem))
    least = min(cost(problem, config, device) for config in stepwise)
    kept = [config for config in costs if config.launches == 1 or costs[config] < least]
    if problem.only_in_band:  # its products from shared memory are assumed to be slower than an exchange
        kept = [config for config in kept if config.in_band] or kept

    def rank(config: SequenceConfig) -> tuple[float, ...]:
        chunk = config.block_b * config.block_k * problem.dtype.itemsize / 4096
        # Among equal costs, prefer at most 128 registers for what the model counts, few programs, and chunks near 4 KiB
        # (shorter ones are more code). The last three make the order unique.
        preferred = max(registers(problem, config, device), 128), config.programs * config.groups, max(chunk, 1 / chunk)
        return _stage(config), costs[config], *preferred, -config.num_warps, config.block_k, config.in_flight

    return [*sorted(kept, key=rank), *stepwise]


def _persistent(
    problem: Problem, device: DeviceFigures, block_b: int, block_h: int, num_warps: int
) -> Iterator[SequenceConfig]:
    """Yield this tile with W_hh on chip, with chunks of every size and different numbers of them in flight."""
    if block_b * block_h > 2048 or 16 < block_b >= 2 * problem.B or 8 < block_h >= 2 * problem.H:
        return
    programs, groups = cdiv(problem.H, block_h), cdiv(problem.B, block_b) * problem.D
    # Programs of a group wait for one another, so all of them have to run at the same time.
    launches = cdiv(groups, device.sms // programs) if 1 < programs <= device.sms else 1
    if launches > _MOST_LAUNCHES or programs > device.sms:
        return
    for in_band, split_k, block_k, bytes_each in _forms(problem, block_b, block_h, num_warps):
        chunks, chunk = cdiv(problem.inner, split_k * block_k), split_k * block_k * problem.dtype.itemsize
        free = device.shared_memory - (0 if in_band else chunks * chunk * problem.columns * block_h)
        at_once = min(free, bytes_each * 32 * num_warps) // (block_b * chunk)
        if at_once > 0 and chunks <= min(_MOST_CHUNKS, _MOST_ROUNDS * at_once) and programs > in_band:
            tile = (block_b, block_h, split_k, block_k, cdiv(chunks, cdiv(chunks, at_once)), programs, groups)
            yield SequenceConfig(num_warps, 1, *tile, True, in_band, launches, max_registers=MAX_REGISTERS)


def _forms(problem: Problem, block_b: int, block_h: int, num_warps: int) -> Iterator[tuple[bool, int, int, int]]:
    """Yield in_band, split_k, block_k and bytes in flight per thread, of all that the kernels have code for."""
    itemsize, forward = problem.dtype.itemsize, problem.way == "forward"
    enough = problem.columns * block_h >= 16 or not problem.on_tensor_cores
    # In band, `fragments` loads 16 bytes; forward, rows are padded for that (`exchanged_row`).
    if True in _IN_BAND and enough and (forward or 4 * problem.H * itemsize % 16 == 0):
        yield from itertools.product([True], [num_warps], [_CHUNK_BYTES // itemsize], _IN_FLIGHT_IN_BAND)
    # On CUDA cores, and in tf32x3, W_hh in shared memory serves only a program that owns all units and waits for none.
    if False in _IN_BAND and block_b >= 16 and (problem.H <= block_h or not problem.only_in_band):
        yield from itertools.product([False], [1 if forward else num_warps], _DEPTHS, _BYTES_IN_FLIGHT)


def _stage(config: SequenceConfig) -> int:
    """Return 0 for all steps in one launch, 1 for all steps in a few launches, 2 for one launch per step."""
    return min(config.launches - 1, 1) if config.persistent else 2


def _stepwise(problem: Problem) -> Iterator[SequenceConfig]:
    """Yield configurations of one launch per step, in which each launch reads W_hh: more rows, which read it less, first."""
    block_k = (64 if problem.dtype.itemsize == 2 else 32) if problem.on_tensor_cores else 16
    for block_b, num_warps in itertools.product((32, 16) if problem.B > 16 else (16,), (4, 8)):
        tile = (block_b, 16, 1, block_k, 1, cdiv(problem.H, 16), cdiv(problem.B, block_b) * problem.D)
        yield SequenceConfig(num_warps, 3, *tile, False, max_registers=MAX_REGISTERS)


def choose(problem: Problem, device: DeviceFigures, on: torch.device) -> SequenceConfig:
    """Return the configuration that was measured for this problem on this device, or else that of `search`, and remember it.

    Raises:
        RuntimeError: during the capture of a CUDA graph, if none is remembered.
    """
    key = problem, device, on.index, interpreter.programs_can_wait()
    config = remembered.get(key)
    if config is None:
        with torch.cuda.device(on) if on.type == "cuda" else contextlib.nullcontext():
            if on.type == "cuda":
                refuse_capture(KERNELS[problem.way].__name__)
            config = device_module.measured(problem, on)
            if config is None or config not in candidates(problem, device) or not _may_wait(config):
                config = search(problem, device)
        remembered[key] = config
    return config


remembered: dict[tuple, SequenceConfig] = {}


def _may_wait(config: SequenceConfig) -> bool:
    """Return whether the programs of a launch run at the same time where they have to."""
    return not config.waits or interpreter.programs_can_wait()


def search(problem: Problem, device: DeviceFigures) -> SequenceConfig:
    """Return the configuration for this problem on the current device, whose figures are `device`.

    Problem, device and compiler determine it, so every process with the same ones chooses alike.
    """
    found = candidates(problem, device)
    if not isinstance(KERNELS[problem.way], JITFunction):  # Triton's interpreter compiles nothing
        return next(c for c in found if _may_wait(c))
    asked: dict[SequenceConfig, float] = {}  # words of local memory; infinite where the kernel cannot be used
    limits = (_MOST_PERSISTENT, _SOME_WORDS), (_MOST_PERSISTENT, _SOME_WORDS), (MOST_COMPILATIONS, 1 << 20)
    for stage, (most, enough) in enumerate(limits):
        for config in (c for c in found if _stage(c) == stage):
            if len(asked) == most:
                break
            if config.persistent and any(_spills_too(problem, device, config, other, asked[other]) for other in asked):
                continue
            asked[config] = _words(problem, device, config)
            if asked[config] <= _FEW_WORDS:
                return config
        best = min((c for c in asked if _stage(c) == stage), key=asked.__getitem__, default=None)
        if best is not None and asked[best] <= enough:
            return best
    raise RuntimeError(f"Triton compiles no kernel for {problem}")


def _spills_too(
    problem: Problem, device: DeviceFigures, config: SequenceConfig, other: SequenceConfig, words: float
) -> bool:
    """Return whether `config` likely spills too: it saves less than half of the registers that `other` lacked."""
    most = registers(problem, other, device) - words / 2
    return _FEW_WORDS < words < math.inf and registers(problem, config, device) > most


def _words(problem: Problem, device: DeviceFigures, config: SequenceConfig) -> float:
    """Return words of local memory per thread; infinite if the kernel has no matrix instruction or too little tensor memory."""
    kernel = compile_for(problem, config)
    if kernel is None or not has_columns(
        config, device, kernel.metadata.tmem_size, kernel.metadata.shared, kernel.n_regs
    ):
        return math.inf
    has_product = any(name in kernel.asm["ptx"] for name in MATRIX_INSTRUCTIONS)
    return kernel.n_spills if has_product or not problem.on_tensor_cores else math.inf
