"""Other people's packages with converted LSTMs, beside torch's own: prints a table of docs/exporting.md.

`make clients` installs the packages into an environment of their own and runs this. Each case builds a model three ways, with
torch's LSTM, converted, and under patch(), and does the same with all three; the results must agree.
"""

import contextlib
import io
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from lstm_triton import convert, hooks, patch

Make = Callable[..., torch.nn.Module]


class Tagger(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = torch.nn.LSTM(3, 5, 2, batch_first=True, bidirectional=True)
        self.out = torch.nn.Linear(10, 2)

    def forward(self, x):
        return self.out(self.lstm(x)[0])


X = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))


# Each case takes make(build, model_of=the identity), which calls build() and has every LSTM of model_of(what it built)
# converted; it returns tensors. Its docstring is the table's last column.


def sb3_contrib(make: Make) -> list[torch.Tensor]:
    """`convert(agent.policy)`. `load` builds the policy anew: convert it again, or load under `patch()`."""
    from sb3_contrib import RecurrentPPO

    def policy_of(agent):
        return agent.policy

    agent = make(
        lambda: RecurrentPPO("MlpLstmPolicy", "CartPole-v1", n_steps=32, batch_size=32, seed=0, device="cpu"), policy_of
    )
    agent.learn(64)
    with tempfile.TemporaryDirectory() as folder:
        agent.save(Path(folder) / "agent")
        again = make(lambda: RecurrentPPO.load(Path(folder) / "agent", device="cpu"), policy_of)
    action, _ = again.predict(torch.zeros(4).numpy(), deterministic=True)
    return [torch.as_tensor(action), *again.policy.parameters()]


def torchrl(make: Make) -> list[torch.Tensor]:
    """As it is, in recurrent mode too. `make_cudnn_based()` of a Python-based module builds torch's LSTM: convert after it."""
    from tensordict import TensorDict
    from torchrl.modules import LSTMModule, set_recurrent_mode

    keys = {"in_keys": ["observation", "h", "c"], "out_keys": ["features", ("next", "h"), ("next", "c")]}
    module = make(lambda: LSTMModule(input_size=4, hidden_size=8, **keys))
    assert module.make_cudnn_based() is module
    data = TensorDict(
        {
            "observation": torch.randn(2, 6, 4),
            "is_init": torch.zeros(2, 6, 1, dtype=torch.bool),
            "h": torch.zeros(2, 6, 1, 8),
            "c": torch.zeros(2, 6, 1, 8),
        },
        [2, 6],
    )
    data["is_init"][0, 2] = True
    results = [module(data[:, 0])["features"]]
    with set_recurrent_mode(True):
        results.append(module(data)["features"])
    results[-1].sum().backward()
    return [*results, *(p.grad for p in module.parameters())]


def rsl_rl(make: Make) -> list[torch.Tensor]:
    """As it is, its exports to TorchScript and ONNX too."""
    import onnxruntime
    from rsl_rl.models import RNNModel
    from tensordict import TensorDict

    observations = TensorDict({"policy": torch.randn(3, 4)}, [3])
    model = make(lambda: RNNModel(observations, {"actor": ["policy"]}, "actor", 2, [8], rnn_hidden_dim=8))
    results = [model(observations)]
    model.reset(torch.tensor([1, 0, 0]))
    results.append(model(observations))
    scripted = torch.jit.script(model.as_jit())
    results.append(scripted(observations["policy"][:1]))
    exportable = model.as_onnx().eval()
    inputs = exportable.get_dummy_inputs()
    session = _session(exportable, inputs)
    found = session.run(None, {i.name: t.numpy() for i, t in zip(session.get_inputs(), inputs)})
    assert isinstance(session, onnxruntime.InferenceSession)
    return [*results, *map(torch.from_numpy, found)]


def opacus(make: Make) -> list[torch.Tensor]:
    """`ModuleValidator.fix` replaces it by opacus's own LSTM, as it does torch's: convert changes nothing there."""
    from opacus import PrivacyEngine
    from opacus.validators import ModuleValidator

    model = make(Tagger)
    assert len(ModuleValidator.validate(model)) == 1
    model = ModuleValidator.fix(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 4, 3)), batch_size=4)
    model, optimizer, data = PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        data_loader=data,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )
    for (x,) in data:
        optimizer.zero_grad()
        model(x).pow(2).sum().backward()
        optimizer.step()
    return list(model.parameters())


def torch_geometric(make: Make) -> list[torch.Tensor]:
    """As it is. Its modules import torch.nn.LSTM by name: `patch()` reaches them all the same."""
    from torch_geometric.nn import JumpingKnowledge, LSTMAggregation, Set2Set

    jump, aggregate, pool = (
        make(build)
        for build in (lambda: JumpingKnowledge("lstm", 4, 2), lambda: LSTMAggregation(4, 6), lambda: Set2Set(4, 3))
    )
    x, index = torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 1, 2])
    results = [jump([x, x + 1]), aggregate(x, index), pool(x, index)]
    sum(r.sum() for r in results).backward()
    return [*results, *(p.grad for m in (jump, aggregate, pool) for p in m.parameters())]


def onnxruntime(make: Make) -> list[torch.Tensor]:
    """`torch.onnx.export(model, args, dynamo=True)` of plain calls records ONNX's LSTM. No `proj_size`, as with torch's."""
    session = _session(model := make(Tagger).eval(), (X,))
    return [torch.from_numpy(session.run(None, {"x": X.numpy()})[0]), model(X)]


def _session(model: torch.nn.Module, inputs: tuple):
    import onnxruntime

    program = torch.onnx.export(model, inputs, dynamo=True, verbose=False)
    return onnxruntime.InferenceSession(program.model_proto.SerializeToString())


CASES: dict[str, Callable[[Make], list[torch.Tensor]]] = {
    "sb3-contrib": sb3_contrib,
    "torchrl": torchrl,
    "rsl-rl": rsl_rl,
    "opacus": opacus,
    "torch_geometric": torch_geometric,
    "onnxruntime": onnxruntime,
}


def _make(way: str) -> Make:
    def make(build, model_of=lambda built: built):
        with patch() if way == "patch" else contextlib.nullcontext():
            built = build()
        model = model_of(built)
        if way == "convert":
            convert(model)
        lstms = [m for m in model.modules() if isinstance(m, torch.nn.LSTM)]
        assert lstms, "the model holds no torch.nn.LSTM"
        assert all(hooks.is_marked(m) == (way != "torch") for m in lstms), f"not what {way} should give"
        return built

    return make


def _run(case: Callable[[Make], list[torch.Tensor]], way: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [t.detach().clone() for t in case(_make(way))]


def _outcomes(case: Callable[[Make], list[torch.Tensor]]) -> Iterator[str]:
    """Of convert and of patch: "yes", or what went wrong."""
    try:
        expected = _run(case, "torch")
    except Exception as error:
        yield from [f"torch's own fails: {_first_line(error)}"] * 2
        return
    for way in ("convert", "patch"):
        try:
            torch.testing.assert_close(_run(case, way), expected, rtol=1e-4, atol=1e-5)
            yield "yes"
        except Exception as error:
            yield f"no: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"[:200].replace("|", "/")


def main(names: list[str]) -> int:
    warnings.simplefilter("ignore")
    lines = ["| client | `convert` | `patch` | how |", "|---|---|---|---|"]
    failed = False
    for name in names or CASES:
        with contextlib.redirect_stdout(io.StringIO()):
            outcomes = list(_outcomes(CASES[name]))
        failed |= outcomes != ["yes", "yes"]
        lines.append(f"| {name} | {' | '.join(outcomes)} | {CASES[name].__doc__} |")
    print("\n".join(lines))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
