"""torch's own samples of good and bad calls of LSTMCell, run on this package's cell.

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
    command = [sys.executable, __file__, device.type]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "12 samples passed" in done.stdout, done.stdout + done.stderr


def _run(device: str) -> None:
    # torch.testing wants this package for its own test classes only.
    expecttest = types.ModuleType("expecttest")
    expecttest.TestCase = unittest.TestCase
    sys.modules.setdefault("expecttest", expecttest)

    import torch
    from torch.testing._internal import common_modules

    from lstm_triton import LSTMCell

    options = {"device": device, "dtype": torch.float32, "requires_grad": True, "training": True}
    passed = 0
    for backend in ("auto", "triton"):
        for sample in common_modules.module_inputs_torch_nn_LSTMCell(None, **options):
            cell = LSTMCell(
                *sample.constructor_input.args, **sample.constructor_input.kwargs, device=device, backend=backend
            )
            args = sample.forward_input.args
            found = cell(*args)
            torch.testing.assert_close(found, sample.reference_fn(cell, *args))
            sum(t.sum() for t in found).backward()
            assert args[0].grad.isfinite().all()
            passed += 1
        for error in common_modules.module_error_inputs_torch_nn_LSTMCell(None, **options):
            sample = error.module_error_input
            cell = LSTMCell(*sample.constructor_input.args, device=device, backend=backend)
            with unittest.TestCase().assertRaisesRegex(error.error_type, error.error_regex):
                cell(*sample.forward_input.args)
            passed += 1
    print(passed, "samples passed")


if __name__ == "__main__":
    _run(sys.argv[1])
