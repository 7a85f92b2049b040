"""A generator as a loader is empty after one pass: each verb that needs another pass says so."""

import functools

import pytest

from branchynet import (
    BranchyNetError,
    advise,
    export,
    fit,
)
from helpers.newcomer import (
    Small,
    loader,
    net,
    policy,
    silent,
    x,
    y,
)


class Spent:
    """A loader with a length whose every pass continues the same generator."""

    def __init__(self):
        self.batches = iter(loader)

    def __iter__(self):
        return self.batches

    def __len__(self):
        return len(loader)


def once():
    return (batch for batch in loader)


def spent():
    batches = once()
    silent(net, batches)
    return batches


two = functools.partial(fit, net, epochs=2, progress=False)
GENERATORS = {
    "fit": (lambda: two(once()), "train_loader is a generator, which has no length"),
    "fit on an iterator": (
        lambda: two(iter(loader)),
        "train_loader is a _.*Iter, which",
    ),
    "fit on zip": (lambda: two(zip(x.split(8), y.split(8), strict=True)), "train_loader is a zip, which has"),
    "fit with validation": (
        lambda: two(loader, once()),
        "val_loader is a generator, which has no length",
    ),
    "fit on a wrapper": (lambda: two(Spent()), "yielded no batch in epoch 2"),
    "fit with validation in a wrapper": (lambda: two(loader, Spent()), "on the validation data after epoch 2"),
    "record again": (lambda: silent(net, spent()), "the loader gave no batch"),
    "advise": (lambda: advise(Small(), once(), loader, x), "train_loader is a generator"),
    "advise with validation": (lambda: advise(Small(), loader, map(tuple, loader), x), "val_loader is a map"),
    "calibration": (
        lambda: export(net, "a.onnx", policy=policy, example=x, precision="int8", calibration=spent()),
        "calibration= gave no samples",
    ),
}


@pytest.mark.parametrize("call", GENERATORS)
def test_a_generator_as_a_loader(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    function, message = GENERATORS[call]
    with pytest.raises(BranchyNetError, match=f"{message}.*empty after one pass: give a list of batches or a DataLoad"):
        function()
    assert silent(net, once()).samples == len(x), "one pass is enough for a record"
