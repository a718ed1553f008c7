"""The fake driver runs Triton's real JIT: what is specialised, compiled and launched, without a GPU.

The checks run in one process of their own, without the interpreter.
"""

import pytest
import torch
import triton
import triton.language as tl
from support.fake_driver import count_compiled, fake_driver
from support.process import run_checks, run_without_interpreter
from triton.runtime import driver as drivers
from triton.runtime.errors import OutOfResources


@pytest.mark.long
def test_jit_without_a_gpu():
    assert "checks passed" in run_without_interpreter(__file__)


def test_the_interpreter_takes_no_driver(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), fake_driver():
        pass


@triton.jit
def _scale_kernel(x_ptr, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + i, 2 * tl.load(x_ptr + i, mask=i < size), mask=i < size)


@triton.jit(do_not_specialize=["size"])
def _unspecialised_kernel(x_ptr, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + i, 2 * tl.load(x_ptr + i, mask=i < size), mask=i < size)


def check_launches_are_recorded_and_not_executed():
    x = torch.ones(64)
    with fake_driver() as driver:
        _scale_kernel[(4,)](x, 64, BLOCK=16)
        _scale_kernel[lambda meta: (64 // meta["BLOCK"], 3)](x, 64, BLOCK=32)
        assert driver.launches == [("_scale_kernel", (4, 1, 1)), ("_scale_kernel", (2, 3, 1))], driver.launches
        assert driver.launches[1].kernel == "_scale_kernel" and driver.launches[1].grid == (2, 3, 1)
        compiled = _scale_kernel.warmup(x, 64, BLOCK=16, grid=(1,))
        assert len(driver.launches) == 2, "a warm-up launches nothing"
        compiled[(7, 1, 1)](x, 64, 16)
        assert driver.launches[2:] == [("_scale_kernel", (7, 1, 1))]
    assert x.eq(1).all()


def check_specialisations_are_counted():
    x = torch.ones(64)
    with fake_driver(compiling=False):
        assert count_compiled(_scale_kernel) == 0
        counts = []
        for size in (33, 34, 63, 1, 16, 32, 64, 2**31):
            _scale_kernel[(1,)](x, size, BLOCK=16)
            counts.append(count_compiled(_scale_kernel))
        # any size; 1 is a constant; divisible by 16; 64 bits
        assert counts == [1, 1, 1, 2, 3, 3, 3, 4], counts
        _scale_kernel[(1,)](x[1:], 33, BLOCK=16)
        assert count_compiled(_scale_kernel) == 5, "a pointer that is not aligned to 16 bytes"
        _scale_kernel[(1,)](x, 33, BLOCK=32)
        assert count_compiled(_scale_kernel) == 6


def check_sizes_that_are_not_specialised_do_not_recompile():
    x = torch.ones(64)
    with fake_driver(compiling=False):
        for size in (33, 1, 16, 64):
            _unspecialised_kernel[(1,)](x, size, BLOCK=16)
        assert count_compiled(_unspecialised_kernel) == 1


def check_the_code_is_for_the_architecture_asked_for():
    for arch in (80, 90, 120):
        with fake_driver(arch=arch):
            compiled = _scale_kernel[(1,)](torch.ones(64), 64, BLOCK=16)
            assert count_compiled(_scale_kernel) == 1, "each context starts anew"
        assert f".target sm_{arch}" in compiled.asm["ptx"]


@triton.jit
def _dot_kernel(x_ptr, K, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, K, BLOCK):
        x = tl.load(x_ptr + i[:, None] * K + (k + i)[None, :])
        acc = tl.dot(x, x.T, acc)
    tl.store(x_ptr + i[:, None] * K + i[None, :], acc.to(tl.bfloat16))


def check_shared_memory_is_limited_as_on_the_device():
    x = torch.ones(128, 1024, dtype=torch.bfloat16)
    with fake_driver(arch=90) as driver:
        _dot_kernel[(1,)](x, 1024, BLOCK=128, num_stages=4)
        assert len(driver.launches) == 1
    with fake_driver(arch=86) as driver:
        try:
            _dot_kernel[(1,)](x, 1024, BLOCK=128, num_stages=5)
        except OutOfResources as error:
            assert "shared memory" in str(error), error
        else:
            raise AssertionError("more shared memory than the device has")
        assert driver.launches == []


def check_properties_are_those_asked_for():
    with fake_driver(arch=86, sm_count=28):
        active = drivers.active
        properties = active.utils.get_device_properties(active.get_current_device())
        assert properties["multiprocessor_count"] == 28 and properties["max_shared_mem"] == 99 * 1024
        assert active.get_current_target().arch == 86


def check_the_previous_driver_comes_back():
    before = drivers._active
    with fake_driver() as outer:
        try:
            with fake_driver() as inner:
                assert drivers.active is inner
                raise ZeroDivisionError
        except ZeroDivisionError:
            assert drivers.active is outer
    assert drivers._active is before


if __name__ == "__main__":
    run_checks(globals())
