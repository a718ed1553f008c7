"""Faults put into the sequence kernels, each of which has to show in the code compiled ahead of time.

In a process without the interpreter, which cannot show what the threads of one program do among themselves: this file is also
the script that it runs.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import re
import tempfile
from pathlib import Path

import pytest
import torch
from support.process import run_without_interpreter

pytestmark = pytest.mark.long


def test_faults_show_in_the_compiled_code():
    assert "every mutant found" in run_without_interpreter(__file__)


def _find_mutants():
    from support.aot import Report
    from support.aot_sequence import Case, choose, faults, loads_behind_barrier, loads_of_a_step
    from support.fake_driver import fake_driver

    from lstm_triton.kernels import search
    from lstm_triton.kernels.specialization import compile_for

    search._IN_BAND = (False,)
    for way in ("forward", "backward"):
        case = Case(way, 256, 16, 1, torch.bfloat16, "ieee")
        [expected], _ = loads_of_a_step(case, choose(case, 90).config)
        assert loads_behind_barrier(choose(case, 90).report.ptx) == [expected]
        with _mutated(way, functools.partial(_waiting_after_the_loads, way)):
            assert loads_behind_barrier(choose(case, 90).report.ptx) == []
    training = ("training",)
    for way, H, features, arch, change, fault in [
        ("forward", 768, training, 90, _loading_chunk_by_chunk, "loads at once, in more than"),
        ("backward", 768, training, 90, _loading_chunk_by_chunk, "loads at once, in more than"),
        ("forward", 768, training, 90, _loading_weights_in_every_step, "is W_hh among them?"),
        ("backward", 768, training, 90, _loading_weights_in_every_step, "is W_hh among them?"),
        ("backward", 256, training, 90, _computing_another_exponential, "exponentials, not"),
        ("forward", 256, ("resets", *training), 120, _loading_resets_on_the_way_to_the_product, "another width"),
    ]:
        case = Case(way, H, 16, 1, torch.bfloat16, "ieee", features)
        with _mutated(way, change):
            found = list(faults(case, *choose(case, arch)[:2]))
        assert any(fault in text for text in found), found
    case = Case("backward", 512, 16, 1, torch.bfloat16, "ieee")
    config = dataclasses.replace(choose(case, 90).config, max_registers=32)
    with fake_driver(90):
        report = Report(compile_for(case.problem, config), 90)
    assert report.local_memory_in_loops() and any("local memory" in text for text in faults(case, config, report))
    print("every mutant found")


def _waiting_after_the_loads(way, source):
    wait = re.search(r"        if counters_ptr is not None:\n            wait\(.*\n", source)[0]
    behind = {"forward": "        i, f, g, o, c_new, h = FORWARD", "backward": "        dh += dh_next"}[way]
    assert source.count(behind) == 1
    return source.replace(wait, "").replace(behind, wait + behind)


def _loading_weights_in_every_step(source):
    resident = r"    el(if RESIDENT:\n        for chunk in [\s\S]*?\n            \)\n)"
    load = re.search(resident, source)[1]
    product = re.search(r"        if IN_BAND:\n            (z = |# In the first step)", source)[0]
    again = "        weights = ()\n" + re.sub(r"^(?=.)", "    ", "    " + load, flags=re.MULTILINE)
    return source.replace(product, again + product)


def _loading_chunk_by_chunk(source):
    [of_rows] = re.findall(r"loaded = (load_rows_chunk\(.*\))\n", source)
    source = source.replace("tl.dot(state[k], weights", f"tl.dot({of_rows}, weights")
    for of_columns in re.findall(r"loaded = (_load_state_chunk\(.*\)).*\n", source):
        source = source.replace("tl.dot(weights[first + k], state[k], z", f"tl.dot(weights[first + k], {of_columns}, z")
    return source


def _computing_another_exponential(source):
    """As many for each thread as if a warp computed another's units: which compiler would repeat them is its own affair."""
    return source.replace("c.to(ACC), dh, dc_step, at)", "c.to(ACC) + tl.exp(dh), dh, dc_step, at)")


def _loading_resets_on_the_way_to_the_product(source):
    load = re.search(r"    resets = resets_at\(t, .*\n", source)[0]
    use = "        h_rows, awaits = (), ()\n"
    return source.replace(use, 8 * " " + load.lstrip() + use)


@contextlib.contextmanager
def _mutated(way, change):
    """The kernel of this way with its module's source changed, and in it that of the product."""
    from lstm_triton.kernels import splits
    from lstm_triton.kernels.specialization import KERNELS

    kernel = KERNELS[way]
    path = Path(inspect.getsourcefile(kernel.fn))
    product = re.search(r"^from \.[\s\S]*", inspect.getsource(splits), re.MULTILINE)[0]
    source = re.sub(r"from \.splits import .*\n", "", path.read_text())
    source = source.replace("\n\n\n", f"\n\n\n{product}\n\n\n", 1)
    changed = change(source)
    assert source != changed
    with tempfile.TemporaryDirectory() as folder:
        mutated = Path(folder, path.name)
        mutated.write_text(re.sub(r"from \.(\w+) import", r"from lstm_triton.kernels.\1 import", changed))
        spec = importlib.util.spec_from_file_location("mutated", mutated)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        KERNELS[way] = getattr(module, kernel.fn.__name__)
        yield
        KERNELS[way] = kernel


if __name__ == "__main__":
    _find_mutants()
