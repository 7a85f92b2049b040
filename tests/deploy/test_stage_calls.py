"""A single stage checks what it is given, also what only later stages read, and pickles."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from branchynet import Policy, export, load
from branchynet.errors import InputError


class TwoInputs(nn.Module):
    """Exit 1 reads `x` alone; exit 2 reads both inputs, exit 3 `y` alone."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(6, 3) for _ in range(3))

    def forward(self, x, y):
        return self.one(x), self.two(x * x + y), self.three(y)


X, Y = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def engine(request, tmp_path_factory):
    torch.manual_seed(0)
    example = (torch.from_numpy(X), torch.from_numpy(Y))
    policy = Policy(thresholds=(0.9, 0.9))
    folder = tmp_path_factory.mktemp("stages") / "net"
    export(TwoInputs().eval(), folder, policy=policy, example=example, layout="stages")
    return load(folder, threads=1, runtime=request.param)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(
    ("late", "match"),
    [
        (Y[:3], r"batch sizes \[\d, \d\]; they must agree"),
        (Y.astype(float), r"'y' is float64"),
        (Y[:, :5], r"'y' is float32 \(5, 5\)"),
        ("hello", r"'y' is str"),
        (None, r"'y' is NoneType"),
        (list(Y), r"'y' is list"),
    ],
    ids=["rows", "dtype", "shape", "text", "none", "list"],
)
def test_values_for_later_stages_are_checked(engine, n, late, match):
    rows = {"x": X, "y": Y} if n == 1 else engine.stage(1).run({"x": X, "y": Y})[2]
    with pytest.raises(InputError, match=match):
        engine.stage(n).run({**rows, "y": late})


def test_a_value_for_later_stages_must_be_there(engine):
    with pytest.raises(InputError, match="the stage of exit 1 needs 'y'"):
        engine.stage(1).run({"x": X})


def test_tensors_are_handed_on_as_arrays(engine):
    _, _, carried = engine.stage(1).run({"x": torch.from_numpy(X), "y": torch.from_numpy(Y)})
    assert all(type(value) is np.ndarray for value in carried.values())
    np.testing.assert_array_equal(carried["y"], Y)


@pytest.mark.parametrize("again", [lambda stage: pickle.loads(pickle.dumps(stage)), copy.deepcopy, copy.copy])
def test_a_stage_pickles_and_copies(engine, again):
    rows = {"x": X, "y": Y}
    for stage in engine.stages:
        answers, scores, carried = stage.run(rows)
        found = again(stage)
        assert (found.exit, found.threshold, found.inputs, found.keeps) == (
            stage.exit, stage.threshold, stage.inputs, stage.keeps
        )  # fmt: skip
        for one, other in zip((*answers, scores, *carried.values()), _all(found.run(rows)), strict=True):
            np.testing.assert_array_equal(one, other)
        rows = carried


def _all(results):
    answers, scores, carried = results
    return (*answers, scores, *carried.values())


@pytest.mark.parametrize("wrong", [None, 0.5, [None], np.ones((2, 1)), ["a"]])
def test_scores_to_leave_by_are_checked(engine, wrong):
    for stage in engine.stages:
        with pytest.raises(InputError, match=r"scores must be one number per sample, \(R,\)"):
            stage.leave(wrong)


def test_masked_arrays_are_refused(engine):
    masked = np.ma.masked_array(X, mask=X > 0.5)
    for call in (engine, lambda x, y: engine.stages[0].run({"x": x, "y": y})):
        with pytest.raises(InputError, match=r"'x' is a masked array.*array\.filled\(value\)"):
            call(masked, Y)
        call(masked.filled(0), Y)
