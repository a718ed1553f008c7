"""Tuning: its candidates, that each of them is checked and timed as a provider, and the table of what was found."""

import dataclasses

import pytest
from support.benches import CPU, run
from test_bench_rows import make_row

from lstm_triton.bench import candidates, tune
from lstm_triton.bench.cases import Case, Task
from lstm_triton.kernels.device import device_figures
from lstm_triton.kernels.figures import figures

H100 = figures(132, 232448, (9, 0))


@pytest.mark.parametrize("kernel", candidates.PLACES)
def test_tuning_candidates_are_distinct_and_the_shipped_one_is_first(kernel):
    shape = {"form": "cell", "length": 1} if kernel.startswith("cell") else {"form": "layer", "length": 2}
    for H, B, dtype in ((768, 16, "bfloat16"), (128, 1, "float32"), (2048, 256, "float16")):
        case = Case("tune", H, B, dtype=dtype, precision="tf32", **shape)
        found = candidates.candidates(kernel, case, H100)
        assert len(found) > 2 and len(set(found)) == len(found)
        if kernel.startswith("sequence"):
            assert all(c.persistent == found[0].persistent for c in found)
            assert all(
                c.programs * c.block_h >= H and (not c.persistent or c.programs * c.groups <= 132) for c in found
            )


@pytest.mark.parametrize("kernel", ["cell forward", "sequence forward"])
def test_candidates_are_checked_and_timed_like_everyone(kernel, monkeypatch):
    shape = {"form": "cell", "length": 1} if kernel.startswith("cell") else {"form": "layer", "length": 2}
    case = Case(kernel, 16, 2, dtype="float32", precision="tf32", **shape)
    used, place = [], candidates._place(kernel)
    monkeypatch.setattr(candidates, "_use", lambda kernel, config: used.append(config))
    names = tuple(f"tune {kernel} {k}" for k in (0, 1))
    found = run(Task("tune", case, providers=names))
    assert [row.status for row in found.values()] == ["ok", "ok"] and found[names[0]].errors
    assert set(used) == set(candidates.candidates(kernel, case, device_figures(CPU))[:2])
    assert found[names[0]].backend_reason != found[names[1]].backend_reason and place[2] is candidates._place(kernel)[2]


def test_the_tuning_table_names_gpu_date_and_gain():
    case = Case("cell forward 1", 512, 16, 1, form="cell")
    shipped = make_row(case, "tune cell forward 0", 10.0, "tune")
    better = make_row(case, "tune cell forward 3", 8.0, "tune", backend_reason="num_warps=4, block_b=16")
    better = dataclasses.replace(better, date="2030-01-02T00:00:00+00:00")
    text = tune.table([shipped, better], "GPU X")
    assert "GPU X, 2030-01-02, +25.0%" in text and "num_warps=4, block_b=16" in text
    assert "No candidate" in tune.table([shipped], "GPU X")
