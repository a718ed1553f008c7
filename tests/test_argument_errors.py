"""What calls say about arguments of a wrong kind, as torch would, before any kernel of torch's reads past their end."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from lstm_triton import GRU, LSTM, GRUCell, LSTMCell, SoftmaxReadout, explain, from_gate_matrices, functional

backends = pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
WEIGHTS = [torch.zeros(12, 2), torch.zeros(12, 3)]
FLAGS = [[True, False]] * 4


@backends
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "options",
    [{"resets": FLAGS}, {"resets": torch.tensor(FLAGS).numpy()}, {"lengths": 3}, {"lengths": [4, 2]}],
    ids=str,
)
def test_segments_that_are_no_tensors(options, batch_first, backend):
    module = LSTM(2, 3, batch_first=batch_first, backend=backend)
    for x in (torch.zeros(4, 4, 2), torch.zeros(4, 2)):
        with pytest.raises(TypeError, match="must be a tensor"):
            module(x, **options)


@backends
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64])
def test_lengths_may_be_unsigned(dtype, backend):
    module, x, lengths = LSTM(2, 3, backend=backend), torch.randn(4, 2, 2), torch.tensor([1, 4])
    assert torch.equal(module(x, lengths=lengths.to(dtype))[0], module(x, lengths=lengths)[0])
    with pytest.raises(ValueError, match="lengths must lie in 0 ... 4"):
        module(x, lengths=torch.tensor([1, 5]).to(dtype))


@backends
@pytest.mark.parametrize("hx", [{0: torch.zeros(1, 2, 3), 1: torch.zeros(1, 2, 3)}, (None, None)], ids=["dict", "none"])
def test_states_that_are_no_pair_of_tensors(hx, backend):
    x = torch.zeros(4, 2, 2)
    with pytest.raises(TypeError, match="hx must be a tuple of two Tensors"):
        functional.lstm(x, hx, WEIGHTS, backend=backend)
    # Of None torch.nn.LSTM asks the rank.
    with pytest.raises(TypeError if isinstance(hx, dict) else AttributeError):
        LSTM(2, 3, backend=backend)(x, hx)


@backends
def test_other_arguments_that_are_no_tensors(backend):
    x, states = torch.zeros(2, 2), (torch.zeros(2, 3), torch.zeros(2, 3))
    calls = [
        lambda: SoftmaxReadout(2, 3, backend=backend)(None),
        lambda: functional.lstm(x[None], None, [None, WEIGHTS[1]], backend=backend),
        lambda: functional.lstm_cell(x, states, None, WEIGHTS[1], backend=backend),
        lambda: functional.softmax_readout(None, WEIGHTS[0], backend=backend),
        lambda: functional.softmax_readout(x, None, backend=backend),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="Tensor"):
            call()


@backends
def test_weights_of_no_dimension(backend):
    with pytest.raises(RuntimeError, match="needs w_ih and w_hh"):
        functional.lstm(torch.zeros(4, 2, 2), None, [torch.tensor(1.0), WEIGHTS[1]], backend=backend)


@backends
@pytest.mark.parametrize("rows", [3, 5])
def test_packed_rows_that_do_not_fit(rows, backend):
    """torch's own kernels ignore what is too much."""
    packed = PackedSequence(torch.zeros(rows, 2), torch.tensor([2, 2]))
    for module in (LSTM(2, 3, backend=backend), LSTM(2, 3, proj_size=2, backend=backend), GRU(2, 3, backend=backend)):
        with pytest.raises(RuntimeError, match=f"has 4 rows, got {rows}"):
            module(packed)


@backends
@pytest.mark.parametrize(
    ("features", "state"), [(1, None), (7, None), (7, (1, 2, 3)), (2, (1, 2, 7)), (2, (1, 1, 3)), (2, (2, 3))], ids=str
)
def test_packed_sizes_that_do_not_fit(features, state, backend):
    """For which torch's own forward reads and writes past the end of tensors, or fails, or does not."""
    hx = None if state is None else (torch.zeros(state), torch.zeros(state))
    with pytest.raises(RuntimeError, match="must be equal to input_size|Expected hidden"):
        LSTM(2, 3, backend=backend)(PackedSequence(torch.zeros(4, features), torch.tensor([2, 2])), hx)


def test_gate_matrices_of_integers():
    W, b = torch.zeros(5, 3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(TypeError, match="floating-point"):
        from_gate_matrices(*[W, b] * 4)


def test_explain_no_rows():
    assert "with B = 0" in explain(LSTM(2, 3, backend="triton"), batch=0)


@backends
@pytest.mark.parametrize("H", [1, 2, 3])
def test_an_unbatched_input_with_states_of_a_batch(H, backend):
    """torch's kernel would read and write past their end."""
    cell = LSTMCell(3, H, backend=backend)
    for states in (torch.zeros(H, H), torch.zeros(1, H)):
        with pytest.raises(RuntimeError, match="hidden0"):
            cell(torch.zeros(3), (states, states))
        with pytest.raises(RuntimeError, match="hidden"):
            GRUCell(3, H, backend=backend)(torch.zeros(3), states)


@backends
@pytest.mark.parametrize("bias", [False, True])
def test_weights_without_memory(bias, backend):
    """torch's kernel would read whatever lies at address 0 and beyond."""
    x = torch.zeros(4, 2, 2)
    packed = pack_padded_sequence(x, [4, 2])
    inputs = {LSTMCell: [x[0]], GRUCell: [x[0]], SoftmaxReadout: [x], LSTM: [x, packed], GRU: [x, packed]}
    for kind, given in inputs.items():
        module = kind(2, 3, bias=bias, device="meta", backend=backend)
        for input in given:
            with pytest.raises(RuntimeError, match="device"):
                module(input)
    functional_call(module, dict(GRU(2, 3, bias=bias).named_parameters()), (packed,))  # nor are these looked at


@backends
@pytest.mark.parametrize("segments", [False, True])
def test_packed_under_another_default_device(segments, backend):
    module, x = LSTM(2, 3, backend=backend), pack_padded_sequence(torch.randn(4, 2, 2), [4, 2])
    options = {"return_cell_states": True, "resets": torch.tensor([[False, True]] * 4)} if segments else {}
    expected = module(x, **options)[0].data
    with torch.device("meta"):
        assert torch.equal(module(x, **options)[0].data, expected)


@backends
def test_lengths_that_the_host_cannot_read(backend):
    module = LSTM(
        2, 3, backend=backend, dtype=torch.float64
    )  # in float32 the kernels round as tf32, the reference does not
    x, lengths = torch.randn(4, 2, 2, dtype=torch.float64), torch.tensor([4, 2])
    expected = module(x, lengths=lengths)[0]

    def call(x, lengths):
        return module(x, lengths=lengths)[0]

    both = torch.func.vmap(call, in_dims=(None, 0))(x, torch.stack([lengths, lengths.flip(0)]))
    torch.testing.assert_close(both, torch.stack([expected, call(x, lengths.flip(0))]))
    torch.testing.assert_close(torch.func.linearize(lambda x: call(x, lengths), x)[0], expected)
    for p in module.parameters():
        p.requires_grad_(False)
    torch.testing.assert_close(make_fx(call)(x, lengths)(x, lengths), expected)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert call(mode.from_tensor(x), mode.from_tensor(lengths)).shape == (4, 2, 3)
