"""torch's settings of float32 products, as a case wants them."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from .cases import Case

_BACKENDS: Any = torch.backends


def set_precision(case: Case) -> None:
    """Set cuDNN's products and matrix products alike.

    For other dtypes TF32 is left on: off, it slows cuDNN's bfloat16 down too. Matrix products are set by torch's older call,
    which sets the newer `fp32_precision` along: after the newer one alone, libraries that read the older one get an error.
    """
    wanted = "ieee" if case.precision in ("ieee", "tf32x3") else "tf32"
    torch.set_float32_matmul_precision("highest" if wanted == "ieee" else "high")
    _BACKENDS.cudnn.rnn.fp32_precision = wanted


@contextlib.contextmanager
def precision(case: Case) -> Iterator[None]:
    """Within, torch's settings are those of `set_precision`."""
    settings = (_BACKENDS.cudnn.rnn, _BACKENDS.cuda.matmul, _BACKENDS.mkldnn.matmul)
    before, older = [s.fp32_precision for s in settings], None
    with contextlib.suppress(RuntimeError):  # the older and the newer setting disagree already
        older = torch.get_float32_matmul_precision()
    set_precision(case)
    try:
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for s, value in zip(settings, before):
            s.fp32_precision = value
