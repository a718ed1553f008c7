"""Whether this process can still use its GPU. After an error it is asked, since words do not tell: cuDNN and cuBLAS name an
illegal access by its call, and a failed capture of a CUDA graph is a "CUDA error" too, after which everything still runs."""

import sys

import torch


def why_lost() -> str | None:
    """Why the CUDA context of this process answers nothing any more; None if it does, or there is none."""
    if not torch.cuda.is_initialized():
        return None
    stall = sys.modules.get("lstm_triton.kernels.stall")  # imported with the first launch
    if stall and (told := stall.message()):
        return told
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error)
    return None
