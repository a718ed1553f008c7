"""torch.jit.trace and torch.export: what was recorded with some numbers of steps and rows holds for others."""

import warnings

import pytest
import torch
from support import segmented
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close

from lstm_triton import LSTM

I, H = 3, 5
RECORDED, OTHERS = (4, 2), [(5, 3), (3, 1)]  # (T, B)

pytestmark = pytest.mark.long

BACKENDS = ["auto", "triton", "reference"]
OPTIONS = {
    "one layer": {},
    "stacked": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "projected": {"proj_size": 2, "bidirectional": True},
}


class _Calls(torch.nn.Module):
    def __init__(self, backend, device, **options):
        super().__init__()
        self.lstm = LSTM(I, H, **options, device=device, backend=backend, precision="ieee")

    def _ordered(self, x):
        return x.transpose(0, 1) if self.lstm.batch_first else x

    def inputs(self, T, B, device):
        return (self._ordered(torch.randn(T, B, I, device=device)),)

    def forward(self, x):
        y, (h, c) = self.lstm(x)
        return y, h, c


class _Packed(_Calls):
    def inputs(self, T, B, device):
        return *super().inputs(T, B, device), torch.arange(T, T - B, -1).clamp(min=1)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=self.lstm.batch_first)
        y, (h, c) = self.lstm(packed)
        return pad_packed_sequence(y, batch_first=self.lstm.batch_first)[0], h, c


class _PackedResets(_Packed):
    def inputs(self, T, B, device):
        return *super().inputs(T, B, device), self._ordered(torch.rand(T, B, device=device) < 0.4)

    def forward(self, x, lengths, resets):
        packed = pack_padded_sequence(x, lengths, batch_first=self.lstm.batch_first, enforce_sorted=False)
        y, (h, c), cells = self.lstm(packed, resets=resets, return_cell_states=True)
        return y.data, h, c, cells.data


class _Lengths(_Calls):
    def inputs(self, T, B, device):
        return *super().inputs(T, B, device), torch.arange(T, T - B, -1, device=device).clamp(min=0)

    def forward(self, x, lengths):
        y, (h, c) = self.lstm(x, lengths=lengths)
        return y, h, c


class _Resets(_Calls):
    def inputs(self, T, B, device):
        resets = self._ordered(torch.rand(T, B, device=device) < 0.4)
        rows = self.lstm.num_layers * (2 if self.lstm.bidirectional else 1)
        states = (torch.randn(rows, B, n, device=device) for n in (self.lstm.proj_size or H, H))
        return *super().inputs(T, B, device), resets, *states

    def forward(self, x, resets, h, c):
        y, (h, c), cells = self.lstm(x, (h, c), resets=resets, reset_state=(h, c), return_cell_states=True)
        return y, h, c, cells


class _Unbatched(_Calls):
    def inputs(self, T, B, device):
        return (torch.randn(T, I, device=device),)


def every_pair(*calls):
    """Of calls, options and backends."""
    rows = segmented.pairwise({"calls": calls, "options": OPTIONS, "backend": BACKENDS})
    return pytest.mark.parametrize("calls, options, backend", [tuple(row.values()) for row in rows])


options_and_backends = pytest.mark.parametrize(
    "options, backend",
    [("stacked", "triton"), ("projected", "triton"), ("stacked", "auto"), ("projected", "reference")],
)


def _traced(module, inputs):
    return torch.jit.trace(module, inputs, check_trace=False)  # its check warns at most; the tests compare


@pytest.fixture(autouse=True)
def tracing_warns_much():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@every_pair(_Calls, _Packed, _PackedResets, _Lengths, _Resets, _Unbatched)
def test_a_trace_holds_for_other_sizes(calls, options, backend, device):
    module = calls(backend, device, **OPTIONS[options]).eval()
    traced = _traced(module, module.inputs(*RECORDED, device))
    for T, B in OTHERS:
        inputs = module.inputs(T, B, device)
        assert_close(traced(*inputs), module(*inputs))


@options_and_backends
def test_a_trace_can_be_differentiated_twice(options, backend, device):
    """Where torch's own kernels are not what was traced."""
    module = _Lengths(backend, device, **OPTIONS[options]).double()
    traced = _traced(module, [t.double() if t.is_floating_point() else t for t in module.inputs(*RECORDED, device)])
    x, lengths = module.inputs(3, 3, device)
    x = x.double().requires_grad_()
    results = []
    for candidate in (traced, module):
        y, h, _ = candidate(x, lengths)
        (first,) = torch.autograd.grad(y.pow(2).sum() + h.pow(2).sum(), x, create_graph=True)
        results.append((first, *torch.autograd.grad(first.pow(2).sum(), list(module.parameters()))))
    assert_close(*results)


@options_and_backends
def test_a_trace_can_be_trained(options, backend, device):
    module = _Lengths(backend, device, **OPTIONS[options])
    traced = _traced(module, module.inputs(*RECORDED, device))
    inputs = module.inputs(5, 3, device)
    parameters = list(module.parameters())
    results = []
    for candidate in (traced, module):
        y, h, c = candidate(*inputs)
        results.append(torch.autograd.grad(y.pow(2).sum() + h.sum() + c.sum(), parameters))
    assert_close(*results)


@every_pair(_Calls, _Lengths, _Resets)
def test_an_exported_program_holds_for_other_sizes(calls, options, backend, device):
    module = calls(backend, device, **OPTIONS[options]).eval()
    steps, rows = torch.export.Dim("steps", min=2, max=64), torch.export.Dim("rows", min=2, max=64)
    dims = (steps, rows)
    x, *rest = example = module.inputs(6, 7, device)
    ordered = dims[::-1] if module.lstm.batch_first else dims
    shapes = [{0: ordered[0], 1: ordered[1]}]
    for t in rest:  # resets, lengths, states
        shapes.append(shapes[0] if t.dtype == torch.bool else {0: rows} if t.dim() == 1 else {1: rows})
    program = torch.export.export(module, example, dynamic_shapes=tuple(shapes)).module()
    for T, B in ((4, 8), (7, 2)):
        inputs = module.inputs(T, B, device)
        assert_close(program(*inputs), module(*inputs))
