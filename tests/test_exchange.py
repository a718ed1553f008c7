"""Programs that exchange their state without a barrier, as compiled code, and mutants of what they do, which have to show."""

import math
import re
from dataclasses import replace

import pytest
import torch
from support import executor, layers, waiting
from support.waiting import BACKWARD, BF16, FORWARD, FP16, FP32, SEGMENTS, TF32, TF32X3

from lstm_triton import functional
from lstm_triton.kernels import device as device_module
from lstm_triton.kernels import layer_backward, search, stall

pytestmark = [pytest.mark.compiled, *waiting.marks]

AS_SEARCHED = {name: getattr(search, name) for name in ("_TILES", "_TILES_ON_CUDA_CORES")}


@pytest.fixture(autouse=True)
def in_band(monkeypatch):
    """Small layers are shared by several programs, as large ones are: 16 units each, on CUDA cores 4, and 8 rows a group."""
    monkeypatch.setattr(search, "_TILES", [(8, 16, 4)])
    monkeypatch.setattr(search, "_TILES_ON_CUDA_CORES", [(8, 4, 4)])
    monkeypatch.setattr(search, "_IN_BAND", (True,))
    monkeypatch.setattr(search, "remembered", {})


def _results(problem, recompute=False):
    results = layers.by_kernels(problem, "triton-persistent", recompute=recompute)
    assert all(config.in_band for config in search.remembered.values())
    return results


@pytest.mark.parametrize(
    "options",
    [
        dict(T=3, B=10, I=3, H=36, **TF32),  # a last chunk that is cut off, a last program of four units
        dict(T=2, B=9, I=3, H=24, D=2, **FP16),
        dict(T=3, B=10, I=3, H=36, D=2, **SEGMENTS, **FP32),
        dict(T=3, B=10, I=3, H=36, **SEGMENTS, **TF32X3),
    ],
    ids=["tf32", "two steps", "fp32", "tf32x3"],
)
def test_programs_compute_what_the_reference_does(options, device, count_launches):
    problem = layers.draw(**options, device=device)
    results = _results(problem)
    launches = count_launches()
    assert launches[FORWARD] == launches[BACKWARD] == 1
    layers.assert_as_accurate_as_torch(results, problem)


@pytest.mark.parametrize("tile", [(16, 8, 4), (16, 16, 8), (32, 16, 4)], ids=str)
def test_other_tiles(tile, monkeypatch, device):
    monkeypatch.setattr(search, "_TILES", [tile])
    monkeypatch.setattr(search, "_IN_BAND", (True, False))  # eight units are too few backward
    problem = layers.draw(T=3, B=18, I=3, H=48, **BF16, device=device)
    results = layers.by_kernels(problem, "triton-persistent")
    assert any(config.in_band for config in search.remembered.values())
    layers.assert_as_accurate_as_torch(results, problem)


def test_the_state_is_loaded_in_rounds(monkeypatch, device):
    """Whatever is asked for at once, the products are summed in one order."""
    problem = layers.draw(T=3, B=3, I=3, H=192, **FP16, device=device)
    results = []
    for most in ((384,), (24,)):
        monkeypatch.setattr(search, "remembered", {})
        monkeypatch.setattr(search, "_IN_FLIGHT_IN_BAND", most)
        results.append(_results(problem))
        rounds = [config.rounds(192 if key[0].way == "forward" else 768) for key, config in search.remembered.items()]
        assert rounds == ([1, 1] if most == (384,) else [2, 6])
    for name, one, many in zip(problem.names, *results):
        assert torch.equal(one, many), name
    layers.assert_as_accurate_as_torch(results[0], problem)


@pytest.mark.parametrize("kind", [FP32, TF32X3], ids=["fp32", "tf32x3"])
def test_full_precision_with_the_tiles_of_the_search(kind, monkeypatch, device, count_launches):
    for name, tiles in AS_SEARCHED.items():
        monkeypatch.setattr(search, name, tiles)
    problem = layers.draw(T=4, B=18, I=3, H=64, **kind, device=device)
    results = _results(problem)
    launches = count_launches()
    assert launches[FORWARD] == launches[BACKWARD] == 1
    layers.assert_as_accurate_as_torch(results, problem)
    for name, once, again in zip(problem.names, results, _results(problem)):
        assert torch.equal(once, again), name


def test_groups_that_do_not_fit_at_once_share_a_few_launches(monkeypatch, device, count_launches):
    """Of four programs each, of which ten SMs take two groups at once: five groups of one direction, six of two."""
    monkeypatch.setattr(device_module, "FREE_MULTIPROCESSORS", device_module.multiprocessor_count(device) - 10)
    for D, launches, options in ((1, 3, {}), (2, 3, SEGMENTS)):
        problem = layers.draw(T=3, B=34 // D, I=3, H=64, D=D, **BF16, **options, device=device)
        results = _results(problem)
        assert count_launches() == {FORWARD: launches, BACKWARD: launches}
        layers.assert_as_accurate_as_torch(results, problem)


def test_a_single_step_waits_for_nothing(device):
    problem = layers.draw(T=1, B=3, I=3, H=32, D=2, **BF16, **SEGMENTS, device=device)
    layers.assert_as_accurate_as_torch(layers.by_kernels(problem, "triton-persistent"), problem)


def test_recomputed_gates_are_several_launches(monkeypatch, device, count_launches):
    monkeypatch.setattr(layer_backward, "recomputed_ranges", lambda T: [(0, 3), (3, 6), (6, 7)])
    problem = layers.draw(T=7, B=3, I=3, H=32, D=2, **SEGMENTS, **TF32, device=device)
    results = _results(problem, recompute=True)
    assert count_launches()[BACKWARD] == 3
    layers.assert_as_accurate_as_torch(results, problem)


@pytest.mark.parametrize("kind, H", [(BF16, 32), (TF32, 36), (FP32, 64)], ids=["bf16", "tf32", "fp32"])
@pytest.mark.parametrize("bits", ["all set", "NaN", "infinite"])
def test_whatever_states_and_inputs_hold_nobody_waits_for_ever(kind, H, bits, device):
    """Bits all set are those of what is not there yet. They are NaN, and what follows from them is, in the same places."""
    T, B, dtype = 4, 9, kind["dtype"]
    x, h0, c0 = torch.randn(T, B, 3), torch.rand(1, B, H), torch.rand(1, B, H)
    weights = [torch.randn(4 * H, n).to(dtype) / math.sqrt(H) for n in (3, H)]
    x, h0, c0 = x.to(dtype), h0.to(dtype), c0.to(dtype)
    words = h0.view(torch.int32 if dtype == torch.float32 else torch.int16)
    for row in (1, 8):
        if bits == "all set":
            words[0, row, 2:9] = -1
        else:
            h0[0, row, 5] = x[2, row - 1, 1] = math.nan if bits == "NaN" else -math.inf
    found = []
    for backend, wide in (("triton-persistent", dtype), ("reference", torch.float64)):
        tensors = [t.to(device, wide).requires_grad_() for t in (x, h0, c0, *weights)]
        y, states = functional.lstm(
            tensors[0], tuple(tensors[1:3]), tensors[3:], backend=backend, precision=kind.get("precision")
        )
        gradients = torch.autograd.grad((y, *states), tensors, [torch.ones_like(t) for t in (y, *states)])
        found.append([t.detach().double() for t in (y, *states, *gradients)])
    assert all(config.in_band for config in search.remembered.values())
    for ours, expected in zip(*found):
        assert torch.equal(ours.isnan(), expected.isnan())
        torch.testing.assert_close(ours, expected, rtol=0.05, atol=0.02, equal_nan=True)
    assert found[0][0][:, 2:7].isfinite().all() and found[0][0].isnan().any() == (bits != "infinite")


# ---- mutants ---------------------------------------------------------------------------------------------------------

STORE = r"@stores st\.relaxed\.gpu\.global(\S*)\.b32"
SOME_PROGRAMS = (
    r".reg .b32 program; .reg .pred here; mov.u32 program, %ctaid.x; setp.ne.u32 here, program, 1;"
    r" and.pred stores, stores, here; \g<0>"
)
RACES = {
    "weak stores": (STORE, r"@stores st.global\1.b32"),
    "weak loads": (r"ld\.relaxed\.gpu\.global\.v4", "ld.global.v4"),
    "stores for the program alone": (STORE, r"@stores st.relaxed.cta.global\1.b32"),
}


def _run(executed, kernel, pattern, replacement):
    """The results of a layer, one of whose kernels is so changed, and the problem."""
    waiting.change(executed, kernel, [(pattern, replacement)])
    problem = layers.draw(T=4, B=3, I=4, H=64, **BF16)
    return _results(problem), problem


@pytest.mark.parametrize("kernel", [FORWARD, BACKWARD])
@pytest.mark.parametrize("mutant", RACES)
def test_accesses_that_are_not_morally_strong_are_races(kernel, mutant, executed):
    with pytest.raises(executor.KernelFault) as error:
        _run(executed, kernel, *RACES[mutant])
    assert {report.kind for report in error.value.reports} == {"race in global memory"}


@pytest.mark.parametrize("kernel", [FORWARD, BACKWARD])
def test_without_waiting_results_are_wrong(kernel, executed):
    results, problem = _run(executed, kernel, r"@there bra done", "bra done")
    with pytest.raises(AssertionError):
        layers.assert_as_accurate_as_torch(results, problem)


@pytest.mark.parametrize("kernel", [FORWARD, BACKWARD])
def test_a_wait_without_end_is_reported_with_its_line(kernel, executed):
    with pytest.raises(executor.KernelFault) as error:
        _run(executed, kernel, STORE, SOME_PROGRAMS)
    assert {report.kind for report in error.value.reports} == {"deadlock"}
    assert any("splits.py" in report.statement.source for report in error.value.reports)


def test_a_wait_without_end_traps_on_a_gpu(executed):
    """The polls are counted, and the last one allowed stores the word that names the kernel, then traps."""

    def few_polls(m):
        return "19" if m[0] == "16777216" else m.expand(SOME_PROGRAMS)

    try:
        with pytest.raises(RuntimeError) as error:
            _run(executed, FORWARD, rf"{STORE}|\b16777216\b", few_polls)
        assert str(error.value).startswith(f"lstm_triton: {FORWARD} timed out")
        assert {report.kind for report in error.value.__cause__.reports} == {"trap"}
    finally:
        stall.word(FORWARD, False).zero_()


# ---- the same launch again, and two at a time ------------------------------------------------------------------------

EXCHANGED = {FORWARD: "y_ptr", BACKWARD: "dz_ptr"}


@pytest.fixture
def two_runs(executed, monkeypatch):
    """Launches of both kernels by two layers of the same shape: {kernel: (one, the other)}."""
    if executed is None:
        pytest.skip("a GPU does not say what was launched")
    recorded, execute = [], executed.execute
    with monkeypatch.context() as patch:
        patch.setattr(executed, "execute", lambda launch: (recorded.append(launch), execute(launch))[1])
        for seed in (1, 2):
            _results(layers.draw(T=4, B=3, I=4, H=64, seed=seed, **BF16))
    return {kernel: [launch for launch in recorded if launch.kernel == kernel] for kernel in EXCHANGED}


def _tensors(launch):
    return {name: value.detach() for name, _, value in launch.arguments if torch.is_tensor(value)}


def _absent(launch):
    """What is exchanged, with all bits set, and a copy of what it held."""
    exchanged = _tensors(launch)[EXCHANGED[launch.kernel]]
    held = exchanged.clone()
    exchanged.view(torch.int16).fill_(-1)
    return exchanged, held


@pytest.mark.parametrize("kernel", EXCHANGED)
def test_a_launch_is_repeated_on_the_same_memory(kernel, two_runs, executed):
    """As a CUDA graph repeats it, with other inputs: the fill and the launch. Without the fill old states would be read."""
    first, second = two_runs[kernel]
    exchanged, right = _tensors(first)[EXCHANGED[kernel]], _tensors(second)[EXCHANGED[kernel]]
    for name, tensor in _tensors(first).items():
        if name not in (EXCHANGED[kernel], "stall_ptr"):
            tensor.copy_(_tensors(second)[name])
    executed.execute(first)
    assert not torch.equal(exchanged, right)
    for _ in range(2):
        _absent(first)
        executed.execute(first)
        assert torch.equal(exchanged, right)


def _at_once(one, other):
    """A launch of the programs of both, which know by their number whose arguments are theirs."""
    name, programs = one.kernel, one.grid[0]
    parameters = re.findall(rf"\.param[^,()]*{name}_param_\d+", one.ptx)
    more = [re.sub(r"_param_(\d+)", lambda m: f"_param_{int(m[1]) + len(parameters)}", text) for text in parameters]
    ptx = one.ptx.replace(parameters[-1], ",\n".join([parameters[-1], *more]))
    ptx = re.sub(
        rf"(ld\.param\S* +\t*[^,]*, \[{name}_param_)(\d+)\];",
        lambda m: f"@!second {m[0]} @second {m[1]}{int(m[2]) + len(parameters)}];",
        ptx,
    )
    ptx = re.sub(r"mov\.u32\s+(%r\d+), %ctaid\.x;", rf"\g<0> @second sub.u32 \1, \1, {programs};", ptx)
    which = f"{{ .reg .pred second; .reg .b32 number; mov.u32 number, %ctaid.x; setp.ge.u32 second, number, {programs};"
    ptx = re.sub(r"(?m)^\{", which, ptx, count=1)
    passed = [argument for argument in one.arguments if argument[1] != "constexpr"]
    passed += [("scratch", "i64", 0)] * (len(parameters) - len(passed))
    grid = (2 * programs, 1, 1)
    return replace(one, ptx=ptx, grid=grid, arguments=[*passed, *other.arguments], at_once=2 * programs)


@pytest.mark.parametrize("kernel", EXCHANGED)
def test_two_launches_run_at_the_same_time(kernel, two_runs, executed):
    """As in two streams, each with its own memory: their programs take turns in any order."""
    one, other = two_runs[kernel]
    results = [_absent(launch) for launch in (one, other)]
    assert not torch.equal(results[0][1], results[1][1])
    executed.execute(_at_once(one, other))
    for exchanged, right in results:
        assert torch.equal(exchanged, right)
