"""Count what one training step of an LSTM asks of a GPU: kernel launches, and bytes if each operand is moved once.

Runs on any machine in seconds. This package's kernels are noted, not run: what is launched does not depend on their results.
Every other operation is seen through a dispatch mode of torch. Views and allocations launch nothing and are not counted.

Run it: python examples/count_launches.py --layers 3 --bidirectional --dropout 0.1
"""

import argparse
import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: the kernels' launchers then take CPU tensors

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lstm_triton import LSTM
from lstm_triton.kernels import interpreter, launch

NO_LAUNCH = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view")
GEMMS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")


class Counter(TorchDispatchMode):
    """Notes (name, bytes) of everything that is launched inside `with counter:`."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:  # look inside this package's operators, and those of torch that are made of others
            if func.namespace == "lstm_triton":
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
            if (result := func.decompose(*args, **kwargs)) is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if not func.is_view and name not in NO_LAUNCH:
            used = (result,) if name.startswith("new_") else (args, tuple(kwargs.values()), result)
            operands = {t.data_ptr(): t for t in tensors(used)}
            self.launches.append((name, sum(map(size, operands.values()))))
        return result

    def note_kernel(self, launcher, grid, config, arguments, **options) -> None:
        """Stands for Launcher.__call__. Of a tensor that holds all T steps, a launch moves those that it computes."""
        moved, T = 0, arguments.get("T", 1)
        steps = arguments["last_step"] - arguments["first_step"] if "T" in arguments else T
        for t in tensors(arguments.values()):
            moved += size(t) * steps // T if t.dim() > 2 and t.shape[0] == T else size(t)
        self.launches.append((launcher.kernel.fn.__name__, moved))


def tensors(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors(value)


def size(t: torch.Tensor) -> int:
    """Bytes, elements that stand for several by broadcasting counted once."""
    n = t.element_size()
    for length, stride in zip(t.shape, t.stride()):
        n *= length if stride else 1
    return n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--bidirectional", action="store_true")
    parser.add_argument("--batch-first", action="store_true")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--projection", type=int, default=0, help="proj_size")
    parser.add_argument("--resets", action="store_true", help="the sequences restart now and then")
    parser.add_argument("--steps", type=int, default=64, help="T")
    parser.add_argument("--batch", type=int, default=16, help="B")
    parser.add_argument("--size", type=int, default=256, help="input and hidden size")
    parser.add_argument("--backend", default="triton-persistent", help="or triton-stepwise")
    parser.add_argument("--names", action="store_true", help="list torch's operations by name")
    options = parser.parse_args()
    T, B = options.steps, options.batch

    lstm = LSTM(
        options.size,
        options.size,
        options.layers,
        dropout=options.dropout,
        bidirectional=options.bidirectional,
        batch_first=options.batch_first,
        proj_size=options.projection,
        precision="tf32",
        backend=options.backend,
    )
    shape = (B, T) if options.batch_first else (T, B)
    x = torch.randn(*shape, options.size, requires_grad=True)
    resets = torch.rand(shape) < 0.1 if options.resets else None
    print(f"{lstm}\nT = {T}, B = {B}, float32 with TF32 products; launches as planned for an H100")

    counter = Counter()
    launch.Launcher.__call__ = lambda self, *args, **kwargs: counter.note_kernel(self, *args, **kwargs)
    interpreter.programs_can_wait = lambda: (
        True
    )  # plan as on a GPU, where programs of one launch may wait for each other
    # What torch does on a GPU: dropout is one launch.
    torch.nn.functional.dropout = lambda x, p: torch.native_dropout(x, p, True)[0]
    lstm(x, resets=resets)[0].sum().backward()  # what is done once in the life of a process is done
    x.grad = None
    lstm.zero_grad()
    counter.launches.clear()
    with counter:
        y, _ = lstm(x, resets=resets)
    report("forward", counter.launches, options.names)
    counter.launches.clear()
    dy = torch.randn_like(y)
    with counter:
        y.backward(dy)
    report("backward", counter.launches, options.names)


def report(title: str, launches: list[tuple[str, int]], names: bool) -> None:
    print(f"\n{title:<30}{'launches':>10}{'MB':>10}")
    kinds = {"LSTM kernels": [], "GEMMs": [], "other": []}
    for name, moved in launches:
        ours = name.startswith(("_lstm_sequence", "_lstm_cell"))
        kinds["LSTM kernels" if ours else "GEMMs" if name in GEMMS else "other"].append((name, moved))
    for kind, found in kinds.items():
        print_line(f"  {kind}", [moved for _, moved in found])
        for name in dict.fromkeys(name for name, _ in found) if names else ():
            print_line(f"    {name}", [moved for other, moved in found if other == name])
    print_line("  all", [moved for _, moved in launches])


def print_line(title: str, moved: list[int]) -> None:
    print(f"{title:<30}{len(moved):>10}{sum(moved) / 1e6:>10.1f}")


if __name__ == "__main__":
    main()
