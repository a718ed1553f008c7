"""From rows to what is shown: the newest good row of each measurement, pairs with cuDNN, who is ahead."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import providers
from .cases import Case, row_key

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
    """GPUs before CPUs, each with its rows."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda r: r["device"]["type"] == "cpu"):
        found.setdefault(row["device"]["name"], []).append(row)
    return found


@dataclass(frozen=True)
class Group:
    """The rows of one case in one execution, by provider."""

    suite: str
    case: Case
    execution: str
    rows: dict[str, Row]

    def us(self, provider: str) -> float | None:
        """Median microseconds per call, None where there is no time."""
        row = self.rows.get(provider)
        return row["timing"]["p50_us"] if row and row["timing"] else None

    def ours(self) -> tuple[str, float] | None:
        """The fastest of this package's ways, and its time. What `auto` takes is `us(providers.OURS)`."""
        times = [(name, t) for name in self.rows if name.startswith("lstm_triton") and (t := self.us(name)) is not None]
        return min(times, key=lambda pair: pair[1]) if times else None

    def theirs(self) -> tuple[str, float] | None:
        """torch's way of this case: torch.nn.LSTM, for cells torch.nn.LSTMCell."""
        name = providers.CUDNN if self.case.form == "layer" else providers.TORCH_CELL
        time = self.us(name)
        return None if time is None else (name, time)

    def speedup(self) -> float | None:
        """torch's time over ours, the fastest of this package's ways."""
        ours, theirs = self.ours(), self.theirs()
        return theirs[1] / ours[1] if ours and theirs else None

    def auto_speedup(self) -> float | None:
        """torch's time over that of what `auto` takes."""
        time, theirs = self.us(providers.OURS), self.theirs()
        return theirs[1] / time if time and theirs else None


def groups(rows: Iterable[Row], suite: str | None = None, mode: str | None = None) -> list[Group]:
    """The timing rows of a suite and a mode (None: of all), by case and execution."""
    found: dict[tuple, Group] = {}
    for row in rows:
        if row["kind"] != "timing" or suite not in (None, row["suite"]):
            continue
        case = Case.from_json(row["case"])
        if mode in (None, case.mode):
            key = row["suite"], row["execution"], case
            found.setdefault(key, Group(row["suite"], case, row["execution"], {})).rows[row["provider"]] = row
    return list(found.values())


def of_kind(rows: Iterable[Row], kind: str, *statuses: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind and (not statuses or row["status"] in statuses)]


def losses(found: Sequence[Group]) -> list[Group]:
    """Where torch is ahead of the fastest of this package's ways by more than the samples leave open, the worst first."""

    def surely(group: Group) -> bool:
        ours, theirs = group.ours(), group.theirs()
        assert ours and theirs
        return group.rows[ours[0]]["timing"]["ci_low_us"] > group.rows[theirs[0]]["timing"]["ci_high_us"]

    behind = [g for g in found if (s := g.speedup()) is not None and s < 1 and surely(g)]
    return sorted(behind, key=lambda g: g.speedup() or 0)


def number(value: Any) -> float:
    """A figure of a row; infinities are strings there."""
    return float(value)
