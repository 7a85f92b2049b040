"""The state of a BranchyNet: in-place operations, copies, buffers and threads."""

import contextlib
import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from branchynet import Policy, attach, export, load, measure, record
from branchynet.deploy.torch_engine import TorchEngine
from branchynet.errors import GraphError
from branchynet.nn.calls import evaluating
from branchynet.nn.network import BranchyNet
from helpers.onnx_graphs import hasty_threads
from helpers.trunks import X, head, hooks, trunk

# In-place operations


def chains(inplace):
    """The same network with or without in-place ReLUs, tapped before and after them."""
    torch.manual_seed(1)
    layers = [nn.Linear(5, 5), nn.ReLU(inplace), nn.Linear(5, 5), nn.BatchNorm1d(5), nn.ReLU(inplace), nn.Linear(5, 3)]
    branches = {"0": nn.Sequential(nn.Tanh(), head()), "1": head(), "3": nn.Sequential(nn.Tanh(), head()), "4": head()}
    return BranchyNet(nn.Sequential(*layers), branches)


def test_in_place_activations_behind_a_tap_train_as_if_they_were_not():
    gradients = []
    for inplace in (False, True):
        net, x = chains(inplace), X.clone()
        sum((n + 1) * output.square().sum() for n, output in enumerate(net(x))).backward()
        assert x.equal(X)
        gradients.append([p.grad for p in net.parameters()])
        assert all(g is not None and g.abs().sum() > 0 for g in gradients[-1] if g.shape != (5,))
    assert all(a.equal(b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("grad", [False, True])
def test_a_branch_that_only_views_its_features_keeps_them(grad):
    answers = []
    for inplace in (False, True):
        torch.manual_seed(2)
        layers = nn.Sequential(nn.Linear(5, 3), nn.ReLU(inplace), nn.Linear(3, 3))
        with torch.set_grad_enabled(grad):
            answers.append(BranchyNet(layers, {"0": nn.Flatten()})(X))
    assert all(a.equal(b) for a, b in zip(*answers, strict=True)) and (answers[0][0] < 0).any()


class Skips(nn.Module):
    """A network whose `+=` overwrites the output of `a`, as in residual networks."""

    def __init__(self):
        super().__init__()
        self.a, self.sum, self.b = nn.Linear(5, 5), nn.Identity(), nn.Linear(5, 3)

    def forward(self, x):
        y = self.a(x)
        y += x
        return self.b(self.sum(y))


def test_an_overwritten_tap_is_named_while_training_and_read_in_time_else():
    net = BranchyNet(Skips(), {"a": nn.Sequential(nn.Tanh(), head())})
    with pytest.raises(GraphError, match=r"'a' is overwritten in place.*tap the submodule"):
        net(X)
    with torch.no_grad():
        assert net(X)[0].equal(net.branches[0](net.backbone.a(X)))
    later = BranchyNet(Skips(), {"sum": head()})
    sum(output.sum() for output in later(X)).backward()
    assert all(p.grad is not None for p in later.parameters())


# The backbone, and copies


def test_the_backbone_keeps_its_names_and_its_checkpoints():
    backbone = trunk()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    net = BranchyNet(backbone, {"0": head(), "2.0": head()})
    net(X)
    assert net.backbone is backbone
    assert list(backbone.state_dict()) == list(before)
    assert all(backbone.state_dict()[name].equal(value) for name, value in before.items())
    other = trunk()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    net.backbone.load_state_dict(other.state_dict())
    assert net(X)[-1].equal(other(X))
    own = {name for name in net.state_dict() if name.startswith("backbone.")}
    assert own == {f"backbone.{name}" for name in before}


def test_copies_and_state_dicts_answer_alike_and_apart():
    twig = BranchyNet(nn.Sequential(nn.Linear(5, 5), head()), {"0": head()})
    net = BranchyNet(trunk(), {"0": twig, "2.0": head()})
    again = copy.deepcopy(net)
    torch.manual_seed(9)
    blank = BranchyNet(
        nn.Sequential(*(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(4)), nn.Linear(5, 3)),
        {"0": BranchyNet(nn.Sequential(nn.Linear(5, 5), head()), {"0": head()}), "2.0": head()},
    )
    assert not blank(X)[0].equal(net(X)[0])
    blank.load_state_dict(net.state_dict())
    for other in (again, blank):
        assert other.num_exits == net.num_exits == 4 and other.taps == net.taps
        assert all(a.equal(b) for a, b in zip(other(X), net(X), strict=True))
    with torch.no_grad():
        again.backbone[0][0].weight.zero_()
    assert not again(X)[0].equal(net(X)[0])


def test_every_parameter_is_trained_by_the_sum_of_all_losses():
    net = BranchyNet(trunk(), {"input": head(), "1": head()})
    sum(output.square().sum() for output in net(X)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_features_are_freed_when_the_forward_is_done():
    features = []

    class Watch(nn.Module):
        def forward(self, x):
            features.append(weakref.ref(x))
            return x.mean(1, keepdim=True)

    net = BranchyNet(trunk(), {"0": Watch(), "1": Watch()})
    gc.disable()  # a reference cycle would keep features in GPU memory until the next collection
    try:
        with torch.no_grad():
            net(X)
        assert [feature() for feature in features] == [None, None]
    finally:
        gc.enable()


def test_torch_can_export_it_with_a_free_batch():
    net = BranchyNet(trunk(), {"input": head(), "1.0": head()}).eval()
    program = torch.export.export(net, (X,), dynamic_shapes=(({0: torch.export.Dim("batch")},),))
    for rows in (2, 11):
        x = torch.randn(rows, 5)
        for got, want in zip(program.module()(x), net(x), strict=True):
            torch.testing.assert_close(got, want)


# Buffers that forward changes


class Moving(nn.Module):
    """A network whose forward calls `move(net, y)`, which writes to its buffers."""

    def __init__(self, move):
        super().__init__()
        self.move = move
        self.a, self.f = nn.Linear(5, 5), nn.Linear(5, 3)
        self.norm = nn.BatchNorm1d(5)
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("kept", None)

    def forward(self, x):
        y = self.a(x)
        self.move(self, y)
        shift = self.mean if self.kept is None else self.kept
        return self.f(torch.tanh(y - shift))


def replaces(net, y):
    net.mean = 0.9999 * net.mean + 1e-6


def writes_through_data(net, y):
    net.mean.data.add_(1e-6)


def writes_a_part(net, y):
    net.mean[1:3] += 1e-6


def writes_the_same(net, y):
    net.mean.zero_().add_(1)


def averages(net, y):
    net.norm.train()(y)


def grows(net, y):
    net.kept = torch.ones(5) if net.kept is None else net.kept + 1e-6


MOVES = [replaces, writes_through_data, writes_a_part, writes_the_same, averages, grows]


def held(net):
    return {name: (id(tensor), tensor.clone()) for name, tensor in net.named_buffers()}


def same(before, after):
    return before.keys() == after.keys() and all(
        before[name][0] == after[name][0] and before[name][1].equal(after[name][1]) for name in before
    )


@pytest.mark.parametrize("move", MOVES)
def test_evaluating_puts_buffers_back_even_after_an_error(move):
    net = Moving(move)
    before = held(net)
    with pytest.raises(KeyError), torch.no_grad(), evaluating(net):
        net(X)
        assert not same(before, held(net))
        raise KeyError
    assert same(before, held(net))


@pytest.mark.parametrize("move", MOVES)
def test_a_network_that_moves_its_buffers_is_refused_and_left_as_it_was(move, tmp_path):
    net = BranchyNet(Moving(move), {"a": head()})
    before = held(net)
    for make in (
        lambda policy: export(net, tmp_path / "model.onnx", policy=policy, example=X),
        lambda policy: TorchEngine(net, policy, X),
    ):
        with pytest.raises(GraphError, match=r"changes its buffer '(mean|norm\.running_mean|kept)'.*training"):
            make(Policy(thresholds=(0.5,)))
        assert same(before, held(net))


class Writes(nn.Module):
    """A network that changes one of its parameters in every forward under no_grad, in one of several ways."""

    def __init__(self, how):
        super().__init__()
        self.a, self.fc, self.how = nn.Linear(5, 5), nn.Linear(5, 3), how
        self.emb = nn.Embedding(4, 5, max_norm=0.1 if how == "renormalizes" else None)

    def forward(self, x):
        y = torch.relu(self.a(x)) + self.emb(torch.zeros_like(x[:, 0], dtype=torch.int64))
        with torch.no_grad():
            if self.how == "adds":
                self.emb.weight.add_(1e-6)
            elif self.how == "copies":
                self.emb.weight[1].copy_(self.emb.weight[0])
            elif self.how == "replaces":
                self.emb.weight = nn.Parameter(self.emb.weight * 0.999)
        return self.fc(y)


@pytest.mark.parametrize("how", ["adds", "copies", "replaces", "renormalizes", None])
def test_a_network_that_changes_its_parameters_is_refused(how, tmp_path):
    net, policy = BranchyNet(Writes(how), {"a": head()}), Policy(thresholds=(0.5,))
    own = dict(net.named_parameters())
    for make in (
        lambda: export(net, tmp_path / "model.onnx", policy=policy, example=X),
        lambda: TorchEngine(net, policy, X),
        lambda: measure(net, X, seconds=0.01),
    ):
        if how is None:
            make()
            continue
        with pytest.raises(GraphError, match=r"changes its parameter 'emb\.weight'"):
            make()
    assert (tmp_path / "model.onnx").exists() is (how is None)
    assert all(parameter is own[name] for name, parameter in net.named_parameters())


@pytest.mark.parametrize("how", ["adds", "copies", "replaces", "renormalizes", None])
def test_a_record_of_a_network_that_changes_its_parameters_is_warned_of(how):
    net, data = BranchyNet(Writes(how), {"a": head()}), [(X, torch.zeros(len(X), dtype=torch.int64))] * 2
    message = pytest.warns(UserWarning, match=r"'backbone\.emb\.weight'.*order of the samples")
    with contextlib.nullcontext() if how is None else message:
        record(net, data, progress=False)


def test_parameters_that_get_their_sizes_are_not_warned_of():
    net, data = nn.Sequential(nn.LazyLinear(5), nn.Linear(5, 3)), [(X, torch.zeros(len(X), dtype=torch.int64))] * 2
    assert record(net, data, progress=False).num_exits == 1


def keeps(net, y):
    net.kept = torch.ones(5) if net.kept is None else net.kept


def test_what_a_network_keeps_from_its_first_answer_on_is_no_reason_to_refuse_it(tmp_path):
    net = BranchyNet(Moving(keeps), {"a": head()}).eval()
    policy = Policy(thresholds=(-1.0,))
    engines = (
        load(export(net, tmp_path / "model.onnx", policy=policy, example=X), threads=1),
        TorchEngine(net, policy, X),
    )
    assert net.backbone.kept is None
    for engine in engines:
        torch.testing.assert_close(torch.from_numpy(engine(X.numpy()).output), net(X)[-1].detach())


def test_lazy_modules_keep_the_sizes_that_they_get():
    net = attach(nn.Sequential(nn.LazyLinear(5), nn.LazyBatchNorm1d(), nn.Linear(5, 3)), ["1"], example=X)
    assert net.backbone[1].running_mean.shape == (5,) and net(X)[0].shape == (6, 3)


# Threads


def test_forwards_of_several_threads_do_not_meet():
    """Two networks share a backbone, and many threads run each with different inputs."""
    backbone = trunk()
    nets = [
        BranchyNet(backbone, {"0": head(), "2": head()}).eval(),
        BranchyNet(backbone, {"0": head(), "1.0": head()}).eval(),
    ]
    batches = [torch.randn(1 + i % 5, 5) for i in range(300)]

    @torch.no_grad()
    def answer(i):
        return nets[i % 2](batches[i])

    expected = [answer(i) for i in range(300)]
    with hasty_threads(), ThreadPoolExecutor(8) as pool:
        for got, want in zip(pool.map(answer, range(300)), expected, strict=True):
            assert all(a.equal(b) for a, b in zip(got, want, strict=True))
    assert not hooks(backbone)
