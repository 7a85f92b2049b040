"""Each sample of a batch may have thresholds of its own, in nested files, in stages and in PyTorch."""

import numpy as np
import onnxruntime
import pytest
import torch

from branchynet import Policy, TorchEngine, export, load
from branchynet.errors import InputError
from helpers.loop import BATCHES, agree, every_exit, figure_2, safe_thresholds
from helpers.networks import FAMILIES, build, draw

KINDS = ("nested", "openvino", "stages", "torch")


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.__name__)
def case(request, tmp_path_factory):
    """A random network, its samples, every exit's outputs, and 64 choices among thresholds that no score is near."""
    net, example = build(request.param, 3)
    inputs = draw(example, 64, 3)
    outputs = every_exit(net, inputs)
    early = net.num_exits - 1
    levels = [safe_thresholds(outputs, [q] * early) for q in (0.0, 0.3, 0.6, 1.0)]
    rng = np.random.default_rng(3)
    own = np.array([[levels[k][n] for n, k in enumerate(rng.integers(len(levels), size=early))] for _ in range(64)])
    policy = Policy(thresholds=levels[1])
    folder = tmp_path_factory.mktemp("own")
    export(net, folder / "nested.onnx", policy=policy, example=inputs, thresholds="input")
    export(net, folder / "stages", policy=policy, example=inputs, layout="stages")
    engines = {
        "nested": load(folder / "nested.onnx", threads=1),
        "openvino": load(folder / "nested.onnx", threads=1, runtime="openvino"),
        "stages": load(folder / "stages", threads=1),
        "torch": TorchEngine(net, policy, inputs),
    }
    return engines, [i.numpy() for i in inputs], outputs, own, policy


@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_leaves_by_its_own_thresholds(case, kind):
    engines, inputs, outputs, own, _ = case
    seen = set()
    for batch in BATCHES:
        for start in range(0, 64 - batch + 1, max(batch, 16)):
            rows = slice(start, start + batch)
            answer = engines[kind](*(i[rows] for i in inputs), thresholds=list(own[rows].T))
            expected = [figure_2(sample, t) for sample, t in zip(outputs[rows], own[rows], strict=True)]
            assert answer.exit.tolist() == [n for n, _ in expected]
            if expected:
                np.testing.assert_allclose(answer.output, np.stack([z for _, z in expected]), atol=1e-4)
            seen.update(answer.exit.tolist())
    assert len(seen) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_policies_may_differ_per_sample(case, kind):
    engines, inputs, outputs, own, policy = case
    policies = [Policy(thresholds=tuple(t)) for t in own]
    policies[5] = Policy(thresholds=(None,) * len(policy.thresholds))
    expected = [figure_2(sample, p.thresholds)[0] for sample, p in zip(outputs, policies, strict=True)]
    assert engines[kind](*inputs, thresholds=policies).exit.tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_one_number_per_exit_still_serves_all(case, kind):
    engines, inputs, outputs, own, policy = case
    agree(engines[kind](*inputs, thresholds=policy.thresholds), outputs, policy.thresholds)
    mixed = [own[:, 0], *policy.thresholds[1:]]
    found = engines[kind](*inputs, thresholds=mixed).exit.tolist()
    expected = [figure_2(z, (t, *policy.thresholds[1:]))[0] for z, t in zip(outputs, own[:, 0], strict=True)]
    assert found == expected


@pytest.mark.parametrize("kind", ["nested", "stages"])
def test_parts_of_many_samples_keep_their_thresholds(case, kind):
    engines, inputs, _, own, _ = case
    whole = engines[kind](*inputs, thresholds=list(own.T))
    parts = engines[kind].answer_all(*inputs, rows=7, thresholds=list(own.T))
    assert parts.exit.tolist() == whole.exit.tolist()


def test_a_required_threshold_is_an_input_with_a_free_batch(case):
    """A server's batcher wants the batch first in every input; another runtime reads the same file."""
    engines, inputs, _, own, _ = case
    path = engines["nested"].__reduce__()[1][0]
    session = onnxruntime.InferenceSession(path)
    names = [i.name for i in session.get_inputs() if i.name.startswith("threshold_")]
    assert all(isinstance(i.shape[0], str) for i in session.get_inputs())
    feeds = {i.name: a for i, a in zip(engines["nested"].inputs, inputs, strict=True)}
    feeds |= {name: own[:, int(name[-1]) - 1].astype(np.float32) for name in names}
    expected = engines["nested"](*inputs, thresholds=list(own.T))
    assert session.run(["exit"], feeds)[0].tolist() == expected.exit.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_thresholds_are_refused(case, kind):
    engines, inputs, _, own, policy = case
    columns = list(own.T)
    for wrong, match in (
        ([columns[0][:63], *columns[1:]], "given for 63 samples, but the batch has 64"),
        ([np.where(np.arange(64) == 3, np.nan, columns[0]), *columns[1:]], "got NaN"),
        ([columns[0].astype(str), *columns[1:]], "must be numbers"),
        ([*columns, columns[0]], "thresholds given for"),
        ([Policy(score="max_probability", thresholds=policy.thresholds)] * 64, "the exits and the score"),
        ([policy] * 63, "given for 63 samples"),
        ([torch.zeros(2, 2), *columns[1:]], r"or None for never; got float32 \(2, 2\)"),
        ([columns[0].tolist(), *columns[1:]], r"numpy array \(B,\) for each exit; got a list"),
        (policy, "give its .thresholds"),
    ):
        with pytest.raises(InputError, match=match):
            engines[kind](*inputs, thresholds=wrong)


def test_the_default_file_takes_one_threshold_per_exit(tmp_path):
    net, example = build(FAMILIES[0], 3)
    path = export(
        net,
        tmp_path / "default.onnx",
        policy=Policy(thresholds=(0.5,) * (net.num_exits - 1)),
        example=draw(example, 4, 3),
    )
    x = draw(example, 4, 3)
    with pytest.raises(
        InputError, match=r"export it with thresholds='input' and free='batch', or with layout='stages'"
    ):
        load(path)(*x, thresholds=[np.zeros(4)] * (net.num_exits - 1))


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch_has_no_policies(case, kind):
    engines, inputs, _, _, _ = case
    assert len(engines[kind](*(i[:0] for i in inputs), thresholds=[]).label) == 0
    with pytest.raises(InputError, match="0 thresholds given"):
        engines[kind](*inputs, thresholds=[])


@pytest.mark.parametrize("kind", ["nested", "openvino", "stages"])
@pytest.mark.parametrize("rows", [7, 64])
def test_every_part_gets_the_thresholds_of_an_iterator(case, kind, rows):
    engines, inputs, _, own, policy = case
    for given in (policy.thresholds, list(own.T), [policy], [policy] * 64):
        whole = engines[kind](*inputs, thresholds=given)
        parts = engines[kind].answer_all(*inputs, rows=rows, thresholds=iter(given))
        np.testing.assert_array_equal(parts.exit, whole.exit)
    for wrong in ({0.5, 0.6}, {"1": 0.5}, "none", policy, 0.5):
        with pytest.raises(InputError, match="thresholds must be a list"):
            engines[kind].answer_all(*inputs, rows=rows, thresholds=wrong)
