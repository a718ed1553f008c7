"""The command line, and the accuracy check behind it."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch

from lstm_triton import check, cli, environment, functional, reference


def test_info_prints_the_line_and_the_listing(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    line = text.splitlines()[0]
    assert line == environment.summary() and (torch.cuda.is_available() or line.startswith("CPU only"))
    for word in (torch.__version__, "triton", "cudnn", "reference", "Compiled kernels", sys.version.split()[0]):
        assert word in text


def _compiled(folder, variant, name, arch, size=0, metadata=None):
    """A variant of a kernel, as Triton's cache keeps it."""
    (folder / variant).mkdir(parents=True)
    target = {"backend": "cuda", "arch": arch, "warp_size": 32}
    (folder / variant / f"{name}.json").write_text(
        json.dumps({"target": target, "name": name}) if metadata is None else metadata
    )
    (folder / variant / f"__grp__{name}.json").write_text(json.dumps({"child_paths": {}}))
    (folder / variant / f"{name}.cubin").write_bytes(bytes(size))


def test_info_lists_the_compiled_kernels(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assert environment.info().endswith(f"Compiled kernels\n  none yet; they will be kept in {tmp_path / 'cache'}")
    _compiled(tmp_path / "cache", "A", "another_kernel", 90)
    assert "Compiled kernels\n  none yet\n" in environment.info()
    _compiled(tmp_path / "cache", "B", "_lstm_cell_forward_kernel", 90, size=3 * 2**20)
    _compiled(tmp_path / "cache", "C", "_lstm_cell_forward_kernel", 90, size=2**20)
    _compiled(tmp_path / "cache", "D", "_lstm_cell_forward_kernel", 120)
    _compiled(tmp_path / "cache", "E", "_readout_forward_kernel", 90)
    _compiled(tmp_path / "cache", "F", "_readout_forward_kernel", 90, metadata='{"target": ')
    assert environment.info().split("Compiled kernels\n")[1].splitlines() == [
        "  _lstm_cell_forward_kernel  sm_120  1 variant",
        "  _lstm_cell_forward_kernel  sm_90   2 variants",
        "  _readout_forward_kernel    sm_90   1 variant",
        "  _readout_forward_kernel    unreadable  1 variant",
        f"  in {tmp_path / 'cache'}: 4.0 MiB, other packages' kernels included",
    ]


def test_info_finds_triton_s_own_cache_folder(tmp_path, monkeypatch):
    knobs = pytest.importorskip("triton.knobs")
    for variables in ({}, {"TRITON_HOME": str(tmp_path)}, {"TRITON_CACHE_DIR": str(tmp_path / "cache")}):
        for name in ("TRITON_HOME", "TRITON_CACHE_DIR"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert environment.cache_folder() == Path(knobs.cache.dir)


def test_summary_does_not_name_a_gpu_that_is_not_used(monkeypatch):
    names = ("First GPU", "Second GPU")

    def properties(index):
        return types.SimpleNamespace(name=names[index], major=9, minor=0, multi_processor_count=132)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    assert environment.summary().startswith("First GPU (sm_90, 132 SMs)")
    assert environment.summary(torch.device("cuda")).startswith("First GPU")
    assert environment.summary(torch.device("cuda:1")).startswith("Second GPU")
    on_cpu = environment.summary(torch.device("cpu"))
    assert on_cpu.startswith("CPU, chosen instead of the GPU") and "First" not in on_cpu


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["check", "--device", "tpu"]])
def test_wrong_arguments_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: lstm-triton" in capsys.readouterr().err


def test_bench_runs_the_harness_or_says_that_there_is_none(capsys, monkeypatch):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["bench", "--anything"]) == 2
    assert "python -m lstm_triton.bench" in capsys.readouterr().err


def _cell_with(change):
    """functional.lstm_cell as plain PyTorch, with a fault put into its results."""

    def lstm_cell(x, hx, *weights, backend):
        assert backend == "triton"
        return change(*reference.lstm_cell(x, *hx, *weights))

    return lstm_cell


def _run_with(monkeypatch, change):
    monkeypatch.setattr(functional, "lstm_cell", _cell_with(change))
    return check.run_here("cpu", "a test")


def test_check_passes_plain_pytorch_and_survives_json(monkeypatch):
    report = _run_with(monkeypatch, lambda h, c: (h, c))
    assert check.Report.from_json(report.to_json()) == report
    float32 = [row for row in report.rows if row.dtype in ("float32", "float64")]
    assert len(float32) == 2 * len(check.QUANTITIES)
    assert not any(row.failures for row in float32)


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        (lambda h, c: (h * (1 + 1e-4), c), {"h", "dx", "dh", "dc", "dW_ih", "dW_hh", "db_ih", "db_hh"}),
        (lambda h, c: (h, c + 1e-4 * c.detach()), {"c"}),
        (lambda h, c: (h.detach() + 0.9999 * (h - h.detach()), c), {"dx", "dh", "dc", "dW_ih", "dW_hh"}),
        (lambda h, c: (torch.where(torch.arange(len(h))[:, None] == 0, torch.nan, h), c), {"h"}),
    ],
    ids=["wrong h", "wrong c", "wrong gradient", "NaN"],
)
def test_check_fails_on_a_wrong_cell(monkeypatch, change, failing):
    report = _run_with(monkeypatch, change)
    assert not report.passed
    assert failing <= {row.quantity for row in report.rows if row.dtype == "float32" and row.failures}
    assert "FAILED float32" in check.table(report)


def test_check_exit_codes(monkeypatch, capsys):
    good = check.Row("float32", "h", 1e-7, 1e-8, 1e-7, 1e-8, ())
    rows = [check.Row("float32", q, 1e-7, 1e-8, 1e-7, 1e-8, ()) for q in check.QUANTITIES[1:]]
    monkeypatch.setattr(check, "run", lambda device, seed: check.Report("a test", 1, (good, *rows)))
    assert check.main([]) == 0
    bad = check.Row("float32", "h", 1.0, 1.0, 1e-7, 1e-8, ("B=1",))
    monkeypatch.setattr(check, "run", lambda device, seed: check.Report("a test", 1, (bad, *rows)))
    assert check.main([]) == 1
    assert "FAILED float32 h: B=1" in capsys.readouterr().out

    def unavailable(device, seed):
        raise check.CheckUnavailable("no reason")

    monkeypatch.setattr(check, "run", unavailable)
    assert check.main([]) == 2
    assert "no reason" in capsys.readouterr().err
