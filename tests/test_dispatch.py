"""Which backend runs a call, that the reason given is the reason, and that `explain` says so."""

import itertools
import os
import re
import subprocess
import sys

import pytest
import torch

from lstm_triton import LSTM, LSTMCell, SoftmaxReadout, convert, dispatch, explain, functional
from lstm_triton.dispatch import Call, Choice, Environment, choose_cell, choose_layer
from lstm_triton.kernels import interpreter

CPU, INTERPRETER, BARE = (Environment(*given, None) for given in ((True, False), (True, True), (False, False)))
SM70, SM75, SM90 = (Environment(True, False, capability) for capability in ((7, 0), (7, 5), (9, 0)))
BARE_GPU, INTERPRETER_BESIDE_A_GPU = Environment(False, False, (9, 0)), Environment(True, True, (9, 0))
FORCED = ("triton", "triton-persistent", "triton-stepwise")

# What stands in the way of the kernels, which is the reason for another backend (None: nothing).
OBSTACLES = [
    *(("cuda", dtype, SM90, None) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)),
    ("cuda", torch.complex64, SM90, "the kernels know no torch.complex64"),
    ("cuda", torch.float8_e4m3fn, SM90, "the kernels know no torch.float8_e4m3fn"),
    ("cuda", torch.float32, SM70, "compute capability 7.0 is below 8.0"),
    ("cuda", torch.float32, BARE_GPU, "triton is not installed"),
    ("cuda", torch.float32, INTERPRETER_BESIDE_A_GPU, "the interpreter works on CPU tensors"),
    ("cuda", torch.float32, CPU, "NVIDIA GPUs"),  # an AMD GPU is "cuda" too, without a compute capability
    ("cpu", torch.float32, CPU, "only in Triton's interpreter (TRITON_INTERPRET=1)"),
    ("cpu", torch.float32, BARE, "triton is not installed"),
    ("cpu", torch.float32, INTERPRETER, None),
    ("meta", torch.float32, CPU, "not on 'meta'"),
    ("mps", torch.float32, BARE, "triton is not installed"),
    ("xpu", torch.float32, CPU, "not on 'xpu'"),
]


@pytest.mark.parametrize("device, dtype, env, obstacle", OBSTACLES, ids=str)
def test_what_stands_in_the_way_of_the_kernels(device, dtype, env, obstacle):
    auto = choose_cell("auto", device, dtype, env)
    assert auto.backend == ("triton" if device == "cuda" and obstacle is None else "torch")
    assert ("not yet measured on a GPU" in auto.reason) == (auto.backend == "triton")
    assert obstacle is None or obstacle in auto.reason
    for backend in FORCED:
        for choose, call, kernels in ((choose_cell, (), "triton"), (choose_layer, (PLAIN,), backend)):
            if obstacle is None:  # a cell has one step, whichever way the kernels are asked for
                assert choose(backend, device, dtype, env, *call) == Choice(kernels, "asked for")
            else:
                with pytest.raises(RuntimeError, match=f"backend='{backend}' cannot serve: .*{re.escape(obstacle)}"):
                    choose(backend, device, dtype, env, *call)
            assert choose("reference", device, dtype, env, *call) == Choice("reference", "asked for")
    with pytest.raises(RuntimeError, match="cuDNN has no LSTM cell"):
        choose_cell("cudnn", device, dtype, env)


PLAIN, SEGMENTS = Call(True, False, None), Call(False, False, None)
LONG, TF32X3 = Call(True, True, None), Call(True, False, "tf32x3")
NO_CUDNN = "cuDNN has no resets, lengths, cell states or recomputation"
OLD_GPU = "compute capability 7.5 is below 8.0"
UNMEASURED = "the persistent kernels are not yet measured on this GPU"
STEP_BY_STEP = "cell states and reset states run step by step"
OF_LAYERS = [
    ("cpu", CPU, PLAIN, "torch", ["on a CPU the kernels run only in Triton's interpreter"]),
    ("cpu", CPU, SEGMENTS, "torch", ["only in Triton's interpreter", STEP_BY_STEP]),
    ("cpu", CPU, LONG, "torch", ["interpreter"]),
    ("cpu", CPU, TF32X3, "torch", ["interpreter"]),
    ("cpu", INTERPRETER, PLAIN, "torch", ["on a CPU torch's own kernels are faster than Triton's interpreter"]),
    ("cpu", INTERPRETER, SEGMENTS, "torch", ["faster than Triton's interpreter; but", "cell states"]),
    ("cpu", BARE, PLAIN, "torch", ["triton is not installed"]),
    ("mps", CPU, PLAIN, "torch", ["the kernels run on NVIDIA GPUs, not on 'mps'"]),
    ("mps", CPU, SEGMENTS, "reference", ["torch's own kernels have no resets"]),
    ("cuda", SM75, PLAIN, "cudnn", [OLD_GPU]),
    ("cuda", SM75, SEGMENTS, "reference", ["torch's own kernels have no resets"]),
    ("cuda", SM75, LONG, "reference", ["cuDNN takes no more than 65535 steps, and ", OLD_GPU]),
    ("cuda", SM75, TF32X3, "reference", ["cuDNN has no tf32x3, and ", OLD_GPU]),
    ("cuda", BARE_GPU, PLAIN, "cudnn", ["triton is not installed"]),
    ("cuda", SM90, PLAIN, "cudnn", [UNMEASURED]),
    ("cuda", SM90, SEGMENTS, "triton-stepwise", [f"{NO_CUDNN}; {UNMEASURED}"]),
    ("cuda", SM90, LONG, "triton-stepwise", [f"cuDNN takes no more than 65535 steps; {UNMEASURED}"]),
    ("cuda", SM90, TF32X3, "triton-stepwise", [f"cuDNN has no tf32x3; {UNMEASURED}"]),
]


@pytest.mark.parametrize("device, env, call, backend, reasons", OF_LAYERS)
def test_automatic_choice_of_a_layer(device, env, call, backend, reasons):
    choice = choose_layer("auto", device, torch.float32, env, call)
    assert choice.backend == backend and all(reason in choice.reason for reason in reasons), choice


def test_forced_cudnn():
    for env in (SM75, SM90, BARE_GPU):
        assert choose_layer("cudnn", "cuda", torch.float32, env, PLAIN) == Choice("cudnn", "asked for")
    for device, call, reason in (
        ("cpu", PLAIN, "cuDNN runs on NVIDIA GPUs, not on 'cpu'"),
        ("cuda", SEGMENTS, NO_CUDNN),
        ("cuda", LONG, "cuDNN takes no more than 65535 steps"),
        ("cuda", TF32X3, "cuDNN has no tf32x3"),
    ):
        with pytest.raises(RuntimeError, match=f"backend='cudnn' cannot serve: {reason}"):
            choose_layer("cudnn", device, torch.float32, SM90, call)


def test_unknown_backends():
    for choose, call in ((choose_cell, ()), (choose_layer, (PLAIN,))):
        with pytest.raises(ValueError, match="backend must be one of 'auto', .*, got 'gpu'"):
            choose("gpu", "cuda", torch.float32, SM90, *call)


def test_auto_takes_torchs_own_for_every_plain_call_on_a_cpu():
    """`LSTM.forward` rests on that, and does not ask."""
    dtypes = torch.float16, torch.bfloat16, torch.float32, torch.float64
    for env, dtype, projected in itertools.product((CPU, INTERPRETER, BARE), dtypes, (False, True)):
        assert choose_layer("auto", "cpu", dtype, env, Call(True, False, None, projected)).backend == "torch"


# ---- in processes, and on this machine -------------------------------------------------------------------------------


def test_this_machine(device):
    env = dispatch.environment(device)
    assert env.has_triton and env.interpreting == (env.capability is None) == (device.type == "cpu")


NO_INTERPRETER = """
assert "torch: on a CPU the kernels run only in Triton's interpreter" in lstm_triton.explain(cell), lstm_triton.explain(cell)
cell.backend = "triton"
try:
    cell(torch.ones(2, 3))
except RuntimeError as error:
    assert "TRITON_INTERPRET=1" in str(error)
else:
    raise AssertionError("a forced backend that cannot serve")
assert "triton" not in sys.modules, "nothing needs triton here"
"""
NO_TRITON = """
assert "triton is not installed" in lstm_triton.explain(cell)
from lstm_triton.cli import main
main(["info"])
"""
WITHOUT_TRITON = """
sys.modules["triton"] = None
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name == "triton" else find_spec(name, *args)
"""


@pytest.mark.long
@pytest.mark.parametrize("before, after", [("", NO_INTERPRETER), (WITHOUT_TRITON, NO_TRITON)], ids=["cpu", "no triton"])
def test_where_the_kernels_cannot_run_torch_does(before, after):
    script = f"""
import importlib.util, sys
{before}
import torch, lstm_triton
cell = lstm_triton.LSTMCell(3, 5)
h, c = cell(torch.ones(2, 3))
torch.testing.assert_close((h, c), torch.nn.LSTMCell.forward(cell, torch.ones(2, 3)))
h.sum().backward()
{after}
"""
    unset = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env = {**unset, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert after is NO_INTERPRETER or ("triton not installed" in done.stdout and "not available" in done.stdout)


@pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
def test_the_backend_chosen_is_the_one_that_runs(backend, device, count_launches):
    x, h, c = (torch.randn(2, n, device=device) for n in (3, 5, 5))
    weights = torch.randn(20, 3, device=device), torch.randn(20, 5, device=device)
    functional.lstm_cell(x, (h, c), *weights, backend=backend)
    kernels = backend == "triton" or (backend == "auto" and device.type == "cuda")
    assert sum(count_launches().values()) == kernels


# ---- explain -------------------------------------------------------------------------------------------------------


def test_explain(monkeypatch):
    monkeypatch.setattr(dispatch, "environment", lambda device: SM90 if device.type == "cuda" else CPU)
    lstm, cell = LSTM(2, 3), LSTMCell(2, 3, backend="triton")
    start = "LSTM(2, 3) on cpu, torch.float32: torch: on a CPU the kernels run only in Triton's interpreter"
    assert explain(lstm).startswith(start) and explain(lstm).endswith(".")
    assert explain(LSTM(2, 3, recompute=True)) == explain(convert(torch.nn.LSTM(2, 3))) == explain(lstm)
    assert explain(lstm, device="cuda") == f"LSTM(2, 3) on cuda, torch.float32: cudnn: {UNMEASURED}."
    assert "cuDNN takes no more than 65535 steps" in explain(lstm, device="cuda", steps=65536)
    assert NO_CUDNN in explain(lstm, device="cuda", dtype=torch.bfloat16, segments=True)
    assert explain(lstm, segments=True).endswith("reset states run step by step in plain PyTorch.")
    assert explain(cell, device="cuda") == "LSTMCell(2, 3) on cuda, torch.float32: triton: asked for."
    assert explain(LSTMCell(2, 3), device="meta", dtype=torch.bfloat16).startswith(
        "LSTMCell(2, 3) on meta, torch.bfloat16: torch: "
    )
    assert "SoftmaxReadout(2, 3)" in explain(SoftmaxReadout(2, 3))
    for module in (cell, LSTM(2, 3, backend="triton")):
        with pytest.raises(RuntimeError, match="backend='triton' cannot serve: on a CPU"):
            explain(module)
    with pytest.raises(TypeError, match="knows LSTM, Recurrent, their cells and SoftmaxReadout, .*, got Linear"):
        explain(torch.nn.Linear(2, 3))


def test_explain_tells_how_many_launches(monkeypatch):
    """On a CPU the limits are those of an H100."""
    monkeypatch.setattr(dispatch, "environment", lambda device: INTERPRETER)
    monkeypatch.setattr(interpreter, "programs_can_wait", lambda: False)
    assert explain(LSTM(2, 512, backend="triton")).endswith("asked for; with B = 1 one launch per step.")
    monkeypatch.setattr(interpreter, "programs_can_wait", lambda: True)
    once = "all steps in one launch"
    for hidden_size, batch, dtype, expected in (
        (1024, 16, torch.bfloat16, once),
        (1024, 512, torch.bfloat16, f"{once} for each of 4 parts of the batch"),
        (1024, 2048, torch.bfloat16, "one launch per step"),
        (1024, 16, torch.float32, once),
        (1536, 64, torch.bfloat16, f"{once} forward, {once} for each of 4 parts of the batch backward"),
    ):
        lstm = LSTM(2, hidden_size, backend="triton", precision="tf32")
        assert explain(lstm, batch=batch, dtype=dtype).endswith(f"triton: asked for; with B = {batch} {expected}.")


def test_explain_tells_what_runs(monkeypatch, device):
    """The remembered choice of a call is the one explained."""
    lstm = LSTM(2, 3, device=device)
    explained = explain(lstm, segments=True).split(": ")[1]
    chosen = []
    original = dispatch.layer_backend
    monkeypatch.setattr(dispatch, "layer_backend", lambda *args: chosen.append(original(*args)) or chosen[-1])
    lstm(torch.randn(4, 1, 2, device=device), lengths=torch.tensor([3]))  # a plain call on a CPU does not ask
    assert chosen == [explained]
