"""`LSTM`: torch.nn.LSTM, and what it cannot do."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import casting, dispatch, layers, segments, torch_ops
from .modules import check_options, options_repr


class LSTMForward(torch.nn.RNNBase):
    """The forward of `LSTM`, for a class that otherwise is a torch.nn.RNNBase with mode "LSTM"."""

    precision: str | None = None
    backend: str = "auto"
    recompute: bool = False
    _flat_weights: list[Any]

    def extra_repr(self) -> str:
        return super().extra_repr() + options_repr(self) + (", recompute=True" if self.recompute else "")

    get_expected_cell_size: Any = torch.nn.LSTM.get_expected_cell_size
    check_forward_args: Any = torch.nn.LSTM.check_forward_args
    permute_hidden: Any = torch.nn.LSTM.permute_hidden

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        resets: Tensor | None = None,
        reset_state: tuple[Tensor, Tensor] | None = None,
        lengths: Tensor | None = None,
        return_cell_states: bool = False,
    ):
        # Weights may have been replaced since the last call: functional_call, parametrizations, a move to another device.
        self._update_flat_weights()
        layers.check_device(self._flat_weights[0].device)
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, resets, reset_state, lengths, return_cell_states)
        if input.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        if input.dim() == 2:
            return self._forward_unbatched(input, hx, resets, reset_state, lengths, return_cell_states)
        if hx is None:
            self.check_input(input, None)
            hx = self._zero_state(input, input.shape[0 if self.batch_first else 1])
        else:
            if hx[0].dim() != 3 or hx[1].dim() != 3:
                raise RuntimeError(
                    "For batched 3-D input, hx and cx should "
                    f"also be 3-D but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
                )
            self.check_forward_args(input, hx, None)
            layers.check_pair(hx)
        # Everything below is time-major; for batch_first these are views, and the kernels follow their strides.
        x = input.transpose(0, 1) if self.batch_first else input
        if self.batch_first and resets is not None:
            resets = resets.transpose(0, 1) if resets.dim() == 2 else resets
        y, hidden, *cells = self._run(x, hx, resets, reset_state, lengths, return_cell_states)
        if self.batch_first:
            y, cells = y.transpose(0, 1), [c.transpose(0, 1) for c in cells]
        return y, hidden, *cells

    def _forward_unbatched(self, input, hx, resets, reset_state, lengths, return_cell_states):
        """A batch of one; resets are [T], lengths a single number, reset_state broadcasts as in a batch."""
        if hx is not None:
            if hx[0].dim() != 2 or hx[1].dim() != 2:
                raise RuntimeError(
                    "For unbatched 2-D input, hx and cx should "
                    f"also be 2-D but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
                )
            hx = (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        batch_dim = 0 if self.batch_first else 1
        resets = resets.unsqueeze(batch_dim) if resets is not None and resets.dim() == 1 else resets
        lengths = lengths.unsqueeze(0) if lengths is not None and lengths.dim() == 0 else lengths
        y, (h, c), *cells = LSTMForward.forward(
            self,
            input.unsqueeze(batch_dim),
            hx,
            resets=resets,
            reset_state=reset_state,
            lengths=lengths,
            return_cell_states=return_cell_states,
        )
        return y.squeeze(batch_dim), (h.squeeze(1), c.squeeze(1)), *(c.squeeze(batch_dim) for c in cells)

    def _forward_packed(self, packed, hx, resets, reset_state, lengths, return_cell_states):
        """resets [T, B] ([B, T] with batch_first) and reset_state are in the caller's order of rows, as hx is."""
        data, batch_sizes, sorted_indices, unsorted_indices = packed
        if lengths is not None:
            raise ValueError("LSTM: a PackedSequence has lengths of its own, got lengths too")
        T, B = len(batch_sizes), int(batch_sizes[0])
        hx = self._zero_state(data, B) if hx is None else self.permute_hidden(hx, sorted_indices)
        layers.check_pair(hx)
        weight = self._flat_weights[0]
        if data.dtype != weight.dtype and not torch._C._is_any_autocast_enabled():
            # Here torch has no check of its own, and fails otherwise than for a padded input.
            raise RuntimeError(
                f"PackedSequence and weights must have the same dtype, got {data.dtype} and {weight.dtype}"
            )
        self.check_forward_args(data, hx, batch_sizes)
        plain = resets is None and reset_state is None and not return_cell_states
        chosen = self._choose(data, plain, T)
        if chosen in ("torch", "cudnn"):
            data, hx, _, weights = layers.autocast(data, hx, None, self._flat_weights)
            with casting.without_autocast(data.device.type):
                y, *hidden = torch_ops.packed_lstm(data, batch_sizes, hx, weights, self._torch_options())
        else:
            if self.batch_first and isinstance(resets, Tensor) and resets.dim() == 2:
                resets = resets.transpose(0, 1)
            segments.check_resets(resets, reset_state, T, B)
            if resets is not None and sorted_indices is not None:
                resets = segments.sent(resets, data.device).index_select(1, sorted_indices)
            if reset_state is not None and sorted_indices is not None:
                reset_state = tuple(
                    s.index_select(-2, sorted_indices) if s.dim() > 1 and s.shape[-2] == B else s for s in reset_state
                )
            # Row b has as many steps as there are entries of batch_sizes above b: known on the host, no waiting for the GPU.
            lengths = segments.sent((batch_sizes[None, :] > torch.arange(B)[:, None]).sum(1), data.device)
            at = segments.sent(_packed_rows(batch_sizes, B), data.device)
            x = data.new_zeros(T * B, data.shape[1]).index_copy(0, at, data).view(T, B, data.shape[1])
            y, hidden, *cells = self._run(x, hx, resets, reset_state, lengths, return_cell_states)
            y, *cells = (t.flatten(0, 1).index_select(0, at) for t in (y, *cells))
            if return_cell_states:
                packed_cells = PackedSequence(cells[0], batch_sizes, sorted_indices, unsorted_indices)
        packed_y = PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices)
        hidden = self.permute_hidden(tuple(hidden), unsorted_indices)
        return (packed_y, hidden, packed_cells) if return_cell_states else (packed_y, hidden)

    def _zero_state(self, input: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        rows = self.num_layers * (2 if self.bidirectional else 1)
        c = input.new_zeros(rows, batch, self.hidden_size)
        return (input.new_zeros(rows, batch, self.proj_size) if self.proj_size else c), c

    def _torch_options(self) -> torch_ops.Options:
        """For torch's own kernels: cuDNN cannot run backward in evaluation mode, so it is told otherwise."""
        train, dropout = self.training or torch.is_grad_enabled(), self.dropout if self.training else 0.0
        return torch_ops.Options(self.bias, self.num_layers, dropout, train, self.bidirectional, self.precision)

    def _choose(self, x: Tensor, plain: bool, T: int) -> str:
        return dispatch.layer_backend(
            self.backend,
            x.device,
            x.dtype,
            plain and not self.recompute,
            dispatch.is_long(T, x.device),
            self.precision,
            self.proj_size > 0,
        )

    def _run(self, x, hx, resets, reset_state, lengths, return_cell_states):
        """All layers on x [T, B, I]: y [T, B, D * H], (h_n, c_n), and with return_cell_states c of the last layer."""
        x, hx, reset_state, weights = layers.autocast(x, hx, reset_state, self._flat_weights)
        chosen = self._choose(
            x, resets is None and reset_state is None and lengths is None and not return_cell_states, x.shape[0]
        )
        if chosen in ("torch", "cudnn"):
            y, h_n, c_n = torch_ops.lstm(x, hx, weights, self._torch_options())
            return y, (h_n, c_n)
        directions = 2 if self.bidirectional else 1
        layers.check_alike(x, hx, weights)
        checked = segments.checked_segments(
            x, (x.shape[0], self.num_layers * directions, x.shape[1]), (self.proj_size or self.hidden_size, self.hidden_size),
            resets, reset_state, lengths,
        )  # fmt: skip
        if x.shape[0] == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        per_layer = len(weights) // self.num_layers
        last = []
        c = None
        for k in range(self.num_layers):
            rows = slice(k * directions, (k + 1) * directions)
            wants_cells = return_cell_states and k == self.num_layers - 1
            x, h_n, c_n, c = layers.run(
                chosen, x, (hx[0][rows], hx[1][rows]), weights[k * per_layer : (k + 1) * per_layer], directions, self.bias,
                checked.of_rows(rows), wants_cells, self.recompute, self.precision,
                float(self.dropout) if self.training and k < self.num_layers - 1 else 0.0,
            )  # fmt: skip
            last.append((h_n, c_n))
        h_n, c_n = last[0] if len(last) == 1 else (torch.cat(states) for states in zip(*last))
        return (x, (h_n, c_n), c) if return_cell_states else (x, (h_n, c_n))


def _packed_rows(batch_sizes: Tensor, B: int) -> Tensor:
    """For each row of packed data its row t * B + b in the padded [T, B]."""
    padded = torch.arange(len(batch_sizes) * B).view(-1, B)
    return padded[torch.arange(B) < batch_sizes[:, None]]


class LSTM(LSTMForward):
    """torch.nn.LSTM, with the whole sequence of a layer in one kernel launch on NVIDIA GPUs, and what cuDNN cannot do.

    Same constructor, parameters, initial values for one seed, state_dict and errors as torch.nn.LSTM.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype: as there.
            I, H, and D = 2 if bidirectional, else 1. With proj_size the outputs have size proj_size in place of H.
        precision: how float32 products are computed on a GPU: "ieee", "tf32", "tf32x3", or None for what
            torch.backends.cudnn.rnn says ("tf32" unless you changed it), as torch.nn.LSTM does.
        backend: "auto" (the fastest known to be right; `lstm_triton.explain(lstm)` says which and why), "triton",
            "triton-persistent", "triton-stepwise", "cudnn", "reference".
        recompute: keep outputs and c for the backward but rebuild the gates, 4/7 of the memory, by a GEMM.

    Inputs:
        input: [T, B, I], [B, T, I] with batch_first, [T, I] unbatched, or a PackedSequence.
        hx: (h_0, c_0), each [num_layers * D, B, H], or [num_layers * D, H] unbatched; zeros when None.
        resets: [T, B] bool ([B, T] with batch_first). resets[t, b] starts a new segment of row b at t; the result equals that
            of the segments run one by one, in both directions.
        reset_state: (h, c), what a reset sets the states to instead of zero, broadcastable to [T, num_layers * D, B, H].
        lengths: [B] integers: the steps of each row, without sorting or packing. Outputs past them are zero, h_n and c_n are
            those of each row's last step, and the reverse direction starts there.
        return_cell_states: also return every c_t of the last layer.

    Outputs: output, (h_n, c_n) as torch.nn.LSTM, and with return_cell_states cell_states, shaped like output before projection.

    Raises ValueError, TypeError and RuntimeError where torch.nn.LSTM does; for resets, lengths and reset_state as
    `functional.lstm` does. Unlike cuDNN it runs backward in evaluation mode.
    """

    def __init__(
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
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )
        self.precision = precision
        self.backend = backend
        self.recompute = recompute


class LSTMSubclass(LSTMForward, torch.nn.LSTM):
    """`LSTM` for code that asks isinstance(module, torch.nn.LSTM); torch.compile refuses every such class.

    Takes the arguments of torch.nn.LSTM; precision, backend and recompute are attributes.
    """
