"""`LSTM`, a replacement for torch.nn.LSTM with resets, lengths, cell states and recomputation."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence

from . import casting, dispatch, layers, measurements, segments, shapes, torch_ops
from .kernels.inputs import LayerOptions, split_weights
from .modes import is_jit_tracing
from .modules import check_options, is_proxy, leaf, options_repr, scripted_as, scripted_lstm
from .shapes import cell_of

# torch's own forward, taken before `hooks` may replace it.
_torchs_forward = torch.nn.LSTM.forward


@scripted_as(scripted_lstm)
def forward(
    module,
    input: Tensor | PackedSequence,
    hx: tuple[Tensor, Tensor] | None = None,
    *,
    resets: Tensor | None = None,
    reset_state: tuple[Tensor, Tensor] | None = None,
    lengths: Tensor | None = None,
    return_cell_states: bool = False,
):
    """Run `LSTM.forward` for a torch.nn.RNNBase of mode "LSTM" that has the options: `LSTM` or a converted torch.nn.LSTM."""
    if is_proxy(input):
        options = dict(resets=resets, reset_state=reset_state, lengths=lengths, return_cell_states=return_cell_states)
        return leaf(module, input, hx, **options)
    if isinstance(input, PackedSequence):
        segments.check_packed(module, input)
    plain = resets is None and reset_state is None and lengths is None and not return_cell_states
    if plain and _is_torchs(module, input):
        if isinstance(input, PackedSequence) and hx is not None:
            _check_states(module, input, hx)
        y, hidden = _torchs_forward(module, input, hx)
        torch_ops.separate_bias_gradients(hidden[0])
        return y, hidden
    # Weights may have been replaced since the last call: functional_call, parametrizations, a move to another device.
    module._update_flat_weights()
    layers.check_device(module._flat_weights[0].device)
    if isinstance(input, PackedSequence):
        return _forward_packed(module, input, hx, resets, reset_state, lengths, return_cell_states)
    if input.dim() not in (2, 3):
        raise ValueError(f"{module.mode}: Expected input to be 2D or 3D, got {input.dim()}D instead")
    if input.dim() == 2:
        return _forward_unbatched(module, input, hx, resets, reset_state, lengths, return_cell_states)
    x, hx, resets = _time_major(module, input, hx, resets)
    y, hidden, *cells = _run(module, x, hx, resets, reset_state, lengths, return_cell_states)
    if module.batch_first:
        y, cells = y.transpose(0, 1), [c.transpose(0, 1) for c in cells]
    return y, hidden, *cells


def _is_torchs(module, input) -> bool:
    """Return whether torch's own forward, with its checks, runs this plain call: on a CPU with "auto", outside of compilers,
    traces and transforms. This takes little Python, because torch's kernel may take as little time."""
    x = input.data if isinstance(input, PackedSequence) else input
    # A named backend may be impossible; that error comes after those for wrong arguments.
    if not isinstance(x, Tensor) or not x.is_cpu or module.backend != "auto":
        return False
    if cell_of(module) is not None or torch.compiler.is_compiling() or is_jit_tracing():
        return False
    if x is input and not module.proj_size and _is_autocast_to_float16():
        return False  # oneDNN has float16 on few CPUs only
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    return not measurements.rows(x.device)


def _is_autocast_to_float16() -> bool:
    return casting.is_autocast("cpu") and torch.get_autocast_dtype("cpu") == torch.float16


def _time_major(module, input, hx, resets):
    """Return input, states and resets, checked as by torch; with batch_first as views, whose strides the kernels take."""
    if hx is None:
        module.check_input(input, None)
        hx = shapes.zero_state(module, input, input.shape[0 if module.batch_first else 1])
    else:
        _check_ranks(hx, 3, "batched")
        module.check_forward_args(input, hx, None)
        layers.check_pair(hx)
    if module.batch_first:
        input = input.transpose(0, 1)
        resets = resets.transpose(0, 1) if isinstance(resets, Tensor) and resets.dim() == 2 else resets
    return input, hx, resets


def _check_ranks(hx, n: int, kind: str) -> None:
    if hx[0].dim() != n or hx[1].dim() != n:
        ranks = f"({hx[0].dim()}-D, {hx[1].dim()}-D)"
        raise RuntimeError(f"For {kind} {n}-D input, hx and cx should also be {n}-D but got {ranks} tensors")


def _forward_unbatched(module, input, hx, resets, reset_state, lengths, return_cell_states):
    """Run an input without a batch dimension. resets: [T]; lengths: []; reset_state: broadcast as for a batch of one."""
    if hx is not None:
        _check_ranks(hx, 2, "unbatched")
        hx = (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
    batch_dim = 0 if module.batch_first else 1
    resets = resets.unsqueeze(batch_dim) if isinstance(resets, Tensor) and resets.dim() == 1 else resets
    lengths = lengths.unsqueeze(0) if isinstance(lengths, Tensor) and lengths.dim() == 0 else lengths
    x, hx, resets = _time_major(module, input.unsqueeze(batch_dim), hx, resets)
    y, (h, c), *cells = _run(module, x, hx, resets, reset_state, lengths, return_cell_states)
    return y.squeeze(1), (h.squeeze(1), c.squeeze(1)), *(c.squeeze(1) for c in cells)


def _forward_packed(module, packed, hx, resets, reset_state, lengths, return_cell_states):
    """Run a PackedSequence. resets [T, B] ([B, T] with batch_first), reset_state and hx are in the caller's order of rows."""
    data, batch_sizes, sorted_indices, unsorted_indices = packed
    if lengths is not None:
        raise ValueError("LSTM: a PackedSequence has lengths of its own, got lengths too")
    # torch.jit.trace records these two operations, so that the trace holds for any number of steps and batch rows.
    T, B = batch_sizes.shape[0], batch_sizes[0] if is_jit_tracing() else int(batch_sizes[0])
    hx = shapes.zero_state(module, data, B) if hx is None else module.permute_hidden(hx, sorted_indices)
    layers.check_pair(hx)
    weight = module._flat_weights[0]
    if data.dtype != weight.dtype and not torch._C._is_any_autocast_enabled():
        # torch does not check this for packed input, and would fail with another error than for padded input.
        casting.check_alike("PackedSequence", data, [("weights", weight)])
    module.check_forward_args(data, hx, batch_sizes)
    features = ",".join(filter(None, (shapes.features(resets, reset_state, None, return_cell_states), "packed")))
    chosen = _choose(module, data, features, T, B)
    if chosen == "torch" and torch._C._are_functorch_transforms_active():
        chosen = "reference"
    if chosen == "cudnn" or (chosen == "torch" and features == "packed" and cell_of(module) is None):
        weights = module._flat_weights
        if chosen == "cudnn":
            data, hx, _, weights = layers.autocast(data, hx, None, weights)
        # On a CPU torch's autocast has no rule for packed input. On a GPU it would cast bfloat16 to float16.
        with casting.without_autocast("cuda"):
            y, *hidden = torch_ops.packed_lstm(data, batch_sizes, hx, weights, torch_ops.options_of(module))
    else:
        if module.batch_first and isinstance(resets, Tensor) and resets.dim() == 2:
            resets = resets.transpose(0, 1)
        segments.check_resets(resets, reset_state, T, B)
        if resets is not None and sorted_indices is not None:
            resets = segments.sent(resets, data.device).index_select(1, sorted_indices)
        if reset_state is not None and sorted_indices is not None:
            reset_state = tuple(
                s.index_select(-2, sorted_indices) if s.dim() > 1 and s.shape[-2] == B else s for s in reset_state
            )
        # Batch row b has as many steps as batch_sizes has entries above b. The host knows these without waiting for the GPU.
        lengths = segments.sent((batch_sizes[None, :] > segments.range_of(B)[:, None]).sum(1), data.device)
        at = segments.sent(segments.packed_rows(batch_sizes, B), data.device)
        x = data.new_zeros(T * B, data.shape[1]).index_copy(0, at, data).view(T, B, data.shape[1])
        y, hidden, *cells = _run(module, x, hx, resets, reset_state, lengths, return_cell_states, chosen)
        y, *cells = (t.flatten(0, 1).index_select(0, at) for t in (y, *cells))
        if return_cell_states:
            packed_cells = PackedSequence(cells[0], batch_sizes, sorted_indices, unsorted_indices)
    packed_y = PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices)
    hidden = module.permute_hidden(tuple(hidden), unsorted_indices)
    return (packed_y, hidden, packed_cells) if return_cell_states else (packed_y, hidden)


def _check_states(module, packed: PackedSequence, hx) -> None:
    """Check the states of packed input as torch checks those of padded input; its kernel could read past their end."""
    hx = module.permute_hidden(hx, packed.sorted_indices)
    layers.check_pair(hx)
    for k, size_of in enumerate((module.get_expected_hidden_size, module.get_expected_cell_size)):
        size = size_of(packed.data, packed.batch_sizes)
        module.check_hidden_size(hx[k], size, f"Expected hidden[{k}] size {{}}, got {{}}")


def _choose(module, x: Tensor, features: str, T: int, B: int) -> str:
    is_lstm = cell_of(module) is None
    measured = measurements.for_call(module.backend, lambda: shapes.of_module(module, x, features, B), T, x.device)
    plain = is_lstm and features in ("", "packed") and not (module.recompute and x.is_cuda)
    call = plain, dispatch.is_long(T, x.device), module.precision, module.proj_size > 0, measured
    return dispatch.layer_backend(module.backend, x.device, x.dtype, *call)


def _run(module, x, hx, resets, reset_state, lengths, return_cell_states, chosen=None):
    """Run all layers on x [T, B, I]. Returns y [T, B, D * H], (h_n, c_n) and with return_cell_states c of the last layer.

    chosen: the backend, or None to choose it here.
    """
    cell = cell_of(module)
    of_units = () if cell is None else module.unit_parameters()
    weights, c_dtype = [*module._flat_weights, *of_units], hx[1].dtype
    x, hx, reset_state, weights = layers.autocast(x, hx, reset_state, weights)
    features = shapes.features(resets, reset_state, lengths, return_cell_states)
    if chosen is None:
        chosen = _choose(module, x, features, x.shape[0], x.shape[1])
    if chosen == "cudnn" or (chosen == "torch" and not features and cell is None):
        y, h_n, c_n = torch_ops.lstm(x, hx, weights, torch_ops.options_of(module))
        if chosen == "torch" and module.proj_size:  # torch's autocast on a CPU does not cast c
            c_n = c_n.to(torch.promote_types(c_n.dtype, c_dtype))
        return y, (h_n, c_n)
    directions = 2 if module.bidirectional else 1
    layers.check_alike(x, hx, weights)
    rows = x.shape[0], module.num_layers * directions, x.shape[1]
    checked = segments.checked_segments(x, rows, shapes.state_sizes(module), resets, reset_state, lengths)
    if x.shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    weights, of_units = weights[: len(weights) - len(of_units)], weights[len(weights) - len(of_units) :]
    last, c = [], None
    for k, layer in enumerate(split_weights(weights, module.num_layers, directions)):
        of_layer = slice(k * directions, (k + 1) * directions)
        states, within = (hx[0][of_layer], hx[1][of_layer]), checked.of_rows(of_layer)
        if cell is not None:
            layer, states, within = cell.layer_inputs(layer, of_units, of_layer, states, within)
        options = layer_options(module, k, chosen, return_cell_states)
        draws = cell is not None and bool(cell.masks) and module.training
        x, h_n, c_n, c, *_ = layers.run(chosen, x, states, layer, within, options, draws)
        if cell is not None:
            c_n, c = cell.kept(c_n), c if c is None else cell.kept(c)
        last.append((h_n, c_n))
    h_n, c_n = last[0] if len(last) == 1 else (torch.cat(states) for states in zip(*last))
    return (x, (h_n, c_n), c) if return_cell_states else (x, (h_n, c_n))


def layer_options(module, k: int, chosen: str, return_cell_states: bool) -> LayerOptions:
    """Return the options of layer k, run by this backend."""
    is_last, cell = k == module.num_layers - 1, cell_of(module)
    dropout = float(module.dropout) if module.training and not is_last else 0.0
    cells, name = return_cell_states and is_last, "lstm" if cell is None else cell.key
    return LayerOptions(module.precision, dropout, cells, module.recompute, chosen == "triton-stepwise", name)


class LSTM(torch.nn.RNNBase):
    """A replacement for torch.nn.LSTM, with the whole sequence of a layer in one kernel launch on NVIDIA GPUs.

    It has the constructor, parameters, initial values for a given seed, state_dict and errors of torch.nn.LSTM.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype: as in
            torch.nn.LSTM. Below, I and H are the sizes, and D is 2 if bidirectional, else 1. With proj_size, h and output have
            size proj_size in place of H.
        precision: of float32 products on a GPU: "ieee", "tf32", "tf32x3", or None for the setting of torch.backends.cudnn.rnn
            ("tf32" unless you changed it), as torch.nn.LSTM.
        backend: "auto" (`lstm_triton.explain(lstm)` says which it takes, and why), "triton", "triton-persistent",
            "triton-stepwise", "cudnn", "reference".
        recompute: keep outputs and c for the backward, but compute the gates (4/7 of the memory where I = H) again by GEMMs. On
            a CPU, where torch's own kernels run, it changes nothing.

    Inputs:
        input: [T, B, I], [B, T, I] with batch_first, [T, I] unbatched, or a PackedSequence.
        hx: (h_0, c_0), each [num_layers * D, B, H], or [num_layers * D, H] unbatched; zeros when None.
        resets: [T, B] bool ([B, T] with batch_first). resets[t, b] starts a new segment of batch row b at t; the result equals
            that of the segments run one by one, in both directions.
        reset_state: (h, c), to which a reset sets the states instead of zeros, broadcastable to [T, num_layers * D, B, H].
        lengths: [B] integers, the steps of each batch row, without sorting or packing. Outputs past them are zero, h_n and c_n
            are those of each row's last step, and the reverse direction starts there.
        return_cell_states: also return every c_t of the last layer.

    Outputs: output [T, B, D * H] and (h_n, c_n), as torch.nn.LSTM, in the dtype of the input (or of autocast); with
        return_cell_states also cell_states, shaped like output before projection.

    Raises ValueError, TypeError and RuntimeError where torch.nn.LSTM does, for resets, lengths and reset_state as
    `functional.lstm` does, and RuntimeError if a named backend cannot run the call. Unlike cuDNN it runs backward in
    evaluation mode.

    It is no instance of torch.nn.LSTM, because torch.compile refuses these; `convert` keeps the class of a module.
    """

    # The values of instances that were pickled before these options existed.
    precision: str | None = None
    backend: str = "auto"
    recompute: bool = False

    get_expected_cell_size: Any = torch.nn.LSTM.get_expected_cell_size
    check_forward_args: Any = torch.nn.LSTM.check_forward_args
    permute_hidden: Any = torch.nn.LSTM.permute_hidden

    def __init__(  # noqa: PLR0913
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device=None,
        dtype=None,
        *,
        precision: str | None = None,
        backend: str = "auto",
        recompute: bool = False,
    ) -> None:
        check_options(precision, backend)
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size)
        super().__init__("LSTM", *sizes, device, dtype)
        self.precision, self.backend, self.recompute = precision, backend, recompute

    def extra_repr(self) -> str:
        return super().extra_repr() + options_repr(self) + (", recompute=True" if self.recompute else "")

    forward = forward
