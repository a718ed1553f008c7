"""The accuracy check, and what results in TF32 are judged by: products of operands truncated as a tensor core does, on every
device."""

import re
from dataclasses import replace

import pytest
import torch
from support import layers
from support.problems import cells, readouts

from lstm_triton import check, functional, reference
from lstm_triton.kernels.device import fp32_precision

GRADIENTS = {"dx", "dh", "dc", "dW_ih", "dW_hh"}
FAULTS = {  # what is done to the results of plain PyTorch, and what must fail
    "none": (lambda h, c: (h, c), set()),
    "wrong h": (lambda h, c: (h * (1 + 1e-4), c), {"h", "db_ih", "db_hh"} | GRADIENTS),
    "wrong c": (lambda h, c: (h, c + 1e-4 * c.detach()), {"c"}),
    "wrong gradient": (lambda h, c: (h.detach() + 0.9999 * (h - h.detach()), c), GRADIENTS),
    "NaN": (lambda h, c: (torch.where(torch.arange(len(h))[:, None] == 0, torch.nan, h), c), {"h"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_passes_plain_pytorch_and_fails_on_a_wrong_cell(fault, monkeypatch, capsys):
    """By its exit code and its table; another process sends its results as JSON."""
    change, failing = FAULTS[fault]

    def lstm_cell(x, hx, *weights, backend):
        assert backend == "triton"
        return change(*reference.lstm_cell(x, *hx, *weights))

    monkeypatch.setattr(functional, "lstm_cell", lstm_cell)
    dtypes = {"float32": torch.float32} if failing else {"float32": torch.float32, "float64": torch.float64}
    rows = [
        row for name, dtype in dtypes.items() for row in check._check_dtype(name, dtype, "cpu", check.SMALL_SHAPES, 0)
    ]
    assert len(rows) == len(dtypes) * len(check.QUANTITIES)
    report = check.Report("a test", len(check.SMALL_SHAPES), tuple(rows))
    assert check.Report.from_json(report.to_json()) == report
    monkeypatch.setattr(check, "run", lambda device, seed: report)
    assert check.main([]) == (1 if failing else 0)
    failed = set(re.findall(r"^FAILED float\d\d (\w+): B=", capsys.readouterr().out, re.MULTILINE))
    assert failed >= failing if failing else not failed


def test_a_check_that_cannot_run_says_why(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check.main(["--device", "cuda"]) == 2 and "cannot run here: no NVIDIA GPU" in capsys.readouterr().err


class _OnGPU(torch.Tensor):
    """A CPU tensor that says it lies on a GPU, whose library takes TF32 for full float32, as a CPU's does."""

    is_cuda, device = True, torch.device("cuda", 0)
    __torch_function__ = torch._C._disabled_torch_function_impl


def _on_gpu(tensors):
    return tuple(None if t is None else t.as_subclass(_OnGPU) for t in tensors)


KINDS = {"cell": (cells, 3, 7, 19), "readout": (readouts, 5, 19, 37), "layer": (layers, 4, 3, 7, 19)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_gpus_library_is_not_asked(kind):
    of, *sizes = KINDS[kind]
    problem = of.draw(*sizes, precision="tf32")
    full, on_gpu = replace(problem, precision="ieee"), replace(problem, inputs=_on_gpu(problem.inputs))
    for found, wanted, other in zip(of.by_torch(on_gpu), of.by_torch(problem), of.by_torch(full)):
        assert torch.equal(found, wanted)
        assert wanted.shape[-1] == 0 or not torch.equal(wanted, other)


def test_the_check_judges_tf32_by_the_same(device, monkeypatch):
    monkeypatch.setattr(check, "_torch_cell", None)
    with fp32_precision(torch.backends.cuda.matmul, "tf32"):
        rows = check._check_dtype("tf32", torch.float32, device.type, check.SMALL_SHAPES[1:2], 0)
    assert len(rows) == len(check.QUANTITIES) and not [row for row in rows if row.failures]
    assert all(row.torch_rms_error > 1e-5 for row in rows if row.quantity.startswith("dW"))
