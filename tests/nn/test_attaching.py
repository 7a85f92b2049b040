"""attach on networks of any kind: the selected tensor, its layout, the places of exits, and detach."""

import functools

import pytest
import torch
from torch import nn

from branchynet import BranchyNet, Policy, attach, choose, detach, export, fit, load, measure, record
from branchynet.deploy.torch_engine import TorchEngine
from branchynet.errors import GraphError, InputError
from branchynet.nn.branches import ConvBranch, DenseBranch, TokenLinear, default_branch
from helpers.loop import agree_in_batches, every_exit, safe_thresholds
from helpers.networks import Attention, Residual, spread_out

CLASSES = 4


def seeded(seed=0):
    torch.manual_seed(seed)


def exported(net, inputs, folder):
    """(engine of an exported file, its thresholds); about a third of the samples leave at each exit."""
    spread_out(net.eval(), inputs)
    outputs = every_exit(net, inputs)
    thresholds = safe_thresholds(outputs, (0.3, 0.5, 0.5)[: outputs.shape[1] - 1])
    path = export(net, folder / "model.onnx", policy=Policy(thresholds=thresholds), example=inputs)
    return load(path, threads=1), thresholds


# The selected tensor


class Wrapped(nn.Module):
    """Layers that return dicts and tuples; the wanted tensor is not the first entry."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x):
            return {"weights": x.sum(), "state": torch.tanh(self.linear(x))}

    def __init__(self):
        super().__init__()
        self.first, self.second = self.Layer(), self.Layer()
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x):
        x = self.second(self.first(x)["state"])["state"]
        return {"loss": x.mean(), "hidden": x, "answer": self.head(x)}


def test_callables_say_which_tensor_is_meant(tmp_path):
    torch.manual_seed(0)
    backbone, x = Wrapped(), torch.randn(30, 6)
    taps = {name: lambda output: output["state"] for name in ("first", "second")}
    net = attach(backbone, ["second", "first"], example=x, output=lambda output: output["answer"], tap=taps)
    assert net.taps == ("first", "second")
    early, _, last = net(x)
    assert last.equal(backbone(x)["answer"]) and early.equal(net.branches[0](backbone.first(x)["state"]))
    engine, thresholds = exported(net, (x,), tmp_path)
    agree_in_batches(engine, net, (x,), thresholds)
    same = BranchyNet(
        backbone, dict(zip(net.taps, net.branches, strict=True)), output=lambda output: output["answer"], tap=taps
    )
    assert all(a.equal(b) for a, b in zip(net(x), same(x), strict=True))


def test_what_callables_must_give():
    x = torch.randn(3, 6)
    with pytest.raises(
        GraphError, match="the function for 'first' returns a dict; output= and tap= must return a tensor"
    ):
        attach(Wrapped(), ["first"], example=x, output=lambda o: o["answer"], tap={"first": lambda o: o})
    with pytest.raises(InputError, match="tap= reads 'secnd', where there is no branch; did you mean 'second'"):
        attach(Wrapped(), ["second"], example=x, output=lambda o: o["answer"], tap={"secnd": lambda o: o["state"]})


def test_a_backbone_without_a_head_gets_one():
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3))
    x = torch.randn(9, 3, 10, 10)
    net = attach(backbone, ["0"], example=x, num_classes=CLASSES)
    assert [o.shape for o in net(x)] == [(9, CLASSES)] * 2
    own = {name for name in net.state_dict() if not name.startswith("backbone.")}
    assert any(name.startswith("output.head.") for name in own)
    assert detach(net) is backbone and list(backbone.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    before = [p.clone() for p in backbone.parameters()]
    fit(net, [(x, torch.randint(CLASSES, (9,)))] * 2, epochs=1, train="branches", progress=False)
    assert all(a.equal(b) for a, b in zip(before, backbone.parameters(), strict=True))
    assert all(p.grad is None for p in net.parameters())

    tokens = nn.Sequential(nn.Embedding(20, 6), Attention(6, 2), Attention(6, 2))
    ids = torch.randint(20, (5, 7))
    with pytest.raises(InputError, match=r"shape \(2, 7, 6\).*num_classes="):
        attach(tokens, ["1"], example=ids)
    assert [o.shape for o in attach(tokens, ["1"], example=ids, num_classes=3)(ids)] == [(5, 3)] * 2


def test_a_module_may_read_the_output_and_is_trained():
    torch.manual_seed(0)
    head = nn.Sequential(nn.Flatten(), nn.Linear(8 * 8 * 8, CLASSES))
    x = torch.randn(4, 3, 8, 8)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
    net = attach(backbone, ["0"], example=x, output=head)
    before = head[1].weight.clone()
    fit(net, [(x, torch.randint(CLASSES, (4,)))], epochs=1, progress=False)
    assert not before.equal(head[1].weight) and net(x)[-1].equal(head(backbone(x)))


# The layout


class Mixed(nn.Module):
    """Square feature maps with as many channels as rows, so that only the next layer shows the layout."""

    def __init__(self, last, size=6):
        super().__init__()
        self.last = last
        self.stem = nn.Conv2d(3, size, 1)
        self.tap = nn.Identity()
        self.norm = nn.LayerNorm(size) if last else nn.BatchNorm2d(size)
        self.head = nn.Linear(size, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        x = self.tap(x.permute(0, 2, 3, 1) * 2 if self.last else x * 2)
        x = self.norm(torch.relu(x) + 1)
        return self.head(x.mean((1, 2)) if self.last else x.mean((2, 3)))


@pytest.mark.parametrize("last", [True, False])
def test_the_next_layers_tell_where_the_channels_are(last):
    net = attach(Mixed(last), ["tap"], example=torch.randn(2, 3, 6, 6))
    if last:
        assert isinstance(net.branches[0], TokenLinear) and net.branches[0].feature_dim == -1
    else:
        assert isinstance(net.branches[0], ConvBranch)


class Waves(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.head = nn.Conv1d(2, 7, 3), nn.Conv1d(7, 7, 3), nn.Linear(7, CLASSES)

    def forward(self, x):
        x = torch.relu(self.conv1(x))
        x = torch.relu(self.conv2(x))
        return self.head(x.transpose(1, 2)).mean(1)


def test_one_dimensional_feature_maps_are_channels_first_where_convolutions_read_them(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(30, 2, 11)
    net = attach(Waves(), ["conv1", "conv2"], example=x)
    assert [(b.feature_dim, b.norm.normalized_shape) for b in net.branches] == [(1, (7,)), (1, (7,))]
    engine, thresholds = exported(net, (x,), tmp_path)
    agree_in_batches(engine, net, (x,), thresholds)


@pytest.mark.parametrize(
    ("shape", "dim", "kind", "features"),
    [
        ((2, 5), None, TokenLinear, 5),
        ((2, 7, 5), None, TokenLinear, 5),
        ((2, 5, 7), 1, TokenLinear, 5),
        ((2, 5, 8, 8), None, ConvBranch, 5),
        ((2, 8, 8, 5), -1, TokenLinear, 5),
        ((2, 5, 3, 8, 8), None, TokenLinear, 5),
        ((2, 3, 8, 8, 5), 4, TokenLinear, 5),
    ],
)
def test_default_branches_for_every_layout(shape, dim, kind, features):
    x = torch.randn(shape)
    branch = default_branch(x, CLASSES, dim)
    assert type(branch) is kind and branch(x).shape == (2, CLASSES)
    if kind is TokenLinear:
        moved = x.movedim(dim if dim is not None else (1 if x.dim() > 3 else -1), -1)
        mean = moved.reshape(2, -1, features).mean(1)
        torch.testing.assert_close(branch(x), branch.classifier(branch.norm(mean)))


def test_the_user_may_say_the_layout():
    branch = functools.partial(default_branch, feature_dim=-1)
    net = attach(Mixed(False), ["tap"], example=torch.randn(2, 3, 6, 6), branch=branch)
    assert isinstance(net.branches[0], TokenLinear)


def test_maps_get_branches_that_give_maps(tmp_path):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, CLASSES, 1)]
    x = torch.randn(20, 3, 12, 8)
    net = attach(nn.Sequential(*layers, nn.Upsample(scale_factor=2)), ["0", "2"], example=x)
    assert [type(b) for b in net.branches] == [DenseBranch] * 2
    assert [o.shape for o in net(x)] == [(20, CLASSES, 12, 8)] * 3
    engine, thresholds = exported(net, (x,), tmp_path)
    agree_in_batches(engine, net, (x,), thresholds)


# The places of exits


class Deep(nn.Module):
    """A list of residual blocks with equal costs, between a stem and a head of almost no cost."""

    def __init__(self, blocks=8, channels=8):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 1)
        self.blocks = nn.ModuleList(Residual(channels, channels, 1) for _ in range(blocks))
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(("exits", "taps"), [(2, (3,)), (3, (2, 4)), (4, (1, 3, 5)), (8, (0, 1, 2, 3, 4, 5, 6))])
def test_automatic_exits_divide_the_work_evenly_at_ends_of_blocks(exits, taps):
    net = attach(Deep(), "auto", example=torch.randn(2, 3, 8, 8), num_exits=exits)
    assert net.num_exits == exits and net.taps == tuple(f"blocks.{n}" for n in taps)


def test_automatic_exits_take_the_smallest_output_of_those_at_one_place():
    layers = [layer for _ in range(4) for layer in (nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2, 1))]
    net = attach(nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3)), "auto", example=torch.randn(2, 4, 9, 9))
    assert all(isinstance(net.backbone[int(tap)], nn.MaxPool2d) for tap in net.taps) and net.num_exits == 3


class Attended(nn.Module):
    """A network of token ids and a mask that every layer reads; one layer is used twice."""

    def __init__(self, layers=3, width=8):
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.shared = nn.Linear(width, width)
        self.layers = nn.ModuleList(Attention(width, 2) for _ in range(layers))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, ids, mask, *, scale):
        keep = mask.bool().unsqueeze(-1)  # a boolean that every stage reads
        x = self.shared(torch.tanh(self.shared(self.embed(ids))))
        for layer in self.layers:
            x = torch.where(keep, layer(x), 0.0) * scale[:, None, None]
        last = mask.sum(1) - 1  # integers; the last stage computes positions in the batch from them
        return self.head(x[torch.arange(ids.shape[0]), last])


def sentences(rows):
    mask = torch.ones(rows, 7, dtype=torch.int64)
    mask[::3, 4:] = 0
    return {"ids": torch.randint(50, (rows, 7)), "mask": mask, "scale": torch.rand(rows) + 0.5}


def test_automatic_exits_see_through_masks_and_leave_out_what_runs_twice():
    net = attach(Attended(), "auto", example=sentences(3), num_exits=3)
    assert net.taps == ("layers.0", "layers.1")


def test_a_skip_connection_over_everything_leaves_no_place():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, x):
            first = self.a(x)
            return self.c(self.b(torch.tanh(first))) + first

    with pytest.raises(GraphError, match=r"only 1 places for exits.*'a'.*4 exits need 3.*names"):
        attach(Skips(), "auto", example=torch.randn(2, 5), num_exits=4)


@pytest.mark.parametrize(
    ("at", "exits", "message"),
    [
        ("auto", 1, "at least 2.*got 1"),
        (["stem"], 3, "num_exits=3 is for at='auto'"),
        ("stem", None, "'auto', or a list"),
    ],
)
def test_wrong_numbers_of_exits_are_named(at, exits, message):
    with pytest.raises(InputError, match=message):
        attach(Deep(), at, example=torch.randn(2, 3, 8, 8), num_exits=exits)


# From network to engine, with keyword inputs


def test_token_ids_and_masks_go_the_whole_way(tmp_path):
    torch.manual_seed(0)
    net = attach(Attended(), ["layers.0", "layers.1"], example=sentences(2))
    batches = [(sentences(16), torch.randint(CLASSES, (16,))) for _ in range(3)]
    history = fit(net, batches, batches, epochs=1, progress=False)
    assert len(history.rows) == 1
    made = record(net, batches, progress=False)
    assert made.outputs.shape == (48, 3, CLASSES)
    choice = choose(made, measure(net, sentences(2), seconds=0.01), max_drop=0.5, confidence=None)
    assert choice.policy.num_exits == 3
    inputs = sentences(40)
    engine, thresholds = exported(net, inputs, tmp_path)
    assert [i.name for i in engine.inputs] == ["ids", "mask", "scale"]
    agree_in_batches(engine, net, inputs, thresholds)
    agree_in_batches(TorchEngine(net, Policy(thresholds=thresholds), inputs), net, inputs, thresholds)


# detach


def test_detach_gives_the_backbone_back_unchanged():
    torch.manual_seed(0)
    backbone, x = Deep(2), torch.randn(2, 3, 8, 8)
    backbone.eval()
    before, answer = {k: v.clone() for k, v in backbone.state_dict().items()}, backbone(x)
    back = detach(attach(backbone, ["blocks.0"], example=x))
    assert back is backbone and back(x).equal(answer) and not back.training
    assert all(v.equal(before[k]) for k, v in back.state_dict().items())
    with pytest.raises(InputError, match=r"only a BranchyNet.*got Deep"):
        detach(backbone)
