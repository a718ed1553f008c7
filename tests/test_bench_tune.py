"""Tuning: its candidates, that each of them is checked, and the table of what was found."""

import pytest
from support.benches import CPU, FakeClock

from lstm_triton.bench import tune
from lstm_triton.bench.cases import Case


class Idle(FakeClock):
    """Calls nothing: the interpreter is for results, not for times."""

    def sample(self, call, n):
        return 2.0, 3.0


@pytest.mark.parametrize("kernel", tune.KERNELS)
def test_tuning_candidates_are_distinct_and_the_shipped_one_is_first(kernel):
    shape = {"form": "cell", "length": 1} if kernel.startswith("cell") else {"form": "layer", "length": 2}
    for H, B, dtype in ((768, 16, "bfloat16"), (128, 1, "float32"), (2048, 256, "float16")):
        case = Case("tune", H, B, dtype=dtype, precision="tf32", **shape)
        found = tune.candidates(kernel, case, (132, 232448, 9))
        assert len(found) > 2 and len(set(found)) == len(found)
        if kernel.startswith("sequence"):
            assert all(c.persistent == found[0].persistent for c in found)
            assert all(
                c.programs * c.block_h >= H and (not c.persistent or c.programs * c.groups <= 132) for c in found
            )


@pytest.mark.parametrize("kernel", ["cell forward", "sequence forward"])
def test_tuning_checks_every_candidate(kernel):
    mode = "train" if kernel.endswith("backward") else "forward"
    shape = {"form": "cell", "length": 1} if kernel.startswith("cell") else {"form": "layer", "length": 2}
    case = Case("tune", 16, 2, mode=mode, dtype="float32", precision="tf32", **shape)
    told = []
    keep = slice(0, 2)
    original = tune.candidates
    tune.candidates = lambda *arguments: original(*arguments)[keep]
    try:
        tune.sweep(kernel, case, CPU, Idle(), lambda k, result: told.append((k, result)), seconds=0.0)
    finally:
        tune.candidates = original
    assert [k for k, _ in told] == [0, 0, 1, 1] and told[1][1].us == 2.0, told
    assert told[1][1].gain == 0.0


def test_the_tuning_table_names_gpu_date_and_gain():
    result = tune.Result({"num_warps": 4, "block_b": 16}, None, 8.0, 10.0)
    text = tune.table([("cell forward", Case("tune", 512, 16, 1, form="cell"), result)], "GPU X", "2030-01-02")
    assert "GPU X, 2030-01-02, +25.0%" in text and "num_warps=4, block_b=16" in text
    assert "No candidate" in tune.table([], "GPU X", "2030-01-02")
    assert tune.run("cpu", None, None, None, None) == 2
