"""Ready-made cells from papers and from torch; each is an example of how to write one."""

import torch

from .declaration import Cell, cell


@cell(gates="rzn")
def gru(z, s):
    """The gated recurrent unit (Cho et al. 2014, arXiv:1406.1078), as torch.nn.GRU has it: r scales W_hn h + b_hn."""
    r, u = torch.sigmoid(z.r), torch.sigmoid(z.z)
    n = torch.tanh(z.input.n + r * z.recurrent.n)
    return (1 - u) * n + u * s.h, {}


@cell(gates="fgo", states="c")
def cifg(z, s):
    """The LSTM with coupled input and forget gate, i = 1 - f (Greff et al. 2017, arXiv:1503.04069)."""
    f, g, o = torch.sigmoid(z.f), torch.tanh(z.g), torch.sigmoid(z.o)
    c = f * s.c + (1 - f) * g
    return o * torch.tanh(c), {"c": c}


@cell(gates="ifgo", states="c", parameters=["pi", "pf", "po"])
def peephole_lstm(z, s, p):
    """The LSTM whose gates read c: i and f the c before the step, o the new c (Gers and Schmidhuber 2000)."""
    i, f, g = torch.sigmoid(z.i + p.pi * s.c), torch.sigmoid(z.f + p.pf * s.c), torch.tanh(z.g)
    c = f * s.c + i * g
    o = torch.sigmoid(z.o + p.po * c)
    return o * torch.tanh(c), {"c": c}


@cell(gates="ifzo", states="cnm")
def slstm(z, s):
    """The sLSTM of the xLSTM (Beck et al. 2024, arXiv:2405.04517), with an exponential input gate, a sigmoid forget gate, the
    normalizer n and the stabilizer m. Its recurrence is dense, where the paper's has one block for each head."""
    log_f = torch.nn.functional.logsigmoid(z.f)
    m = torch.maximum(log_f + s.m, z.i)
    i, f = torch.exp(z.i - m), torch.exp(log_f + s.m - m)
    c = f * s.c + i * torch.tanh(z.z)
    n = f * s.n + i
    return torch.sigmoid(z.o) * c / n, {"c": c, "n": n, "m": m}


@cell(gates="fn")
def minimal_gated_unit(z, s):
    """The minimal gated unit (Zhou et al. 2016, arXiv:1603.09420), the forget gate applied to U h + b as in torch's GRU."""
    f = torch.sigmoid(z.f)
    n = torch.tanh(z.input.n + f * z.recurrent.n)
    return (1 - f) * s.h + f * n, {}


@cell(gates="a")
def rnn_tanh(z, s):
    """Elman's network, as torch.nn.RNN has it (Elman 1990)."""
    return torch.tanh(z.a), {}


@cell(gates="a")
def rnn_relu(z, s):
    """torch.nn.RNN(nonlinearity="relu")."""
    return torch.relu(z.a), {}


def zoneout_lstm(z, s, m):
    i, f, g, o = torch.sigmoid(z.i), torch.sigmoid(z.f), torch.tanh(z.g), torch.sigmoid(z.o)
    c = f * s.c + i * g
    return m.h * s.h + (1 - m.h) * o * torch.tanh(c), {"c": m.c * s.c + (1 - m.c) * c}


def zoneout(p_h: float = 0.05, p_c: float = 0.5) -> Cell:
    """Make the LSTM with zoneout (Krueger et al. 2017, arXiv:1606.01305).

    In training each unit keeps its h with probability p_h and its c with p_c; in evaluation mode it takes the expectation. The
    defaults are the paper's for characters.
    """
    return Cell(zoneout_lstm, gates="ifgo", states="c", masks={"h": p_h, "c": p_c})
