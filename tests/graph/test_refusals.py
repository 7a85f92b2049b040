"""Networks that cannot be cut are refused early, with the reason and the place."""

import functools
import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from branchynet import BranchyNet, Policy, attach, export, load, measure
from branchynet.deploy import assembly
from branchynet.deploy import exporting as export_module
from branchynet.deploy.assembly import assemble
from branchynet.deploy.torch_engine import TorchEngine
from branchynet.errors import BranchyNetError, FileError, GraphError, InputError
from branchynet.graph import onnx_flat as flat_module
from branchynet.graph.onnx_flat import flatten
from branchynet.policy import scores
from helpers import chains
from helpers import transformers_models as hugging
from helpers.loop import every_exit, figure_2, safe_thresholds
from helpers.networks import spread_out
from helpers.onnx_graphs import check_work, profile

SOURCE = Path(__file__).parents[2] / "src" / "branchynet"


class Inner(nn.Module):
    """A network that applies `act` to its features."""

    def __init__(self, act):
        super().__init__()
        self.linear, self.act = nn.Linear(6, 6), act

    def forward(self, x):
        return self.act(self.linear(x))


def branchy(act, classes=4):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(6, 6), Inner(act), nn.Linear(6, 6), nn.Linear(6, classes))
    return BranchyNet(backbone, {"0": nn.Linear(6, classes), "2": nn.Linear(6, classes)}).eval()


def decides(x):
    if x.sum() > 0:
        return x
    return -x


def counts(x):
    return x if x.shape[0] > 3 else -x


def reads(x):
    return x * float(x.sum())


class Batched(nn.BatchNorm1d):
    """A batch norm that ignores eval mode."""

    def train(self, mode=True):
        return super().train(True)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (decides, r"in '1' \(Inner\) at .*test_refusals\.py:\d+\).*data-dependent.*torch\.where"),
        (reads, r"in '1' \(Inner\) at .*test_refusals\.py:\d+\).*data-dependent"),
        (lambda x: x + torch.from_numpy(x.numpy()), r"in '1' \(Inner\) at .*test_refusals\.py:\d+\)"),
        (lambda x: x.view(2, 6), "batch size, dimension 0 of every input, cannot stay free.*constant.*free='none'"),
        (counts, r"batch size, dimension 0 of every input, cannot stay free.*<= 3"),
        (Batched(6), r"changes its buffer '1\.act\.running_mean'.*batch norm in training mode"),
        (lambda x: F.batch_norm(x, None, None, training=True), "batch norm in '1' averages over the samples"),
        (lambda x: F.dropout(x, 0.5, training=True), "random numbers.*eval mode"),
    ],
    ids=["if", "float", "numpy", "view", "len", "buffer", "batch_norm", "dropout"],
)
def test_the_reason_and_the_place_are_named(act, message):
    with pytest.raises(GraphError) as raised:
        flatten(branchy(act), torch.randn(5, 6), score=scores.entropy)
    assert re.search(message, str(raised.value), re.DOTALL), raised.value


def test_torchs_own_control_flow_is_refused_before_any_long_work():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            x = self.a(x)
            return self.b(torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,)))

    with pytest.raises(GraphError, match=r"torch's 'cond'.*torch\.where"):
        attach(Branches(), ["a"], example=torch.randn(3, 6))


def test_the_line_is_the_networks_own():
    with pytest.raises(GraphError) as raised:
        flatten(branchy(decides), torch.randn(5, 6), score=scores.entropy)
    line = int(re.search(r"test_refusals\.py:(\d+)", str(raised.value))[1])
    assert "x.sum() > 0" in Path(__file__).read_text().splitlines()[line - 1]


def test_an_exit_made_of_the_last_ones_output_is_refused():
    backbone = nn.Sequential(nn.Linear(6, 4), nn.Softmax(1))
    net = BranchyNet(backbone, {"1": nn.Identity()}, output=lambda p: p)
    flatten(net, torch.randn(3, 6))  # the same value: no information is lost

    class Answer(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.after = nn.Linear(6, 6), nn.Linear(6, 4), nn.Softmax(1)

        def forward(self, x):
            y = self.b(torch.tanh(self.a(x)))
            return {"logits": y, "p": self.after(y)}

    late = BranchyNet(Answer(), {"a": nn.Linear(6, 4), "after": nn.Linear(4, 4)}, output=lambda out: out["logits"])
    with pytest.raises(GraphError, match=r"exit 2 is computed from the last exit's output.*before the output"):
        flatten(late, torch.randn(3, 6))


class Places(nn.Module):
    """Integers, booleans and positions in the batch, computed before the first exit and read by every later stage."""

    def __init__(self, classes=4):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, classes)

    def forward(self, x):
        rows = torch.arange(x.shape[0], device=x.device)
        chosen = x[..., 0].argmax(1)  # int64 (B,)
        positive = x > 0  # bool (B, L, 6)
        odd = (rows % 2 == 0) | (rows >= 0)  # depends only on positions; always true
        weight = torch.full((x.shape[0], 1), 0.5).cumsum(1)  # depends only on the batch size
        first = x[rows, chosen]
        for layer in self.layers:
            x = torch.tanh(layer(x))
            x = torch.where(positive & odd[:, None, None], x, 0.5 * x) + (1 - positive.long()) * 0.1
        flat = x.reshape(-1, 6)[
            rows * x.shape[1] + chosen
        ]  # positions in the batch merged with positions in the sequence
        return self.head(flat + first * weight + x[rows, chosen])


def test_integers_booleans_and_places_in_the_batch_cross_the_cut(tmp_path):
    torch.manual_seed(0)
    branch = [nn.Sequential(nn.Flatten(), nn.Linear(30, 4)) for _ in range(2)]
    net = BranchyNet(Places(), {"layers.0": branch[0], "layers.1": branch[1]}).eval()
    x = torch.randn(43, 5, 6)
    spread_out(net, (x,))
    outputs = every_exit(net, (x,))
    thresholds = safe_thresholds(outputs, (0.4, 0.5))
    expected = [figure_2(sample, thresholds) for sample in outputs]
    exits = np.array([n for n, _ in expected])
    flat = flatten(net, x, score=scores.entropy)
    path = tmp_path / "model.onnx"
    ir.save(assemble(flat, Policy(thresholds=thresholds)), path)
    for engine in (load(path, threads=1), TorchEngine(net, Policy(thresholds=thresholds), x)):
        for batch in (1, 7, 43):
            for start in range(0, 43, batch):
                answer = engine(x[start : start + batch].numpy())
                assert answer.exit.tolist() == exits[start : start + batch].tolist()
                want = np.stack([z for _, z in expected[start : start + batch]])
                np.testing.assert_allclose(answer.output, want, atol=1e-4)
    _, events = profile(path, {flat.model.graph.inputs[0].name: x.numpy()}, tmp_path)
    check_work(flat, events, (1, 2, 3), exits)


def test_floats_less_integers_are_exported(tmp_path):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x, mask):
            return self.b(torch.tanh(self.a(x)) + (1.0 - mask) * -9.0)

    net = BranchyNet(Masked(), {"a": nn.Linear(6, 4)}).eval()
    x, mask = torch.randn(5, 6), torch.randint(2, (5, 6))
    ir.save(assemble(flatten(net, (x, mask)), None), tmp_path / "flat.onnx")
    results = load(tmp_path / "flat.onnx", threads=1).outputs(x.numpy(), mask.numpy())
    np.testing.assert_allclose(results[-1], net(x, mask)[-1].detach(), atol=1e-5)


# Failures after the export


UNRUNNABLE = {
    "softplus of double": lambda x: F.softplus(x.double()).float(),
    "sums in uint8": lambda x: (x * 9).to(torch.uint8).cumsum(1, dtype=torch.uint8).float(),
    "places in int32": lambda x: x[torch.ones(x.shape[0], x.shape[0]).tril().sum(1).int() - 1],
}


@pytest.mark.parametrize("case", UNRUNNABLE)
def test_a_graph_that_the_runtime_cannot_open_is_no_bad_file(case, tmp_path):
    net = branchy(UNRUNNABLE[case])
    with pytest.raises(GraphError, match=r"(?s)graph of this network cannot be run.*net\.float\(\).*TorchEngine"):
        export(net, tmp_path / "model.onnx", policy=None, example=torch.randn(3, 6))
    with pytest.raises(GraphError, match="cannot be run"):
        measure(net, torch.randn(3, 6))
    assert not list(tmp_path.iterdir())


def fails(error):
    def failing(*args, **options):
        raise error

    return failing


@pytest.fixture
def cached(monkeypatch):
    """Exports of `branchy()` from `chains` use a cached flat graph and take milliseconds."""
    monkeypatch.setattr(export_module, "flatten", lambda net, example, **options: flat_chain())


@functools.cache
def flat_chain():
    return flatten(chains.branchy(), chains.inputs(), score=scores.entropy)


@pytest.mark.parametrize(
    ("place", "step"),
    [
        (flat_module, "_tidy"),
        (assembly, "nest"),
        (assembly, "keep_blocks"),
        (assembly, "load"),
        (export_module, "check_answers"),
    ],
)
@pytest.mark.parametrize("error", [KeyError("a value"), RuntimeError("an operator\nand its node"), FileError("a file")])
def test_whatever_fails_behind_the_exporter_is_a_graph_error(place, step, error, monkeypatch, request, tmp_path):
    if place is not flat_module:
        request.getfixturevalue("cached")
    monkeypatch.setattr(place, step, fails(error))
    with pytest.raises(GraphError, match=r"(a value|an operator|a file)") as raised:
        export(chains.branchy(), tmp_path / "model.onnx", policy=chains.TWO, example=chains.inputs())
    assert "and its node" not in str(raised.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [InputError("an input"), GraphError("a graph"), OSError("a disk"), MemoryError()])
def test_errors_that_say_what_they_are_stay_so(error, cached, monkeypatch, tmp_path):
    monkeypatch.setattr(export_module, "check_answers", fails(error))
    with pytest.raises(BranchyNetError if isinstance(error, OSError) else type(error)) as raised:
        export(chains.branchy(), tmp_path / "model.onnx", policy=chains.TWO, example=chains.inputs())
    assert raised.value is error or isinstance(raised.value, FileError)


# Generality


def test_no_line_of_the_library_is_about_one_architecture():
    names = {case.model.rpartition("For")[0] for case in (*hugging.VISION, *hugging.SEQUENCES)}
    words = names | {name.lower() for name in names if len(name) > 4}
    found = {
        (path.name, word)
        for path in SOURCE.rglob("*.py")
        if not {"zoo", "reproduce"} & set(path.parts)  # these are about the paper's networks
        for word in words
        if re.search(rf"(?<![A-Za-z_]){word}(?![A-Za-z])", path.read_text())
    }
    assert found == set()
