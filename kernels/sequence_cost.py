"""The registers and memory of a configuration of the sequence kernels, and the cost model of a step.

No number here has been measured on a GPU yet.
"""

from .config import MAX_REGISTERS, cdiv
from .figures import DeviceFigures
from .sequence_config import Problem, SequenceConfig


def shared_memory(problem: Problem, config: SequenceConfig) -> int:
    """Return the bytes of a program: W_hh, and one buffer for the chunks in flight or for sums that move between threads."""
    chunk, columns = config.split_k * config.block_k * problem.dtype.itemsize, problem.columns * config.block_h
    state, sums = config.in_flight * config.block_b * chunk, 4 * parts(problem, config) * config.block_b * columns
    if config.in_band:
        return sums
    return config.chunks(problem.inner) * chunk * columns + max(state, sums)


def parts(problem: Problem, config: SequenceConfig) -> int:
    """Return the number of partial sums of each result: one for each split of the inner dimension, or four on CUDA cores."""
    return config.split_k * (1 if problem.on_tensor_cores else 4)


def is_wide(problem: Problem, config: SequenceConfig, device: DeviceFigures) -> bool:
    """Return whether the product runs on wgmma or tcgen05, which read W_hh from shared memory; mma.sync reads registers."""
    return device.wide_rate > 0 and config.split_k == 1 and problem.columns * config.block_h >= 64


def tensor_memory(problem: Problem, config: SequenceConfig, device: DeviceFigures) -> int:
    """Return the most columns (128 float32 each) that a program takes, for sums [4 * block_h, block_b] of each chunk."""
    if device.tensor_memory == 0 or not is_wide(problem, config, device):
        return 0
    columns = config.chunks(problem.inner) * config.block_b * config.block_h // 32
    return max(1 << (columns - 1).bit_length(), 32)  # allocations are powers of two


def registers(problem: Problem, config: SequenceConfig, device: DeviceFigures) -> float:
    """Estimate the registers of a thread that grow with tile and chunks, to compare candidates.

    They hold the chunks in flight, the sums, c, the gates of this step and the next, and for mma.sync a chunk of W_hh, or all
    of it.
    """
    itemsize, columns = problem.dtype.itemsize, problem.columns * config.block_h
    depth, tile = config.split_k * config.block_k, config.block_b * config.block_h
    state = config.in_flight * config.block_b * depth * itemsize / 4
    sums = parts(problem, config) * config.block_b * columns
    weights = 0 if is_wide(problem, config, device) else depth * columns * itemsize / 4
    weights *= config.chunks(problem.inner) if config.in_band else 1
    weights *= (2 if problem.precision == "tf32x3" else 1) if problem.on_tensor_cores else 8
    return (state + sums + (2 * itemsize + 1) * tile + weights) / (32 * config.num_warps)


def fits(problem: Problem, config: SequenceConfig, device: DeviceFigures) -> bool:
    """Return whether shared memory, registers and tensor memory may suffice."""
    size = shared_memory(problem, config)
    if size > device.shared_memory or registers(problem, config, device) > MAX_REGISTERS:
        return False
    return has_columns(config, device, tensor_memory(problem, config, device), size)


def has_columns(config: SequenceConfig, device: DeviceFigures, columns: int, size: int, registers: int = 0) -> bool:
    """Return whether tensor memory suffices for all programs that may share an SM with one that waits (`grid_sync`).

    size: bytes of shared memory. registers: per thread; 0 if unknown. An SM has room for 64 warps, 64 K registers, and as much
    shared memory as one program may have and 1 KiB for each program.
    """
    if not config.waits:
        return columns <= device.tensor_memory
    sharing = min((device.shared_memory + 1024) // (size + 1024), 64 // config.num_warps)
    if registers:
        sharing = min(sharing, 65536 // (32 * config.num_warps * registers))
    return columns * sharing <= device.tensor_memory


def cost(problem: Problem, config: SequenceConfig, device: DeviceFigures) -> float:
    """Estimate the cycles of a step by a model, the sum of

    * the barrier, or the time until stores are visible without one, or a launch;
    * the L2 latency of each round of loads, and the L2 throughput;
    * the slowest of shared memory, from which tensor cores read W_hh; the products; and the chain of sums in one tensor core,
      in which each chunk of wgmma or tcgen05 ends before the next begins;
    * moving partial sums through shared memory;
    * the gates.
    """
    chunks, columns = config.chunks(problem.inner), problem.columns * config.block_h
    row_bytes = chunks * config.split_k * config.block_k * problem.dtype.itemsize
    launched = config.programs * config.groups_at_once
    wide = is_wide(problem, config, device)
    rate, latency = (device.wide_rate, device.wide_latency) if wide else (device.mma_rate, device.mma_latency)
    if not problem.on_tensor_cores:
        rate, latency = 2 * device.fma_rate, device.fma_latency  # rates count elements of two bytes
    rounding = 3 if problem.precision == "tf32x3" else 1
    products = rounding * config.block_b * columns * row_bytes / 2 / rate
    chain = rounding * row_bytes / config.split_k / 32 * latency + (chunks * device.wide_end if wide else 0)
    # Every warpgroup reads W_hh from shared memory where wgmma has no 64 rows of it for each.
    readers = max(config.num_warps / 4 * 64 / columns, 1) if wide and not device.tensor_memory else not config.in_band
    weights = readers * columns * row_bytes / device.shared_bytes
    sums = 8 * parts(problem, config) * config.block_b * columns / device.shared_bytes
    # Ten special functions per unit; other arithmetic is taken to overlap them. A thread without a unit repeats another's, and
    # its loads and stores go through shared memory.
    tile, threads = config.block_b * config.block_h, 32 * config.num_warps
    gates = 10 * max(tile, threads) / device.special_functions + (device.scattered if tile < threads else 0)
    # The L2 cache holds rows of the state, and W_hh if it is not on chip, whose loads are pipelined.
    rows = config.block_b + (0 if config.persistent else columns)
    share = max(device.sms / launched, 1)  # SMs for each program
    state = rows * row_bytes / min(device.l2_share * share, device.l2_most)
    exchange = (device.store if config.in_band else device.barrier) if config.waits else 0
    latencies = exchange + (config.rounds(problem.inner) if config.persistent else 1) * device.l2_latency
    step = latencies + state + max(weights, products, chain) + sums + gates
    total = step * cdiv(launched, device.sms) * config.launches  # programs that do not wait may queue for an SM
    return total + (0 if config.persistent else device.launch)
