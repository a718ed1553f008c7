"""Launch configurations of the sequence kernels: the problem, the resources of a candidate, and the cost model of a step.

`search` lists the candidates and compiles them. No number here has been measured on a GPU yet.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .config import LaunchConfig, cdiv, uses_tensor_cores
from .figures import DeviceFigures

# Bytes of the inner dimension per warp and chunk where state is exchanged without a barrier: 16 for each of four threads.
CHUNK_BYTES = 64


class Problem(NamedTuple):
    """What a configuration depends on besides the device: B batch rows, H units, D directions, "forward" or "backward".

    stepwise: one launch per step is requested. The rest changes only the code. features: those of `specialization.POINTERS`
    that the call has. recompute: the backward takes pre-activations, not gates. long_offsets: a step's tensors have 2^31
    elements or more. single_step: T = 1. cell: its name.
    """

    way: str
    B: int
    H: int
    D: int
    dtype: torch.dtype
    precision: str
    stepwise: bool = False
    features: frozenset[str] = frozenset()
    recompute: bool = False
    long_offsets: bool = False
    single_step: bool = False
    cell: str = "lstm"

    @property
    def inner(self) -> int:
        """The inner dimension of a step's product."""
        return self.H if self.way == "forward" else 4 * self.H

    @property
    def columns(self) -> int:
        """Columns of the product for each unit."""
        return 4 if self.way == "forward" else 1

    @property
    def on_tensor_cores(self) -> bool:
        return uses_tensor_cores(self.dtype, self.precision)

    @property
    def only_in_band(self) -> bool:
        """Whether one launch of all steps needs W_hh in registers: CUDA cores do, and tf32x3, which splits W_hh in two."""
        return self.dtype == torch.float32 and self.precision != "tf32"


@dataclass(frozen=True)
class SequenceConfig(LaunchConfig):
    """The tile of one program of a sequence kernel, and how the launch runs.

    A program owns block_b rows x block_h units. The recurrent product takes its inner dimension (H forward, 4H backward) in
    chunks of split_k x block_k. There are `groups` groups (row blocks times directions) of `programs` programs. persistent:
    W_hh stays on chip and all steps run in one launch, in which the programs of a group exchange their state and load
    in_flight chunks of it at once; otherwise one launch computes one step. in_band: the exchange has no barrier (exchange.py),
    and W_hh stays in registers. launches: over how many launches, each of all steps, the groups are divided where their
    programs cannot all run at once.
    """

    block_b: int
    block_h: int
    split_k: int
    block_k: int
    in_flight: int
    programs: int
    groups: int
    persistent: bool
    in_band: bool = False
    launches: int = 1

    @functools.cached_property
    def constants(self) -> dict[str, Any]:
        tile = ("block_b", "block_h", "split_k", "block_k", "in_flight", "in_band")
        return {"RESIDENT": self.persistent} | {name.upper(): getattr(self, name) for name in tile}

    @property
    def groups_at_once(self) -> int:
        return cdiv(self.groups, self.launches)

    @property
    def waits(self) -> bool:  # whether programs wait for one another in a launch of several steps
        return self.persistent and self.programs > 1

    def chunks(self, inner: int) -> int:
        return cdiv(inner, self.split_k * self.block_k)

    def rounds(self, inner: int) -> int:
        """L2 round trips of a step for the exchanged state, for an inner dimension of this size."""
        return cdiv(self.chunks(inner), self.in_flight)


def exchanged_row(H: int, dtype: torch.dtype) -> int:
    """Return the units from a row of h to the next where programs exchange it: each row begins at a multiple of 16 bytes."""
    return H if H * dtype.itemsize % 16 == 0 else cdiv(H, 8) * 8


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
    """Return the most columns, of 128 lanes of float32, of a program: for sums [4 * block_h, block_b] of each chunk."""
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
    state, sums = (
        config.in_flight * config.block_b * depth * itemsize / 4,
        parts(problem, config) * config.block_b * columns,
    )
    weights = 0 if is_wide(problem, config, device) else depth * columns * itemsize / 4
    weights *= config.chunks(problem.inner) if config.in_band else 1
    weights *= (2 if problem.precision == "tf32x3" else 1) if problem.on_tensor_cores else 8
    return (state + sums + (2 * itemsize + 1) * tile + weights) / (32 * config.num_warps)


def readers_of_weights(problem: Problem, config: SequenceConfig, device: DeviceFigures) -> float:
    """Return how often a step reads W_hh from shared memory: more than once where it has too few rows for all warpgroups."""
    if device.tensor_memory or not is_wide(problem, config, device):
        return 1
    return max(config.num_warps / 4 * 64 / (problem.columns * config.block_h), 1)


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
    share = max(device.sms / launched, 1)  # SMs for each program
    wide = is_wide(problem, config, device)
    rate, latency = (device.wide_rate, device.wide_latency) if wide else (device.mma_rate, device.mma_latency)
    if not problem.on_tensor_cores:
        rate, latency = 2 * device.fma_rate, device.fma_latency  # rates count elements of two bytes
    products, chain = config.block_b * columns * row_bytes / 2 / rate, row_bytes / config.split_k / 32 * latency
    if problem.precision == "tf32x3":
        products, chain = 3 * products, 3 * chain
    chain += chunks * device.wide_end if wide else 0
    from_cache = config.block_b + (
        0 if config.persistent else columns
    )  # rows of the state, and W_hh if it is not on chip
    state = from_cache * row_bytes / min(device.l2_share * share, device.l2_most)
    # Ten special functions per unit; other arithmetic is taken to overlap them. A thread without a unit repeats another's, and
    # its loads and stores go through shared memory.
    tile, threads = config.block_b * config.block_h, 32 * config.num_warps
    gates = 10 * max(tile, threads) / device.special_functions + (device.scattered if tile < threads else 0)
    exchange = device.store if config.in_band else device.barrier
    latencies = (exchange if config.waits else 0) + config.rounds(problem.inner) * device.l2_latency
    if not config.persistent:
        latencies = device.l2_latency  # once, because the loads are pipelined
    readers = 0 if config.in_band else readers_of_weights(problem, config, device)
    weights = readers * columns * row_bytes / device.shared_bytes
    sums = 8 * parts(problem, config) * config.block_b * columns / device.shared_bytes
    step = latencies + state + max(weights, products, chain) + sums + gates
    total = step * cdiv(launched, device.sms) * config.launches  # programs that do not wait may queue for an SM
    return total + (0 if config.persistent else device.launch)
