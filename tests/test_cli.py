"""The command line: what it says of the machine and of compiled kernels, and its exit codes."""

import json
import runpy
import sys
import types
from pathlib import Path

import pytest
import torch

from lstm_triton import cli, environment


def test_info_prints_the_line_and_the_listing(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lstm_triton", "info"])
    with pytest.raises(SystemExit, match="^0$"):
        runpy.run_module("lstm_triton", run_name="__main__")
    text = capsys.readouterr().out
    line = text.splitlines()[0]
    assert line == environment.summary() and (torch.cuda.is_available() or line.startswith("CPU only"))
    for word in (torch.__version__, "triton", "cudnn", "reference", "Compiled kernels", sys.version.split()[0]):
        assert word in text


def test_info_lists_the_compiled_kernels(tmp_path, monkeypatch):
    def compiled(variant, name, arch, size=0, damage=slice(None)):
        """A variant of a kernel, as Triton's cache keeps it."""
        folder = tmp_path / "cache" / variant
        folder.mkdir(parents=True)
        metadata = json.dumps({"target": {"backend": "cuda", "arch": arch, "warp_size": 32}, "name": name})
        (folder / f"{name}.json").write_text(metadata[damage])
        (folder / f"__grp__{name}.json").write_text(json.dumps({"child_paths": {}}))
        (folder / f"{name}.cubin").write_bytes(bytes(size))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assert environment.info().endswith(f"Compiled kernels\n  none yet; they will be kept in {tmp_path / 'cache'}")
    compiled("A", "another_kernel", 90)
    assert "Compiled kernels\n  none yet\n" in environment.info()
    compiled("B", "_lstm_cell_forward_kernel", 90, size=3 * 2**20)
    compiled("C", "_lstm_cell_forward_kernel", 90, size=2**20)
    compiled("D", "_lstm_cell_forward_kernel", 120)
    compiled("E", "_readout_forward_kernel", 90)
    compiled("F", "_readout_forward_kernel", 90, damage=slice(12))
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
    def properties(index):
        return types.SimpleNamespace(name=f"GPU {index}", major=9, minor=0, multi_processor_count=132)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    assert environment.summary().startswith("GPU 0 (sm_90, 132 SMs)")
    for device, name in (("cuda", "GPU 0 "), ("cuda:1", "GPU 1 "), ("cpu", "CPU, chosen instead of the GPU")):
        assert environment.summary(torch.device(device)).startswith(name)


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["check", "--device", "tpu"]])
def test_wrong_arguments_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: lstm-triton" in capsys.readouterr().err


def test_without_the_benchmark_its_command_says_so(capsys, monkeypatch):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["bench", "--anything"]) == 2
    assert "python -m lstm_triton.bench" in capsys.readouterr().err
