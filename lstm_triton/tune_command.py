"""`lstm-triton tune`: run `tune` for calls that are given by their sizes."""

import argparse
import functools
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch

from . import dispatch, measurements, tuning
from .kernels.device import matmul_precision
from .shapes import Shape
from .trial import WAYS

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


def main(arguments: Sequence[str]) -> int:
    """Run `lstm-triton tune`."""
    parser = argparse.ArgumentParser(
        "lstm-triton tune", description="Find what runs a call fastest on this GPU, and keep it."
    )
    add, flag = parser.add_argument, functools.partial(parser.add_argument, action="store_true")
    add("--layer", action="append", metavar="IxH", type=_sizes, help="sizes of input and state, such as 256x512")
    add("--batch", type=int, default=16, help="default: 16")
    add("--steps", type=int, default=128, help="default: 128")
    add("--dtype", choices=(*_DTYPES, *_DTYPES.values()), default="fp32")
    add("--precision", choices=dispatch.PRECISIONS[1:], help="of float32 products; default: as torch is set")
    add("--layers", type=int, default=1)
    add(
        "--cell",
        metavar="NAME",
        type=_named_cell,
        help="of the catalogue, such as gru, or MODULE:NAME; default: the LSTM",
    )
    flag("--bidirectional")
    flag("--train", help="measure forward and backward")
    flag("--resets", help="of a call with resets")
    flag("--lengths", help="of a call with lengths")
    add("--budget", type=lambda text: float(text.removesuffix("s")), default=60.0, help="seconds for each layer")
    flag("--dry-run", help="list what would be measured on this GPU")
    flag("--forget", help="remove all measurements of this user")
    options = parser.parse_args(arguments)
    if options.forget:
        measurements.change(lambda rows: [])
        return 0
    if not torch.cuda.is_available():
        print("lstm-triton tune: there is no NVIDIA GPU, or torch has no CUDA", file=sys.stderr)
        return 1
    if not options.layer:
        parser.error("--layer is missing")
    device = torch.device("cuda", torch.cuda.current_device())
    dtype, directions = _DTYPES.get(options.dtype, options.dtype), 2 if options.bidirectional else 1
    features = ",".join(name for name in ("resets", "lengths") if vars(options)[name])
    precision = matmul_precision(getattr(torch, dtype), options.precision, recurrent=True)
    for I, H in options.layer:
        shape = Shape(I, H, options.layers, directions, 0, options.batch, features, dtype, precision, options.train)
        shape = shape if options.cell is None else shape._replace(cell=options.cell.key)
        if options.dry_run:
            ways = WAYS[: 1 + shape.train]
            found = (tuning.contenders(shape, options.steps, device, way) for way in ways)
            names = dict.fromkeys(name for of_way in found for name in of_way)
            print(f"{shape}, T = {options.steps}:", *names, sep="\n  ")
        else:
            print(tuning.tune_shape(shape, options.steps, device, options.budget))
    return 0


def _named_cell(text: str) -> Any:
    """Return the `cells.Cell` of this name in the catalogue, or in a module, which may be in the working folder."""
    from .cells import Cell, catalogue

    module, _, name = text.rpartition(":")
    sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module) if module else catalogue, name)
    except (ImportError, AttributeError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not isinstance(found, Cell):
        raise argparse.ArgumentTypeError(f"{text} is no cell, as lstm_triton.cell declares them")
    return found


def _sizes(text: str) -> tuple[int, int]:
    I, _, H = text.partition("x")
    return int(I), int(H)
