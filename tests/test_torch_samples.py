"""torch's own samples of good and bad calls of LSTM, LSTMCell, GRU and GRUCell, run on this package's.

In a process of their own: importing them freezes torch's global settings.
"""

import sys
import types
import unittest

import pytest
from support.process import run_script

pytestmark = pytest.mark.long


def test_torchs_own_samples(device, tmp_path):
    assert "all samples passed" in run_script(__file__, device.type, cwd=tmp_path)


def _run(device: str) -> None:
    # torch.testing wants this package for its own test classes only.
    expecttest = types.ModuleType("expecttest")
    expecttest.TestCase = unittest.TestCase
    sys.modules.setdefault("expecttest", expecttest)

    import torch
    from torch.testing._internal import common_modules

    from lstm_triton import GRU, LSTM, GRUCell, LSTMCell

    torch.set_num_threads(1)
    for theirs, ours, least, errors in (
        (torch.nn.LSTM, LSTM, 32, 10),
        (torch.nn.LSTMCell, LSTMCell, 2, 4),
        (torch.nn.GRU, GRU, 16, 8),
        (torch.nn.GRUCell, GRUCell, 2, 4),
    ):
        (info,) = (info for info in common_modules.module_db if info.module_cls is theirs)
        # As many as torch had when this was written.
        assert _samples(info, ours, device) >= least
        assert _errors(info, ours, common_modules.ModuleErrorEnum) >= errors
    print("all samples passed")


def _samples(info, ours, device: str) -> int:
    """Good calls give what torch's module gives, gradients included."""
    import torch
    from torch.utils._pytree import tree_leaves

    options = {"device": device, "dtype": torch.float64}
    samples = info.module_inputs_func(info, **options, requires_grad=True, training=True)
    for sample in samples:
        constructor, args = sample.constructor_input, sample.forward_input.args
        theirs = info.module_cls(*constructor.args, **constructor.kwargs, **options)
        leaves = [t for t in tree_leaves(args) if t is not None]
        for backend in ("auto", "triton"):
            module = ours(*constructor.args, **constructor.kwargs, **options, backend=backend)
            module.load_state_dict(theirs.state_dict())
            results = []
            for m in (module, theirs):
                found = tree_leaves(m(*args))
                total = found[0].sum() + sum(t.pow(2).sum() for t in found[1:])
                results.append([*found, *torch.autograd.grad(total, [*leaves, *m.parameters()])])
            torch.testing.assert_close(*results)
            if backend == "auto" and sample.reference_fn is not None:  # the same samples as a batch of one
                torch.testing.assert_close(tree_leaves(sample.reference_fn(module, *args)), results[0][: len(found)])
    return len(samples)


def _errors(info, ours, kinds) -> int:
    """Bad calls raise what torch's module raises."""
    import torch

    errors = info.module_error_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=True, training=True)
    for error in errors:
        constructor, forward = error.module_error_input.constructor_input, error.module_error_input.forward_input
        for backend in ("auto", "triton"):
            with unittest.TestCase().assertRaisesRegex(error.error_type, error.error_regex):
                module = ours(*constructor.args, **constructor.kwargs, backend=backend)
                assert error.error_on is kinds.FORWARD_ERROR, "constructed"
                module(*forward.args)
    return len(errors)


if __name__ == "__main__":
    _run(sys.argv[1])
