"""Triton kernels of the LSTM and their launchers: tensors in, tensors out, no autograd.

Importing this package needs triton. Under TRITON_INTERPRET=1 the kernels run on CPU tensors, in Triton's interpreter with the
repairs of `interpreter`.
"""

from . import interpreter

if interpreter.is_interpreting():
    interpreter.install()
