"""The LSTMs that people run (real_workloads.csv, each row with its source), as cases.

A field of the table may be a range or an estimate; what is run lies in it and is named here.
"""

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cases import Case

TABLE = Path(__file__).with_name("real_workloads.csv")

# Where a field is not one number: which of its numbers is run.
CHOICES: dict[str, dict[str, int]] = {
    "rl_sb3_train": {"input_size": 64, "B": 8, "T": 128},
    "rl_isaaclab_shadow": {"input_size": 157},
    "rl_isaaclab_shadow_act": {"input_size": 157},
    "rl_isaaclab_factory": {"input_size": 30},
    "rl_allegro_kuka": {"input_size": 64},
    "rl_allegro_hand": {"input_size": 64},
    "rl_rsl": {"input_size": 48},
    "rl_rllib": {"B": 32},
    "rl_r2d2": {"B": 64, "T": 120},
    "ts_deepar_gluon_dec": {"B": 3200},
    "ts_lstm_nf": {"T": 36},
    "ts_ptf_deepar": {"input_size": 16},
    "ts_tft": {"input_size": 160, "hidden_size": 160, "B": 128, "T": 168},
    "audio_nam_eval": {"T": 65536},
    "nlp_awd": {"input_size": 400},
    "nlp_flair_tag": {"input_size": 2048, "T": 40},
    "nlp_stanza_dep": {"input_size": 700, "B": 200, "T": 25},
    "asr_nemo_pred": {"T": 80},
    "asr_nemo_decode": {"layers": 2, "B": 64},
    "asr_sb_crdnn": {"input_size": 1000, "T": 400},
    "asr_sb_rnnlm": {"T": 40},
    "asr_icefall": {"layers": 1, "B": 40, "T": 350},
    "asr_espnet": {"B": 32, "T": 50},
    "diar_pyannote": {"layers": 4, "T": 589},
    "tts_tacotron2_dec": {"input_size": 1536, "layers": 1, "T": 800},
    "tts_tacotron2_enc": {"T": 120},
    "audio_umx": {"T": 259},
    "audio_demucs": {"input_size": 384, "hidden_size": 384, "B": 400},
    "bio_bonito": {"layers": 1, "B": 64},
}

# What the table's columns cannot say.
CHANGES: dict[str, dict[str, Any]] = {
    "rl_rsl": {"rows": "lengths", "resets": 0.0},
    "rl_torchrl_bench": {"resets": 0.03},
    "ts_tft": {"mode": "train"},
    "nlp_awd": {"note": "all three layers with 1150 units, where the model's last has 400; without weight drop"},
    "nlp_awd_enwik8": {"note": "all three layers with 1840 units; without weight drop"},
    "tts_tacotron2_dec": {"form": "loop", "note": "the second of its two cells; without the attention between them"},
    "asr_icefall": {"note": "one of its twelve layers"},
    "bio_bonito": {"note": "one of its five layers"},
}

# What is not the LSTM of torch.nn.LSTM.
NOT_RUN = {
    "nlp_elmo": "clips states and cells inside the recurrence: no provider here does",
    "asr_torchaudio": "layer norm inside the cell: no provider here has it",
    "xlstm_slstm": "sLSTM: exponential gates and a block-diagonal recurrence, not an LSTM",
}

_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "AMP": "float16"}
RESETS = 0.02  # share of steps that begin an episode, where the table gives none: one in 50


@dataclass(frozen=True)
class Workload:
    """One row of the table; `case` is None where it cannot be run, for `reason`."""

    id: str
    domain: str
    project: str
    source: str
    case: Case | None
    reason: str
    in_graph: bool


def load(path: Path = TABLE) -> list[Workload]:
    """Every row of the table, in its order."""
    with path.open(encoding="utf-8", newline="") as file:
        return [_workload(row) for row in csv.DictReader(file)]


def _workload(row: Mapping[str, str]) -> Workload:
    name = row["id"]
    reason = NOT_RUN.get(name, "")
    case = None if reason else _case(row)
    return Workload(name, row["domain"], row["project"], row["source"], case, reason, "CUDA graph" in row["kind"])


def _case(row: Mapping[str, str]) -> Case:
    name, kind, extras = row["id"], row["kind"], row["extras"]
    form = "cell" if kind.startswith("cell") else "layer"
    packed = kind.startswith("packed fwd")
    # A loop over single steps only to clear states is what a layer with resets replaces.
    resets = RESETS if form == "layer" and ("reset" in extras or "done" in extras) and number(row, "T") > 1 else 0.0
    options: dict[str, Any] = {
        "form": form,
        "mode": "train" if "bwd" in kind else "forward",
        "rows": "packed" if packed else "padded",
        "resets": resets,
        "dtype": next(_DTYPES[word] for word in re.findall(r"fp32|fp16|bf16|AMP", row["dtype"])),
    }
    options |= CHANGES.get(name, {})
    return Case(
        name, number(row, "hidden_size"), number(row, "B"), number(row, "T"), input_size=number(row, "input_size"),
        layers=number(row, "layers"), bidirectional=row["bidir"] == "1", proj_size=_projection(row), **options,
    )  # fmt: skip


def number(row: Mapping[str, str], field: str) -> int:
    """The number that is run for a field of the table."""
    text = row[field]
    if text.isdigit():
        return int(text)
    return CHOICES[row["id"]][field]


def _projection(row: Mapping[str, str]) -> int:
    return int(row["proj"]) if row["proj"] != "0" else 0
