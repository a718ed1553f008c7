"""Which backend runs a call, that the reason given is the reason, and that `explain` says so."""

import os
import re
import subprocess
import sys

import pytest
import torch

from lstm_triton import LSTM, LSTMCell, SoftmaxReadout, convert, dispatch, explain, functional
from lstm_triton.dispatch import Call, Choice, Environment, choose_cell, choose_layer, choose_readout
from lstm_triton.kernels import interpreter

CPU, INTERPRETER, BARE = (Environment(*given, None) for given in ((True, False), (True, True), (False, False)))
SM70, SM75, SM90 = (Environment(True, False, capability) for capability in ((7, 0), (7, 5), (9, 0)))
BARE_GPU, INTERPRETER_BESIDE_A_GPU = Environment(False, False, (9, 0)), Environment(True, True, (9, 0))
PLAIN, SEGMENTS, PROJECTED = Call(True, False, None), Call(False, False, None), Call(True, False, None, True)
LONG, TF32X3 = Call(True, True, None), Call(True, False, "tf32x3")
DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64

NO_SEGMENTS = "cuDNN has no resets, lengths, cell states or recomputation"
# What cuDNN lacks for a call of a layer.
LACKS = {
    PLAIN: None,
    SEGMENTS: NO_SEGMENTS,
    LONG: "cuDNN takes no more than 65535 steps",
    TF32X3: "cuDNN has no tf32x3",
}
UNMEASURED = "the persistent kernels are not yet measured on this GPU"
STEPWISE = ("triton-stepwise", f"{{lacks}}; {UNMEASURED}")
NO_TORCH = ("reference", "torch's own kernels have no resets, lengths, cell states or recomputation")
LOOPS = "; cell states, reset states and cells of one's own, if any, run step by step in plain PyTorch"
# The automatic choice for each of these calls: the backend and its reason.
KERNELS = [("cudnn", UNMEASURED), STEPWISE, STEPWISE, STEPWISE]
NO_KERNELS = [("cudnn", "{obstacle}"), NO_TORCH, *[("reference", "{lacks}, and {obstacle}")] * 2]
ON_A_CPU = [("torch", "{obstacle}"), ("torch", "{obstacle}" + LOOPS), *[("torch", "{obstacle}")] * 2]
ELSEWHERE = [("torch", "{obstacle}"), NO_TORCH, *[("torch", "{obstacle}")] * 2]
ONLY_INTERPRETED = "the kernels run on NVIDIA GPUs; on a CPU only in Triton's interpreter, slowly (TRITON_INTERPRET=1)"
INTERPRETED = "TRITON_INTERPRET=1 is set: the interpreter"
# What stands in the way of the kernels, which is the reason for another backend (None: nothing).
PLACES = [
    *(("cuda", dtype, SM90, None, KERNELS) for dtype in DTYPES),
    ("cuda", torch.complex64, SM90, "the kernels know no torch.complex64", NO_KERNELS),
    ("cuda", torch.float8_e4m3fn, SM90, "the kernels know no torch.float8_e4m3fn", NO_KERNELS),
    ("cuda", torch.float32, SM70, "the GPU's compute capability 7.0 is below 8.0", NO_KERNELS),
    ("cuda", torch.float32, SM75, "the GPU's compute capability 7.5 is below 8.0", NO_KERNELS),
    ("cuda", torch.float32, BARE_GPU, "triton is not installed", NO_KERNELS),
    ("cuda", torch.float32, INTERPRETER_BESIDE_A_GPU, f"{INTERPRETED} works on CPU tensors", NO_KERNELS),
    # An AMD GPU is "cuda" too, without a compute capability.
    ("cuda", torch.float32, CPU, "the kernels run on NVIDIA GPUs, not on 'cuda'", NO_KERNELS),
    *(("cpu", dtype, CPU, ONLY_INTERPRETED, ON_A_CPU) for dtype in DTYPES),
    *(("cpu", dtype, BARE, "triton is not installed", ON_A_CPU) for dtype in DTYPES),
    *(("cpu", dtype, INTERPRETER, None, ON_A_CPU) for dtype in DTYPES),
    ("meta", torch.float32, CPU, "the kernels run on NVIDIA GPUs, not on 'meta'", ELSEWHERE),
    ("mps", torch.float32, CPU, "the kernels run on NVIDIA GPUs, not on 'mps'", ELSEWHERE),
    ("mps", torch.float32, BARE, "triton is not installed", ELSEWHERE),
    ("xpu", torch.float32, CPU, "the kernels run on NVIDIA GPUs, not on 'xpu'", ELSEWHERE),
]


def _sentence(module, device, dtype, choice):
    return f"{type(module).__name__}(2, 3) on {device}, {dtype}: {choice.backend}: {choice.reason}."


@pytest.mark.parametrize("device, dtype, env, obstacle, layers", PLACES, ids=str)
def test_choice(device, dtype, env, obstacle, layers, monkeypatch):
    def refused(backend, why, choose, *call):
        with pytest.raises(RuntimeError, match=f"^backend='{backend}' cannot serve: {re.escape(why)}"):
            choose(backend, device, dtype, env, *call)

    monkeypatch.setattr(dispatch, "environment", lambda device: env)
    own = "on a CPU torch's own {} faster than Triton's interpreter"
    for name, module, choose in (
        ("cell", LSTMCell(2, 3), choose_cell),
        ("linear layer and softmax", SoftmaxReadout(2, 3), choose_readout),
    ):
        choice = choose("auto", device, dtype, env)
        if layers is KERNELS:
            assert choice.backend == "triton" and "not yet measured on a GPU" in choice.reason
        else:
            assert choice == Choice("torch", obstacle or own.format(f"{name} is"))
        assert explain(module, device=device, dtype=dtype) == _sentence(module, device, dtype, choice)
    for (call, lacks), (backend, reason) in zip(LACKS.items(), layers, strict=True):
        expected = Choice(backend, reason.format(lacks=lacks, obstacle=obstacle or own.format("kernels are")))
        assert choose_layer("auto", device, dtype, env, call) == expected
        options = dict(device=device, dtype=dtype, steps=65536 if call.long else 65535, segments=not call.plain)
        for lstm in (LSTM(2, 3, precision=call.precision), convert(torch.nn.LSTM(2, 3), precision=call.precision)):
            assert explain(lstm, **options) == _sentence(lstm, device, dtype, expected)
        if device != "cuda":
            refused("cudnn", f"cuDNN runs on NVIDIA GPUs, not on '{device}'", choose_layer, call)
        elif lacks:
            refused("cudnn", lacks, choose_layer, call)
        else:
            assert choose_layer("cudnn", device, dtype, env, call) == Choice("cudnn", "requested")
    if device == "cpu":  # for every plain call: `LSTM.forward` rests on that, and does not ask
        assert choose_layer("auto", device, dtype, env, PROJECTED).backend == "torch"
    refused("cudnn", "cuDNN has no LSTM cell", choose_cell)
    refused("cudnn", "cuDNN has no such readout", choose_readout)
    for choose, call in ((choose_cell, ()), (choose_readout, ()), (choose_layer, (PLAIN,))):
        assert choose("reference", device, dtype, env, *call) == Choice("reference", "requested")
        for backend in ("triton", "triton-persistent", "triton-stepwise"):
            if obstacle is not None:
                refused(backend, obstacle, choose, *call)
            else:  # a cell has one step, whichever way the kernels are asked for
                asked = Choice(backend if call else "triton", "requested")
                assert choose(backend, device, dtype, env, *call) == asked
        with pytest.raises(ValueError, match="backend must be one of 'auto', .*, got 'gpu'"):
            choose("gpu", device, dtype, env, *call)


# ---- in a process, and on this machine -------------------------------------------------------------------------------

UNAVAILABLE = """
import importlib.util, sys, torch, lstm_triton
from lstm_triton import dispatch
from lstm_triton.cli import main

def check(why):
    cell = lstm_triton.LSTMCell(3, 5)
    assert why in lstm_triton.explain(cell), lstm_triton.explain(cell)
    h, c = cell(torch.ones(2, 3))
    torch.testing.assert_close((h, c), torch.nn.LSTMCell.forward(cell, torch.ones(2, 3)))
    h.sum().backward()
    cell.backend = "triton"
    try:
        cell(torch.ones(2, 3))
    except RuntimeError as error:
        assert why in str(error)
    else:
        raise AssertionError("a forced backend that cannot serve")

check("the kernels run on NVIDIA GPUs; on a CPU only in Triton's interpreter, slowly (TRITON_INTERPRET=1)")
assert "triton" not in sys.modules, "nothing needs triton here"
sys.modules["triton"] = None
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name == "triton" else find_spec(name, *args)
dispatch.environment.cache_clear()
dispatch._remembered.cache_clear()
check("triton is not installed")
main(["info"])
"""


@pytest.mark.long
def test_where_the_kernels_cannot_run_torch_does():
    """On a CPU without the interpreter, which imports no triton, and then as if there were none."""
    unset = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env = {**unset, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", UNAVAILABLE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "triton not installed" in done.stdout and "not available" in done.stdout


def test_the_backend_explained_is_the_one_that_runs(monkeypatch, device, count_launches):
    env = dispatch.environment(device)
    assert env.has_triton and env.interpreting == (env.capability is None) == (device.type == "cpu")
    x, h, c = (torch.randn(2, n, device=device) for n in (3, 5, 5))
    weights = torch.randn(20, 3, device=device), torch.randn(20, 5, device=device)
    for backend in ("auto", "triton", "reference"):
        functional.lstm_cell(x, (h, c), *weights, backend=backend)
        kernels = backend == "triton" or (backend == "auto" and device.type == "cuda")
        assert sum(count_launches().values()) == kernels
    lstm, chosen, original = LSTM(2, 3, device=device), [], dispatch.layer_backend
    monkeypatch.setattr(dispatch, "layer_backend", lambda *args: chosen.append(original(*args)) or chosen[-1])
    lstm(torch.randn(4, 1, 2, device=device), lengths=torch.tensor([3]))  # a plain call on a CPU does not ask
    assert chosen == [explain(lstm, segments=True).split(": ")[1]]


# ---- explain ---------------------------------------------------------------------------------------------------------


def test_explain(monkeypatch):
    monkeypatch.setattr(dispatch, "environment", lambda device: SM90 if device.type == "cuda" else CPU)
    asked = _sentence(LSTMCell(2, 3), "cuda", torch.float32, Choice("triton", "requested"))
    assert explain(LSTMCell(2, 3, backend="triton"), device="cuda") == asked
    plain, recomputing = (LSTM(2, 3, num_layers=2, recompute=recompute) for recompute in (False, True))
    assert explain(recomputing) == explain(plain) == explain(LSTM(2, 3)).replace("(2, 3)", "(2, 3, num_layers=2)")
    assert explain(recomputing, device="cuda") == explain(plain, device="cuda", segments=True)
    for module in (LSTMCell(2, 3, backend="triton"), LSTM(2, 3, backend="triton")):
        with pytest.raises(RuntimeError, match="'triton' cannot serve: .* on a CPU only in Triton's interpreter"):
            explain(module)
    with pytest.raises(TypeError, match="knows LSTM, Recurrent, their cells and SoftmaxReadout, .*, got Linear"):
        explain(torch.nn.Linear(2, 3))


ONCE, IN_PARTS = "all steps in one launch", "all steps in one launch for each of 4 parts of the batch"


@pytest.mark.parametrize(
    "hidden_size, batch, dtype, expected",
    [
        (512, 1, torch.float32, None),
        (1024, 16, torch.bfloat16, ONCE),
        (1024, 512, torch.bfloat16, IN_PARTS),
        (1024, 2048, torch.bfloat16, "one launch per step"),
        (1024, 16, torch.float32, ONCE),
        (1536, 64, torch.bfloat16, f"{ONCE} forward, {IN_PARTS} backward"),
    ],
)
def test_explain_tells_how_many_launches(hidden_size, batch, dtype, expected, monkeypatch):
    """On a CPU the limits are those of an H100. expected: None where programs cannot wait."""
    monkeypatch.setattr(dispatch, "environment", lambda device: INTERPRETER)
    monkeypatch.setattr(interpreter, "programs_can_wait", lambda: expected is not None)
    lstm = LSTM(2, hidden_size, backend="triton", precision="tf32")
    text = f": triton: requested; with B = {batch} {expected or 'one launch per step'}."
    assert explain(lstm, batch=batch, dtype=dtype).endswith(text)
