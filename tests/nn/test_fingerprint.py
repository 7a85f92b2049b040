"""Records, costs and choices of different networks are not mixed."""

import copy
import hashlib

import numpy as np
import pytest
import torch

from branchynet import (
    BudgetController,
    Choice,
    ExitCost,
    ExitRecord,
    Policy,
    bench,
    choose,
    evaluate,
    export,
    frontier,
    load,
    measure,
    record,
    zoo,
)
from branchynet.errors import InputError
from branchynet.nn.fingerprint import fingerprint
from branchynet.profiling.target import Target


def b_lenet(seed=0, **options):
    torch.manual_seed(seed)
    return zoo.b_lenet(branches="published", **options).eval()


def batches(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.rand(40, 1, 28, 28, generator=generator), torch.arange(40) % 10)]


def test_it_tells_architectures_and_trainings_apart():
    net = b_lenet()
    assert fingerprint(net) == fingerprint(copy.deepcopy(net)) == fingerprint(b_lenet())
    structure, weights = fingerprint(net).split("-")
    assert fingerprint(b_lenet(1)).startswith(structure) and not fingerprint(b_lenet(1)).endswith(weights)
    changed = copy.deepcopy(net)
    with torch.no_grad():
        next(changed.parameters()).view(-1)[0] += 1e-6
    assert fingerprint(changed) != fingerprint(net)
    assert fingerprint(b_lenet(num_classes=9)).split("-")[0] != structure
    assert fingerprint(net.backbone).split("-")[0] != structure


class Held(torch.nn.Module):
    """A linear layer with one more tensor, in a buffer that `state_dict()` includes or omits."""

    def __init__(self, value, persistent, deep):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 2)
        if value is not None:
            owner = self.layer if deep else self
            owner.register_buffer("scale", torch.tensor(value), persistent=persistent)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("persistent", [False, True])
def test_every_buffer_counts(persistent, deep):
    values = [1.0, -1.0, [1.0, 1.0]]
    one, other, shaped = (fingerprint(Held(value, persistent, deep)) for value in values)
    assert one == fingerprint(Held(1.0, persistent, deep)) == fingerprint(Held(1.0, not persistent, deep))
    assert one.split("-")[0] == other.split("-")[0] != shaped.split("-")[0]
    assert len({one, other, shaped, fingerprint(Held(None, persistent, deep))}) == 4


def test_without_such_buffers_it_is_of_the_state_alone():
    net = b_lenet()
    weights = hashlib.sha256()
    for _, value in sorted(net.state_dict().items()):
        weights.update(value.numpy().tobytes())
    assert fingerprint(net).split("-")[1] == weights.hexdigest()[:12]


def test_records_costs_and_choices_carry_it(tmp_path):
    net = b_lenet()
    made, cost = record(net, batches(), progress=False), measure(net, batches()[0][0], seconds=0.1)
    choice = choose(made, cost, max_drop=0.999, confidence=None)
    assert made.network == cost.network == choice.network == fingerprint(net)
    made.save(tmp_path / "r.npz"), cost.save(tmp_path / "c.json"), choice.save(tmp_path / "o.json")
    assert ExitRecord.load(tmp_path / "r.npz").network == made.network
    assert ExitCost.load(tmp_path / "c.json") == cost and Choice.load(tmp_path / "o.json") == choice
    losses = record(net, batches(), loss=lambda o, t: (o.argmax(1) != t).float(), progress=False)
    losses.save(tmp_path / "l.npz")
    assert ExitRecord.load(tmp_path / "l.npz").network == made.network == made.take(slice(3)).network
    path = export(net, tmp_path / "flat.onnx", policy=None, example=batches()[0][0])
    assert record(load(path), batches(), progress=False).network == made.network


def test_another_training_is_refused_where_its_answers_matter():
    one, other = (record(b_lenet(seed), batches(), progress=False) for seed in (0, 1))
    cost = measure(b_lenet(2), batches()[0][0], seconds=0.1)
    choice = choose(one, cost, max_drop=0.999, confidence=None)  # costs do not depend on the weights
    with pytest.raises(InputError, match=f"different networks .{other.network} and {one.network}"):
        evaluate(other, choice)
    evaluate(other, choice.policy, cost)  # an explicit policy is accepted


def test_another_architecture_is_refused():
    made = record(b_lenet(), batches(), progress=False)
    foreign = measure(b_lenet(num_classes=9), batches()[0][0], seconds=0.1)
    policy = Policy(thresholds=(0.5,))
    for mixed in (
        lambda: choose(made, foreign, max_drop=0.999, confidence=None),
        lambda: frontier(made, foreign),
        lambda: evaluate(made, policy, foreign),
        lambda: BudgetController(made, policy, foreign, goal_share=0.5),
    ):
        with pytest.raises(InputError, match="different architectures"):
            mixed()


def test_bench_refuses_another_networks_file(tmp_path):
    net, (images, labels) = b_lenet(), batches()[0]
    path = export(net, tmp_path / "m.onnx", policy=Policy(thresholds=(0.5,)), example=images)
    arguments = {"targets": Target(), "samples": 8, "repeats": 1}
    with pytest.raises(InputError, match="different networks"):
        bench(path, b_lenet(1), (images, labels), **arguments)
    assert len(bench(path, net, (images, labels), **arguments)) == 1


def test_what_does_not_say_is_not_refused():
    made = record(b_lenet(), batches(), progress=False)
    cost = ExitCost((1.0, 2.0), (0.5, 0.0))
    assert choose(made, cost, max_drop=0.999, confidence=None).network == made.network
    message = ExitRecord(made.outputs, made.labels)
    assert np.isclose(evaluate(message, choose(made, cost, max_drop=0.999, confidence=None).policy).samples, 40)
