"""From rows to what is shown: the newest good row of each measurement, pairs with torch, who is ahead.

This package is compared in two ways: its kernels, each forced, and what `auto` takes, which may be cuDNN itself.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import providers
from .cases import Case, row_key, settings

Row = Mapping[str, Any]


def latest(rows: Iterable[Row]) -> list[Row]:
    """The newest row of each measurement on each device, in order of first appearance."""
    found: dict[tuple, Row] = {}
    for row in rows:
        key = row["device"]["name"], row["kind"] == "anchor" and row["date"], row_key(row)
        if key not in found or row["date"] >= found[key]["date"]:
            found[key] = row
    return list(found.values())


def by_device(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """GPUs before CPUs, each with its rows; apart what was measured with a flushed L2 cache or other numbers of threads."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda r: (r["device"]["type"] == "cpu", r["l2"] == "flushed")):
        l2, threads = settings(row)
        name = row["device"]["name"] + (", L2 cache flushed before each call" if l2 == "flushed" else "")
        name += f", {threads} thread{'s' if threads > 1 else ''}" if threads else ""
        found.setdefault(name, []).append(row)
    return found


@dataclass(frozen=True)
class Group:
    """The rows of one case in one execution, under the same settings, by provider."""

    suite: str
    case: Case
    execution: str
    rows: dict[str, Row]

    def us(self, provider: str) -> float | None:
        """Median microseconds per call, None where there is no time."""
        row = self.rows.get(provider)
        return row["timing"]["p50_us"] if row and row["timing"] else None

    def ours(self) -> tuple[str, float] | None:
        """The fastest of the rows that this package's kernels computed, and its time; not where it called torch or cuDNN."""
        times = [(name, t) for name, row in self.rows.items() if _is_ours(row) and (t := self.us(name)) is not None]
        return min(times, key=lambda pair: pair[1]) if times else None

    def auto(self) -> tuple[str, float] | None:
        """What is taken when no backend is asked for."""
        time = self.us(providers.OURS)
        return None if time is None else (providers.OURS, time)

    def theirs(self) -> tuple[str, float] | None:
        """torch's way of this case: torch.nn.LSTM, for cells torch.nn.LSTMCell."""
        name = providers.CUDNN if self.case.form == "layer" else providers.TORCH_CELL
        time = self.us(name)
        return None if time is None else (name, time)

    def speedup(self) -> float | None:
        """torch's time over that of this package's kernels."""
        return self._over(self.ours())

    def auto_speedup(self) -> float | None:
        """torch's time over that of what `auto` takes."""
        return self._over(self.auto())

    def _over(self, way: tuple[str, float] | None) -> float | None:
        theirs = self.theirs()
        return theirs[1] / way[1] if way and theirs else None


def _is_ours(row: Row) -> bool:
    return row["provider"].startswith("lstm_triton") and (row["backend"] or "").startswith("triton")


# The two ways that are compared with torch, by the names they are shown under.
WAYS: dict[str, Callable[[Group], tuple[str, float] | None]] = {"kernels": Group.ours, "auto": Group.auto}
SPEEDUPS: dict[str, Callable[[Group], float | None]] = {"kernels": Group.speedup, "auto": Group.auto_speedup}


def groups(rows: Iterable[Row], suite: str | None = None, mode: str | None = None) -> list[Group]:
    """The timing rows of a suite and a mode (None: of all), by case and execution."""
    found: dict[tuple, Group] = {}
    for row in rows:
        if row["kind"] != "timing" or suite not in (None, row["suite"]):
            continue
        case = Case.from_json(row["case"])
        if mode in (None, case.mode):
            key = row["suite"], row["execution"], case, settings(row)
            found.setdefault(key, Group(row["suite"], case, row["execution"], {})).rows[row["provider"]] = row
    return list(found.values())


def of_kind(rows: Iterable[Row], kind: str, *statuses: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind and (not statuses or row["status"] in statuses)]


@dataclass(frozen=True)
class Loss:
    """A comparison in which torch is ahead of one of WAYS; provider: of this package."""

    group: Group
    way: str
    provider: str
    speedup: float


def losses(found: Sequence[Group], way: str) -> list[Loss]:
    """Where torch is ahead of one of WAYS by more than the samples leave open, the worst first."""
    behind = []
    for group in found:
        ours, theirs, speedup = WAYS[way](group), group.theirs(), SPEEDUPS[way](group)
        if ours is None or theirs is None or speedup is None or speedup >= 1:
            continue
        mine, other = group.rows[ours[0]]["timing"], group.rows[theirs[0]]["timing"]
        if mine["ci_low_us"] > other["ci_high_us"]:
            behind.append(Loss(group, way, ours[0], speedup))
    return sorted(behind, key=lambda loss: loss.speedup)


def number(value: Any) -> float:
    """A figure of a row; infinities are strings there."""
    return float(value)
