"""torch's own samples of good and bad calls of LSTM, run on this package's.

In a process of their own: importing them freezes torch's global settings.
"""

import os
import subprocess
import sys
import types
import unittest

import pytest

pytestmark = pytest.mark.long


def test_torchs_own_samples(device):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, __file__, device.type], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "all samples passed" in done.stdout, done.stdout + done.stderr


def _run(device: str) -> None:
    # torch.testing wants this package for its own test classes only.
    expecttest = types.ModuleType("expecttest")
    expecttest.TestCase = unittest.TestCase
    sys.modules.setdefault("expecttest", expecttest)

    import torch
    from torch.testing._internal import common_modules

    from lstm_triton import LSTM

    torch.set_num_threads(1)
    (info,) = (info for info in common_modules.module_db if info.module_cls is torch.nn.LSTM)
    options = {"device": device, "dtype": torch.float64, "requires_grad": True, "training": True}
    passed = 0
    for sample in info.module_inputs_func(info, **options):
        constructor, args = sample.constructor_input, sample.forward_input.args
        theirs = torch.nn.LSTM(*constructor.args, **constructor.kwargs, device=device, dtype=torch.float64)
        leaves = [args[0], *(args[1] if len(args) > 1 else ())]
        for backend in ("auto", "triton"):
            ours = LSTM(*constructor.args, **constructor.kwargs, device=device, dtype=torch.float64, backend=backend)
            ours.load_state_dict(theirs.state_dict())
            results = []
            for module in (ours, theirs):
                y, (h, c) = module(*args)
                gradients = torch.autograd.grad(
                    y.sum() + h.pow(2).sum() + c.pow(2).sum(), [*leaves, *module.parameters()]
                )
                results.append([y, h, c, *gradients])
            torch.testing.assert_close(*results)
            if backend == "auto":  # the same samples as a batch of one
                y, (h, c) = sample.reference_fn(ours, *args)
                torch.testing.assert_close([y, h, c], results[0][:3])
            passed += 1
    assert passed >= 2 * 32, passed
    options["dtype"] = torch.float32
    errors = info.module_error_inputs_func(info, **options)
    for error in errors:
        constructor, forward = error.module_error_input.constructor_input, error.module_error_input.forward_input
        for backend in ("auto", "triton"):
            with unittest.TestCase().assertRaisesRegex(error.error_type, error.error_regex):
                module = LSTM(*constructor.args, **constructor.kwargs, backend=backend)
                assert error.error_on is common_modules.ModuleErrorEnum.FORWARD_ERROR, "constructed"
                module(*forward.args)
    assert len(errors) >= 10, len(errors)
    print("all samples passed")


if __name__ == "__main__":
    _run(sys.argv[1])
