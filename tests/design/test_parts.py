"""Parts of the designer, compared with naive searches and models of their times."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from branchynet import Target, zoo
from branchynet.design import part_times
from branchynet.design.candidates import Candidate, CandidateNetwork, attach_candidates
from branchynet.design.part_times import Batch, StageTimes, time_stages
from branchynet.graph.onnx_flat import flatten
from branchynet.nn.attaching import attach_branches
from branchynet.nn.branches import named_branches
from branchynet.policy.scores import entropy
from branchynet.profiling.onnx_parts import OnnxParts

DEEP = "conv-64x2-128x2-128"
MAPS = [(1, 28, 28), (3, 32, 32), (16, 32, 31), (64, 8, 8), (96, 4, 5), (32, 2, 2), (5, 1, 1), (2048, 7, 7)]


@pytest.mark.parametrize("shape", MAPS)
def test_branches_read_maps_of_any_size(shape):
    made = named_branches(torch.rand(3, *shape), 7)
    assert {"linear", "hidden-64"} <= made.keys()
    assert any(name.startswith("conv") for name in made) == (min(shape[1:]) >= 2)
    for name, branch in made.items():
        assert branch(torch.rand(3, *shape)).shape == (3, 7), name


@pytest.mark.parametrize(("shape", "dim"), [((9, 12), None), ((12,), None), ((12, 9), 1), ((5, 4, 12), -1)])
def test_branches_read_tokens_with_features_in_any_dimension(shape, dim):
    for branch in named_branches(torch.rand(2, *shape), 7, dim).values():
        assert branch(torch.rand(2, *shape)).shape == (2, 7)
        assert next(m for m in branch.modules() if isinstance(m, nn.Linear)).in_features == 12


def test_no_branch_reads_integers():
    assert named_branches(torch.ones(2, 9, dtype=torch.int64), 7) == {}


class Residual(nn.Module):
    """Two blocks; nothing inside of them is a place for an exit."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(inplace=True)) for _ in "ab")
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.fc(x.mean((2, 3)))


def test_all_candidates_share_one_trunk():
    torch.manual_seed(0)
    trunk, images = Residual().eval(), torch.rand(5, 1, 9, 9)
    pool = attach_candidates(trunk, images)
    pool.net.eval()
    assert pool.net.taps[0] == "input" and "stem" in pool.net.taps and "blocks.0.0" not in pool.net.taps
    assert [c.tap for c in pool.candidates] == sorted(
        (c.tap for c in pool.candidates), key=pool.net.taps.index
    ) and len(set(pool.candidates)) == len(pool.candidates) == pool.net.num_exits - 1
    depths = [c.depth for c in pool.candidates]
    assert depths == sorted(depths) and depths[0] == 0 and 0 < depths[-1] < 1
    with torch.no_grad():
        every = pool.net(images)
        assert torch.equal(every[-1], trunk(images))
        some = [i for i in range(len(pool.candidates)) if i % 3]
        few = pool.of(some)
        assert few.backbone is pool.net.backbone  # not a copy: it trains with the others
        assert all(torch.equal(a, every[i]) for a, i in zip(few.eval()(images), [*some, -1], strict=True))
        for i, candidate in enumerate(pool.candidates):
            net = pool.network([i])
            assert net.taps == (candidate.tap,)
            assert torch.allclose(net(images)[0], every[i], atol=1e-5) and torch.equal(net(images)[1], every[-1])
            assert net.backbone is not trunk  # a copy: training does not change the trunk
            rebuilt = attach_branches(trunk, [candidate.tap], [candidate.branch], images)
            assert [p.shape for p in rebuilt.parameters()] == [p.shape for p in net.parameters()]


def macs(net, x):
    """Multiply-accumulates per sample of a network of convolutions and linear layers, counted in a forward pass."""
    counts = []
    layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    hooks = [
        m.register_forward_hook(lambda m, _, out: counts.append(out[0].numel() * m.weight[0].numel())) for m in layers
    ]
    net.eval()(x)
    for hook in hooks:
        hook.remove()
    assert len(counts) == len(layers)
    return sum(counts)


@torch.no_grad()
@pytest.mark.parametrize("wide", [False, True])
def test_branches_have_less_work_than_the_rest_of_the_trunk(wide):
    """Deep branches, of several convolutions between two poolings, have less than a quarter of it."""
    a, b = (64, 320) if wide else (8, 16)
    trunk, images = nn.Sequential(
        nn.Conv2d(1, a, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(a, b, 5, padding=2), nn.ReLU(),
        nn.Conv2d(b, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 10),
    ), torch.rand(2, 1, 28, 28)  # fmt: skip
    pool, kept = attach_candidates(trunk, images), {}
    for tap in pool.net.taps:
        upto = 0 if tap == "input" else int(tap) + 1
        features = trunk[:upto](images)
        (first, _), *others = named_branches(features, 10).items()
        left = macs(trunk[upto:], features)
        kept[tap] = [pool.candidates[i].branch for i in pool.at(tap)]
        within = {name: left / 4 if name == DEEP else left for name, _ in others}
        assert kept[tap] == [first, *(name for name, branch in others if macs(branch, features) < within[name])]
    assert len(kept["input"]) > len(kept[pool.net.taps[-1]])
    assert [DEEP in names for names in kept.values()] == [wide, *[False] * (len(kept) - 1)]


def random_times(generator, taps, candidates, rows):
    reach = np.cumsum(generator.uniform(5, 20, taps + 1))
    position = np.sort(generator.integers(0, taps, candidates))
    one = Batch(rows, reach * rows, reach[-1] * rows, generator.uniform(1, 9, candidates) * rows,
                generator.uniform(0, 1, taps) * rows, generator.uniform(1, 3, taps) * rows)  # fmt: skip
    return one, tuple(int(t) for t in position)


def seconds_of(part, true, taps):
    """The time of a graph of `_part_graphs` in a model in which parts add up; `taps` are the branches' positions."""
    name, _, n = part.partition(" ")
    n = int(n or 0)
    here = [i for i, tap in enumerate(taps) if tap == n]
    return {
        "plain": lambda: true.plain,
        "last": lambda: true.reach[-1],
        "alone": lambda: true.reach[taps[n]] + true.branch[n],
        "all": lambda: true.reach[n] + true.branch[here].sum(),
        "both": lambda: true.reach[-1] + true.branch[here[0]],
        "leave": lambda: true.reach[n] + true.branch[here[0]] + true.leave[n],
        "stay": lambda: true.reach[-1] + true.branch[here[0]] + true.stay[n],
    }[name]()


@pytest.mark.parametrize("single", [False, True])
def test_times_of_parts_follow_from_those_of_whole_graphs(single, monkeypatch):
    """With one and with several branches per tap, the trunk before a tap is not counted with its branch."""
    net, x = zoo.b_lenet(branches="published").eval(), torch.rand(4, 1, 28, 28)
    pool = (
        CandidateNetwork(net, (Candidate(net.taps[0], "", 0.1),))
        if single
        else attach_candidates(zoo.lenet().eval(), x)
    )
    parts = OnnxParts(flatten(pool.net, x, score=entropy))
    taps = [pool.net.taps.index(c.tap) for c in pool.candidates]
    generator, names = np.random.default_rng(0), []
    reach = np.cumsum(generator.uniform(5, 20, len(pool.net.taps) + 1))
    true = Batch(1, reach, reach[-1] - 1, generator.uniform(1, 9, len(taps)),
                 generator.uniform(0, 1, len(reach) - 1), generator.uniform(1, 3, len(reach) - 1))  # fmt: skip
    made = part_times._part_graphs

    def remembered(*args):
        names[:] = calls = made(*args)
        return calls

    monkeypatch.setattr(part_times, "_part_graphs", remembered)
    monkeypatch.setattr(
        part_times, "samples_of", lambda calls, _: np.array([[seconds_of(name, true, taps)] * 3 for name in names])
    )
    found = time_stages(pool, parts, x, Target(), 0.1).whole
    for field in ("reach", "branch", "leave", "stay", "plain"):
        np.testing.assert_allclose(getattr(found, field), getattr(true, field), err_msg=field)


@pytest.mark.parametrize("seed", range(5))
def test_a_design_costs_the_sum_of_the_parts_that_a_sample_reaches(seed):
    generator = np.random.default_rng(seed)
    whole, taps = random_times(generator, 3, 6, 1)
    times = StageTimes(whole, whole, taps, 1, 0.0)
    for chosen in itertools.combinations(range(6), 2):
        if taps[chosen[0]] == taps[chosen[1]]:
            continue
        cost = times.cost(chosen)
        met, expected = 0.0, []
        for i in chosen:
            met += whole.branch[i]
            expected.append(whole.reach[taps[i]] + met + whole.leave[taps[i]])
            met += whole.stay[taps[i]]
        expected.append(whole.reach[-1] + met)
        before = sum(whole.leave[taps[i]] for i in chosen[:1])
        got = cost.latency_us([True] * 3)
        assert got[0] == pytest.approx(expected[0])
        assert got[1] == pytest.approx(expected[1]) and got[2] == pytest.approx(expected[2])
        assert before >= 0 and cost.threads == 1 and cost.batch_size == 1


def test_every_row_of_a_batch_pays_the_fixed_costs():
    """Calls of b rows take 8 + b us to the tap, 4 + 2b for the branch, 20 + 5b from there to the end."""

    def batch(b):
        return Batch(
            b, np.array([8.0 + b, 28 + 6 * b]), 28.0 + 6 * b, np.array([4.0 + 2 * b]), np.zeros(1), np.zeros(1)
        )

    times = StageTimes(batch(64), batch(16), (0,), 1, 0.0)
    cost = times.cost([0])
    leave, stay = cost.latency_us([True, True])
    assert leave == pytest.approx(1 + 2 + (8 + 4 + 20) / 64) and stay - leave == pytest.approx(5)
    assert times.plain_us == pytest.approx(6 + 28 / 64)
