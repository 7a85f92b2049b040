"""The PyTorch engine: predictions of the naive loop, later stages only for the rows that stay, and shared weights."""

import functools
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from branchynet import BranchyNet, Policy, Prediction
from branchynet.deploy.torch_engine import TorchEngine
from branchynet.errors import InputError
from branchynet.policy.scores import entropy
from helpers.loop import BATCHES, QUANTILES, agree, agree_everywhere, every_exit, safe_thresholds
from helpers.networks import FAMILIES, build, draw, residual, tokens, two_inputs


@functools.cache
def case(family):
    """(net, 64 samples, outputs of every exit, thresholds, engine)."""
    net, example = build(family, 0)
    inputs = draw(example, 64, 0)
    outputs = every_exit(net, inputs)
    thresholds = safe_thresholds(outputs, QUANTILES[1][: net.num_exits - 1])
    return net, inputs, outputs, thresholds, TorchEngine(net, Policy(thresholds=thresholds), inputs)


families = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)


# Parity


@families
@pytest.mark.parametrize("batch", BATCHES)
def test_it_agrees_with_the_loop_at_its_own_thresholds(family, batch):
    _, inputs, outputs, thresholds, engine = case(family)
    agree(engine(*(i[:batch].numpy() for i in inputs)), outputs[:batch], thresholds)


@families
def test_it_agrees_with_the_loop_at_any_thresholds_and_batch(family):
    _, inputs, outputs, _, engine = case(family)
    agree_everywhere(engine, inputs, outputs)


@families
def test_nan_never_leaves_early(family):
    net, inputs, _, _, engine = case(family)
    poisoned = [i[:8].clone() for i in inputs]
    if family is tokens:
        return  # token ids cannot be NaN
    poisoned[0][3] = np.nan
    answer = engine(*poisoned, thresholds=(1e30,) * (net.num_exits - 1))
    assert answer.exit[3] == net.num_exits
    assert (np.delete(answer.exit, 3) == 1).all()


@families
@pytest.mark.parametrize("most", [1, 5, 64])
def test_more_rows_than_a_gpu_takes_run_in_parts(family, most, monkeypatch):
    _, inputs, outputs, thresholds, engine = case(family)
    monkeypatch.setattr(engine, "_most", most)
    agree(engine(*inputs), outputs, thresholds)


def test_each_exit_can_be_left_out():
    net, inputs, outputs, thresholds, _ = case(two_inputs)
    for never in (0, 1):
        fewer = tuple(None if n == never else t for n, t in enumerate(thresholds))
        engine = TorchEngine(net, Policy(thresholds=fewer), inputs)
        agree(engine(*inputs), outputs, fewer)
        agree(engine(*inputs, thresholds=fewer), outputs, fewer)
        with pytest.raises(InputError, match=rf"exit {never + 1} was left out of this engine.*None"):
            engine(*inputs, thresholds=thresholds)


@pytest.mark.parametrize("given_as", [[0.3, None], (None, 1.2), [None, None], np.array([1.1, 0.7]), [np.inf, 1e39]])
def test_thresholds_of_a_call_are_used_as_given(given_as):
    _, inputs, outputs, _, engine = case(two_inputs)
    agree(engine(*inputs, thresholds=given_as), outputs, [t for t in given_as])


def test_every_kind_of_score_sees_the_outputs_so_far():
    net, inputs = case(two_inputs)[:2]

    def disagreement(outputs):
        return sum((output - outputs[-1]).abs().amax(1) for output in outputs) + outputs[0].amax(1)

    with torch.no_grad():
        outputs = net(*inputs)
    scores = [disagreement(outputs[: n + 1]).numpy() for n in range(3)]
    thresholds = [float(np.median(s)) for s in scores[:2]]
    answer = TorchEngine(net, Policy(disagreement, tuple(thresholds)), inputs)(*inputs)
    leaves = np.stack([*(s < t for s, t in zip(scores, thresholds, strict=False)), np.ones(64, bool)])
    assert answer.exit.tolist() == (leaves.argmax(axis=0) + 1).tolist() and len({*answer.exit}) == 3
    np.testing.assert_allclose(answer.score, np.stack(scores)[answer.exit - 1, np.arange(64)], atol=1e-4)


# Description, inputs and predictions


def test_it_describes_itself():
    net, _, _, thresholds, engine = case(two_inputs)
    assert [str(i) for i in engine.inputs] == ["image: float32 (B, 2, 8, 8)", "vector: float32 (B, 5)"]
    assert [(i.name, i.dtype, i.shape) for i in engine.inputs][1] == ("vector", np.float32, (5,))
    assert engine.num_exits == net.num_exits and engine.policy == Policy(thresholds=thresholds)
    assert engine.device == torch.device("cpu")
    assert [str(i) for i in case(tokens)[4].inputs] == ["ids: int64 (B, 7)"]


@pytest.mark.parametrize("rows", [0, 1, 9])
def test_predictions_have_their_documented_shapes_and_types(rows):
    _, inputs, _, _, engine = case(two_inputs)
    answer = engine(*(i[:rows] for i in inputs))
    assert isinstance(answer, Prediction) and all(isinstance(a, np.ndarray) for a in answer)
    assert [a.shape for a in answer] == [(rows,), (rows,), (rows,), (rows, 4)]
    assert [a.dtype for a in answer] == [np.int64, np.int64, np.float32, np.float32]


def test_arrays_and_tensors_of_any_layout_are_read_correctly():
    _, inputs, _, _, engine = case(two_inputs)
    image, vector = (i.numpy() for i in inputs)
    backwards = np.ascontiguousarray(vector[::-1])[::-1]
    frozen = image.copy()
    frozen.flags.writeable = False
    want = engine(*inputs)
    for given in [
        (image, vector),
        (np.asfortranarray(image), backwards),
        (frozen, inputs[1]),
        (inputs[0].to(memory_format=torch.channels_last), inputs[1].clone().requires_grad_()),
    ]:
        for a, b in zip(engine(*given), want, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


class Echo(nn.Module):
    def forward(self, x):
        return x


def test_predictions_share_no_memory():
    x = torch.randn(6, 4)
    net = BranchyNet(nn.Sequential(Echo(), nn.Linear(4, 4)), {"0": Echo()})
    given = x.numpy().copy()
    engine = TorchEngine(net, Policy(thresholds=(float(entropy((x,)).median()),)), x)
    for thresholds in (None, [9.0]):
        answer = engine(given, thresholds=thresholds)
        answer.output[:] = 7
        np.testing.assert_array_equal(given, x)


def test_a_batch_norm_in_train_mode_runs_in_eval_mode():
    net, inputs, outputs, thresholds, engine = case(residual)
    net.train()
    agree(engine(*inputs), outputs, thresholds)
    assert net.training
    net.eval()


def test_keywords_one_exit_and_one_row():
    net, inputs, outputs, thresholds, _ = case(two_inputs)
    by_name = {"vector": inputs[1][:1], "image": inputs[0][:1]}
    engine = TorchEngine(net, Policy(thresholds=thresholds), by_name)
    assert [i.name for i in engine.inputs] == ["vector", "image"]
    agree(engine(inputs[1], inputs[0]), outputs, thresholds)
    alone = TorchEngine(net.backbone, Policy(), inputs)(*inputs)
    assert (alone.exit == 1).all()
    np.testing.assert_allclose(alone.output, outputs[:, -1], atol=1e-5)


def test_images_out_and_half_precision():
    def mean_entropy(outputs):
        log_p = torch.log_softmax(outputs[-1], dim=1)
        return -(log_p.exp() * log_p).sum(1).mean((1, 2))

    torch.manual_seed(0)
    net = BranchyNet(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 1)), {"0": nn.Conv2d(6, 5, 1)})
    net = net.bfloat16().eval()
    x = torch.randn(8, 3, 6, 7).bfloat16()
    with torch.no_grad():
        early, late = (o.float() for o in net(x))
    threshold = float(mean_entropy((early,)).sort().values[3:5].mean())
    engine = TorchEngine(net, Policy(mean_entropy, (threshold,)), x)
    answer = engine(x)
    assert answer.label.shape == (8, 4, 5) and answer.output.shape == (8, 5, 4, 5) and {*answer.exit} == {1, 2}
    want = torch.where(torch.from_numpy(answer.exit == 1)[:, None, None, None], early, late)
    np.testing.assert_allclose(answer.output, want, atol=0.05)
    assert engine(x[:0]).label.shape == (0, 4, 5)
    assert str(engine.inputs[0]).endswith(": bfloat16 (B, 3, 6, 7)")
    with pytest.raises(InputError, match=r"is float32 \(8, 3, 6, 7\)"):
        engine(x.float().numpy())
    with pytest.raises(InputError, match="is float64"):
        engine(x.double().numpy())


def test_threads_do_not_disturb_each_other():
    _, inputs, outputs, _, engine = case(residual)
    jobs = [(start, safe_thresholds(outputs, q[:2])) for start in range(0, 48, 5) for q in QUANTILES]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda j: engine(*(i[j[0] : j[0] + 9] for i in inputs), thresholds=j[1]), jobs))
    for (start, thresholds), answer in zip(jobs, answers, strict=True):
        agree(answer, outputs[start : start + 9], thresholds)


def test_it_moves_the_network_to_the_device():
    net, inputs, outputs, thresholds, _ = case(two_inputs)
    engine = TorchEngine(net, Policy(thresholds=thresholds), inputs, device="cpu")
    assert engine.device == torch.device("cpu")
    agree(engine(*inputs), outputs, thresholds)
    with pytest.raises(InputError, match=r"'nowhere'.*'cuda'"):
        TorchEngine(net, Policy(thresholds=thresholds), inputs, device="nowhere")


# Work


@contextmanager
def watched(engine):
    """Collect (exit, rows, values taken) for every stage that runs."""
    seen, handles = [], []
    for stage in engine._cut.stages:
        hook = functools.partial(lambda exit, _module, args: seen.append((exit, args[0], args[1:])), stage.exit)
        handles.append(stage.module.register_forward_pre_hook(hook))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class Counted(TorchDispatchMode):
    """Counts operators, and keeps the first dimension of each output."""

    def __init__(self):
        super().__init__()
        self.names = Counter()
        self.rows = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names[func.overloadpacket.__name__] += 1
        if isinstance(result, torch.Tensor):
            self.rows.append((func.overloadpacket.__name__, *result.shape[:1]))
        return result


@families
@pytest.mark.parametrize("quantiles", QUANTILES)
def test_each_stage_gets_only_the_rows_that_stay(family, quantiles):
    net, inputs, outputs, _, engine = case(family)
    thresholds = safe_thresholds(outputs, quantiles[: net.num_exits - 1])
    with watched(engine) as seen:
        answer = engine(*inputs, thresholds=thresholds)
    staying = [int((answer.exit >= n).sum()) for n in range(1, net.num_exits + 1)]
    assert [(exit, rows) for exit, rows, _ in seen] == [(n, rows) for n, rows in enumerate(staying, 1) if rows]
    for (exit, rows, values), stage in zip(seen, engine._cut.stages, strict=False):
        kept = torch.from_numpy(answer.exit >= exit)
        for value, taken in zip(values, stage.takes, strict=True):
            assert taken.axis is None or value.shape[taken.axis] == rows
            if taken.name in engine._cut.inputs:
                torch.testing.assert_close(value, inputs[engine._cut.inputs.index(taken.name)][kept])


@families
def test_one_synchronisation_per_exit_and_one_selection_per_live_tensor(family):
    net, inputs, _, thresholds, engine = case(family)
    for limits, reached in ((thresholds, net.num_exits), ((1e30,) * (net.num_exits - 1), 1)):
        with watched(engine) as seen, Counted() as ops:
            answer = engine(*inputs, thresholds=limits)
        assert len(seen) == reached == answer.exit.max()
        gates = min(reached, net.num_exits - 1)
        assert ops.names["nonzero"] == gates
        assert not any("item" in name or "local_scalar" in name or name == "equal" for name in ops.names)
        picked = sum(len(stage.takes) for stage in engine._cut.stages[1:reached])
        composed = sum(range(reached - 1))  # rows of the second narrowing in terms of the first, and so on
        assert ops.names["index_select"] == picked + composed


def test_nothing_is_selected_if_all_rows_stay():
    net, inputs, outputs, _, engine = case(residual)
    with Counted() as ops:
        answer = engine(*inputs, thresholds=(None,) * (net.num_exits - 1))
    assert not ops.names["index_select"] and not ops.names["index_copy_"]
    agree(answer, outputs, (None,) * (net.num_exits - 1))


def test_convolutions_get_no_row_that_has_left():
    net, inputs, outputs, _, engine = case(residual)
    thresholds = safe_thresholds(outputs, (0.75, 0.6))
    with Counted() as ops:
        answer = engine(*inputs, thresholds=thresholds)
    rows = [n for name, n in ops.rows if "conv" in name]
    staying = [int((answer.exit >= n).sum()) for n in (1, 2, 3)]
    assert sorted(set(rows), reverse=True) == staying and rows == sorted(rows, reverse=True)
    with Counted() as whole, torch.no_grad():
        net(*inputs)
    assert len(rows) == sum("conv" in name for name, _ in whole.rows)


# Weights


def test_changing_the_network_changes_the_answers():
    net, example = build(two_inputs, 5)
    inputs = draw(example, 16, 5)
    engine = TorchEngine(net, Policy(thresholds=(1.0,) * (net.num_exits - 1)), inputs)
    own = {p.data_ptr() for p in (*net.parameters(), *net.buffers())}
    for stage in engine._cut.stages:
        assert {p.data_ptr() for p in (*stage.module.parameters(), *stage.module.buffers())} <= own

    def check():
        outputs = every_exit(net, inputs)
        thresholds = safe_thresholds(outputs, (0.4, 0.5)[: net.num_exits - 1])
        agree(engine(*inputs, thresholds=thresholds), outputs, thresholds)
        return outputs

    before = check()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    sum(output.square().mean() for output in net(*inputs)).backward()
    optimizer.step()
    assert np.abs(check() - before).max() > 0.01
    net.load_state_dict(build(two_inputs, 5)[0].state_dict())
    np.testing.assert_allclose(check(), before)
