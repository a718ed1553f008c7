"""torch.nn.LSTM and LSTM side by side."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lstm_triton import LSTM

BACKENDS = ["auto", "triton", "reference"]
backends = pytest.mark.parametrize("backend", BACKENDS)


def pair(
    *args, backend: str = "auto", dtype: torch.dtype = torch.float64, kinds=(torch.nn.LSTM, LSTM), **kwargs
) -> tuple[torch.nn.RNNBase, torch.nn.RNNBase]:
    """torch's LSTM and ours, with the same parameters. In float64, so that comparing them needs no tolerance to speak of."""
    theirs = kinds[0](*args, dtype=dtype, **kwargs)
    ours = kinds[1](*args, dtype=dtype, backend=backend, precision="ieee", **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def states(module: torch.nn.RNNBase, B: int | None, **options) -> tuple[Tensor, Tensor]:
    """A random hx for B rows, or for an unbatched call."""
    rows = module.num_layers * (2 if module.bidirectional else 1)
    batch = () if B is None else (B,)
    weight = module.weight_ih_l0
    h, c = (
        torch.randn(rows, *batch, size, dtype=weight.dtype, device=weight.device, **options)
        for size in (module.proj_size or module.hidden_size, module.hidden_size)
    )
    return h, c


def flat(result) -> list[Tensor]:
    """output, h_n, c_n (or the one state of a GRU) and, if there are any, cell states; of a PackedSequence its data."""
    output, states, *cells = result
    states = states if isinstance(states, tuple) else (states,)
    return [t.data if isinstance(t, PackedSequence) else t for t in (output, *states, *cells)]


def gradients(results: list[Tensor], leaves, seed: int = 0) -> list[Tensor]:
    """Of the leaves (zeros where there is none), for the same random cotangents on each call."""
    generator = torch.Generator().manual_seed(seed)
    cotangents = [
        torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype).to(t.device) for t in results
    ]
    return list(
        torch.autograd.grad(
            results, list(leaves), cotangents, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    )


def trained(module: torch.nn.RNNBase, input, hx=None, leaves=(), **options) -> list[Tensor]:
    """Results of a call, then the gradients of leaves and parameters."""
    results = flat(module(input, hx, **options))
    return [t.detach() for t in results] + gradients(results, [*leaves, *module.parameters()])


def twice_differentiated(module: torch.nn.RNNBase, x: Tensor, hx, **options) -> list[Tensor]:
    """First and second gradients of a call's inputs and parameters."""
    leaves = [x, *hx, *module.parameters()]
    first = torch.autograd.grad([t.pow(2).sum() for t in flat(module(x, hx, **options))], leaves, create_graph=True)
    return [*(g.detach() for g in first), *gradients([sum(g.pow(2).sum() for g in first)], leaves)]


def assert_close(found, expected) -> None:
    """Equal up to another order of the same sums, in the float64 of `pair`."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
