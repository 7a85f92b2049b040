"""Files that tf2onnx made of networks of Keras (`keras/make.py`) get exits that agree with the naive loop."""

from pathlib import Path

import numpy as np
import pytest
import torch

from branchynet import Policy, attach, export, from_onnx, load
from helpers.loop import agree_in_batches, every_exit, safe_thresholds
from helpers.networks import last_linear, spread_head
from helpers.onnx_nodes import runtime_answers

KERAS = Path(__file__).parent / "keras"
DRAWN = {
    "images": lambda rows: torch.rand(rows, 28, 28, 1),
    "text": lambda rows: torch.randint(0, 50, (rows, 12), dtype=torch.int32),
    "series": lambda rows: torch.randn(rows, 9, 6),
}


@pytest.mark.parametrize("name", DRAWN)
def test_a_file_of_keras_gets_exits(name, tmp_path):
    torch.manual_seed(0)
    path, inputs = KERAS / f"{name}.onnx", (DRAWN[name](64),)
    plain = from_onnx(path).eval()
    for rows in (1, 2, 7):
        theirs = runtime_answers(path, {plain.input_names[0]: inputs[0][:rows].numpy()})[0]
        with torch.no_grad():  # float32: PyTorch and ONNX Runtime round sums in another order; outputs are about 1
            np.testing.assert_allclose(plain(inputs[0][:rows]).numpy(), theirs, atol=1e-4)

    example = inputs if name == "text" else None  # drawn from the file
    net = attach(path, "auto", num_exits=2, example=example).eval()
    with torch.no_grad():
        spread_head(last_linear(net.branches[0]), net(*inputs)[0])
    thresholds = safe_thresholds(every_exit(net, inputs), (0.5,))
    file = export(net, tmp_path / "model.onnx", policy=Policy(thresholds=thresholds), example=inputs)
    agree_in_batches(load(file, threads=1), net, inputs, thresholds)


@pytest.mark.parametrize("name", DRAWN)
def test_every_place_of_a_file_of_keras_can_be_tapped(name):
    path, inputs = KERAS / f"{name}.onnx", DRAWN[name](3)
    places = list(from_onnx(path).places)
    assert len(places) >= 1
    outputs = attach(path, places, example=inputs)(inputs)
    assert [output.shape for output in outputs] == [outputs[-1].shape] * (len(places) + 1)


def test_dense_layers_on_sequences_are_no_places():
    """Keras merges samples and positions there, so no single sample can leave."""
    places = from_onnx(KERAS / "text.onnx").places
    assert not [place for place in places if "Tensordot/" in place]
