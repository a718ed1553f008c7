"""The launch configurations of the sequence kernels, over devices, sizes, dtypes: what each must hold to be launched at all."""

import itertools

import pytest
import torch

from lstm_triton.kernels.config import cdiv, uses_tensor_cores
from lstm_triton.kernels.sequence_config import (
    DeviceLimits,
    sequence_backward_config,
    sequence_forward_config,
)

# Multiprocessors, KiB of shared memory, generation.
DEVICES = {
    "A100": (108, 163, 8),
    "RTX 3090": (82, 99, 8),
    "RTX 4090": (128, 99, 8),
    "H100": (132, 227, 9),
    "B200": (148, 227, 10),
    "RTX 5090": (170, 99, 12),
    "a slice of an H100": (60, 227, 9),
    "its smallest slice": (14, 227, 9),
}
KINDS = (
    (torch.bfloat16, "ieee"),
    (torch.float16, "ieee"),
    (torch.float32, "tf32"),
    (torch.float32, "tf32x3"),
    (torch.float32, "ieee"),
    (torch.float64, "ieee"),
)
# Around every tile, and on: odd and even ones, to where no kernel keeps its weights on chip.
UNITS = sorted(
    {1, 2, 8, 9, *range(29, 1600, 59), *(n + k for n in (16, 32, 64, 128, 512, 1024, 1536) for k in (-1, 0, 1))}
)
ROWS = (1, 16, 17, 64, 256, 1024)
WAYS = (sequence_forward_config, sequence_backward_config)


def _bytes(way, config, H, itemsize):
    """What a program takes of shared memory: W_hh, and in one place pieces of state, padded by the tile, or room to work."""
    forward = way is sequence_forward_config
    inner, columns = (H, 4 * config.block_h) if forward else (4 * H, config.block_h)
    depth = config.split_k * config.block_k
    weights, state = cdiv(inner, depth) * depth * columns * itemsize, config.block_b * depth * itemsize
    converted = (
        16 * config.block_b * config.block_h if forward else 4 * config.split_k * config.block_b * config.block_h
    )
    return weights + max(config.in_flight * state, converted)


def _tensor_memory(way, config, H):
    """Columns of a program on sm_100: [4 * block_h, block_b] in float32 for each chunk, in columns of 128 lanes."""
    if way is not sequence_forward_config or 4 * config.block_h < 64:
        return 0  # such products run on mma.sync
    columns = 32
    while columns < cdiv(H, config.block_k) * config.block_b * 4 * config.block_h / 128:
        columns *= 2
    return columns


def _limits(device):
    multiprocessors, kib, generation = DEVICES[device]
    return DeviceLimits(multiprocessors, kib * 1024, generation)


@pytest.mark.long
@pytest.mark.parametrize("device", DEVICES)
def test_every_configuration_can_be_launched(device):
    limits = _limits(device)
    for (dtype, precision), H, B, D, way in itertools.product(KINDS, UNITS, ROWS, (1, 2), WAYS):
        config = way.__wrapped__(B, H, D, dtype, precision, limits)
        case = way.__name__, H, B, D, dtype, precision, config
        if not config.persistent:
            assert config == way(B, H, D, dtype, precision, limits, stepwise=True), case
        else:
            assert uses_tensor_cores(dtype, precision), case
            assert config.programs == 1 or config.programs * config.groups <= limits.multiprocessors, case
            assert _bytes(way, config, H, dtype.itemsize) <= limits.shared_memory, case
        if config.persistent and limits.generation == 10:
            columns = _tensor_memory(way, config, H)
            assert columns <= 512, case
            if config.programs > 1:
                per_sm = min(228 * 1024 // (_bytes(way, config, H, dtype.itemsize) + 1024), 64 // config.num_warps)
                assert columns * per_sm <= 512, case
        assert config.programs * config.block_h >= H > (config.programs - 1) * config.block_h, case
        assert config.groups == cdiv(B, config.block_b) * D, case
        assert config == way(B, H, D, dtype, precision, limits), case
        for tile in (config.block_b, config.block_h, config.block_k, config.split_k):
            assert tile & (tile - 1) == 0, case


@pytest.mark.parametrize("way", WAYS)
def test_large_layers_run_in_one_launch(way):
    """The sweep would also hold if every configuration were one launch per step."""
    h100 = _limits("H100")
    for dtype, precision, H, B in (
        (torch.bfloat16, "ieee", 512, 64),
        (torch.bfloat16, "ieee", 1024, 16),
        (torch.bfloat16, "ieee", 1536, 1),
        (torch.float32, "tf32", 768, 16),
    ):
        assert way(B, H, 1, dtype, precision, h100).persistent, (H, B)
    for dtype, precision, H, B in (
        (torch.bfloat16, "ieee", 1600, 1),
        (torch.bfloat16, "ieee", 1024, 256),
        (torch.float32, "ieee", 64, 1),
    ):
        assert not way(B, H, 1, dtype, precision, h100).persistent, (H, B)


@pytest.mark.long
@pytest.mark.parametrize("device", ["H100", "A100", "RTX 4090"])
def test_smaller_layers_run_in_one_launch_too(device):
    """As docs/design.md says beside the largest."""
    for (dtype, precision), D, B in itertools.product(KINDS[::2][:2], (1, 2), (1, 16, 64, 256)):
        both = [
            all(way.__wrapped__(B, H, D, dtype, precision, _limits(device)).persistent for way in WAYS)
            for H in range(1, 1601)
        ]
        aligned = [H for H, fits in enumerate(both, 1) if fits and H % 32 == 0]
        assert aligned, (dtype, D, B)
        assert all(both[: aligned[-1]]), (dtype, D, B, 1 + both.index(False))
