"""`cell`: what may be declared, what is derived from it, and that it is right: against autograd in float64."""

import math
import random
import re
import types

import pytest
import torch
from support import cell_grammar, segmented

from lstm_triton import Cell, cell
from lstm_triton.cells import CellError, catalogue
from lstm_triton.kernels import interpreter
from lstm_triton.kernels.cell_equations import step_of

CATALOGUE = {name: value for name, value in vars(catalogue).items() if isinstance(value, Cell)}
CATALOGUE["zoneout"] = catalogue.zoneout(0.2, 0.4)


@cell(gates="ifgo", states="c")
def lstm(z, s):
    i, f, g, o = z.i.sigmoid(), z.f.sigmoid(), z.g.tanh(), z.o.sigmoid()
    c = f * s.c + i * g
    return o * c.tanh(), {"c": c}


@cell(gates="ifgo", states="cnm", parameters="abd")
def eight(z, s, p):
    """As many states as the kernels carry: the sLSTM with peepholes that sees h."""
    log_f, z_i = torch.nn.functional.logsigmoid(z.f + p.b * s.c), z.i + p.a * s.c
    m = log_f + s.m + torch.nn.functional.softplus(z_i - log_f - s.m)  # not the larger one, whose gradient jumps
    i, f = torch.exp(z_i - m), torch.exp(log_f + s.m - m)
    c, n = f * s.c + i * torch.tanh(z.g), f * s.n + i
    return 0.1 * s.h + torch.sigmoid(z.o + p.d * c) * c / n, {"c": c, "n": n, "m": m}


# ---- what is derived -------------------------------------------------------------------------------------------------


def _powers(z, s):
    """Powers and constants."""
    a, b = torch.sigmoid(z.a), z.b**3
    return a**-1.5 + b * torch.tensor(0.5) + s.n**0.5, {"n": a**2.5 - z.b**4 + a**-2}


def _passes(z, s):
    """Passes its state through, whose gradient is no tensor of the inputs."""
    return (z.a + 0 * z.b).sin(), {"n": s.n}


@pytest.mark.skipif(not interpreter.is_interpreting(), reason="each cell would be compiled: see `make sweep`")
def test_generated_functions_are_those_of_autograd():
    """Every function, nested at random; `make sweep` draws more. test_recurrent and test_cell_catalogue run ready-made ones."""
    drawn = [cell_grammar.random_cell(random.Random(seed)) for seed in (5, 24, 89, 151)]
    used = {word for *_, words in drawn for word in re.findall(r"\w+", words)}
    cells = [Cell(*parts) for *parts, _ in drawn]
    assert {*cell_grammar.UNARY, *cell_grammar.BINARY} <= used
    assert {of.n_carried for of in cells} == {1, 2, 4, 8} and {len(of.masks) for of in cells} == {0, 1, 3}
    for of in (*cells, Cell(_powers, "ab", "n"), Cell(_passes, "ab", "n")):
        segmented.judge(segmented.Case(T=1, B=2, I=3, H=5, cell=of), torch.device("cpu"))


def test_what_is_saved():
    assert "return v0, v1, v2, v3" in lstm.triton_source(), "the gates, as the hand-written equations do"
    assert lstm.triton_source().count("tanh(") == 3, "the backward computes tanh(c) again, from c"
    saved = {"cifg": 3, "gru": 4, "peephole_lstm": 4, "slstm": 4, "minimal_gated_unit": 3, "rnn_tanh": 0, "rnn_relu": 0}
    returned = {name: re.search(r"return (.*)\n\n", of.triton_source())[1] for name, of in CATALOGUE.items()}
    assert {name: 4 - of.count("tl.zeros_like(z0)") for name, of in returned.items()} == saved | {"zoneout": 4}


def test_a_number_that_float32_rounds_keeps_its_bits_where_triton_would_round_it():
    source = Cell(lambda z, s: (z.a.clamp(min=0.1, max=0.5) + 0.1, {}), "a").triton_source()
    assert set(re.findall(r"tl.full\(\w+.shape, ([\d.]+), \w+.dtype\)", source)) == {"0.1"}, source
    assert "+ 0.1" in source and re.search(r"minimum\(\w+, 0.5", source), source


def test_a_cell_is_its_function_and_equal_ones_have_one_name():
    z = types.SimpleNamespace(**{g: torch.randn(2, 3) for g in "ifgo"})
    c = torch.randn(2, 3)
    h, states = lstm(z, types.SimpleNamespace(c=c))
    assert torch.equal(h, lstm.step(z.i, z.f, z.g, z.o, c)[0]) and list(states) == ["c"]
    assert lstm.__name__ == "lstm" and "gates=('i', 'f', 'g', 'o')" in repr(lstm)

    @cell(gates="ifgo", states="c")
    def again(z, s):
        return lstm.function(z, s)

    assert again.key.removeprefix("again") == lstm.key.removeprefix("lstm")
    assert len({of.key for of in CATALOGUE.values()}) == len(CATALOGUE)
    assert step_of("lstm") is None and step_of(lstm.key) == lstm.step
    with pytest.raises(RuntimeError, match="'other' is not declared in this process"):
        step_of("other")


# ---- refusals --------------------------------------------------------------------------------------------------------


def _branches(z, s):
    if z.f.sum() > 0:
        return z.f, {}
    return -z.f, {}


def _reads_a_number(z, s):
    return z.f * z.f[0, 0].item(), {}


def _masked(z, s, m):
    return z.a * m.u, {}


def _sums(z, s):
    a = z.f.sigmoid()
    return a.cumsum(-1), {}


_LINE = _sums.__code__.co_firstlineno + 2
_OUTSIDE = torch.ones(3)
REFUSED = {
    "a sum over units": (lambda z, s: (z.f.softmax(-1), {}), "f", "", "softmax.* not a pointwise operation"),
    "layer norm": (lambda z, s: (torch.layer_norm(z.f, (3,)), {}), "f", "", "native_layer_norm"),
    "an unknown function": (lambda z, s: (torch.special.bessel_j0(z.f), {}), "f", "", "special_bessel_j0"),
    "random numbers": (lambda z, s: (torch.rand_like(z.f) * z.f, {}), "f", "", "rand_like"),
    "a matrix product": (lambda z, s: (z.f @ z.f.t(), {}), "f", "", "aten.t.default"),
    "a power": (lambda z, s: (z.f**1.7, {}), "f", "", r"line \d+: .*exponent 1\.7"),
    "a tensor from outside": (lambda z, s: (z.f * _OUTSIDE, {}), "f", "", r"line \d+: aten\.mul.* may be a parameter"),
    "a number of the interpreter": (lambda z, s: (math.tanh(z.f), {}), "f", "", r"line \d+: .*converted to Python"),
    "dropout": (lambda z, s: (torch.dropout(z.f, 0.5, True), {}), "f", "", r"line \d+: aten\.bernoulli"),
    "a change in place": (lambda z, s: (z.f.mul_(2), {}), "f", "", r"line \d+: aten\.mul_\.Tensor"),
    "a running sum": (_sums, "f", "", rf"_sums: .*test_cells\.py, line {_LINE}: aten\.cumsum\.default"),
    "a branch": (_branches, "f", "", "line \\d+"),
    "a number": (_reads_a_number, "f", "", "line \\d+"),
    "two arguments of three": (lambda z, s, p: (z.f, {}), "f", "", r"line \d+: .*missing 1 required .*'p'"),
    "a missing state": (lambda z, s: (z.f, {}), "f", "c", "the new state 'c' is missing"),
    "an unknown state": (lambda z, s: (z.f, {"c": z.f}), "f", "", "a state 'c', which it does not have"),
    "no states at all": (lambda z, s: z.f, "f", "", "must return the new h and a dict"),
    "a number as h": (lambda z, s: (1.0, {}), "f", "", "the new h is not a tensor"),
    "an unused gate": (lambda z, s: (z.f, {}), "fg", "", "the gate 'g' is not used"),
    "nine states": (
        lambda z, s: (z.f + s.h, dict.fromkeys("abcdegij", z.f)),
        "f",
        "abcdegij",
        "8 states and parameters .* not 9: a, b, c, d, e, g, i, j, h",
    ),
    "five gates": (lambda z, s: (z.a + z.b + z.c + z.d + z.e, {}), "abcde", "", "hold 4 pre-activations, not 5"),
    "three gates apart": (
        lambda z, s: (z.input.a * z.recurrent.a + z.input.b * z.recurrent.b + z.input.c * z.recurrent.c, {}),
        "abc",
        "",
        "hold 4 pre-activations, not 6",
    ),
    "a gate that does not exist": (lambda z, s: (z.q, {}), "f", "", "gates are f, not 'q'"),
    "a state that does not exist": (lambda z, s: (z.f * s.q, {}), "f", "", "states are h, not 'q'"),
    "one name twice": (lambda z, s: (z.a, {"a": s.a}), "a", "a", "names of their own"),
    "the name of the output": (lambda z, s: (z.h, {}), "h", "", "names of their own"),
    "four masks": (_masked, "a", "", "at most 3 masks", dict.fromkeys("uvwx", 0.5)),
    "a probability": (_masked, "a", "", "probabilities between 0 and 1", {"u": 1.5}),
    "no probabilities": (_masked, "a", "", "names with probabilities", "u"),
    "an unused mask": (_masked, "a", "", "the mask 'v' is not used", {"u": 0.5, "v": 0.5}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    function, gates, states, message, *masks = REFUSED[case]
    with pytest.raises(AttributeError if "does not exist" in case else CellError, match=message):
        Cell(function, gates, states, (), *masks)
