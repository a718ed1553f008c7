"""Which algorithm cuDNN runs for a torch.nn.LSTM: torch decides it for every call, and does not tell."""

from dataclasses import dataclass

from .cases import Case

STANDARD = "STANDARD"
PERSIST_STATIC = "PERSIST_STATIC"
PERSIST_STATIC_SMALL_H = "PERSIST_STATIC_SMALL_H"


@dataclass(frozen=True)
class Gpu:
    """What the choice depends on besides the call."""

    capability: tuple[int, int]
    multiprocessors: int


def algorithm(case: Case, gpu: Gpu) -> str:
    """The algorithm by the rules of torch 2.11 to 2.13.

    The forward of a training step and its backward are chosen apart: both are named where they differ.
    """
    forward = _algorithm(case, gpu, 192)
    backward = _algorithm(case, gpu, 128)
    if case.mode == "train" and forward != backward:
        return f"{forward} forward, {backward} backward"
    return forward


def _algorithm(case: Case, gpu: Gpu, small: int) -> str:
    if case.proj_size or case.rows != "padded":  # rows with lengths are packed for torch.nn.LSTM
        return STANDARD
    if case.hidden_size <= small and case.dtype != "float64":
        return PERSIST_STATIC_SMALL_H
    if (
        case.dtype == "float16"
        and case.layers == 1
        and not case.bidirectional
        and case.hidden_size <= 1024
        and case.hidden_size % 128 == 0
        and case.input_size % 128 == 0
        and case.batch % 8 == 0
        and case.batch <= 128
        and gpu.multiprocessors >= 98
        and gpu.capability != (8, 6)
    ):
        return PERSIST_STATIC
    return STANDARD


def remark(case: Case) -> str | None:
    """What a user of cuDNN pays besides, in one sentence."""
    if case.dtype == "bfloat16":
        return "torch does not flatten bfloat16 weights for cuDNN: each call copies them"
    return None
