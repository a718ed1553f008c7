"""The suites: which cases, how large, and in which order, so that a run that is cut short already tells the story."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from . import workloads
from .cases import Case, Task

# "gpu": real sizes. "cpu": what a CPU does in minutes. "tiny": for the tests of the harness itself.
SCALES = ("gpu", "cpu", "tiny")


@dataclass(frozen=True)
class Sizes:
    """The sizes that a scale gives the suites."""

    hidden: tuple[int, ...]  # the headline first
    batch: int
    length: int
    dtypes: tuple[str, ...]
    grid: tuple[tuple[int, ...], tuple[int, ...], int]  # hidden sizes, batches, length of the heat map
    lengths: tuple[int, ...]
    cell_hidden: tuple[int, ...]
    cell_batch: tuple[int, ...]
    compiled: float  # torch.compile, seconds for each shape, at sizes whose ranks add up to at most this
    features: tuple[int, int, int]  # hidden, batch, length
    memory: tuple[tuple[int, int, int], ...]
    accuracy: tuple[tuple[int, int, int], ...]
    most_flops: float  # of a real workload


SIZES = {
    "gpu": Sizes(
        hidden=(768, 512, 1024, 256, 128, 2048, 64, 1536, 32, 384, 640, 192, 96, 3072, 4096, 500),
        batch=16,
        length=1024,
        dtypes=("bfloat16", "float16", "float32"),
        grid=((512, 1024, 256, 128, 2048), (64, 1, 16, 256, 1024), 128),
        lengths=(256, 16, 4096, 1, 64, 1024, 16384, 70000),
        cell_hidden=(512, 1024, 128, 256, 2048, 64, 4096),
        cell_batch=(16, 1, 64, 256, 1024),
        compiled=float("inf"),
        features=(512, 64, 256),
        memory=((512, 64, 512), (1024, 16, 1024), (256, 1024, 64)),
        accuracy=((512, 16, 128), (1024, 16, 16), (128, 16, 1024), (512, 16, 1024), (19, 3, 7)),
        most_flops=float("inf"),
    ),
    "cpu": Sizes(
        hidden=(256, 64, 128, 512, 32),
        batch=8,
        length=32,
        dtypes=("float32",),
        grid=((128, 64, 256), (8, 1, 64), 16),
        lengths=(16, 1, 64, 256),
        cell_hidden=(128, 256, 64),
        cell_batch=(1, 16, 64),
        compiled=1,
        features=(128, 16, 32),
        memory=((128, 16, 64),),
        accuracy=((64, 4, 32), (19, 3, 7)),
        most_flops=2e9,
    ),
    "tiny": Sizes(
        hidden=(16, 8), batch=2, length=3, dtypes=("float32",), grid=((8,), (1, 2), 2), lengths=(2, 1), cell_hidden=(8,),
        cell_batch=(2,), compiled=0, features=(8, 3, 5), memory=((8, 2, 3),), accuracy=((5, 2, 3),), most_flops=2e6,
    ),
}  # fmt: skip

CELL_PROVIDERS = ("lstm_triton auto", "torch.nn.LSTMCell")

Ordered = list[tuple[float, Task]]


def _dtype_rank(sizes: Sizes, dtype: str) -> int:
    return sizes.dtypes.index(dtype)


def hidden_sizes(sizes: Sizes, suite: str) -> Ordered:
    """The headline: cuDNN across hidden sizes, input size equal to hidden size."""
    found: Ordered = []
    for rank, H in enumerate(sizes.hidden):
        for dtype in sizes.dtypes:
            for mode in ("forward", "train"):
                # At the first hidden size everything, then bfloat16 throughout, then the other dtypes.
                priority = 1.0 if rank == 0 else 2 + 0.05 * rank + 2 * _dtype_rank(sizes, dtype)
                executions = ("eager", "graph") if rank < 3 else ("eager",)
                case = Case(f"H{H}", H, sizes.batch, sizes.length, dtype=dtype, mode=mode)
                found.append((priority, Task(suite, case, executions=executions)))
    return found


def batch(sizes: Sizes, suite: str) -> Ordered:
    """The heat map: hidden size by batch."""
    hidden, batches, length = sizes.grid
    found: Ordered = []
    for i, B in enumerate(batches):
        for j, H in enumerate(hidden):
            for mode in ("forward", "train"):
                for dtype in sizes.dtypes:
                    rank = _dtype_rank(sizes, dtype)
                    case = Case(f"H{H} B{B}", H, B, length, dtype=dtype, mode=mode)
                    found.append((3 + 0.1 * (i + j) + 3 * rank, Task(suite, case)))
    return found


def length(sizes: Sizes, suite: str) -> Ordered:
    """Scaling in the number of steps; the longest is past what cuDNN takes."""
    H, B, _ = sizes.features
    return [
        (3.2 + 0.2 * rank, Task(suite, Case(f"T{T}", H, min(B, 16), T, dtype=sizes.dtypes[0], mode=mode)))
        for rank, T in enumerate(sizes.lengths)
        for mode in ("forward", "train")
        if T <= 16384 or mode == "forward"
    ]


def cell(sizes: Sizes, suite: str) -> Ordered:
    """One step, eager and in a CUDA graph."""
    found: Ordered = []
    for i, H in enumerate(sizes.cell_hidden):
        for j, B in enumerate(sizes.cell_batch):
            for dtype in reversed(sizes.dtypes):  # float32 first: what most cells run in
                for mode in ("forward", "train"):
                    priority = (
                        1.5 if i == j == 0 and dtype == "float32" else 3 + 0.15 * (i + j) + _dtype_rank(sizes, dtype)
                    )
                    case = Case(f"H{H} B{B}", H, B, 1, form="cell", dtype=dtype, mode=mode)
                    names = (*CELL_PROVIDERS, "torch.compile") if i + j <= sizes.compiled else None
                    found.append((priority, Task(suite, case, executions=("eager", "graph"), providers=names)))
    return found


def real(sizes: Sizes, suite: str) -> Ordered:
    """The LSTMs that people run, from real_workloads.csv, taking turns between domains."""
    rank: dict[str, int] = {}
    found: Ordered = []
    for workload in workloads.load():
        turn = rank[workload.domain] = rank.get(workload.domain, -1) + 1
        case = workload.case
        if case is None:
            continue
        if case.flops() > sizes.most_flops:
            case = _shrink(case, sizes.most_flops)
        executions = ("eager", "graph") if workload.in_graph else ("eager",)
        found.append((2.2 + 0.3 * turn, Task(suite, case, executions=executions)))
    return found


def _shrink(case: Case, most: float) -> Case:
    """Fewer rows, then fewer steps and units, until it takes at most that many operations; the note says so."""
    smaller = case
    while smaller.flops() > most:
        if smaller.batch > 1:
            smaller = replace(smaller, batch=smaller.batch // 2)
        elif smaller.length > 4:
            smaller = replace(smaller, length=smaller.length // 2)
        else:
            half = {name: max(getattr(smaller, name) // 2, 1) for name in ("hidden_size", "input_size")}
            smaller = replace(smaller, **half, proj_size=min(smaller.proj_size, half["hidden_size"] // 2))
    note = f"; {smaller.note}" if smaller.note else ""
    return replace(smaller, note=f"made smaller than the real one, to end in time{note}")


def features(sizes: Sizes, suite: str) -> Ordered:
    """What a feature costs: packed and lengths against padded, resets against none, deep and bidirectional stacks."""
    H, B, T = sizes.features
    variants: dict[str, dict] = {
        "padded": {},
        "packed": {"rows": "packed"},
        "lengths": {"rows": "lengths"},
        "resets": {"resets": 0.02},
        "two layers": {"layers": 2},
        "bidirectional": {"bidirectional": True},
        "projection": {"proj_size": H // 2},
    }
    return [
        (2.2 + 0.1 * rank, Task(suite, Case(name, H, B, T, dtype="float32", mode=mode, **options)))
        for rank, (name, options) in enumerate(variants.items())
        for mode in ("train", "forward")
    ]


def memory(sizes: Sizes, suite: str) -> Ordered:
    """Bytes held for the backward and at the peak, with and without recomputation, of one layer and of four."""
    return [
        (
            2.2 + 0.5 * rank + (0.1 if layers > 1 else 0),
            Task(
                suite,
                Case(f"H{H} B{B} T{T}{name}", H, B, T, dtype=dtype, mode="train", layers=layers),
                "memory",
            ),
        )
        for rank, (H, B, T) in enumerate(sizes.memory)
        for layers, name in ((1, ""), (4, " 4 layers"))
        for dtype in sizes.dtypes
    ]


def accuracy(sizes: Sizes, suite: str) -> Ordered:
    """Errors of outputs and gradients against float64."""
    found: Ordered = []
    for rank, (H, B, T) in enumerate(sizes.accuracy):
        for scale in (1.0, 4.0):
            for dtype, precision in (("float32", "tf32"), ("float32", "ieee"), ("bfloat16", ""), ("float16", "")):
                case = Case(
                    f"H{H} T{T} x{scale:g}", H, B, T, dtype=dtype, precision=precision, mode="train", scale=scale
                )
                found.append((2.1 + 0.4 * rank + 0.1 * scale / 4, Task(suite, case, "accuracy")))
                if rank == 0:
                    one = replace(case, name=f"cell H{H} x{scale:g}", form="cell", length=1)
                    found.append((2.2 + 0.1 * scale / 4, Task(suite, one, "accuracy")))
    return found


def interpreted_accuracy(sizes: Sizes, suite: str) -> Ordered:
    """On a CPU: the kernels themselves, in Triton's interpreter, on problems that it can do."""
    found: Ordered = []
    for H, B, T in ((19, 3, 7), (64, 4, 5)) if sizes is not SIZES["tiny"] else ((5, 2, 3),):
        for dtype in ("float32", "bfloat16", "float16"):
            options = {"precision": "ieee"} if dtype == "float32" else {}
            case = Case(f"H{H} T{T} interpreted", H, B, T, dtype=dtype, mode="train", **options)  # type: ignore[arg-type]
            found.append((2.4, Task(suite, case, "accuracy", interpreter=True)))
            one = replace(case, name=f"cell H{H} interpreted", form="cell", length=1)
            found.append((2.4, Task(suite, one, "accuracy", interpreter=True)))
    return found


def overhead(sizes: Sizes, suite: str) -> Ordered:
    """Host microseconds per call, at sizes where the device has next to nothing to do."""
    cell_case = Case("host time, cell", 64, 1, 1, form="cell", dtype="float32")
    layer_case = Case("host time, layer", 64, 1, 1, dtype="float32")
    return [
        (2.15, Task(suite, replace(case, mode=mode), "overhead"))
        for case in (cell_case, layer_case)
        for mode in ("forward", "train")
    ]


def cold_start(sizes: Sizes, suite: str) -> Ordered:
    """Seconds to the first result in a new process, with an empty and with a warm cache of kernels."""
    return [
        (
            3.5,
            Task(
                suite, Case("first call, cell", 512, 16, 1, form="cell", dtype="bfloat16", mode="train"), "cold-start"
            ),
        ),
        (3.6, Task(suite, Case("first call, layer", 512, 16, 16, dtype="bfloat16", mode="train"), "cold-start")),
    ]


def roofs(sizes: Sizes, suite: str) -> Ordered:
    """What this device can do at most: copies, matrix products, barriers."""
    return [(0.5, Task(suite, Case("roofs", 1, 1, 1, dtype=sizes.dtypes[0]), "roof"))]


SUITES: dict[str, Callable[[Sizes, str], Ordered]] = {
    "hidden-sizes": hidden_sizes,
    "batch": batch,
    "length": length,
    "cell": cell,
    "real": real,
    "features": features,
    "memory": memory,
    "accuracy": accuracy,
    "overhead": overhead,
    "cold-start": cold_start,
    "roofs": roofs,
}


def tasks(suites: Iterable[str], scale: str, device_type: str) -> list[Task]:
    """Everything the suites measure, the most telling first.

    scale: one of SCALES. device_type: "cuda" or "cpu"; on a CPU the kernels' accuracy is added, in the interpreter.
    """
    sizes = SIZES[scale]
    found: Ordered = []
    for suite in suites:
        found += SUITES[suite](sizes, suite)
        if suite == "accuracy" and device_type == "cpu":
            found += interpreted_accuracy(sizes, suite)
    if device_type == "cpu":  # no CUDA graphs, no TF32
        found = [(p, replace(t, executions=("eager",)).with_case(precision="ieee")) for p, t in found]
        unique = {(t.suite, t.kind, t.interpreter, t.case): (p, t) for p, t in reversed(found)}
        found = list(reversed(unique.values()))
    return [task for _, task in sorted(found, key=lambda pair: pair[0])]


def describe() -> str:
    """One line for each suite."""
    width = max(map(len, SUITES))
    return "\n".join(f"{name:<{width}}  {(make.__doc__ or '').splitlines()[0]}" for name, make in SUITES.items())
