"""What users write with torch alone for resets, lengths and cell states: one layer in one direction, with its final states."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lstm_triton.reference import lstm_step

from .cases import require
from .problem import Model, Problem, Provider, State, Unavailable, by_steps, load, torch_lstm


def _model(way: Callable[..., tuple[Tensor, State]], problem: Problem) -> Model:
    case, resets, lengths = problem.case, problem.resets is not None, problem.lengths is not None
    kind = case.form, case.cell, case.layers, case.directions, case.proj_size
    serves = {split: resets or lengths, packed: resets and not lengths, loop: True}
    rules = {
        "written for one layer of an LSTM in one direction": kind == ("layer", "lstm", 1, 1, 0)
        and case.rows != "packed",
        "calls are split at resets and lengths, and packed by resets of full batch rows": serves[way],
    }
    require(rules, Unavailable)
    lstm = torch_lstm(case, problem.device, problem.x.dtype)
    return Model(functools.partial(way, lstm, problem), load(lstm, problem))


def split(lstm: Any, problem: Problem, x: Tensor, state: State) -> tuple[Tensor, State]:
    """One call of torch.nn.LSTM from each step at which a batch row starts anew or ends to the next."""
    cuts, (h, c), resets, lengths = {0, len(x)}, state, problem.resets, problem.lengths
    if resets is not None:
        cuts |= set(resets.any(1).nonzero()[:, 0].tolist())
    if lengths is not None:
        cuts |= set(lengths.tolist())
    steps, ys, ended = sorted(cuts), [], []
    for start, stop in zip(steps, steps[1:]):
        if lengths is not None:  # longest first
            n = int((lengths > start).sum())
            ended.append((h[:, n:], c[:, n:]))
            h, c = h[:, :n].contiguous(), c[:, :n].contiguous()
        if resets is not None:
            keep = ~resets[start, : h.shape[1], None]
            h, c = h * keep, c * keep
        y, (h, c) = lstm(x[start:stop, : h.shape[1]], (h, c))
        ys.append(nn.functional.pad(y, (0, 0, 0, x.shape[1] - y.shape[1])))
    h, c = (torch.cat(states[::-1], 1) for states in zip(*ended, (h, c)))
    return torch.cat(ys), (h, c)


def packed(lstm: Any, problem: Problem, x: Tensor, state: State) -> tuple[Tensor, State]:
    """Every segment a row of one packed call."""
    (T, B, I), starts = x.shape, problem.resets.clone()  # type: ignore[union-attr]
    starts[0] = True
    row, start = starts.t().nonzero().unbind(1)
    stop = torch.where(row.roll(-1) == row, start.roll(-1), T)
    stop[-1] = T
    length, order = (stop - start).sort(descending=True)
    row, start, stop = row[order], start[order], stop[order]
    step = torch.arange(int(length[0]), device=x.device)[:, None]
    active = step < length
    at = ((start + step) * B + row)[active]
    first = (start == 0) & ~problem.resets[0, row]  # type: ignore[index]
    h, c = (s[:, row] * first[:, None] for s in state)
    y, last = lstm(nn.utils.rnn.PackedSequence(x.reshape(T * B, I)[at], active.sum(1).cpu()), (h, c))
    ends = (stop == T).nonzero()[:, 0]
    ends = ends[row[ends].argsort()]
    h, c = (s[:, ends] for s in last)
    return y.data.new_zeros(T * B, y.data.shape[1]).index_copy(0, at, y.data).view(T, B, -1), (h, c)


def loop(lstm: Any, problem: Problem, x: Tensor, state: State) -> tuple[Tensor, State]:
    """One product for the inputs of all steps, and a loop that keeps h and c of each."""
    (w_ih, w_hh, b_ih, b_hh), cells = lstm._flat_weights, []

    def step(z: Tensor, state: State) -> State:
        z_i, z_f, z_g, z_o = torch.addmm(z, state[0], w_hh.t()).chunk(4, 1)
        h, c = lstm_step(z_i, z_f, z_g, z_o, state[1])
        cells.append(c)
        return h, c

    z = nn.functional.linear(x, w_ih, b_ih + b_hh)
    y, state = by_steps(step, problem.resets, z, state, problem.ends)
    if problem.case.cell_states:
        torch.stack(cells)
    return y, state


PROVIDERS: dict[str, Provider] = {
    f"torch by hand: {way.__name__}": functools.partial(_model, way) for way in (split, packed, loop)
}
