"""Synchronisation taken out of the compiled kernels, one piece at a time: does the executor notice? `make mutants`.

`python tests/mutants.py [sm_80 ...]` compiles cell, readout and sequence kernels, both ways, and executes each as it
is and with one barrier, fence, wait, release or acquire removed or weakened. It prints what is not noticed, and exits with 1 if
that is anything but

* redundant: a barrier with no access to memory between it and its neighbours on one side; a wgmma fence with no register of its
  products written since the last one; a wait that another follows on every path (what is in flight is not used before that, or
  the executor would have reported it);
* unknown: a barrier where other barriers may order the same accesses; a wgmma fence that another path may need.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from support import layers
from support.executor import ExecutingDriver, Launch, executing
from support.executor.driver import Executed
from support.executor.ptx import Kernel, Statement, parse
from support.problems import cells, readouts

TARGETS = ("sm_80", "sm_90", "sm_100")
BF16, TF32 = {"dtype": torch.bfloat16}, {"dtype": torch.float32, "precision": "tf32"}


def _layer() -> None:
    with layers.products_of_warpgroups():
        layers.by_kernels(layers.draw(3, 18, 5, 136, **BF16), "triton-persistent")


# Kernel, and what launches it: small, with several chunks and, in sequences, programs that wait for each other.
PROBLEMS = {
    "_lstm_cell_forward_kernel": lambda: cells.by_kernels(cells.draw(17, 150, 136, **BF16)),
    "_lstm_cell_backward_kernel": lambda: cells.by_kernels(cells.draw(40, 48, 64, **TF32)),
    "_readout_forward_kernel": lambda: readouts.by_kernels(readouts.draw(17, 150, 300, **BF16)),
    "_readout_backward_kernel": lambda: readouts.by_kernels(readouts.draw(17, 150, 300, **BF16)),
    "_lstm_sequence_forward_kernel": _layer,
    "_lstm_sequence_backward_kernel": _layer,
}
# What is looked for in a line, what stands there instead, and what it is called.
CHANGES = [
    (r"(?:@!?%\w+\s+)?bar\.(?:warp\.)?sync\s+-?\d+;", "", "barrier"),
    (r"fence\.proxy\.async\.shared::cta;", "", "proxy fence"),
    (r"wgmma\.fence\.sync\.aligned;", "", "wgmma fence"),
    (r"(cp\.async|wgmma)(\.wait_group\S*)\s+(\d+);", lambda m: f"{m[1]}{m[2]} {int(m[3]) + 1};", "wait"),
    (r"tcgen05\.wait::\w+\.sync\.aligned;", "", "tcgen05 wait"),
    (r"mbarrier\.try_wait\S*\s+(\w+),[^;]*;", r"mov.pred \1, -1;", "mbarrier wait"),
    (r"\.release\b", ".relaxed", "release"),
    (r"\.acquire\b", ".relaxed", "acquire"),
]
_ACCESS = re.compile(
    r"(ld|st|atom|red)\.(?!param)|cp\.async\.c[ag]|(ld|st)matrix|wgmma\.mma|tcgen05\.(mma|ld|st|commit|alloc)|mbarrier"
)
_BARRIER = re.compile(r"bar(rier)?(\.warp)?\.sync")
_END = re.compile(r"ret|exit")


@dataclass(frozen=True)
class Mutant:
    line: int
    kind: str
    text: str  # of the line, as it was
    ptx: str


def mutants(ptx: str) -> Iterator[Mutant]:
    lines = ptx.split("\n")
    for n, line in enumerate(lines):
        for pattern, replacement, kind in CHANGES:
            changed, found = re.subn(pattern, replacement, line)
            if found:
                yield Mutant(n + 1, kind, line.strip(), "\n".join([*lines[:n], changed, *lines[n + 1 :]]))


class _Paths:
    """The ways through a kernel."""

    def __init__(self, kernel: Kernel):
        self.statements = kernel.statements
        self.after: list[list[int]] = []
        for k, s in enumerate(self.statements):
            branches = s.opcode in ("bra", "bra.uni")
            ends = s.guard is None and (branches or s.opcode in ("ret", "exit", "trap"))
            self.after.append(([kernel.target(s)] if branches else []) + ([] if ends else [k + 1]))
        self.before: list[list[int]] = [[] for _ in self.statements]
        for k, following in enumerate(self.after):
            for f in following:
                self.before[f].append(k)

    def between(self, line: int, stop: re.Pattern, backward: bool = False) -> list[Statement]:
        """All statements that a path from this line comes by before one that `stop` matches."""
        edges = self.before if backward else self.after
        to_visit = list(edges[next(k for k, s in enumerate(self.statements) if s.line == line)])
        seen: set[int] = set()
        while to_visit:
            k = to_visit.pop()
            if k not in seen and not stop.match(self.statements[k].opcode):
                seen.add(k)
                to_visit += edges[k]
        return [self.statements[k] for k in seen]


def why_not_noticed(mutant: Mutant, paths: _Paths) -> str:
    """What can be seen from the code about a mutant that nobody misses: see the module."""

    def between(stop: str | re.Pattern, backward: bool = False) -> list[Statement]:
        return paths.between(mutant.line, re.compile(stop), backward)

    redundant = False
    if mutant.kind == "barrier":
        sides = (between(_BARRIER), between(_BARRIER, backward=True))
        redundant = any(not any(_ACCESS.match(s.opcode) for s in side) for side in sides)
    if mutant.kind == "wgmma fence":
        before, behind = between(r"wgmma\.fence", backward=True), between(r"wgmma\.fence")
        used = {name for s in behind if s.opcode.startswith("wgmma.mma") for name in re.findall(r"%r\d+", s.text)}
        results = [s.operands[0] for s in before if s.operands and not s.opcode.startswith(("st", "wgmma"))]
        redundant = not used & {name for result in results for name in re.findall(r"%\w+", result)}
    if mutant.kind == "wait":
        again = r"cp\.async\.wait" if "cp.async" in mutant.text else r"wgmma\.wait"
        redundant = not any(_END.match(s.opcode) for s in between(again))
    if redundant:
        return "redundant"
    return "unknown" if mutant.kind in ("barrier", "wgmma fence") else "not noticed"


class _MutatingDriver(ExecutingDriver):
    """Executes one kernel with each of its mutants on what its first launch is given, and then as it is."""

    def __init__(self, target: str, kernel: str, is_in_sample: Callable[[int, Mutant], bool]):
        super().__init__(int(target.removeprefix("sm_")))
        self.kernel, self.is_in_sample = kernel, is_in_sample
        self.found: list[tuple[Mutant, str]] = []

    def execute(self, launch: Launch) -> Executed:
        if launch.kernel == self.kernel and not self.found:
            self._mutate(launch)
        return super().execute(launch)

    def _mutate(self, launch: Launch) -> None:
        storages = [v.untyped_storage() for _, _, v in launch.arguments if hasattr(v, "untyped_storage")]
        before = [s.clone() for s in storages]

        def run(ptx: str) -> tuple[bool, list[torch.Tensor]]:
            """Whether something is reported, and the memory afterwards."""
            for s, b in zip(storages, before):
                s.copy_(b)
            self.raises = False
            executed = super(_MutatingDriver, self).execute(replace(launch, ptx=ptx))
            self.raises = True
            return bool(executed.reports), [torch.tensor([], dtype=torch.uint8).set_(s.clone()) for s in storages]

        paths = _Paths(parse(launch.ptx))
        reported, right = run(launch.ptx)
        assert not reported, "the kernel as it is"
        for number, mutant in enumerate(mutants(launch.ptx)):
            if self.is_in_sample(number, mutant):
                reported, memory = run(mutant.ptx)
                differs = not all(map(torch.equal, memory, right))
                outcome = "noticed" if reported or differs else why_not_noticed(mutant, paths)
                self.found.append((mutant, outcome))
        for s, b in zip(storages, before):
            s.copy_(b)


def survey(targets: Iterable[str], is_in_sample=lambda number, mutant: True) -> Counter[tuple[str, str]]:
    """(kind, outcome) -> mutants, of all kernels; each that is not noticed is printed."""
    outcomes: Counter[tuple[str, str]] = Counter()
    for target in targets:
        for kernel, launch in PROBLEMS.items():
            driver = _MutatingDriver(target, kernel, is_in_sample)
            with executing(driver=driver):
                launch()
            assert driver.found, f"{kernel} was not launched, or has no synchronisation"
            for mutant, outcome in driver.found:
                outcomes[mutant.kind, outcome] += 1
                if outcome != "noticed":
                    print(f"{target} {kernel} line {mutant.line}: {mutant.kind} {outcome}: `{mutant.text}`")
            print(f"{target} {kernel}: {len(driver.found)} mutants", flush=True)
    return outcomes


def is_in_sample(number: int, mutant: Mutant) -> bool:
    """Of the mutants of a kernel, which ones the suite executes."""
    return number % 16 == 0 or mutant.kind in ("release", "acquire")


def main(targets: list[str]) -> int:
    outcomes = survey(targets or TARGETS)
    for (kind, outcome), number in sorted(outcomes.items()):
        print(f"{kind}: {number} {outcome}")
    return int(any(outcome == "not noticed" for _, outcome in outcomes))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
