"""The PyTorch engine with batch sizes gives the predictions of the naive loop, whatever pads its batches."""

import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from branchynet import BranchyNet, Policy, averaged
from branchynet.deploy.recorder import Recorder
from branchynet.deploy.torch_engine import TorchEngine
from helpers.loop import BATCHES, QUANTILES, agree, agree_everywhere, every_exit, safe_thresholds
from helpers.networks import FAMILIES, build, draw, residual, spread_out, tokens, two_inputs

SIZES = (1, 2, 5, 16, 40)


def traced(self, step):
    """Record a step as CUDA does: its operators on its tensors, without the code of the step."""
    graph = make_fx(step)()
    return lambda: graph()


@functools.cache
def case(family, *, recorded=False):
    """(net, 64 samples, outputs of every exit, thresholds, engine)."""
    net, example = build(family, 0)
    inputs = draw(example, 64, 0)
    outputs = every_exit(net, inputs)
    thresholds = safe_thresholds(outputs, QUANTILES[1][: net.num_exits - 1])
    with pytest.MonkeyPatch.context() as patch:
        if recorded:
            patch.setattr(Recorder, "record", traced)
        engine = TorchEngine(net, Policy(thresholds=thresholds), inputs, batch_sizes=SIZES)
        if recorded:
            engine.prepare()
    return net, inputs, outputs, thresholds, engine


families = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)


# Parity


@families
@pytest.mark.parametrize("batch", [*BATCHES, 300])
def test_it_agrees_with_the_loop_at_its_own_thresholds(family, batch):
    _, inputs, outputs, thresholds, engine = case(family)
    rows = np.arange(batch) % 64
    agree(engine(*(i[rows].numpy() for i in inputs)), outputs[rows], thresholds)


@pytest.mark.parametrize(
    ("family", "recorded"),
    [
        *((family, False) for family in FAMILIES),
        (two_inputs, True),
        *(pytest.param(family, True, marks=pytest.mark.heavy) for family in FAMILIES if family is not two_inputs),
    ],
)
def test_it_agrees_with_the_loop_at_any_thresholds_and_batch(family, recorded):
    _, inputs, outputs, _, engine = case(family, recorded=recorded)
    agree_everywhere(engine, inputs, outputs)


@families
def test_each_sample_may_have_thresholds_of_its_own(family):
    net, inputs, outputs, _, engine = case(family)
    levels = [safe_thresholds(outputs, [q] * (net.num_exits - 1)) for q in (0.0, 0.3, 0.6, 1.0)]
    rng = np.random.default_rng(0)
    for batch in (1, 7, 40, 64):
        chosen = rng.integers(len(levels), size=batch)
        own = np.array([levels[k] for k in chosen])
        answer = engine(*(i[:batch] for i in inputs), thresholds=list(own.T))
        for k, thresholds in enumerate(levels):
            agree(type(answer)(*(a[chosen == k] for a in answer)), outputs[:batch][chosen == k], thresholds)
        agree(engine(*(i[:batch] for i in inputs), thresholds=levels[1]), outputs[:batch], levels[1])


@pytest.mark.parametrize("of", ["softmax", pytest.param("logits", marks=pytest.mark.heavy)])
def test_averaged_exits_and_exits_left_out(of):
    net, inputs, _, _, _ = case(residual)
    mean = averaged(net, of=of)
    outputs = every_exit(mean, inputs)
    thresholds = safe_thresholds(outputs, (0.3, 0.5))
    for never in (None, 0, 1):
        fewer = tuple(None if n == never else t for n, t in enumerate(thresholds))
        engine = TorchEngine(mean, Policy(thresholds=fewer), inputs, batch_sizes=SIZES)
        agree(engine(*inputs), outputs, fewer)
        agree(engine(*inputs, thresholds=(None, None)), outputs, (None, None))


class SequenceFirst(nn.Module):
    """A network whose features are `(L, B, D)`; a mask `(B, L)` is read by every layer."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(6, 4) for _ in range(3))

    def forward(self, x, mask):
        x, exits = x.transpose(0, 1).contiguous(), []
        for layer, head in zip(self.layers, self.heads, strict=True):
            x = x + torch.tanh(layer(x)) * mask.t().unsqueeze(2)
            exits.append(head(x.mean(0)))
        return tuple(exits)


def test_the_batch_may_be_another_dimension_of_a_value():
    torch.manual_seed(0)
    net, inputs = SequenceFirst().eval(), (torch.randn(64, 5, 6), torch.rand(64, 5).round())
    outputs = every_exit(net, inputs)
    engine = TorchEngine(net, Policy(thresholds=(1.0, 1.0)), inputs, batch_sizes=SIZES)
    assert next(t.axis for t in engine._cut.stages[1].takes if t.name not in engine._cut.inputs) == 1
    for quantiles in QUANTILES:
        thresholds = safe_thresholds(outputs, quantiles[:2])
        agree(engine(*inputs, thresholds=thresholds), outputs, thresholds)


# Padded rows


def poison(engine, value):
    """Overwrite every row of every buffer of numbers."""
    buffers = engine._stages._buffers
    for tensor in (*buffers.values.values(), *buffers.answers[:2], *(level.threshold for level in buffers.levels)):
        if tensor.is_floating_point():
            tensor.fill_(value)
    engine._stages._filled.clear()


@families
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_what_the_buffers_held_before_never_matters(family, value):
    _, inputs, outputs, thresholds, engine = case(family)
    for batch in (1, 3, 17, 39):
        poison(engine, value)
        agree(engine(*(i[:batch] for i in inputs)), outputs[:batch], thresholds)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f is not tokens], ids=lambda f: f.__name__)
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 3, 8])
def test_a_row_of_nan_changes_no_other_row(family, value, place):
    net, inputs, _, thresholds, engine = case(family)
    given = [i[:9].clone() for i in inputs]
    want = engine(*given)
    given[0][place] = value
    got = engine(*given)
    others = np.arange(9) != place
    assert got.exit[others].tolist() == want.exit[others].tolist()
    # The row may leave elsewhere, and then later stages run at another size, whose sums have another order.
    np.testing.assert_allclose(got.output[others], want.output[others], atol=1e-5)
    never = engine(*given, thresholds=(1e30,) * len(thresholds))
    if np.isnan(value):
        assert never.exit[place] == net.num_exits and (never.exit[others] == 1).all()


# Work


def ran(engine, *inputs, **options):
    """(exit, rows) of every stage that runs."""
    seen, handles = [], []
    for stage in engine._cut.stages:
        hook = functools.partial(lambda exit, _module, args: seen.append((exit, args[0])), stage.exit)
        handles.append(stage.module.register_forward_pre_hook(hook))
    try:
        engine(*inputs, **options)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@families
@pytest.mark.parametrize("quantiles", QUANTILES)
def test_each_stage_runs_at_the_smallest_size_that_holds_the_samples(family, quantiles):
    net, inputs, outputs, _, engine = case(family)
    inputs, outputs = [i[:40] for i in inputs], outputs[:40]
    thresholds = safe_thresholds(outputs, quantiles[: net.num_exits - 1])
    exits = engine(*inputs, thresholds=thresholds).exit
    staying = [int((exits >= n).sum()) for n in range(1, net.num_exits + 1)]
    wanted = [(n, min(s for s in SIZES if s >= rows)) for n, rows in enumerate(staying, 1) if rows]
    assert ran(engine, *inputs, thresholds=thresholds) == wanted


@families
def test_the_host_waits_once_per_exit_and_once_for_the_answers(family, monkeypatch):
    net, inputs, _, thresholds, engine = case(family)
    waits = []
    monkeypatch.setattr(Recorder, "wait", lambda self: waits.append(self))
    for limits in (thresholds, (1e30,) * len(thresholds), (-1e30,) * len(thresholds)):
        waits.clear()
        reached = engine(*(i[:40] for i in inputs), thresholds=limits).exit.max()
        assert len(waits) == min(reached, net.num_exits - 1) + 1
    waits.clear()
    engine(*(i[:40] for i in inputs), thresholds=(None,) * len(thresholds))
    assert len(waits) == 1


def test_values_keep_their_memory_layout():
    net, inputs, outputs, thresholds, _ = case(residual)
    wide = inputs[0].to(memory_format=torch.channels_last)
    engine = TorchEngine(
        net.to(memory_format=torch.channels_last), Policy(thresholds=thresholds), wide, batch_sizes=SIZES
    )
    maps = [v for v in engine._stages._buffers.values.values() if v.dim() == 4]
    assert len(maps) > 1 and all(v.is_contiguous(memory_format=torch.channels_last) for v in maps)
    taken = []
    stage = engine._cut.stages[1].module
    handle = stage.register_forward_pre_hook(lambda _, args: taken.extend(a for a in args[1:] if a.dim() == 4))
    agree(engine(*inputs), outputs, thresholds)
    handle.remove()
    assert taken and all(t.is_contiguous(memory_format=torch.channels_last) for t in taken)
    net.to(memory_format=torch.contiguous_format)


# Weights, threads, and the memory of predictions


def test_changing_the_network_changes_the_answers():
    net, example = build(two_inputs, 5)
    inputs = draw(example, 16, 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "record", traced)
        engine = TorchEngine(net, Policy(thresholds=(1.0,) * (net.num_exits - 1)), inputs, batch_sizes=(4, 16))
        engine.prepare()
    before = engine(*inputs).output
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    spread_out(net, inputs)
    outputs = every_exit(net, inputs)
    thresholds = safe_thresholds(outputs, (0.4, 0.5)[: net.num_exits - 1])
    answer = engine(*inputs, thresholds=thresholds)
    agree(answer, outputs, thresholds)
    assert np.abs(answer.output - before).max() > 0.01


def test_threads_do_not_disturb_each_other():
    _, inputs, outputs, _, engine = case(residual)
    jobs = [(start, safe_thresholds(outputs, q[:2])) for start in range(0, 48, 5) for q in QUANTILES]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda j: engine(*(i[j[0] : j[0] + 9] for i in inputs), thresholds=j[1]), jobs))
    for (start, thresholds), answer in zip(jobs, answers, strict=True):
        agree(answer, outputs[start : start + 9], thresholds)


class Echo(nn.Module):
    def forward(self, x):
        return x


def test_predictions_share_no_memory():
    x = torch.randn(6, 4)
    net = BranchyNet(nn.Sequential(Echo(), nn.Linear(4, 4)), {"0": Echo()})
    engine = TorchEngine(net, Policy(thresholds=(1.0,)), x, batch_sizes=(8,))
    given = x.numpy().copy()
    first = engine(given, thresholds=[9.0])
    kept = first.output.copy()
    second = engine(given + 1, thresholds=[9.0])
    np.testing.assert_array_equal(first.output, kept)
    second.output[:] = 7
    np.testing.assert_array_equal(given, x)
    np.testing.assert_array_equal(engine(given, thresholds=[9.0]).output, kept)


@pytest.mark.parametrize("inference", [True, False])
def test_engines_work_in_inference_mode_and_outside(inference):
    net, inputs, outputs, thresholds, _ = case(two_inputs)
    with torch.inference_mode(inference):
        engine = TorchEngine(net, Policy(thresholds=thresholds), inputs, batch_sizes=(8, 64))
    agree(engine(*inputs), outputs, thresholds)
    with torch.inference_mode():
        agree(engine(*(i.clone() for i in inputs)), outputs, thresholds)
