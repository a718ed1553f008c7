"""LSTM as a drop-in for torch.nn.LSTM, and Recurrent for others: results and gradients of a call, beside torch's own."""

import warnings
from functools import partial

import pytest
import torch
from support import segmented
from support.lstms import (
    BACKENDS,
    assert_close,
    backends,
    flat,
    gradients,
    pair,
    states,
    trained,
    twice_differentiated,
)
from test_cells import lstm as own_lstm
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from lstm_triton import LSTM, Recurrent
from lstm_triton.cells import catalogue

T, B, I, H = 4, 3, 2, 3
NO_STATES = {"change": None}
BIDIRECTIONAL, DEEP = {"bidirectional": True}, {"num_layers": 2, "bidirectional": True}
DEEP_BATCH_FIRST = DEEP | {"batch_first": True}
# Options of the module; and of the call, as `_call` takes them.
CALLS = {
    "one layer": ({}, {}),
    "no bias": ({"bias": False}, NO_STATES),
    "deep": (DEEP_BATCH_FIRST, {}),
    "without a batch": (DEEP, {"rows": None, **NO_STATES}),
    "packed": (DEEP, {"lengths": [2, 3, 1]}),
    "packed, batch first": (DEEP_BATCH_FIRST, {"lengths": [3, 2, 2], **NO_STATES}),
    "packed, sorted": ({}, {"lengths": [3, 2, 1], "is_sorted": True, **NO_STATES}),
    "no rows": (DEEP_BATCH_FIRST, {"rows": 0}),
}
OF_LSTM = CALLS | {
    "layers": ({"num_layers": 3}, NO_STATES),
    "bidirectional": (BIDIRECTIONAL, {}),
    "batch first": ({"batch_first": True}, NO_STATES),
    "projection": ({"proj_size": 2}, NO_STATES),
    "deep projection": (DEEP_BATCH_FIRST | {"proj_size": 1, "bias": False}, {}),
    "dropout after the last layer": (BIDIRECTIONAL | {"dropout": 0.9}, NO_STATES),
    "dropout of everything": (DEEP | {"dropout": 1.0}, {}),
    "without a batch, projection": (DEEP_BATCH_FIRST | {"proj_size": 2}, {"rows": None}),
    "strided": (BIDIRECTIONAL, {"layout": lambda x: x.repeat(1, 2, 2)[:, ::2, ::2]}),
    "time of a batch-first tensor": (
        BIDIRECTIONAL,
        {"layout": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)},
    ),
    "expanded": (BIDIRECTIONAL, {"layout": lambda x: x[:, :1].expand(T, B, I)}),
    "packed, projection": (DEEP | {"proj_size": 2}, {"lengths": [1, 3, 2]}),
    "a list of states": ({"num_layers": 2}, {"change": lambda h, c: [h, c]}),
    "unbound states": ({"num_layers": 2}, {"change": lambda h, c: torch.stack((h, c)).unbind()}),
    "states of one row": ({}, {"change": lambda h, c: (h[:, :1].expand(1, B, H), c[:, :1].expand(1, B, H))}),
    "states of other strides": (
        {"num_layers": 2},
        {"change": lambda h, c: (h.mT.contiguous().mT, c.transpose(0, 1).contiguous().transpose(0, 1))},
    ),
}
KINDS = {
    "LSTM": (torch.nn.LSTM, LSTM),
    "own LSTM": (torch.nn.LSTM, partial(Recurrent, own_lstm)),
    "GRU": (torch.nn.GRU, partial(Recurrent, catalogue.gru)),
    "tanh": (torch.nn.RNN, partial(Recurrent, catalogue.rnn_tanh)),
    "relu": (partial(torch.nn.RNN, nonlinearity="relu"), partial(Recurrent, catalogue.rnn_relu)),
}
ROWS = [("LSTM", name, backend) for name in OF_LSTM for backend in BACKENDS]
AXES = {"kind": [*KINDS][1:], "name": [*CALLS], "backend": BACKENDS}
ROWS += [tuple(row.values()) for row in segmented.pairwise(AXES)]


def _call(module, rows=B, lengths=None, is_sorted=False, layout=lambda x: x, change=lambda *hx: hx):
    """x, hx and leaves of a call of the module with T steps."""
    weight = module.weight_hh_l0
    x = torch.randn(T, 1 if rows is None else rows, I, dtype=weight.dtype, device=weight.device)
    x = x[:, 0] if rows is None else x.transpose(0, 1).contiguous() if module.batch_first else x
    x = layout(x).requires_grad_()
    hx = states(module, rows, requires_grad=True)[: 2 if module.mode == "LSTM" else 1]
    leaves = (x, *hx) if change else (x,)
    hx = change(*hx) if change else None
    hx = hx[0] if hx and module.mode != "LSTM" else hx
    given = x if lengths is None else pack_padded_sequence(x, torch.tensor(lengths), module.batch_first, is_sorted)
    return given, hx, leaves


@pytest.mark.parametrize("kind, name, backend", ROWS)
def test_calls_are_torchs(kind, name, backend, device):
    """Everything about a PackedSequence is in the caller's order of rows but the data, whose order is torch's."""
    options, call = OF_LSTM[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of dropout that does nothing
        theirs, ours = pair(I, H, **options, kinds=KINDS[kind], backend=backend, device=device)
    x, hx, leaves = _call(theirs, **call)
    # torch's own kernels where cuDNN's zeros of dropout are others, or it takes no batch without rows.
    with torch.backends.cudnn.flags(enabled=options.get("dropout") != 1 and call.get("rows") != 0):
        expected, result = theirs(x, hx), ours(x, hx)
        found, wanted = (
            [*flat(of), *gradients(flat(of), [*leaves, *module.parameters()])]
            for of, module in ((result, ours), (expected, theirs))
        )
    assert_close(found, wanted)
    assert type(result) is tuple and type(result[1]) is type(expected[1]) and type(result[0]) is type(expected[0])
    if isinstance(x, PackedSequence):
        for found, wanted in zip(result[0][1:], expected[0][1:]):
            assert found is wanted is None or torch.equal(found, wanted)


# ---- training ----------------------------------------------------------------------------------------------------------


def test_second_derivatives_through_layers_and_projections_are_torchs(device):
    theirs, ours = pair(1, 2, num_layers=2, bidirectional=True, proj_size=1, backend="triton", device=device)
    x = torch.randn(2, 2, 1, dtype=torch.float64, device=device, requires_grad=True)
    h, c = states(ours, 2, requires_grad=True)
    with torch.backends.cudnn.flags(enabled=False):  # it has no second derivatives
        assert_close(*(twice_differentiated(module, x, (h, c)) for module in (theirs, ours)))


@backends
def test_parameters_are_read_on_every_call(backend, device):
    """Whether they were changed, replaced, or are computed from others."""
    theirs, ours = pair(I, H, 2, backend=backend, device=device)
    x = torch.randn(T, B, I, dtype=torch.float64, device=device, requires_grad=True)
    for module in (theirs, ours):
        module(x)
        with torch.no_grad():
            module.weight_hh_l1.mul_(2)
        module.bias_ih_l0 = torch.nn.Parameter(torch.full_like(module.bias_ih_l0, 0.5))
    assert_close(trained(ours, x), trained(theirs, x))
    for module in (theirs, ours):
        torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    expected = trained(theirs, x, None, (x,))
    assert_close(trained(ours, x, None, (x,)), expected)
    assert expected[-1].abs().sum() > 0


# ---- memory ------------------------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("cells", [False, True])
def test_chunks_with_carried_states_are_the_whole(cells, num_layers, backend, device):
    """Clients clear rows of h_n and c_n in place between calls, and go backward later: as resets within one call."""
    lstm = LSTM(I, H, num_layers, dtype=torch.float64, device=device, backend=backend, precision="ieee")
    x = torch.randn(5, B, I, dtype=torch.float64, device=device, requires_grad=True)
    carried = hx = states(lstm, B, requires_grad=True)
    resets = torch.zeros(5, B, dtype=torch.bool, device=device)
    resets[1, 0] = resets[2, 1] = True
    whole = trained(lstm, x, hx, (x, *hx), resets=resets, return_cell_states=cells)
    parts = []
    for start, stop in ((0, 1), (1, 2), (2, 5)):
        given = x[start:stop].clone()
        for state in carried if start else ():
            state[:, resets[start]] = 0
        results = flat(lstm(given, carried, return_cell_states=cells))
        assert len({t.untyped_storage().data_ptr() for t in (given, *results)}) == 1 + len(results)
        y, *carried = results[:3]
        parts.append((y, *results[3:]))
        assert_close([part[-1] for part in parts[-1]], [s[-1] for s in carried][: len(parts[-1])])
    y, *cell_states = map(torch.cat, zip(*parts))
    found = [y, *carried, *cell_states]
    assert_close([*(t.detach() for t in found), *gradients(found, [x, *hx, *lstm.parameters()])], whole)
