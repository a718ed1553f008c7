"""Making rows: what is common to all rows of a run, and what a measurement adds."""

import datetime
import time
import uuid
from typing import Any

import torch

from . import device as devices
from . import schema
from .cases import Case, Task
from .providers import Model


class RowMaker:
    """Makes rows of one run on one device. command: as it was typed; l2: the state of the L2 cache that is timed."""

    def __init__(
        self, device: torch.device, command: str, run: str | None = None, synthetic: bool = False, l2: str | None = None
    ) -> None:
        self._device = device
        self._described = devices.describe(device)
        self._run = run or uuid.uuid4().hex[:12]
        self._command = command
        self._synthetic = synthetic
        self._l2 = l2
        self._state: dict[str, Any] = {}
        self._state_at = float("-inf")

    def state(self) -> dict[str, Any]:
        """Clocks, power, temperature, read at most every two seconds: asking takes a while."""
        now = time.monotonic()
        if now - self._state_at > 2.0:
            self._state, self._state_at = devices.state(self._device), now
        return self._state

    def make(
        self,
        task: Task,
        provider: str,
        execution: str,
        status: str,
        reason: str | None,
        model: Model | None = None,
        *,
        state: dict[str, Any] | None = None,
        label: str | None = None,
        **measured: Any,
    ) -> dict[str, Any]:
        """A row; `measured` holds timing, values, bytes, errors, floor, distance as far as there are any."""
        remarks = " ".join(model.remarks) if model else ""
        reasons = [text for text in (model.backend_reason if model else None, remarks) if text]
        labels = [schema.CPU_LABEL] if self._device.type == "cpu" else []
        labels += [label] if label else []
        labels += ["kernels in Triton's interpreter, errors only"] if task.interpreter else []
        labels += [task.case.note] if task.case.note else []
        row: dict[str, Any] = {name: None for name, field in schema.FIELDS.items() if field.nullable}
        row |= {
            "schema": schema.SCHEMA,
            "kind": task.kind,
            "status": status,
            "reason": reason,
            "suite": task.suite,
            "case": task.case.to_json(),
            "provider": provider,
            "backend": model.backend if model else None,
            "backend_reason": "; ".join(reasons) or None,
            "algorithm": model.algorithm if model else None,
            "execution": execution,
            # Of failures too: with another state of the cache they are tried again.
            "l2": self._l2 if task.kind in ("timing", "anchor") else None,
            "precision": precisions(task.case),
            "device": self._described,
            "state": state if state is not None else self.state() if status == "ok" else {},
            "versions": devices.versions(),
            "source": devices.source(),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "run": self._run,
            "command": self._command,
            "label": "; ".join(labels) or None,
            "synthetic": self._synthetic,
        }
        row |= measured
        return {name: row[name] for name in schema.FIELDS}


def precisions(case: Case) -> dict[str, Any]:
    """How float32 products are computed now, on torch's side and on ours."""
    rnn: Any = torch.backends.cudnn.rnn
    matmul: Any = torch.backends.cuda.matmul
    return {
        "cudnn_rnn": rnn.fp32_precision,
        "cuda_matmul": matmul.fp32_precision,
        "lstm_triton": case.precision or "as the dtype",
    }
