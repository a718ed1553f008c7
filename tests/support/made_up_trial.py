"""The process of `lstm-triton tune` on a CPU, in Triton's interpreter, with a made-up clock and made-up accidents.

MADE_UP, in the environment, says by the name of a contender what happens: microseconds of a call, or "trap", "hang", "wrong".
"""

import json
import os
import time

from lstm_triton import trial
from lstm_triton.kernels import interpreter

MADE_UP = json.loads(os.environ["MADE_UP"])


def _happens(name: str):
    return next((what for start, what in MADE_UP.items() if name.startswith(start)), 1000.0)


class Clock:
    sample_seconds = 0.01

    def __init__(self, device):
        pass

    def sample(self, call, n):
        what = _happens(call.__name__)
        if what == "trap":
            os.abort()
        if what == "hang":
            time.sleep(600)
        return (what if isinstance(what, (int, float)) else 1.0,) * 2


class Work(trial.Work):
    def of(self, contender):
        backend = "auto" if contender.backend == "cudnn" else contender.backend  # torch's own, on a CPU
        call, configurations = super().of(contender._replace(backend=backend))
        is_wrong = _happens(contender.backend) == "wrong"

        def changed():
            y, *others = call()
            return [y + 0.01 if is_wrong else y, *others]

        return changed, configurations


def main(connection, request):
    interpreter.install()
    trial.Clock, trial.Work = Clock, Work
    trial.serve(connection, request)
