"""Triton kernels of the LSTM and their launchers: tensors in, tensors out, no autograd.

Under TRITON_INTERPRET=1 the kernels run on CPU tensors, in Triton's interpreter with the repairs of `interpreter`.
"""

import importlib.util
import os

if os.environ.get("TRITON_INTERPRET") and importlib.util.find_spec("triton") is not None:
    from . import interpreter

    if interpreter.is_interpreting():
        interpreter.install()
