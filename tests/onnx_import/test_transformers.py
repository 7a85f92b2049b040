"""Files of Hugging Face `transformers` get exits that agree with the naive loop."""

import numpy as np
import pytest
import torch
from torch import nn

from branchynet import Policy, attach, export, from_onnx, load
from helpers.loop import agree_in_batches, every_exit, safe_thresholds
from helpers.networks import last_linear, spread_head
from helpers.onnx_nodes import runtime_answers
from helpers.onnx_sources import write
from helpers.transformers_models import SAMPLES, SEQUENCES, VISION, calibrate

CASES = {str(case).partition("For")[0]: case for case in [*VISION, *SEQUENCES]}
FILES = [
    *((name, "dynamo") for name in ("ResNet", "ConvNext", "Levit", "Swin", "Bert", "GPT2", "Llama", "AST")),
    *((name, "script") for name in ("MobileNetV2", "ViT", "Segformer", "DistilBert", "DebertaV2", "Wav2Vec2")),
]


class Positional(nn.Module):
    """A model of one or two inputs, by position, whose output are the logits."""

    def __init__(self, model, names):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, first, second=None):
        return self.model(**dict(zip(self.names, (first, second), strict=False))).logits


@pytest.mark.heavy
@pytest.mark.parametrize(("name", "exporter"), FILES)
def test_a_file_of_transformers_gets_exits(name, exporter, tmp_path):
    case = CASES[name]
    named = case.inputs(SAMPLES)
    inputs = tuple(named.values())
    model = case.backbone()
    calibrate(model, named)
    source = Positional(model, list(named))
    with torch.no_grad():
        spread_head(last_linear(source), source(*inputs))
    path = write(source, tuple(one[:2] for one in inputs), tmp_path / "plain.onnx", exporter)
    plain = from_onnx(path).eval()
    for rows in (1, 2, 7):
        feeds = {f"x{n}": one[:rows].numpy() for n, one in enumerate(inputs, 1)}
        with torch.no_grad():
            ours = plain(*(one[:rows] for one in inputs)).numpy()
        # float32: rounding in another order grows over some hundred layers; outputs are scaled to about 1
        np.testing.assert_allclose(ours, runtime_answers(path, feeds)[0], atol=1e-3)

    net = attach(path, "auto", example=inputs, num_exits=2).eval()
    with torch.no_grad():
        spread_head(last_linear(net.branches[0]), net(*inputs)[0])
    thresholds = safe_thresholds(every_exit(net, inputs), (0.5,))
    file = export(net, tmp_path / "model.onnx", policy=Policy(thresholds=thresholds), example=inputs)
    agree_in_batches(load(file, threads=1), net, inputs, thresholds)
