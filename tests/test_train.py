import contextlib
import functools
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from branchynet.errors import BranchyNetError, FileError, InputError
from branchynet.net import BranchyNet
from branchynet.training import checkpoint, train
from branchynet.training.checkpoint import load_weights, save_weights
from branchynet.training.history import EpochRow, History
from branchynet.training.train import Constant, Cosine, fit, joint_loss

CLASSES = 4


class Pictures(TensorDataset):
    """Noisy copies of one pattern a class; `interrupt` is called before the given sample is drawn for the n-th time."""

    def __init__(self, samples=60, interrupt=None, at=-1):
        generator = torch.Generator().manual_seed(1)
        patterns = torch.rand(CLASSES, 2, 8, 8, generator=generator)
        labels = torch.randint(CLASSES, (samples,), generator=generator)
        super().__init__(patterns[labels] + 0.3 * torch.randn(samples, 2, 8, 8, generator=generator), labels)
        self.interrupt, self.at, self.drawn = interrupt, at, 0

    def __getitem__(self, index):
        if self.drawn == self.at:
            self.interrupt()
        self.drawn += 1
        image, label = super().__getitem__(index)
        # Augmentation from all three generators, so that a resume which restored only one of them would show.
        return image + 0.1 * torch.rand(()) + 0.1 * float(np.random.rand()) + 0.1 * random.random(), label


def make(seed=0, classes=CLASSES, width=4):
    """Two exits, with batch normalisation, dropout and tied nothing; reproducible whatever the global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = nn.Sequential(
            nn.Conv2d(2, width, 3),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(36 * width, CLASSES),
        )
        branch = nn.Sequential(
            nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(36 * width, classes)
        )
        return BranchyNet(backbone, {"0": branch})


def loader(**kwargs):
    return DataLoader(Pictures(**kwargs), batch_size=10, shuffle=True)


def state(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


quiet = functools.partial(fit, progress=False, device="cpu")
brisk = functools.partial(torch.optim.Adam, lr=5e-3)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums are taken in another order by another number of threads; a child process has one as well."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# The joint loss


logits = st.integers(0, 2**32 - 1).map(np.random.default_rng)


@settings(max_examples=50, deadline=None)
@given(
    rng=logits,
    exits=st.integers(1, 4),
    batch=st.integers(1, 5),
    classes=st.integers(2, 6),
    distill=st.sampled_from([0.0, 0.7]),
)
def test_joint_loss_is_the_weighted_sum_of_the_exits(rng, exits, batch, classes, distill):
    outputs, target = rng.normal(scale=3, size=(exits, batch, classes)), rng.integers(classes, size=batch)
    weights = rng.uniform(0.1, 2, exits)
    log_p = outputs - np.log(np.exp(outputs).sum(axis=2, keepdims=True))
    parts = -log_p[:, np.arange(batch), target].mean(axis=1)
    parts[:-1] += distill * (np.exp(log_p[-1]) * (log_p[-1] - log_p[:-1])).sum(axis=2).mean(axis=1)
    tensors = tuple(torch.tensor(o, requires_grad=True) for o in outputs)
    joint = joint_loss(tensors, torch.tensor(target), weights, distill=distill)
    assert joint.item() == pytest.approx(float(weights @ parts), rel=1e-9)
    joint.backward()
    # The last exit learns from the labels alone, whatever it teaches the others.
    onehot = np.eye(classes)[target]
    np.testing.assert_allclose(tensors[-1].grad, weights[-1] * (np.exp(log_p[-1]) - onehot) / batch, atol=1e-12)


def test_joint_loss_weighs_all_exits_alike_by_default_and_takes_one_tensor():
    outputs, target = tuple(torch.randn(3, 5, CLASSES)), torch.arange(5) % CLASSES
    assert torch.equal(joint_loss(outputs, target), joint_loss(outputs, target, [1, 1, 1]))
    assert torch.equal(joint_loss(outputs[0], target), F.cross_entropy(outputs[0], target))


def test_joint_loss_takes_any_loss():
    outputs, target = (torch.zeros(3, 1), torch.ones(3, 1)), torch.full((3, 1), 2.0)
    assert float(joint_loss(outputs, target, [1, 10], F.mse_loss)) == 4 + 10


@pytest.mark.parametrize(
    ("weights", "told"),
    [([1], "2 exits"), ([1, -0.5], "-0.5"), ([0, 0], "all 0"), ([1, math.nan], "nan"), ([math.inf, 1], "inf")],
)
def test_joint_loss_refuses_weights(weights, told):
    with pytest.raises(InputError, match=told):
        joint_loss((torch.zeros(2, 3), torch.zeros(2, 3)), torch.tensor([0, 1]), weights)


def test_joint_loss_names_the_exit_of_another_shape():
    with pytest.raises(InputError, match=r"exit 2 .*\(2, 5\).*last exit \(2, 3\)"):
        joint_loss((torch.zeros(2, 3), torch.zeros(2, 5), torch.zeros(2, 3)), torch.tensor([0, 1]))


@pytest.mark.parametrize("target", [torch.tensor([0, 3]), torch.tensor([0]), torch.tensor([0.0, 1.0])])
def test_joint_loss_names_a_target_that_does_not_fit(target):
    with pytest.raises(InputError, match=r"exit 1 .*\(2, 3\)"):
        joint_loss((torch.zeros(2, 3), torch.zeros(2, 3)), target)


# Training


def test_every_exit_learns_and_the_history_says_so():
    net = make()
    history = quiet(net, loader(samples=200), loader(samples=100), epochs=5, optimizer=brisk)
    assert [row.epoch for row in history.rows] == [1, 2, 3, 4, 5]
    assert history.last.train_loss < history.rows[0].train_loss / 2
    assert len(history.last.val_accuracy) == 2 and min(history.last.val_accuracy) > 0.9
    assert history.last.val_loss < history.rows[0].val_loss
    assert history.seconds == sum(row.seconds for row in history.rows) > 0


def test_the_history_counts_as_a_plain_loop_does():
    """Loss and accuracy of one epoch without learning, batches of unequal size, against figures over all at once."""
    data = TensorDataset(torch.randn(25, 2, 8, 8), torch.randint(CLASSES, (25,)))
    net = make().eval()
    still = functools.partial(torch.optim.SGD, lr=0.0)
    row = quiet(net, DataLoader(data, 25), DataLoader(data, 10), epochs=1, weights=[1, 0.5], optimizer=still).last
    x, y = data.tensors
    # One step at a learning rate of 0 moves the running statistics of the batch normalisation, and nothing else.
    with torch.no_grad():
        outputs = net(x)
    assert row.val_loss == pytest.approx(float(joint_loss(outputs, y, [1, 0.5])), rel=1e-5)
    assert row.val_accuracy == pytest.approx([float((o.argmax(1) == y).float().mean()) for o in outputs])


def test_a_plain_network_trains_as_one_exit():
    backbone = make().backbone
    history = quiet(backbone, loader(samples=200), loader(samples=100), epochs=5, optimizer=brisk)
    assert len(history.last.val_accuracy) == 1 and history.last.val_accuracy[0] > 0.9


def test_the_loop_is_the_textbook_loop():
    """Without chance in it, `fit` must give the weights of a loop written by hand."""
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
    quiet(fitted, batches, epochs=3, weights=[1, 0.3], schedule=Constant())
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


def test_targets_that_are_no_class_indices_have_no_accuracy():
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
    """The trunk's ReLU changes the tapped tensor after the branch has kept it for its own backward."""
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


def test_everything_is_put_back_after_a_failure():
    net = make()
    net.branches.eval()
    modes, flags = [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]

    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quiet(net, loader(interrupt=fail, at=25), epochs=1, train="branches", channels_last=True)
    assert [m.training for m in net.modules()] == modes and [p.requires_grad for p in net.parameters()] == flags
    assert all(p.is_contiguous() for p in net.parameters())


def test_the_callers_generators_and_accelerator_are_left_alone():
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
        torch.rand(7)  # where the generators stand must not matter
        quiet(net, data, epochs=2, seed=seed)
        return state(net)

    for generator in (False, True):
        assert equal(weights(1, generator), weights(1, generator))
        assert not equal(weights(1, generator), weights(2, generator))


def test_channels_last_changes_only_the_order_of_sums():
    nets = [make(), make()]
    for net, channels_last in zip(nets, (False, True), strict=True):
        # Not Adam: its first steps turn the rounding of a vanishing gradient into whole steps.
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
    quiet(net, loader(), epochs=1, weights=[1, 0], optimizer=functools.partial(torch.optim.SGD, lr=0.1))
    assert torch.equal(net.backbone[5].weight, before["backbone.5.weight"])
    assert not torch.equal(net.branches[0][4].weight, before["branches.0.4.weight"])


def test_a_loss_that_is_not_finite_stops_the_training_by_name(tmp_path):
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
    ("changes", "told"),
    [
        ({"epochs": 0}, "epochs"),
        ({"seed": -1}, "seed"),
        ({"train": "heads"}, "'heads'"),
        ({"train": "branches", "net": nn.Linear(3, 2)}, "Linear"),
        ({"mixed_precision": "fp8"}, "'fp8'"),
        ({"mixed_precision": "fp16"}, "GPU"),
        ({"device": "abacus"}, "'abacus'"),
        ({"weights": [1, 1, 1]}, "3 for 2 exits"),
        ({"weights": [-1, 1]}, "-1"),
        ({"train_loader": []}, "no batches"),
        ({"train_loader": iter([])}, "length"),
        ({"val_loader": []}, "validation"),
        ({"train_loader": [torch.zeros(3)]}, "inputs, target"),
        ({"train_loader": [{"image": torch.zeros(3)}]}, "dict"),
        ({"net": make().requires_grad_(False)}, "gradient"),
        ({"net": make(classes=7)}, r"exit 1 .*7.*4"),
    ],
)
def test_wrong_arguments_are_named(changes, told):
    arguments = {"net": make(), "train_loader": loader(), "epochs": 1, "device": "cpu", "progress": False} | changes
    with pytest.raises(InputError, match=told):
        fit(**arguments)


def test_the_bar_tells_loss_and_accuracy_unless_silenced(capsys):
    fit(make(), loader(), epochs=2, device="cpu")
    told = capsys.readouterr().err
    assert "epoch 1/2" in told and "epoch 2/2" in told and "loss" in told and told.count("%") == 4
    quiet(make(), loader(), epochs=2)
    assert capsys.readouterr() == ("", "")


def test_an_epoch_costs_little_more_than_a_bare_loop():
    """The loop's own work a batch, seen on a network that does next to nothing."""
    net, batches = nn.Linear(8, 2), [(torch.randn(16, 8), torch.randint(2, (16,)))] * 300

    def bare():
        optimizer = torch.optim.Adam(net.parameters())
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()

    def took(function):
        start = time.process_time()
        function()
        return time.process_time() - start

    # 1 ms a batch is a hundredth of what LeNet takes for 512 pictures.
    spent = min(took(lambda: quiet(net, batches, epochs=1)) for _ in range(3)) - min(took(bare) for _ in range(3))
    assert spent < 1e-3 * len(batches)


# Runs that are killed and go on

EPOCHS = 3


def killed_run(folder, at):
    """For a child process: train into `folder` and die by SIGKILL before the `at`-th sample is drawn."""
    torch.set_num_threads(1)
    data = loader(interrupt=lambda: os.kill(os.getpid(), signal.SIGKILL), at=int(at))
    fit(make(), data, epochs=EPOCHS, run=folder, device="cpu", progress=False)


@pytest.fixture(scope="module")
def whole():
    """Weights and history of a training that nothing disturbed."""
    net = make()
    history = quiet(net, loader(), epochs=EPOCHS)
    return state(net), history


@pytest.mark.parametrize("at", [25, 60 + 44])  # amid the third batch of epoch 1, amid the fifth of epoch 2
def test_a_run_that_was_killed_goes_on_to_the_same_weights(whole, tmp_path, at):
    command = f"import test_train; test_train.killed_run({str(tmp_path)!r}, {at})"
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(checkpoint.__file__).parents[2])])
    child = subprocess.run([sys.executable, "-c", command], env={**os.environ, "PYTHONPATH": paths}, timeout=60)
    assert child.returncode == -signal.SIGKILL
    assert len(History.load(tmp_path / "train.csv").rows) == at // 60
    # Weights drawn anew must not matter, because those of the first start were kept.
    net, history = resumed(tmp_path, make(seed=9))
    assert equal(state(net), whole[0])
    assert [row.epoch for row in history.rows] == [1, 2, 3]
    assert [figures(row) for row in history.rows] == [figures(row) for row in whole[1].rows]
    assert History.load(tmp_path / "train.csv").rows[-1].train_loss == history.last.train_loss
    stored = safetensors.torch.load_file(tmp_path / "checkpoint.safetensors")
    assert equal(stored, whole[0])


def resumed(folder, net, interrupt=-1, **changes):
    return net, quiet(net, loader(interrupt=stop, at=interrupt), **{"epochs": EPOCHS, "run": folder} | changes)


def figures(row):
    return (row.epoch, row.lr, row.train_loss, row.train_accuracy, row.val_loss, row.val_accuracy)


class Stop(Exception):
    pass


def stop():
    raise Stop


class Counting(torch.optim.SGD):
    """An optimizer whose state is a plain number, which changes its steps."""

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state[p]["count"] = self.state[p].get("count", 0) + 1
            p.grad.div_(self.state[p]["count"])
        return super().step(closure)


RECIPES = {
    "numbers": {"optimizer": functools.partial(Counting, lr=0.1)},
    "adam": {},
    "sgd": {"optimizer": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True)},
    "adamw": {"optimizer": functools.partial(torch.optim.AdamW, lr=0.01, amsgrad=True), "train": "branches"},
    # A fused step walks memory, so the state must come back in the weights' own memory order.
    "fused": {"optimizer": functools.partial(torch.optim.Adam, lr=0.01, fused=True), "channels_last": True},
    "groups": {
        "optimizer": lambda p: torch.optim.Adam([{"params": p[:2], "lr": 0.1}, {"params": p[2:]}], lr=0.01),
        "schedule": lambda o, n: torch.optim.lr_scheduler.MultiStepLR(o, [4, 9], 0.3),
        "channels_last": True,
    },
    "onecycle": {"schedule": lambda o, n: torch.optim.lr_scheduler.OneCycleLR(o, 0.01, n), "mixed_precision": "bf16"},
    "exponential": {"schedule": lambda o, n: torch.optim.lr_scheduler.ExponentialLR(o, 0.9), "distill": 0.5},
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("at", [0, 61, 133, 179])
def test_any_optimizer_and_schedule_goes_on_to_the_same_weights(tmp_path, recipe, at):
    net = make()
    quiet(net, loader(), epochs=EPOCHS, **RECIPES[recipe])
    with pytest.raises(Stop):
        resumed(tmp_path, make(), interrupt=at, **RECIPES[recipe])
    again, _ = resumed(tmp_path, make(seed=9), **RECIPES[recipe])
    assert equal(state(net), state(again))


def test_overflowing_fp16_steps_are_left_out_and_the_scale_goes_on(tmp_path, monkeypatch):
    """A CPU has no fp16 training, but torch's gradient scaler runs there; it halves its scale after an overflow."""
    accelerating, skipped = train.accelerating, []

    @contextlib.contextmanager
    def scaling(mixed_precision, device):
        with accelerating(mixed_precision, device) as accelerator:
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=2)
            yield accelerator
            skipped.append(EPOCHS * 6 - json.loads(header(tmp_path)["branchynet"])["progress"]["steps"])

    def header(folder):
        with safetensors.safe_open(folder / "training.safetensors", framework="pt") as stored:
            return stored.metadata()

    monkeypatch.setattr(train, "accelerating", scaling)
    loud = {"weights": [30, 30]}
    net, _ = resumed(tmp_path, make(), **loud)
    with pytest.raises(Stop):
        resumed(tmp_path, make(), resume=False, interrupt=133, **loud)
    again, history = resumed(tmp_path, make(seed=9), **loud)
    assert equal(state(net), state(again)) and all(value.isfinite().all() for value in state(net).values())
    assert skipped[0] == skipped[1] > 0
    # The schedule waits with the optimizer, so it has not come to its end.
    assert history.last.lr > Cosine()(torch.optim.SGD(net.parameters(), lr=1e-3), 18).lr_lambdas[0](17) * 1e-3


@pytest.mark.parametrize("name", ["training.safetensors", "checkpoint.safetensors", "train.csv"])
def test_a_kill_between_the_files_of_a_checkpoint_loses_nothing(whole, tmp_path, name, monkeypatch):
    """Stop right after `name` of epoch 2 was written, and leave a half-written file about."""
    written = []
    replace = Path.replace

    def watched(self, target):
        result = replace(self, target)
        written.append(Path(target).name)
        if written.count(name) == 3:  # the state before epoch 1 counts too
            raise Stop
        return result

    monkeypatch.setattr(Path, "replace", watched)
    with pytest.raises(Stop):
        resumed(tmp_path, make())
    monkeypatch.undo()
    half = tmp_path / ".checkpoint-abc.partial.safetensors"
    half.write_bytes(b"half")
    net, history = resumed(tmp_path, make(seed=9))
    assert equal(state(net), whole[0]) and len(history.rows) == EPOCHS
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.safetensors", "train.csv", "training.safetensors"]


@pytest.fixture
def finished(tmp_path, whole):
    resumed(tmp_path, make())
    return tmp_path


def test_a_finished_run_returns_at_once(finished, whole):
    (finished / "train.csv").write_text("epoch\n")  # derived, so made again
    net = make(seed=9)
    _, history = resumed(finished, net, interrupt=0)
    assert equal(state(net), whole[0])
    assert [figures(row) for row in history.rows] == [figures(row) for row in whole[1].rows]
    assert len(History.load(finished / "train.csv").rows) == EPOCHS


def test_resume_false_starts_anew(finished, whole):
    net, _ = resumed(finished, make(seed=9), resume=False)
    assert not equal(state(net), whole[0])
    assert equal(safetensors.torch.load_file(finished / "checkpoint.safetensors"), state(net))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"epochs": 4}, "epochs=3.*epochs=4"),
        ({"seed": 1}, "seed=0.*seed=1"),
        ({"weights": [1, 0.3]}, r"weights=None.*weights=\[1.0, 0.3\]"),
        ({"train": "branches"}, "train='all'.*train='branches'"),
        ({"optimizer": functools.partial(torch.optim.Adam, lr=0.01)}, "'lr': 0.001.*'lr': 0.01"),
        ({"schedule": Cosine(0.1)}, r"Cosine\(warmup=0.05\).*Cosine\(warmup=0.1\)"),
        ({"loss": functools.partial(F.cross_entropy, label_smoothing=0.1)}, "loss=.*label_smoothing=0.1"),
        ({"mixed_precision": "bf16"}, "mixed_precision='no'"),
    ],
)
def test_a_run_with_other_settings_is_refused(finished, changes, told):
    with pytest.raises(InputError, match=f"(?s){told}.*another run folder, or resume=False"):
        resumed(finished, make(), **changes)


def test_a_run_of_another_network_is_refused(finished):
    net = make(width=5)
    before = state(net)
    with pytest.raises(FileError, match=r"'backbone.0.weight' is of shape \(4, 2, 3, 3\) .* \(5, 2, 3, 3\)"):
        resumed(finished, net)
    assert equal(before, state(net))


def test_a_truncated_or_foreign_state_is_refused(finished):
    path = finished / "training.safetensors"
    content = path.read_bytes()
    for foreign in (
        b"",
        content[:5],
        content[:100],
        content[:-1],
        content[: len(content) // 2],
        b"\x00" * 64,
        b"PK\x03\x04" * 9,
    ):
        path.write_bytes(foreign)
        with pytest.raises(FileError, match=r"training\.safetensors"):
            resumed(finished, make())
    path.write_bytes((finished / "checkpoint.safetensors").read_bytes())  # sound, but no state of a training
    with pytest.raises(FileError, match=r"not the state.*resume=False"):
        resumed(finished, make())
    assert resumed(finished, make(), resume=False)[1].last.epoch == EPOCHS


def full_disk(limit):
    """Let no file grow beyond `limit` bytes: what a full disk looks like to a writer."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_full_disk_leaves_the_last_good_state(tmp_path, whole):
    kept = {}

    def fill():
        kept.update({path.name: path.read_bytes() for path in tmp_path.iterdir()})
        full_disk(2000)

    try:
        with pytest.raises(FileError, match=r"cannot write .*training.safetensors.*space"):
            quiet(make(), loader(interrupt=fill, at=70), epochs=EPOCHS, run=tmp_path)
    finally:
        full_disk(resource.RLIM_INFINITY)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept
    assert equal(state(resumed(tmp_path, make(seed=9))[0]), whole[0])


def test_an_optimizer_that_tensors_and_json_cannot_hold_is_named(tmp_path):
    class Odd(torch.optim.SGD):
        def step(self, closure=None):
            self.state[self.param_groups[0]["params"][0]]["memory"] = {1, 2}
            return super().step(closure)

    with pytest.raises(InputError, match="Odd"):
        resumed(tmp_path, make(), optimizer=lambda p: Odd(p, lr=0.1))


# Weights on disk


def test_weights_come_back_bit_for_bit(tmp_path):
    net = make()
    quiet(net, loader(), epochs=1)
    save_weights(net, tmp_path / "w.safetensors")
    other = make(seed=9)
    load_weights(other, tmp_path / "w.safetensors")
    assert equal(state(net), state(other))
    assert equal(safetensors.torch.load_file(tmp_path / "w.safetensors"), state(net))


def test_tied_strided_and_low_precision_weights_come_back(tmp_path):
    def network():
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last))
        net[1].weight = net[0].weight
        return net.to(torch.bfloat16)

    net, other = network(), network()
    save_weights(net, tmp_path / "w.safetensors")
    load_weights(other, tmp_path / "w.safetensors")
    assert equal(state(net), state(other)) and other[1].weight is other[0].weight


def test_a_backbones_own_file_loads_into_the_backbone(tmp_path):
    backbone, net = make(seed=3).backbone, make()
    save_weights(backbone, tmp_path / "backbone.safetensors")
    save_weights(net, tmp_path / "net.safetensors")
    load_weights(net.backbone, tmp_path / "backbone.safetensors")
    assert equal(state(net.backbone), state(backbone))
    with pytest.raises(FileError, match=r"'backbone.0.weight' is missing .*load it into net.backbone"):
        load_weights(net, tmp_path / "backbone.safetensors")
    with pytest.raises(FileError, match=r"'0.weight' is missing .*BranchyNet around"):
        load_weights(backbone, tmp_path / "net.safetensors")


def test_weights_of_another_architecture_name_the_first_tensor_that_differs(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(make(width=5), path)
    net = make()
    before = state(net)
    with pytest.raises(
        FileError, match=r"'backbone.0.weight' is of shape \(5, 2, 3, 3\) in the file .* \(4, 2, 3, 3\)"
    ):
        load_weights(net, path)
    save_weights(nn.Sequential(*make().backbone, nn.Linear(4, 4)), path)
    with pytest.raises(FileError, match=r"'6.(weight|bias)' is of shape \(4,.* in the file and missing in the network"):
        load_weights(net.backbone, path)
    assert equal(before, state(net))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_truncated_file_is_never_read(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cut") / "w.safetensors"
    save_weights(make(), path)
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    net = make(seed=9)
    before = state(net)
    with pytest.raises(FileError, match=r"w\.safetensors"):
        load_weights(net, path)
    assert equal(before, state(net))


def test_missing_files_and_pickles_are_file_errors(tmp_path):
    with pytest.raises(FileError, match="none"):
        load_weights(make(), tmp_path / "none.safetensors")
    with pytest.raises(FileError):
        load_weights(make(), tmp_path)
    torch.save(make().state_dict(), tmp_path / "pickled.pt")
    with pytest.raises(FileError, match="pickled"):
        load_weights(make(), tmp_path / "pickled.pt")
    with pytest.raises(FileError, match="cannot write"):
        save_weights(make(), tmp_path / "pickled.pt" / "w.safetensors")


# The history on disk

floats = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), exits=st.integers(0, 12), validated=st.booleans())
def test_a_history_comes_back_from_csv(tmp_path_factory, data, exits, validated):
    accuracies = st.tuples(*[floats] * exits)
    row = st.builds(
        EpochRow,
        epoch=st.integers(1, 1000),
        seconds=st.integers(0, 10**6).map(lambda ms: ms / 1000),
        lr=floats,
        train_loss=floats,
        train_accuracy=accuracies,
        val_loss=floats if validated else st.none(),
        val_accuracy=accuracies if validated else st.just(()),
    )
    history = History(tuple(data.draw(st.lists(row, max_size=3))))
    path = tmp_path_factory.mktemp("csv") / "train.csv"
    history.save(path)
    assert History.load(path) == history


def test_a_foreign_csv_is_no_history(tmp_path):
    (tmp_path / "a.csv").write_text("name,age\nx,3\n")
    for path in (tmp_path / "a.csv", tmp_path / "none.csv"):
        with pytest.raises(FileError, match=path.name):
            History.load(path)
