"""What a file says of itself: places for exits, and inputs that can be drawn."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from branchynet import attach, detach, from_onnx, zoo
from branchynet.errors import InputError
from branchynet.nn.calls import evaluating, find_tensor
from branchynet.nn.placement import exit_places
from branchynet.nn.trace import tracing
from helpers.networks import build, chain, residual, tokens, two_inputs
from helpers.onnx_sources import write


def published_resnet(seed):
    torch.manual_seed(seed)
    return zoo.NETWORKS["b_resnet20-published"](), (torch.rand(3, 3, 32, 32),)


SOURCES = {
    **{family.__name__: lambda seed, family=family: build(family, seed) for family in (chain, residual, tokens)},
    "two_inputs": lambda seed: build(two_inputs, seed),
    "resnet": published_resnet,
}


@pytest.mark.parametrize("exporter", ["dynamo", "script"])
@pytest.mark.parametrize("name", SOURCES)
def test_places_are_those_that_a_trace_of_the_network_finds(name, exporter, tmp_path):
    net, example = SOURCES[name](3)
    path = write(detach(net), example, tmp_path / "plain.onnx", exporter)
    imported = from_onnx(path).eval()
    with torch.no_grad(), evaluating(imported), tracing(imported, (example, {}), lambda _, v: find_tensor(v)) as survey:
        returned = imported(*example)
    traced = {moment.name for _share, moment in exit_places(survey, returned)}
    places = imported.places
    assert len(places) >= 2 and {imported.submodule_name(place) for place in places} <= traced
    outputs = attach(path, list(places), example=example)(*example)
    assert len(outputs) == len(places) + 1
    top = str(imported).split("(weights)")[0]
    assert f"inputs: {', '.join(imported.input_names)}\n" in top and repr(places[0]) in top


def test_places_are_the_ends_of_blocks(tmp_path):
    """In a residual network every block has one, its last activation; after the last block, it is the pooled one."""
    net, example = published_resnet(0)
    imported = from_onnx(write(detach(net), example, tmp_path / "plain.onnx", "script"))
    blocks = [f"/stage{s}/stage{s}.{b}/Relu_1_output_0" for s in (1, 2, 3) for b in (0, 1, 2)]
    assert [place for place in imported.places if place.startswith("/stage")] == blocks[:-1]
    assert imported.places[-1].startswith("/classifier")


def test_few_places_of_a_long_network_are_shown(tmp_path):
    layers = [layer for _ in range(30) for layer in (nn.Linear(4, 4), nn.ReLU())]
    path = write(nn.Sequential(*layers, nn.Linear(4, 2)), (torch.rand(2, 4),), tmp_path / "plain.onnx")
    imported = from_onnx(path)
    (line,) = [line for line in str(imported).splitlines() if "places for exits" in line]
    shown = [place for place in imported.places if repr(place) in line]
    assert len(imported.places) == 30 and 6 <= len(shown) <= 12
    assert f"and {30 - len(shown)} between them" in line


def test_a_network_without_places_says_so(tmp_path):
    imported = from_onnx(write(nn.Linear(4, 2), (torch.rand(2, 4),), tmp_path / "plain.onnx"))
    assert imported.places == () and "places for exits: none found" in str(imported)


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("name", ["chain", "two_inputs"])
def test_an_example_is_drawn_in_the_shapes_of_the_file(name, free, tmp_path):
    net, example = SOURCES[name](3)
    path = write(detach(net), example, tmp_path / "plain.onnx", free=free)
    before = torch.get_rng_state()
    drawn = attach(path, "auto", num_exits=2, num_classes=4, branch=lambda x, classes: nn.Identity())
    assert torch.equal(torch.get_rng_state(), before)
    given = attach(path, "auto", num_exits=2, num_classes=4, branch=lambda x, classes: nn.Identity(), example=example)
    assert drawn.taps == given.taps


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [
        (TensorProto.INT64, ["batch", 7], r"does not say which numbers the input 'x' \(torch.int64\) may hold"),
        (TensorProto.FLOAT, ["batch", 3, "height", "width"], r"gives the input 'x' the shape \(\?, 3, \?, \?\)"),
        (TensorProto.FLOAT, None, "gives the input 'x' no shape"),
    ],
)
def test_an_example_that_cannot_be_drawn_is_asked_for(kind, shape, message, tmp_path):
    nodes = [helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT), helper.make_node("Mul", ["f", "w"], ["y"])]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(np.ones(1, np.float32), "w")],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "net.onnx")
    with pytest.raises(InputError, match=rf"give example=, one batch of inputs: the file {message}"):
        attach(tmp_path / "net.onnx", ["f"])


def test_a_network_of_torch_needs_an_example():
    with pytest.raises(InputError, match=r"attach needs example=, one batch of inputs.*images\[:2\]"):
        attach(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), ["1"])


def test_a_model_in_memory_is_to_be_saved(tmp_path):
    path = write(nn.Linear(4, 2), (torch.rand(2, 4),), tmp_path / "plain.onnx")
    for given in (onnx.load(path), path.read_bytes()):
        with pytest.raises(InputError, match=r"give the path of the ONNX file, as of onnx\.save\(model, path\)"):
            attach(given, "auto", example=torch.rand(2, 4))
