import functools
import math
import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from branchynet.errors import BranchyNetError, InputError
from branchynet.losses import joint_loss
from branchynet.nn.network import BranchyNet
from branchynet.nn.weights import load_weights
from branchynet.training import trainer
from branchynet.training.history import History
from branchynet.training.loop import fit
from branchynet.training.options import FitOptions
from branchynet.training.schedules import Constant, Cosine
from helpers.training_runs import CLASSES, Pictures, brisk, equal, loader, make, quiet, state

logits = st.integers(0, 2**32 - 1).map(np.random.default_rng)


def test_every_exit_learns_according_to_the_history():
    net = make()
    history = quiet(net, loader(samples=200), loader(samples=100), epochs=5, optimizer=brisk)
    assert [row.epoch for row in history.rows] == [1, 2, 3, 4, 5]
    assert history.last.train_loss < history.rows[0].train_loss / 2
    assert len(history.last.val_accuracy) == 2 and min(history.last.val_accuracy) > 0.9
    assert history.last.val_loss < history.rows[0].val_loss
    assert history.seconds == pytest.approx(sum(row.seconds for row in history.rows)) and history.seconds > 0


def test_the_history_agrees_with_a_simple_loop():
    """One epoch at a learning rate of 0 with batches of unequal size gives the figures of all data at once."""
    data = TensorDataset(torch.randn(25, 2, 8, 8), torch.randint(CLASSES, (25,)))
    net = make().eval()
    still = functools.partial(torch.optim.SGD, lr=0.0)
    row = quiet(net, DataLoader(data, 25), DataLoader(data, 10), epochs=1, loss_weights=[1, 0.5], optimizer=still).last
    x, y = data.tensors
    # A step at a learning rate of 0 changes only the running statistics of batch normalization.
    with torch.no_grad():
        outputs = net(x)
    assert row.val_loss == pytest.approx(float(joint_loss(outputs, y, [1, 0.5])), rel=1e-5)
    assert row.val_accuracy == pytest.approx([float((o.argmax(1) == y).float().mean()) for o in outputs])


def test_a_plain_network_trains_as_one_exit():
    backbone = make().backbone
    history = quiet(backbone, loader(samples=200), loader(samples=100), epochs=5, optimizer=brisk)
    assert len(history.last.val_accuracy) == 1 and history.last.val_accuracy[0] > 0.9


def test_the_loop_is_the_textbook_loop():
    """Without randomness, `fit` gives the weights of a hand-written loop."""
    batches = [(torch.randn(6, 3), torch.randint(2, (6,))) for _ in range(5)]

    def network():
        torch.manual_seed(0)
        return BranchyNet(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), {"0": nn.Linear(4, 2)})

    by_hand, fitted = network(), network()
    optimizer = torch.optim.Adam(by_hand.parameters(), lr=1e-3)
    for _ in range(3):
        for x, y in batches:
            early, last = by_hand(x)
            optimizer.zero_grad()
            (F.cross_entropy(early, y) + 0.3 * F.cross_entropy(last, y)).backward()
            optimizer.step()
    quiet(fitted, batches, epochs=3, loss_weights=[1, 0.3], schedule=Constant())
    assert equal(state(by_hand), state(fitted))


class Named(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, left, right):
        return self.net(torch.cat([left, right], dim=1))


def test_inputs_may_be_a_tensor_a_tuple_or_a_dict():
    pairs = [(torch.randn(8, 2, 8, 8), torch.randint(CLASSES, (8,))) for _ in range(4)]
    nets = [make(), Named(make()), Named(make())]
    quiet(nets[0], pairs, epochs=2)
    quiet(nets[1], [(tuple(x.split(1, dim=1)), y) for x, y in pairs], epochs=2)
    quiet(nets[2], [({"right": x[:, 1:], "left": x[:, :1]}, y) for x, y in pairs], epochs=2)
    assert equal(state(nets[0]), state(nets[1].net)) and equal(state(nets[0]), state(nets[2].net))


def test_dense_targets_are_counted_position_by_position():
    net = nn.Conv2d(1, 2, 1)
    x = torch.randn(40, 1, 4, 4)
    row = quiet(
        net, [(x, (x[:, 0] > 0).long())] * 60, epochs=1, optimizer=functools.partial(torch.optim.Adam, lr=0.1)
    ).last
    assert 0.8 < row.train_accuracy[0] <= 1


def test_targets_other_than_class_indices_have_no_accuracy():
    x = torch.randn(40, 3)
    history = quiet(nn.Linear(3, 1), [(x, x.sum(1, keepdim=True))] * 5, epochs=2, loss=F.mse_loss)
    assert history.last.train_accuracy == () and history.last.train_loss < history.rows[0].train_loss


def test_training_the_branches_leaves_the_last_exit_bit_identical():
    net, x = make(), torch.randn(50, 2, 8, 8)
    backbone, branch = state(net.backbone), state(net.branches)
    net.eval()
    early, last = (o.detach() for o in net(x))
    net.train()
    net.backbone[1].eval()
    quiet(net, loader(), epochs=2, train="branches", distill=0.5, channels_last=True)
    assert equal(backbone, state(net.backbone))
    assert not any(torch.equal(branch[name], value) for name, value in state(net.branches).items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert net.training and net.backbone[0].training and not net.backbone[1].training
    net.eval()
    assert torch.equal(net(x)[1], last) and not torch.equal(net(x)[0], early)


def test_a_frozen_backbone_may_overwrite_a_tap_in_place():
    """The ReLU of the trunk changes the tapped tensor after the branch has saved it for its backward."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        nets = [
            BranchyNet(
                nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=inplace), nn.Flatten(), nn.Linear(108, CLASSES)),
                {"0": nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(32, CLASSES))},
            )
            for inplace in (False, True)
        ]
    nets[1].load_state_dict(nets[0].state_dict())
    for net in nets:
        quiet(net, loader(), epochs=1, train="branches")
    assert equal(state(nets[0]), state(nets[1]))


def test_parameters_that_the_user_froze_stay_frozen():
    net = make()
    net.backbone[0].requires_grad_(False)
    before = state(net)
    quiet(net, loader(), epochs=1)
    assert torch.equal(net.backbone[0].weight, before["backbone.0.weight"])
    assert not torch.equal(net.backbone[5].weight, before["backbone.5.weight"])
    assert not net.backbone[0].weight.requires_grad


def test_everything_is_restored_after_a_failure():
    net = make()
    net.branches.eval()
    modes, flags = [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]

    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quiet(net, loader(interrupt=fail, at=25), epochs=1, train="branches", channels_last=True)
    assert [m.training for m in net.modules()] == modes and [p.requires_grad for p in net.parameters()] == flags
    assert all(p.is_contiguous() for p in net.parameters())


def test_the_callers_generators_and_accelerator_do_not_change():
    accelerator = Accelerator(cpu=True)

    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def seed():
        random.seed(5), np.random.seed(5), torch.manual_seed(5)

    seed()
    expected = draw()
    seed()
    quiet(make(), loader(), epochs=1, mixed_precision="bf16")
    assert draw() == expected
    assert accelerator.mixed_precision == "no" and accelerator.device.type == "cpu"


def test_the_seed_decides_shuffling_dropout_and_augmentation():
    def weights(seed, generator):
        net = make()
        own = torch.Generator().manual_seed(random.getrandbits(32)) if generator else None
        data = DataLoader(Pictures(), batch_size=10, shuffle=True, generator=own)
        torch.rand(7)  # the state of the generators must not matter
        quiet(net, data, epochs=2, seed=seed)
        return state(net)

    for generator in (False, True):
        assert equal(weights(1, generator), weights(1, generator))
        assert not equal(weights(1, generator), weights(2, generator))


def test_channels_last_changes_only_the_order_of_sums():
    nets = [make(), make()]
    for net, channels_last in zip(nets, (False, True), strict=True):
        # Not Adam, because its first steps turn rounding errors of a zero gradient into full steps.
        sgd = functools.partial(torch.optim.SGD, lr=0.05)
        quiet(net, loader(), loader(), epochs=1, channels_last=channels_last, optimizer=sgd)
    for name, value in state(nets[0]).items():
        other = nets[1].state_dict()[name]
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5)
        assert other.stride() == value.stride()


def test_channels_last_reaches_the_network():
    seen = []
    net = make()
    net.backbone[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    quiet(net, loader(), epochs=1, channels_last=True)
    assert all(x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous() for x in seen)


def test_bf16_trains_and_keeps_float32_weights():
    net, dtypes = make(), []
    net.backbone[0].register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    history = quiet(net, loader(samples=200), loader(samples=100), epochs=5, optimizer=brisk, mixed_precision="bf16")
    assert set(dtypes) == {torch.bfloat16}
    assert min(history.last.val_accuracy) > 0.9
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert net(torch.randn(1, 2, 8, 8))[0].dtype == torch.float32


def test_schedules_are_stepped_every_batch():
    rates = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    history = quiet(make(), loader(), epochs=4, optimizer=lambda p: Watched(p, lr=0.5), schedule=Cosine(warmup=0.25))
    steps = 4 * 6
    assert len(rates) == steps and rates[:6] == pytest.approx([0.5 * n / 6 for n in range(1, 7)])
    assert rates[6] == max(rates) == 0.5 and rates[6:] == sorted(rates[6:], reverse=True)
    assert rates[15] == pytest.approx(0.25) and 0 < rates[-1] < 0.01
    assert [row.lr for row in history.rows] == [rates[n] for n in (5, 11, 17, 23)]
    rates.clear()
    quiet(make(), loader(), epochs=2, optimizer=lambda p: Watched(p, lr=0.5), schedule=Constant())
    assert rates == [0.5] * 12


def test_an_exit_of_weight_0_learns_nothing():
    net = make()
    before = state(net)
    quiet(net, loader(), epochs=1, loss_weights=[1, 0], optimizer=functools.partial(torch.optim.SGD, lr=0.1))
    assert torch.equal(net.backbone[5].weight, before["backbone.5.weight"])
    assert not torch.equal(net.branches[0][4].weight, before["branches.0.4.weight"])


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path):
    net = nn.Linear(3, 2)
    good = (torch.ones(2, 3), torch.tensor([0, 1]))
    data = [good, good, (torch.full((2, 3), math.nan), good[1])]

    class Worsening(list):
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter(data if self.passes == 2 else [good] * 3)

    with pytest.raises(BranchyNetError, match="nan in epoch 2, batch 3; lower the learning rate"):
        quiet(net, Worsening(data), epochs=3, run=tmp_path)
    assert [row.epoch for row in History.load(tmp_path / "train.csv").rows] == [1]
    load_weights(net, tmp_path / "checkpoint.safetensors")
    assert net.weight.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"epochs": 0}, "epochs"),
        ({"seed": -1}, "seed must not be negative"),
        ({"seed": 2**32}, "seed must be at most 4294967295; got 4294967296"),
        ({"seed": 10**20}, "seed must be at most"),
        ({"seed": True}, "seed must be a whole number; got True"),
        ({"train": "heads"}, "'heads'"),
        ({"train": "branches", "net": nn.Linear(3, 2)}, "Linear"),
        ({"mixed_precision": "fp8"}, "'fp8'"),
        ({"mixed_precision": "fp16"}, "GPU"),
        ({"device": "abacus"}, "'abacus'"),
        ({"loss_weights": [1, 1, 1]}, "3 for 2 exits"),
        ({"loss_weights": [-1, 1]}, "-1"),
        ({"train_loader": []}, "no batches"),
        ({"train_loader": iter([])}, "length"),
        ({"val_loader": []}, "validation"),
        ({"train_loader": [torch.zeros(3)]}, "inputs, target"),
        ({"train_loader": [{"image": torch.zeros(3)}]}, "dict"),
        ({"net": make().requires_grad_(False)}, "gradient"),
        ({"net": make(classes=7)}, r"exit 1 .*7.*4"),
    ],
)
def test_wrong_arguments_are_named(changes, text):
    arguments = {"net": make(), "train_loader": loader(), "epochs": 1} | changes
    with pytest.raises(InputError, match=text):
        quiet(**arguments)


def test_the_bar_shows_loss_and_accuracy_unless_disabled(capsys):
    fit(make(), loader(), epochs=2, options=FitOptions(device="cpu"))
    text = capsys.readouterr().err
    assert "epoch 1/2" in text and "epoch 2/2" in text and "loss" in text and text.count("%") == 4
    quiet(make(), loader(), epochs=2)
    assert capsys.readouterr() == ("", "")


def test_a_log_file_gets_lines_within_an_epoch(capsys, monkeypatch):
    monkeypatch.setattr(trainer, "REFRESH_S", -1.0)
    monkeypatch.setattr(trainer, "LINE_S", -1.0)
    fit(make(), loader(), epochs=1, options=FitOptions(device="cpu"))
    text = capsys.readouterr().err
    assert [f"epoch 1/1: {n} of 6 batches, loss" in text for n in range(8)] == [n in range(1, 6) for n in range(8)]


def test_batches_without_samples_are_left_out():
    x, y = torch.randn(12, 2, 8, 8), torch.randint(CLASSES, (12,))
    some = [(x[:6], y[:6]), (x[6:], y[6:])]
    nets = make(), make()
    nets[1].load_state_dict(nets[0].state_dict())
    for net, given in zip(nets, (some, [(x[:0], y[:0]), some[0], (x[:0], y[:0]), some[1]]), strict=True):
        quiet(net, given, epochs=1, schedule=Constant())
    assert equal(state(nets[0]), state(nets[1]))
    with pytest.raises(InputError, match="yielded no batch"):
        quiet(make(), [(x[:0], y[:0])], epochs=1)
