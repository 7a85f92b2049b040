"""Files of one small network in every kind, and changed copies of them."""

import base64
import io

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from branchynet import BranchyNet, Policy, export
from branchynet.deploy import checksum
from branchynet.deploy.stored_samples import SAMPLES_KEY
from helpers.onnx_graphs import graphs


class Three(nn.Module):
    """Convolutions with a residual sum, so that int8 has something to round."""

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8 * 36, 5)

    def forward(self, x):
        x = self.a(x)
        return self.fc((x + self.b(x)).flatten(1))


def images(rows=8, seed=0):
    return torch.randn(rows, 2, 6, 6, generator=torch.Generator().manual_seed(seed)) * 2


def network():
    torch.manual_seed(0)
    net = BranchyNet(Three(), {tap: nn.Sequential(nn.Flatten(), nn.Linear(8 * 36, 5)) for tap in ("a", "b")}).eval()
    with torch.no_grad():
        for head in (*(branch[1] for branch in net.branches), net.backbone.fc):
            head.weight *= 4
    return net


TWO = Policy(thresholds=(0.8, 1.48))
INT8 = {"precision": "int8", "calibration": [images(64, 1)]}
KINDS = {
    "nested": {},
    "flat": {"policy": None},
    "one": {"free": "none"},
    "required": {"thresholds": "input"},
    "never": {"policy": Policy(thresholds=(None, 1.48))},
    "margin": {"policy": Policy("margin", (0.3, 0.85))},
    "int8": INT8,
    "int8-flat": {"policy": None, **INT8},
    "int8-one": {"free": "none", **INT8},
}


def every_kind(folder):
    """The path of a file of each kind in `KINDS`."""
    net = network()
    return {
        kind: export(net, folder / f"{kind}.onnx", **{"policy": TWO, "example": images(), **options})
        for kind, options in KINDS.items()
    }


def changed(path, folder, change):
    """A copy of a file with a changed model, without the checksum."""
    model = onnx.load(path)
    change(model)
    kept = [p for p in model.metadata_props if p.key != checksum.KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    onnx.save(model, folder / "changed.onnx")
    return folder / "changed.onnx"


def initializers(model, name, kind):
    """Initializers with `name` in their name, at any level."""
    found = [t for _, g in graphs(model.graph) for t in g.initializer if name in t.name and t.data_type == kind]
    assert found, [t.name for _, g in graphs(model.graph) for t in g.initializer]
    return found


def edit(name, function, kind=onnx.TensorProto.FLOAT):
    def change(model):
        for tensor in initializers(model, name, kind):
            array = function(numpy_helper.to_array(tensor))
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    return change


def with_arrays(path, folder, change):
    """A copy of a file with changed arrays of stored samples."""

    def edit_arrays(model):
        entry = next(p for p in model.metadata_props if p.key == SAMPLES_KEY)
        with np.load(io.BytesIO(base64.b64decode(entry.value))) as stored:
            arrays = dict(stored)
        change(arrays)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        entry.value = base64.b64encode(buffer.getvalue()).decode()

    return changed(path, folder, edit_arrays)
