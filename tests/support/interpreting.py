"""What the tests of the interpreter share."""

import torch


def assert_identical(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bit for bit, except that one NaN is as good as another."""
    assert actual.dtype == expected.dtype
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    assert torch.equal(actual.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(actual[number].view(integer), expected[number].view(integer))
