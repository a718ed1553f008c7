"""Launch configurations of the sequence kernels, and the problem that each is for. `search` finds one."""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .config import LaunchConfig, cdiv, uses_tensor_cores


class Problem(NamedTuple):
    """All that a configuration depends on besides the device. way: "forward" or "backward". B rows, H units, D directions.

    stepwise: one launch per step is requested. The rest changes only the code. features: those of `specialization.POINTERS`
    that the call has. recompute: the backward takes pre-activations, not gates. long_offsets: a step's tensors have 2^31
    elements or more. cell: its name.
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
    cell: str = "lstm"

    @property
    def inner(self) -> int:
        """The inner dimension of a step's product."""
        return self.H if self.way == "forward" else 4 * self.H

    @property
    def columns(self) -> int:
        """Return the columns of the product for each unit."""
        return 4 if self.way == "forward" else 1

    @property
    def on_tensor_cores(self) -> bool:
        return uses_tensor_cores(self.dtype, self.precision)

    @property
    def only_in_band(self) -> bool:
        """Tell whether programs of one launch need W_hh in registers: CUDA cores do, and tf32x3, which splits W_hh in two."""
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
        """Return the L2 round trips of a step for the exchanged state, for an inner dimension of this size."""
        return cdiv(self.chunks(inner), self.in_flight)


def exchanged_row(H: int, dtype: torch.dtype) -> int:
    """Return the length of a row of h where programs exchange it: each row begins at a multiple of 16 bytes."""
    units = 16 // dtype.itemsize
    return cdiv(H, units) * units
