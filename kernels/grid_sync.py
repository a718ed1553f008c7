"""The barrier between the programs of one launch, and why it is correct.

A barrier group is P programs that own the P slices of the hidden units for one block of batch rows in one direction. In every
step each program reads the h (forward) or dz (backward) that all P have stored in the step before. Each group has a counter of
arrivals:

    program A: store its slice   ->  arrive: CTA barrier; atomic add, release, gpu scope
    program B: wait: read, acquire, gpu scope, until the count is reached; CTA barrier  ->  load A's slice

Why B sees A's slice (PTX memory model, four links in this order):
1. Each thread of A stores, then passes the CTA barrier: the stores happen before the arrival, which one thread makes.
   `tl.debug_barrier()` is that barrier; Triton does not promise one before a release, and without it only the arriving thread's
   own stores would be ordered.
2. That thread's release at gpu scope is cumulative: it covers what the barrier ordered before it, not only its own stores.
3. B's acquire reads a value that A's release, or a later arrival in the same chain of atomics (a release sequence), wrote. So
   A's release synchronizes with B's acquire. The loop condition uses the value; otherwise the compiler may drop the acquire.
4. The CTA barrier after the wait orders the polling thread's acquire before the loads of all of B's threads.

Why it ends: the count only grows. Step s waits for s * P arrivals, which needs every program of the group to have finished step
s - 1 and nothing else, so by induction over s all arrive, provided all P run at the same time. The launch is cooperative: the
driver refuses a grid whose programs cannot all be resident. Kernels that are running already are assumed to end; until then the
programs that have started wait for the others. Groups never wait for one another.

On sm_100 a resident program may still block: tcgen05.alloc waits while other programs on its SM hold the columns of tensor
memory that it needs, and they release them only when they end. Neither occupancy nor a cooperative launch counts these
columns. Therefore the columns of a program, times the programs of its launch that may share an SM, are at most the 512 that an
SM has (`sequence_cost`), so no program blocks on one that waits for it. Other kernels on the SM are assumed to end, as above.

Why nothing is overwritten too early: h_t and dz_t have an address of their own for every t, which is never reused. Where two
slices of dz_t overlap, both programs store the same bits before they arrive, and a reader waits for both.

The counters are zero at the start of a launch and again at its end: the last arrival, for which no program waits, sets its
counter back to zero. Launches of one stream never overlap and therefore share counters. A CUDA graph has its own, as it may be
replayed in any stream. Counters lie 128 bytes apart, one L2 line each.
"""

import torch
import triton
import triton.language as tl

COUNTER_STRIDE = tl.constexpr(32)  # int32 elements between counters: 128 bytes


# A wait times out after this many polls: a program of the group is not running, perhaps because another kernel keeps its SM.
# Communication may wait long for another process (`device.FREE_MULTIPROCESSORS` leaves room for it). A poll is assumed to take
# about a microsecond (not measured), and all of them some fifteen seconds.
@triton.constexpr_function
def max_polls():
    return 1 << 24


@triton.jit
def arrive(counter_ptr, last):
    """Publish all that this program has stored, and count one arrival. The arrival after `last` others sets the count to 0."""
    tl.debug_barrier()
    # A reduction (red) returns no value that the next step would have to wait for.
    tl.inline_asm_elementwise(
        "{ .reg .pred first; .reg .b32 thread; mov.u32 thread, %tid.x; setp.eq.u32 first, thread, 0;"
        " @first red.release.gpu.global.inc.u32 [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r",
        [counter_ptr.to(tl.int64), last],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def wait(counter_ptr, target, stall_ptr):
    """Wait until `target` arrivals are counted; what they published may be loaded afterwards.

    A wait that times out writes the number of polls to stall_ptr, a word of host memory, and ends the kernel with a trap.
    """
    # Triton has no load with acquire semantics but an atomic add of 0, which it compiles to one.
    arrived = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    polls = 0
    while arrived < target:
        arrived = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
        polls += 1
        if polls == max_polls():
            # The function call in tl.device_assert would serialize every wgmma of the kernel, even if it is never made.
            tl.inline_asm_elementwise(
                "st.volatile.u32 [$2], $1; membar.sys; trap; mov.u32 $0, $1;",
                "=r,r,l",
                [polls, stall_ptr.to(tl.int64)],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
    tl.debug_barrier()


# By device and stream, not by launch: each launch would need another to fill them with zeros.
_counters: dict[tuple[torch.device, int], torch.Tensor] = {}


def counters(groups: int, on: torch.device) -> torch.Tensor:
    """Return zeros [>= groups * COUNTER_STRIDE] int32, for a launch on this device's current stream."""
    size, stream = groups * COUNTER_STRIDE.value, 0
    if on.type == "cuda":
        # torch tells only for the current device whether its stream is being captured.
        if on.index != torch.cuda.current_device() or torch.cuda.is_current_stream_capturing():
            return torch.zeros(size, dtype=torch.int32, device=on)
        stream = torch._C._cuda_getCurrentRawStream(on.index)
    found = _counters.get((on, stream))
    if found is None or found.numel() < size:
        found = _counters[on, stream] = torch.zeros(size, dtype=torch.int32, device=on)
    return found


def forget_counters() -> None:
    """Forget all counters, after a launch that failed and may have left any values in them."""
    _counters.clear()
