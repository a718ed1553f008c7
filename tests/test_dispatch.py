"""Which backend runs a cell, and that the reason given is the reason."""

import os
import subprocess
import sys

import pytest
import torch

from lstm_triton import LSTMCell, dispatch, explain, functional
from lstm_triton.dispatch import BACKENDS, Environment, cell_backend, choose_cell, environment

H100 = Environment(has_triton=True, interpreting=False, capability=(9, 0))
V100 = Environment(has_triton=True, interpreting=False, capability=(7, 0))
CPU = Environment(has_triton=True, interpreting=False, capability=None)
INTERPRETER = Environment(has_triton=True, interpreting=True, capability=None)
INTERPRETER_BESIDE_A_GPU = Environment(has_triton=True, interpreting=True, capability=(9, 0))
NO_TRITON = Environment(has_triton=False, interpreting=False, capability=None)
NO_TRITON_BUT_A_GPU = Environment(has_triton=False, interpreting=False, capability=(9, 0))

# device, dtype, environment -> what "auto" picks, and what is said when "triton" is forced (None: it serves).
CASES = [
    ("cuda", torch.float32, H100, "triton", None),
    ("cuda", torch.bfloat16, H100, "triton", None),
    ("cuda", torch.float64, H100, "triton", None),
    ("cuda", torch.complex64, H100, "torch", "the kernels know no torch.complex64"),
    ("cuda", torch.float32, V100, "torch", "compute capability 7.0 is below 8.0"),
    ("cuda", torch.float32, NO_TRITON_BUT_A_GPU, "torch", "triton is not installed"),
    ("cuda", torch.float32, INTERPRETER_BESIDE_A_GPU, "torch", "the interpreter works on CPU tensors"),
    ("cpu", torch.float32, CPU, "torch", "TRITON_INTERPRET=1"),
    ("cpu", torch.float32, NO_TRITON, "torch", "triton is not installed"),
    ("cpu", torch.float32, INTERPRETER, "torch", None),
    ("meta", torch.float32, CPU, "torch", "not on 'meta'"),
    ("mps", torch.float32, NO_TRITON, "torch", "triton is not installed"),
    ("xpu", torch.float32, CPU, "torch", "not on 'xpu'"),
    ("cuda", torch.float32, CPU, "torch", "NVIDIA GPUs"),  # an AMD GPU is "cuda" too, without a compute capability
]


@pytest.mark.parametrize("device, dtype, env, auto, obstacle", CASES, ids=str)
def test_choice(device, dtype, env, auto, obstacle):
    choice = choose_cell("auto", device, dtype, env)
    assert choice.backend == auto
    assert ("not yet measured on a GPU" in choice.reason) == (auto == "triton")
    if obstacle is not None:
        assert obstacle in choice.reason, "what stands in the way of the kernels is the reason"
        with pytest.raises(RuntimeError, match="backend='triton' cannot serve: ") as error:
            choose_cell("triton", device, dtype, env)
        assert obstacle in str(error.value)
    else:
        assert choose_cell("triton", device, dtype, env).backend == "triton"
    assert choose_cell("reference", device, dtype, env).backend == "reference"
    with pytest.raises(RuntimeError, match="cuDNN has no LSTM cell"):
        choose_cell("cudnn", device, dtype, env)


def test_a_cell_has_one_step_whichever_way_the_kernels_are_asked_for():
    for backend in ("triton-persistent", "triton-stepwise"):
        assert choose_cell(backend, "cuda", torch.float32, H100).backend == "triton"
        with pytest.raises(RuntimeError, match=f"backend='{backend}' cannot serve"):
            choose_cell(backend, "cpu", torch.float32, CPU)


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend must be one of 'auto', .*got 'fast'"):
        choose_cell("fast", "cuda", torch.float32, H100)
    assert BACKENDS[0] == "auto"


def test_this_machine(device):
    env = environment(device)
    assert env.has_triton and env.interpreting == (device.type == "cpu")
    assert (env.capability is None) == (device.type == "cpu")
    assert cell_backend("triton", device, torch.float32) == "triton"
    assert cell_backend("auto", torch.device("cpu"), torch.float32) == "torch"


@pytest.mark.long
def test_without_the_interpreter_a_cpu_is_served_by_torch():
    script = """
import torch, lstm_triton
cell = lstm_triton.LSTMCell(3, 5)
torch.testing.assert_close(cell(torch.ones(2, 3)), torch.nn.LSTMCell.forward(cell, torch.ones(2, 3)))
assert "torch: on a CPU the kernels run only in Triton's interpreter" in lstm_triton.explain(cell), lstm_triton.explain(cell)
cell.backend = "triton"
try:
    cell(torch.ones(2, 3))
except RuntimeError as error:
    assert "TRITON_INTERPRET=1" in str(error)
else:
    raise AssertionError("a forced backend that cannot serve")
import sys
assert "triton" not in sys.modules, "nothing needs triton here"
"""
    _run(script)


@pytest.mark.long
def test_without_triton_everything_but_the_kernels_works():
    script = """
import sys
sys.modules["triton"] = None
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name == "triton" else find_spec(name, *args)
import torch, lstm_triton
cell = lstm_triton.LSTMCell(3, 5)
h, c = cell(torch.ones(2, 3))
h.sum().backward()
assert "triton is not installed" in lstm_triton.explain(cell)
"""
    _run(script)


def _run(script):
    unset = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env = {**unset, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_explain(device):
    cell = LSTMCell(3, 5, device=device, backend="triton")
    assert explain(cell) == f"LSTMCell(3, 5) on {cell.weight_hh.device}, torch.float32: triton: asked for."
    text = explain(LSTMCell(3, 5), device="meta", dtype=torch.bfloat16)
    assert text.startswith("LSTMCell(3, 5) on meta, torch.bfloat16: torch: ")
    with pytest.raises(TypeError, match="Linear"):
        explain(torch.nn.Linear(3, 5))
    with pytest.raises(RuntimeError, match="cannot serve"):
        explain(cell, device="meta")


@pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
def test_the_backend_chosen_is_the_one_that_runs(backend, device, count_launches):
    x, h, c = (torch.randn(2, n, device=device) for n in (3, 5, 5))
    weights = torch.randn(20, 3, device=device), torch.randn(20, 5, device=device)
    functional.lstm_cell(x, (h, c), *weights, backend=backend)
    kernels = backend == "triton" or (backend == "auto" and device.type == "cuda")
    assert sum(count_launches().values()) == kernels


def test_auto_takes_torchs_own_for_every_plain_call_on_a_cpu():
    """`LSTM.forward` rests on that, and does not ask."""
    for has_triton in (False, True):
        for interpreting in (False, has_triton):
            for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
                for projected in (False, True):
                    call = dispatch.Call(True, False, None, projected)
                    env = dispatch.Environment(has_triton, interpreting, None)
                    assert dispatch.choose_layer("auto", "cpu", dtype, env, call).backend == "torch"
