"""Files and engines with free lengths answer as PyTorch does, at every length that the network takes."""

import importlib
import itertools
import random

import numpy as np
import pytest
import torch
from torch import nn

from branchynet import BranchyNet, Policy, TorchEngine, attach, export, load, verify
from branchynet.errors import GraphError, InputError
from helpers.loop import agree, every_exit, safe_thresholds
from helpers.networks import spread_out
from helpers.transformers_models import SEQUENCES, enliven

BATCHES = (1, 7)
exporting = importlib.import_module(export.__module__)
MODELS = {case.model: case for case in SEQUENCES}


class Maps(nn.Module):
    """A fully convolutional network: pooling at the end takes maps of any size."""

    def __init__(self, seed):
        super().__init__()
        draw = random.Random(seed)
        widths = [3, *(draw.choice((4, 6)) for _ in range(3))]
        self.stages = nn.ModuleList(
            nn.Conv2d(a, b, draw.choice((1, 3)), stride=draw.choice((1, 2)), padding=draw.choice((0, 1)))
            for a, b in itertools.pairwise(widths)
        )
        self.pool = nn.MaxPool2d(2) if draw.random() < 0.5 else nn.Identity()
        self.scaled = draw.random() < 0.5  # by the number of positions, which Shape gives
        self.fc = nn.Linear(widths[-1], 5)

    def forward(self, x):
        for stage in self.stages:
            x = torch.relu(stage(x))
        x = self.pool(x)
        if self.scaled:
            x = x * (x.shape[2] * x.shape[3]) / 100
        return self.fc(x.flatten(2).amax(2))


def maps(rows, height, width):
    return torch.rand(rows, 3, height, width)


def tap(channels):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))


def fully_convolutional(seed, height=24, width=31):
    torch.manual_seed(seed)
    backbone = Maps(seed)
    at = ["stages.0", "stages.1"]
    branches = {name: tap(backbone.get_submodule(name).out_channels) for name in at}
    net = BranchyNet(backbone, branches).eval()
    spread_out(net, {"x": maps(40, height, width)})
    return net


def agrees(engine, net, inputs):
    """The engine agrees with the naive loop at batches 1 and 7, and every exit answers some sample."""
    outputs = every_exit(net, inputs)
    thresholds = safe_thresholds(outputs, (0.4, 0.5))
    arrays = [t.numpy() for t in (inputs.values() if isinstance(inputs, dict) else inputs)]
    exits = set()
    for batch in BATCHES:
        for start in range(0, len(outputs) if batch > 1 else 12, batch):
            rows = slice(start, start + batch)
            answer = engine(*(a[rows] for a in arrays), thresholds=thresholds)
            agree(answer, outputs[rows], thresholds, atol=1e-3)
            exits.update(answer.exit.tolist())
    assert exits == set(range(1, outputs.shape[1] + 1))


def every_engine(net, folder, example, free, monkeypatch):
    policy, flatten, known = Policy(thresholds=(0.5, 0.5)), exporting.flatten, []
    monkeypatch.setattr(
        exporting, "flatten", lambda *a, **k: known[0] if known else known.append(flatten(*a, **k)) or known[0]
    )
    export(net, folder / "nested.onnx", policy=policy, example=example, free=free)
    export(net, folder / "stages", policy=policy, example=example, free=free, layout="stages")
    yield load(folder / "nested.onnx", threads=1)
    yield load(folder / "stages", threads=1)
    yield TorchEngine(net, policy, example, free=free)


@pytest.mark.parametrize("seed", [0, *(pytest.param(other, marks=pytest.mark.heavy) for other in (1, 2, 3))])
def test_a_fully_convolutional_network_takes_maps_of_any_size(tmp_path, seed, monkeypatch):
    net = fully_convolutional(seed)
    for engine in every_engine(net, tmp_path, maps(8, 24, 31), {"x": {2: "height", 3: "width"}}, monkeypatch):
        assert [(length.name, length.most) for length in engine.lengths] == [("height", None), ("width", None)]
        assert engine.inputs[0].shape == (3, None, None)
        least = [length.least for length in engine.lengths]
        for height, width in ((24, 31), (40, 19), (least[0], 57), tuple(least)):
            agrees(engine, net, (maps(43, height, width),))


def test_a_stage_takes_the_lengths_of_its_network(tmp_path):
    net = fully_convolutional(0)
    path = export(
        net, tmp_path / "net", policy=Policy(thresholds=(0.5, 0.5)), example=maps(8, 24, 31), layout="stages",
        free={"x": {2: "height", 3: "width"}},
    )  # fmt: skip
    stage = load(path, threads=1).stage(1)
    height, _ = stage.lengths
    with pytest.raises(InputError, match=f"the height of 'x' is {height.least - 1}; this file takes {height}"):
        stage.run({"x": maps(3, height.least - 1, 31).numpy()})


def test_later_stages_check_the_lengths_of_carried_values(tmp_path):
    net, x = sequence(nn.Linear(8, 8)), torch.randn(4, 9, 4)
    how = {"policy": Policy(thresholds=(0.5,)), "example": x, "free": {"x": {1: "n"}}}
    stage = load(export(net, tmp_path / "net", layout="stages", **how), threads=1).stage(2)
    (length,) = stage.lengths
    (name, _axis), *_ = length.at
    assert name == stage.inputs[0].name
    carried = {i.name: np.zeros((3, *(d or length.least - 1 for d in i.shape)), np.float32) for i in stage.inputs}
    with pytest.raises(InputError, match=f"the n of '{name}' is {length.least - 1}; this file takes"):
        stage.run(carried)


def words(rows, length):
    """Token ids with padding at the end of every third row, and the attention mask."""
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[::3, 2 * length // 3 :] = 0
    return {"input_ids": torch.randint(5, 50, (rows, length)) * mask, "attention_mask": mask}


def sound(rows, length):
    return {"input_values": torch.randn(rows, length)}


TEXT = {"input_ids": {1: "length"}, "attention_mask": {1: "length"}}


@pytest.mark.parametrize(
    ("model", "draw", "free", "example", "lengths", "allowed"),
    [
        ("BertForSequenceClassification", words, TEXT, 9, (9, 5, 14), "2 to 512"),
        ("DistilBertForSequenceClassification", words, TEXT, 9, (9, 5, 14), "2 to 512"),
        ("Wav2Vec2ForSequenceClassification", sound, {"input_values": {1: "samples"}}, 400, (400, 333), "30 or more"),
    ],
)
@pytest.mark.heavy
def test_transformers_take_several_lengths(tmp_path, model, draw, free, example, lengths, allowed, monkeypatch):
    torch.manual_seed(0)
    case = MODELS[model]
    inputs = draw(41, example)
    net = attach(case.backbone(), case.at, example=inputs).eval()
    enliven(net, inputs)
    for engine in every_engine(net, tmp_path, inputs, free, monkeypatch):
        (length,) = engine.lengths
        assert str(length) == allowed
        for size in lengths:
            agrees(engine, net, draw(41, size))
        if length.most:
            taker = "this engine" if isinstance(engine, TorchEngine) else "this file"
            with pytest.raises(InputError, match=f"the length of 'input_ids' is 513; {taker} takes {allowed}$"):
                engine(**draw(2, 513))
            with pytest.raises(InputError, match="'input_ids', dimension 1 of 'attention_mask' must be equal, the len"):
                engine(draw(2, 7)["input_ids"], draw(2, 8)["attention_mask"])
    assert verify(tmp_path / "nested.onnx").passed
    assert verify(tmp_path / "stages").passed


def test_flat_files_and_samples_stored_with_free_lengths(tmp_path):
    net = fully_convolutional(0)
    free = {"x": {2: "height", 3: "width"}}
    engine = load(export(net, tmp_path / "flat.onnx", policy=None, example=maps(4, 24, 31), free=free), verify=True)
    x = maps(7, 33, 40)
    for ours, theirs in zip(engine.outputs(x)[1:], every_exit(net, (x,)).swapaxes(0, 1), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert len(engine.answer_all(maps(9, 20, 20), rows=4).label) == 9
    assert engine(maps(0, 20, 20)).output.shape == (0, 5)
    with pytest.raises(InputError, match="the height of 'x' is 1; this file takes"):
        engine(maps(3, 1, 40))


class Positions(nn.Module):
    """Adds an embedding for each of 9 positions."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 9, 8))

    def forward(self, x):
        return x + self.positions


class Sequence(nn.Module):
    def __init__(self, mix):
        super().__init__()
        self.embed, self.mix, self.fc = nn.Linear(4, 8), mix, nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.mix(torch.relu(self.embed(x))).mean(1))


class Pairs(nn.Module):
    """Joins neighbors, so that the length must be even."""

    def forward(self, x):
        return x.view(x.shape[0], x.shape[1] // 2, 2, 8).amax(2)


def sequence(mix):
    torch.manual_seed(0)
    backbone = Sequence(mix)
    return BranchyNet(backbone, {"embed": nn.Sequential(nn.Flatten(2), Mean(), nn.Linear(8, 3))}).eval()


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


def test_a_network_that_needs_multiples_takes_every_second_length(tmp_path):
    net, x = sequence(Pairs()), torch.randn(4, 12, 4)
    free, policy = {"x": {1: "frames"}}, Policy(thresholds=(1.0,))
    engine = load(export(net, tmp_path / "model.onnx", policy=policy, example=x, free=free))
    assert str(engine.lengths[0]).endswith("... or more") and engine.lengths[0].step == 2
    agree(engine(torch.randn(0, 6, 4)), np.empty((0, 2, 3)), (1.0,))
    y = torch.randn(7, 30, 4)
    agree(engine(y), every_exit(net, (y,)), (1.0,))
    with pytest.raises(InputError, match=r"the frames of 'x' is 13; this file takes \d+, \d+, ... or more"):
        engine(torch.randn(7, 13, 4))


class Sides(nn.Module):
    def forward(self, x):
        return x + x.transpose(2, 3)


def test_the_error_names_the_module_that_fixes_a_length(tmp_path):
    for free, message in (
        ({"x": {1: "frames"}}, r"'frames', dimension 1 of 'x', cannot stay free: 'mix' \(Positions\) needs it to be 9"),
        ({"x": {2: "width"}}, r"'width', dimension 2 of 'x', cannot stay free: 'embed' \(Linear\) needs it to be 4"),
    ):
        with pytest.raises(GraphError, match=message):
            export(sequence(Positions()), tmp_path / "a.onnx", policy=None, example=torch.randn(4, 9, 4), free=free)
    square = nn.Sequential(nn.Conv2d(3, 4, 3), Sides(), nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    with pytest.raises(GraphError, match="needs 'height' and 'width' to be equal: give them one name"):
        export(
            square, tmp_path / "a.onnx", policy=None, example=maps(2, 20, 20), free={"input": {2: "height", 3: "width"}}
        )
    path = export(
        square, tmp_path / "a.onnx", policy=None, example=maps(2, 20, 20), free={"input": {2: "side", 3: "side"}}
    )
    with pytest.raises(InputError, match="dimension 2 of 'input', dimension 3 of 'input' must be equal, the side"):
        load(path)(maps(2, 20, 21))


def test_the_spectrogram_transformer_fixes_its_length_in_its_embeddings(tmp_path):
    case = MODELS["ASTForAudioClassification"]
    inputs = case.inputs(3)
    net = attach(case.backbone(), case.at, example=inputs).eval()
    with pytest.raises(GraphError, match=r"'frames', dimension 1 .*embeddings' \(ASTEmbeddings\) needs it to be 32"):
        export(net, tmp_path / "a.onnx", policy=None, example=inputs, free={"input_values": {1: "frames"}})


@pytest.mark.parametrize(
    ("free", "message"),
    [
        ("length", "free must be 'batch', 'none', or a mapping .* got 'length'"),
        (1, "free must be 'batch', 'none', or a mapping .* got 1"),
        ({}, "free must map inputs to dimensions, such as .*'x': .*; got {}"),
        ({"x": 1}, "free must map inputs to dimensions"),
        ({"x": {}}, "free must map inputs to dimensions"),
        ({"y": {1: "length"}}, "free names 'y', which is no input of the network: it reads x"),
        ({"x": {0: "batch"}}, "dimension 0 of 'x' is the batch, which is free already"),
        ({"x": {3: "length"}}, "free names dimension 3 of 'x', which has dimensions 1 to 2 and the batch"),
        ({"x": {-1: "length"}}, "free names dimension -1 of 'x'"),
        ({"x": {"1": "length"}}, "free names dimension '1' of 'x'"),
        ({"x": {True: "length"}}, "free names dimension True of 'x'"),
        ({"x": {1: "batch"}}, "the name of dimension 1 of 'x' in free must be a word .* got 'batch'"),
        ({"x": {1: "stay_1"}}, "must be a word such as 'length'"),
        ({"x": {1: "s53"}}, "must be a word such as 'length'"),
        ({"x": {1: "2 * n"}}, "must be a word such as 'length'"),
        ({"x": {1: 5}}, "must be a word such as 'length'"),
        ({"x": {1: "n", 2: "n"}}, "dimension 2 of 'x' is 4 in the example, but 'n' is 9 elsewhere"),
    ],
    ids=str,
)
def test_wrong_free_lengths_are_refused(tmp_path, free, message):
    net, x = sequence(nn.Identity()), torch.randn(4, 9, 4)
    with pytest.raises(InputError, match=message):
        export(net, tmp_path / "a.onnx", policy=None, example=x, free=free)
    assert not any(tmp_path.iterdir())


def test_a_length_of_one_in_the_example_is_refused(tmp_path):
    with pytest.raises(InputError, match="dimension 1 of 'x' is 1 in the example, so torch"):
        export(
            sequence(nn.Identity()), tmp_path / "a.onnx", policy=None, example=torch.randn(4, 1, 4),
            free={"x": {1: "length"}},
        )  # fmt: skip


def test_a_length_that_equals_the_batch_of_the_example_stays_apart(tmp_path):
    net, x = sequence(nn.Identity()), torch.randn(2, 2, 4)
    engine = load(export(net, tmp_path / "a.onnx", policy=Policy(thresholds=(1.0,)), example=x, free={"x": {1: "n"}}))
    y = torch.randn(7, 5, 4)
    agree(engine(y), every_exit(net, (y,)), (1.0,))


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_a_recurrent_layer_has_a_fixed_length(tmp_path, kind):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = kind(4, 8, batch_first=True), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.c(self.b(self.a(x)[0]).relu().mean(1))

    net, x = attach(Recurrent().eval(), at=["b"], example=torch.randn(4, 6, 4)), torch.randn(4, 6, 4)
    with pytest.raises(GraphError, match=rf"PyTorch exports 'a' \({kind.__name__}\) for a fixed length, here 6"):
        export(net, tmp_path / "m.onnx", policy=Policy(thresholds=(0.5,)), example=x, free={"x": {1: "length"}})
