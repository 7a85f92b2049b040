"""Typical wrong calls of new users: each raises an error that says what to give."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from branchynet import (
    BranchyNetError,
    BudgetController,
    Choice,
    ExitCost,
    ExitRecord,
    Monitor,
    Policy,
    Target,
    attach,
    averaged,
    choose,
    evaluate,
    export,
    fit,
    fit_score,
    fit_temperature,
    frontier,
    joint_loss,
    load,
    measure,
)
from branchynet.data import load_data
from branchynet.deploy.torch_engine import TorchEngine
from branchynet.training.options import FitOptions
from helpers.newcomer import (
    FixedBatch,
    Small,
    Stream,
    batches,
    cost,
    dense,
    engine,
    found,
    loader,
    misfitting,
    net,
    policy,
    quick,
    retrained,
    silent,
    single,
    x,
    y,
)

WRONG = {
    "choose(cost, record)": (
        lambda: choose(cost, found, max_drop=0.1),
        "record must be an ExitRecord; got an ExitCost",
    ),
    "choose(net)": (lambda: choose(net, cost, max_drop=0.1), "record must be an ExitRecord; got a BranchyNet"),
    "choose in per cent": (lambda: choose(found, cost, max_drop=5), "it is a fraction; give 0.05 for 5%"),
    "choose of one per cent": (lambda: choose(found, cost, max_drop=1), "limits nothing.*give 0.01 for 1%"),
    "choose of all answers": (lambda: choose(found, cost, max_disagreement=1.0), "limits nothing.*fraction"),
    "fit for regression": (lambda: quick(single, batches(x, y.float()[:, None])), "one class.*give loss="),
    "fit for several numbers": (lambda: quick(net, batches(x, 9 * torch.rand(16, 4))), "distributions.*give loss="),
    "fit for several labels": (lambda: quick(net, batches(x, torch.ones(16, 4))), "sum 1.*give loss="),
    "fit for whole numbers": (lambda: quick(single, batches(x, 0 * y)), "one class.*give loss="),
    "labels of -1": (lambda: quick(net, batches(x, y - 1)), r"labels lie in -1..2, but outputs have 4.*from 0"),
    "segments from 1": (
        lambda: joint_loss((dense,), 1 + dense.argmax(1)),
        r"labels lie in 1..4, but outputs have 4.*from 0",
    ),
    "segments with a channel": (lambda: joint_loss((dense,), dense.argmax(1)[:, None]), r"target.squeeze\(1\)"),
    "segments as floats": (lambda: joint_loss((dense,), dense.argmax(1).float()), r"target.long\(\)"),
    "record of segments": (lambda: silent(nn.Conv2d(3, 4, 1), batches(x, y)), "give loss=.*pixel_error"),
    "a branch too wide": (
        lambda: misfitting(nn.Sequential(nn.Flatten(), nn.Linear(99, 4)))(x),
        r"the branch at 'first' cannot read features of shape \(16, 4, 8, 8\)",
    ),
    "a branch too wide in training": (
        lambda: quick(misfitting(nn.Conv2d(3, 4, 1)), loader),
        r"the branch at 'first' cannot read features of shape \(8, 4, 8, 8\)",
    ),
    "a branch of another dtype": (
        lambda: silent(misfitting(nn.Sequential(nn.Flatten(), nn.Linear(256, 4).double())), loader),
        "the branch at 'first' cannot read features.*float32",
    ),
    "attach to a fixed batch": (lambda: attach(FixedBatch(), at=["first"], example=x), "two rows.*write x.shape"),
    "export in int8 with the float network's choice": (
        lambda: export(
            net,
            "a.onnx",
            policy=choose(found, max_drop=0.9, confidence=None),
            example=x,
            precision="int8",
            calibration=[x],
        ),
        "int8 and float are different networks; record the flat int8 file",
    ),
    "export after more training": (
        lambda: export(retrained(), "a.onnx", policy=choose(found, max_drop=0.9, confidence=None), example=x),
        r"different networks.*after training, call record\(...\) and choose\(...\) again",
    ),
    "choose with a list": (
        lambda: choose(found, cost, max_drop=[0.1]),
        r"max_drop must be a finite number; got \[0.1\]",
    ),
    "choose with text": (
        lambda: choose(found, cost, min_accuracy="0.9"),
        "min_accuracy must be a finite number; got '0.9'",
    ),
    "choose with an array": (lambda: choose(found, cost, max_drop=np.array([0.1])), "max_drop must be a finite number"),
    "choose with a huge number": (lambda: choose(found, cost, max_latency_us=10**400), "must be a finite number"),
    "choose with a complex number": (lambda: choose(found, cost, max_drop=1j), "must be a finite number"),
    "choose(confidence=text)": (lambda: choose(found, cost, max_drop=0.1, confidence="0.95"), "confidence must be"),
    "choose(vectors=-1)": (lambda: choose(found, cost, max_drop=0.1, vectors=-1), "vectors must be at least 1"),
    "choose(vectors=text)": (lambda: choose(found, cost, max_drop=0.1, vectors="x"), "vectors must be a whole number"),
    "choose(score=3)": (
        lambda: choose(found, cost, max_drop=0.1, score=3),
        "score must be a name or a callable; got 3",
    ),
    "choose with a score of nothing": (
        lambda: choose(found, cost, max_drop=0.1, score=lambda outputs: None),
        "gave None at exit 1; it must be a tensor",
    ),
    "choose(confidence=95)": (lambda: choose(found, cost, max_drop=0.3, confidence=95), "between 0 and 1"),
    "choose without a limit": (lambda: choose(found, cost), "give exactly one of max_drop"),
    "choose(score=) misspelt": (lambda: choose(found, cost, max_drop=0.1, score="entropie"), "did you mean 'entropy'"),
    "evaluate with thresholds": (
        lambda: evaluate(found, (0.5,)),
        r"policy must be a Policy; got \(0.5,\).*Policy\(thr",
    ),
    "evaluate(policy, record)": (lambda: evaluate(policy, found), "record must be an ExitRecord; got a Policy"),
    "evaluate with a list of costs": (lambda: evaluate(found, policy, [10, 20]), "cost must be an ExitCost; got"),
    "frontier without a cost": (lambda: frontier(found, None), "cost must be an ExitCost; got None"),
    "fit(optimizer=Adam(...))": (
        lambda: quick(net, loader, optimizer=torch.optim.Adam(net.parameters())),
        r"optimizer must be a function.*functools.partial\(torch.optim.Adam",
    ),
    "fit(optimizer=text)": (lambda: quick(net, loader, optimizer="adam"), "optimizer must be a function"),
    "FitOptions(schedule=StepLR(...))": (
        lambda: FitOptions(schedule=torch.optim.lr_scheduler.StepLR(torch.optim.Adam(net.parameters()), 1)),
        "schedule must be a function",
    ),
    "fit(loss=class)": (lambda: quick(net, loader, loss=nn.CrossEntropyLoss), r"give CrossEntropyLoss\(\)"),
    "fit(epochs=text)": (lambda: fit(net, loader, epochs="3"), "epochs must be a whole number; got '3'"),
    "fit(epochs=fraction)": (lambda: fit(net, loader, epochs=1.5), "epochs must be a whole number; got 1.5"),
    "fit(loss_weights=number)": (
        lambda: quick(net, loader, loss_weights=1.0),
        "loss_weights must be numbers, one per exit",
    ),
    "FitOptions(seed=fraction)": (lambda: FitOptions(seed=0.5), "seed must be a whole number"),
    "fit on a data set": (lambda: quick(net, loader.dataset), r"is a data set.*DataLoader\(data, batch_size=64"),
    "fit on a stream of no length": (lambda: quick(net, DataLoader(Stream(), batch_size=2)), "must have a length"),
    "fit on all parts": (lambda: quick(net, load_data("digits")), "an ImageData, not a loader.*data.loader"),
    "fit on a part": (lambda: quick(net, load_data("digits").train), "a Split, not a loader.*data.loader"),
    "record of a data set": (lambda: silent(net, loader.dataset), "DataLoader"),
    "record of a tensor": (lambda: silent(net, x), "every batch must be"),
    "record of nothing": (lambda: silent(net, 3), "must yield batches"),
    "record on a device that is none": (lambda: silent(net, loader, device="gpu"), "no device of PyTorch; give 'cpu'"),
    "bytes for pixels": (lambda: silent(net, batches((255 * x).byte(), y)), r"uint8.*x.float\(\) / 255"),
    "bytes in training": (lambda: quick(net, batches((255 * x).byte(), y)), r"uint8.*x.float\(\) / 255"),
    "float64": (lambda: silent(net, batches(x.double(), y)), r"float64.*computes in float32.*x.to\(torch.float32\)"),
    "channels last": (lambda: silent(net, batches(x.permute(0, 2, 3, 1), y)), r"channels first.*permute\(0, 3, 1, 2\)"),
    "labels from 1": (lambda: silent(net, batches(x, y + 1)), r"labels lie in 1..4, but outputs have 4.*from 0"),
    "labels from 1 in training": (
        lambda: quick(net, batches(x, y + 1)),
        "labels lie in 1..4, but outputs have 4.*from 0",
    ),
    "float labels": (lambda: quick(net, batches(x, y.float())), r"loss of exit 1.*target.long\(\)"),
    "labels as a column": (lambda: quick(net, batches(x, y[:, None])), r"target \(8, 1\).*target.squeeze\(1\)"),
    "labels as one-hot": (lambda: silent(net, batches(x, torch.eye(4)[y])), "labels must be integers"),
    "attach(class)": (lambda: attach(Small, at=["first"], example=x), r"the class Small: give Small\(\)"),
    "attach at a name": (lambda: attach(Small(), at="first", example=x), "list of one or more"),
    "attach to no submodule": (lambda: attach(Small(), at=["layer1"], example=x), "no submodule 'layer1'"),
    "attach with a shape": (lambda: attach(Small(), at=["first"], example=(3, 8, 8)), "cannot process 3, 8, 8"),
    "attach with a loader": (lambda: attach(Small(), at=["first"], example=loader), r"next\(iter\(loader\)\)\[0\]"),
    "attach with labels": (lambda: attach(Small(), at=["first"], example=(x, y)), "looks like the labels"),
    "attach with numpy": (lambda: attach(Small(), at=["first"], example=x.numpy()), r"torch.from_numpy\(array\)"),
    "attach with one image": (lambda: attach(Small(), at=["first"], example=x[0]), r"give x\[None\]"),
    "measure with labels": (lambda: measure(net, (x, y)), "looks like the labels"),
    "measure with one image": (lambda: measure(net, x[0]), r"float32 \(3, 8, 8\).*give x\[None\]"),
    "labels as one-hot in training": (
        lambda: quick(net, batches(x, torch.eye(4)[y].long())),
        r"target.argmax\(1\)",
    ),
    "measure with a loader": (lambda: measure(net, loader), "example must be a tensor.*got a DataLoader"),
    "TorchEngine of a record": (
        lambda: TorchEngine(found, policy, x),
        "the network must be a Module; got an ExitRecord",
    ),
    "export of a record": (lambda: export(found, "a.onnx", policy=policy, example=x), "got an ExitRecord"),
    "export with thresholds": (lambda: export(net, "a.onnx", policy=(0.5,), example=x), r"policy must.*got \(0.5,\)"),
    "load(net)": (lambda: load(net), "path must be.*got a BranchyNet: give the name of a file"),
    "averaged(record)": (lambda: averaged(found), "takes a BranchyNet.*got ExitRecord"),
    "fit_score(net)": (lambda: fit_score(net), "record must be an ExitRecord; got a BranchyNet"),
    "fit_temperature(net)": (lambda: fit_temperature(net), "record must be an ExitRecord; got a BranchyNet"),
    "ExitRecord of images": (lambda: ExitRecord(x.numpy(), y.numpy()), r"must have shape \(S, N, C\)"),
    "ExitCost of numbers": (lambda: ExitCost(10.0, 1.0), "give one number per exit"),
    "Policy(0.5)": (lambda: Policy(thresholds=0.5), "thresholds must be a list; got 0.5"),
    "Policy((0.5,))": (lambda: Policy((0.5,)), "score must be a name or a callable"),
    "Policy of text": (lambda: Policy(thresholds="12"), "thresholds must be a list; got '12'"),
    "Policy of a set": (lambda: Policy(thresholds={0.8}), "thresholds must be a list; got a set"),
    "Policy of a dict": (lambda: Policy(thresholds={0.8: 1}), "thresholds must be a list; got a dict"),
    "Policy of a flag": (lambda: Policy(thresholds=(True,)), "thresholds must be numbers.*got True$"),
    "Policy of text inside": (lambda: Policy(thresholds=("0.5",)), "thresholds must be numbers.*got '0.5'$"),
    "engine with text": (lambda: engine()(x, thresholds="1"), "thresholds must be a list; got '1'"),
    "engine with a set": (lambda: engine()(x, thresholds={0.5}), "thresholds must be a list; got a set"),
    "engine with a flag": (lambda: engine()(x, thresholds=[True]), "thresholds must be numbers"),
    "ExitCost of letters": (lambda: ExitCost(("a",), (0,)), "ExitCost.trunk_us must be a finite number; got 'a'"),
    "ExitCost of text": (lambda: ExitCost("12", "00"), "ExitCost.trunk_us must be a list; got '12'"),
    "ExitCost of None": (lambda: ExitCost((None,), (0,)), "ExitCost.trunk_us must be a finite number; got None"),
    "Monitor with thresholds": (lambda: Monitor(found, (0.5,)), r"policy must be a Policy; got \(0.5,\)"),
    "Monitor without a policy": (lambda: Monitor(found, None), "policy must be a Policy; got None"),
    "Monitor(policy, record)": (lambda: Monitor(policy, found), "record must be an ExitRecord; got a Policy"),
    "Monitor(false_alarm=text)": (
        lambda: Monitor(found, policy, false_alarm="1"),
        "false_alarm must be a finite number; got '1'",
    ),
    "BudgetController(record, cost, policy)": (
        lambda: BudgetController(found, cost, policy, goal_us=15),
        "cost must be an ExitCost; got a Policy: give what measure.* after the policy",
    ),
    "BudgetController with thresholds": (
        lambda: BudgetController(found, (0.5,), cost, goal_us=15),
        "policy must be a Policy",
    ),
    "BudgetController(rate=text)": (
        lambda: BudgetController(found, policy, cost, goal_us=15, rate="x"),
        "rate must be a finite number; got 'x'",
    ),
    "BudgetController(goal_us=text)": (
        lambda: BudgetController(found, policy, cost, goal_us="15"),
        "goal_us must be a finite number; got '15'",
    ),
    "BudgetController(goal_us=True)": (
        lambda: BudgetController(found, policy, cost, goal_us=True),
        "goal_us must be a finite number; got True",
    ),
    "frontier(vectors=text)": (lambda: frontier(found, cost, vectors="1e6"), "vectors must be a whole number"),
    "frontier(vectors=0)": (lambda: frontier(found, cost, vectors=0), "vectors must be at least 1; got 0"),
    "frontier(...).policy(10**6)": (lambda: frontier(found, cost).policy(10**6), "index must be at most"),
    "frontier(...).policy(-99)": (lambda: frontier(found, cost).policy(-99), "index must be at least"),
    "frontier(...).policy(text)": (lambda: frontier(found, cost).policy("0"), "index must be a whole number"),
    "measure(batch_size=text)": (
        lambda: measure(net, x, Target(batch_size="1")),
        "batch_size must be a whole number; got '1'",
    ),
    "measure(threads=text)": (lambda: measure(net, x, Target(threads="1")), "threads must be.*got .1."),
    "measure(seconds=-1)": (lambda: measure(net, x, seconds=-1), "seconds must not be negative; got -1"),
    "measure(seconds=text)": (lambda: measure(net, x, seconds="3"), "seconds must be a finite number; got '3'"),
    "export(path=5)": (lambda: export(net, 5, policy=policy, example=x), "path must be a str or a PathLike; got 5"),
    "export(labels=text)": (
        lambda: export(net, "a.onnx", policy=policy, example=x, labels="cat"),
        "labels must be a list; got 'cat'",
    ),
    "export(labels=a set)": (
        lambda: export(net, "a.onnx", policy=policy, example=x, labels={"cat", "dog"}),
        "labels must be a list; got a set",
    ),
    "export(samples=True)": (
        lambda: export(net, "a.onnx", policy=policy, example=x, samples=True),
        "samples must be a whole number; got True",
    ),
    "export(layout=unknown)": (
        lambda: export(net, "a.onnx", policy=policy, example=x, layout="staged"),  # pyright: ignore[reportArgumentType]
        "layout 'nested' or 'stages'; got 'default' and 'staged'",
    ),
    "record(loss=text)": (lambda: silent(net, loader, loss="ce"), "loss must be a function.*got 'ce'"),
    "record(loss=class)": (lambda: silent(net, loader, loss=nn.CrossEntropyLoss), r"give CrossEntropyLoss\(\)"),
    "fit(loss=text)": (lambda: quick(net, loader, loss="ce"), "loss must be a function.*got 'ce'"),
    "record.save(5)": (lambda: found.save(5), "path must be a str or a PathLike; got 5"),
    "cost.save(None)": (lambda: cost.save(None), "path must be a str or a PathLike; got None"),
    "Choice.load(5)": (lambda: Choice.load(5), "path must be a str or a PathLike; got 5"),
    "load_data misspelt": (lambda: load_data("minst"), "did you mean 'mnist'"),
}


@pytest.mark.parametrize("call", WRONG)
def test_it_says_what_to_give(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    function, message = WRONG[call]
    with pytest.raises(BranchyNetError, match=f"(?s){message}"):
        function()
    assert not list(tmp_path.iterdir()), "a refused call writes nothing"
