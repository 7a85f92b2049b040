"""The reproduction of the paper's evaluation on a small network and digits, compared with naive loops."""

import itertools
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import branchynet.reproduce as room
from branchynet import Policy, evaluate, record, zoo
from branchynet.data import load_data, loader
from branchynet.errors import FileError, InputError
from branchynet.nn.averaging import averaged
from branchynet.nn.weights import load_weights
from branchynet.policy.averaging import fit_averaging
from branchynet.policy.record_scores import scores_of_record
from branchynet.reproduce import reproduce, table1
from branchynet.reproduce.figures import figure_3, figure_4
from branchynet.reproduce.recipes import RECIPES, Training, adam, recipes
from branchynet.reproduce.results import PlainResult, evaluate_network, on_device
from branchynet.zoo.lenet import LeNet
from helpers.loop import doubt, entropy, figure_2

RECIPE = replace(
    RECIPES["b_lenet"],
    data="digits",
    epochs=(2, 2),
    smaller=(("LeNet 2-4-8", partial(LeNet, channels=(2, 4, 8)), "lenet_2_4_8-digits"),),
    slack=(0.05,),
)


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


@pytest.fixture(scope="module")
def training(tmp_path_factory, digits):
    return Training(RECIPE, digits, tmp_path_factory.mktemp("training"), progress=False)


@pytest.fixture(scope="module")
def found(training, digits):
    return evaluate_network(RECIPE, training.all(), digits, samples=32, repeats=1, say=lambda line: None)


def test_both_networks_start_from_one_baseline_with_equal_epochs(training):
    again = replace(training, recipe=replace(RECIPE, epochs=(2, 0)))
    nets = training.all()
    assert {p.name for p in training.folder.iterdir()} >= {"baseline", "joint", "continued", "lenet_2_4_8-digits"}
    rows = {p.parent.name: len(p.read_text().splitlines()) for p in training.folder.glob("*/train.csv")}
    assert rows["joint"] == rows["continued"]
    baseline = training.baseline().state_dict()
    assert any(not torch.equal(v, baseline[k]) for k, v in nets.plain.state_dict().items())
    stopped = again.baseline().state_dict()  # read, not trained again
    assert all(torch.equal(v, stopped[k]) for k, v in baseline.items())


def test_branches_may_be_trained_alone_first(training, digits):
    """On the frozen baseline, before the second part."""
    warm = replace(training, recipe=replace(RECIPE, warm=(1, 5e-3)))
    baseline, started = training.baseline().state_dict(), []

    def add(trunk):
        net = RECIPE.branchy()
        net.backbone.load_state_dict(trunk.state_dict())
        started.append(net)
        return net

    warm.with_exits(add, "warmed")
    rows = {p.parent.name: len(p.read_text().splitlines()) - 1 for p in training.folder.glob("warmed*/train.csv")}
    assert rows == {"warmed-warm": 1, "warmed": 2}
    frozen = replace(warm, recipe=replace(warm.recipe, epochs=(2, 0)))
    assert all(torch.equal(v, baseline[k]) for k, v in frozen.continued().state_dict().items())
    kept = frozen.with_exits(add, "frozen").backbone.state_dict()
    assert all(torch.equal(v, baseline[k]) for k, v in kept.items())
    assert (training.folder / "frozen-warm").exists() and not (training.folder / "frozen").exists()
    alone = RECIPE.branchy()
    load_weights(alone, training.folder / "warmed-warm" / "checkpoint.safetensors")
    assert all(torch.equal(v, baseline[k]) for k, v in alone.backbone.state_dict().items())
    assert any(not torch.equal(v, baseline[k]) for k, v in started[0].backbone.state_dict().items())


def test_a_given_baseline_replaces_the_first_part(training, tmp_path):
    path = training.folder / "baseline" / "checkpoint.safetensors"
    given = replace(training, folder=tmp_path, start=path)
    first, expected = given.baseline().state_dict(), training.baseline().state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in first.items()) and not list(tmp_path.iterdir())
    other = replace(given, recipe=replace(RECIPE, plain=partial(LeNet, channels=(2, 4, 8))))
    with pytest.raises(FileError, match="checkpoint"):
        other.baseline()


def test_images_grow_in_the_first_part_only(training, tmp_path):
    seen = []
    recipe = replace(RECIPE, sides=(14, 28), plain=partial(SideCounting, seen), branchy=None, smaller=(), epochs=(3, 1))
    growing = replace(training, recipe=recipe, folder=tmp_path)
    growing.continued()
    assert [side for side, _ in itertools.groupby(seen)] == [14, 28]
    epochs = seen.count(14) / len(loader(training.data.train, recipe.batch))
    assert epochs == 1 and seen.count(28) > 2 * seen.count(14)


class SideCounting(nn.Module):
    """A network for images of any size that records the sizes it is trained on."""

    def __init__(self, seen):
        super().__init__()
        self.seen, self.layer = seen, nn.Linear(1, 10)

    def forward(self, x):
        if self.training:
            self.seen.append(x.shape[-1])
        return self.layer(x.mean(dim=(2, 3)))


def test_figures_of_merit_are_those_of_the_networks(found, training, digits):
    nets = training.all()
    test = record(nets.branchy, loader(digits.test, 100), progress=False)
    assert found.test.digest == test.digest
    plain = record(nets.plain, loader(digits.test, 100), progress=False)
    assert found.plain.accuracy == evaluate(plain, Policy()).accuracy
    assert [s.network for s in found.smaller] == ["LeNet 2-4-8"] and found.smaller[0].us > 0
    assert [p.asked for p in found.points] == 2 * [found.plain_val, found.plain_val - 0.05]
    assert [p.name for p in found.points] == 2 * ["B-LeNet"] + 2 * ["B-LeNet, averaged"]
    weights = fit_averaging(found.val, of="logits")
    for point in found.points:
        is_mean = point.name.endswith("averaged")
        rule, score = (averaged(nets.branchy, weights, of="logits"), doubt) if is_mean else (nets.branchy, entropy)
        on_val, on_test = (record(rule, loader(p, 100), progress=False) for p in (digits.val, digits.test))
        assert (evaluate(on_val, point.policy).accuracy >= point.asked - 1e-9) == point.reached
        loop = [figure_2(sample, point.policy.thresholds, score) for sample in on_test.outputs]
        assert point.outcome.exit_share[0] == np.mean([n == 1 for n, _ in loop])
        right = np.mean([z.argmax() == label for (_, z), label in zip(loop, test.labels, strict=True)])
        assert point.outcome.accuracy == pytest.approx(right)


def test_figure_3(found):
    data, picture = figure_3(found)
    assert len(data["sweep"]) == 18 and len(picture.axes) == 1
    for point in data["frontier"][:: max(1, len(data["frontier"]) // 5)] + data["sweep"][:3]:
        outcome = evaluate(found.test, Policy(thresholds=tuple(point["thresholds"])), found.cost)
        assert (outcome.mean_us, outcome.accuracy) == (point["us"], point["accuracy"])
    assert data["chosen"]["accuracy"] == found.points[0].outcome.accuracy


def test_figure_4_is_a_loop_over_the_sorted_samples(found):
    data, _ = figure_4(found)
    entropy = scores_of_record(found.test)[:, 0]
    order = np.argsort(entropy, kind="stable")
    for k in (0, len(data["share"]) // 2, len(data["share"]) - 1):
        leave = set(order[: round(data["share"][k] * len(order))].tolist())
        loss = [found.test.losses[i, 0 if i in leave else 1] for i in range(len(order))]
        assert data["accuracy"][k] == pytest.approx(1 - np.mean(loss))
        assert data["largest_entropy"][k] == pytest.approx(max(entropy[i] for i in leave))
    knee = data["knee"]
    leaving = evaluate(found.test, Policy(thresholds=(knee["threshold"],))).exit_share[0]
    assert leaving == pytest.approx(knee["share"], abs=2 / found.test.samples)


def test_table_1(found):
    rows = table1.rows(found)
    text = table1.table([rows])
    assert {line.count("|") for line in text.splitlines()} == {10}
    assert "reported in the paper" in text and "5.4x" in text and "LeNet 2-4-8" in text
    assert json.loads(json.dumps(rows, allow_nan=False))["plain"]["macs"] == found.cost.macs([False, True])[-1]
    early, late = found.cost.latency_us([True, True])
    left = [early if right else late for right in found.test.losses[:, 0] < 0.5]
    assert rows["oracle_gain"] == pytest.approx(found.cost.plain_us / np.mean(left))


def test_the_table_has_the_rows_of_a_gpu_if_there_are_any(found):
    timed = {"plain_ms": 1.5, "branchy_ms": 0.5, "gain": 3.0}
    without = table1.table([table1.rows(found)])
    first, *others = found.points
    text = table1.table([table1.rows(replace(found, points=(replace(first, cuda=timed), *others)))])
    (row,) = set(text.splitlines()) - set(without.splitlines())
    assert row.startswith(f"| {first.name}, GPU; plain 1500 us |") and "| 500 | **3.00x** |" in row
    assert row.count("|") == 10


def test_a_better_smaller_network_is_named(found):
    def row(*smaller):
        return table1.rows(replace(found, smaller=smaller))

    point = found.points[0]
    us, accuracy = point.bench["branchy_us"], point.outcome.accuracy
    best = PlainResult("small", accuracy, us / 2)
    slow, wrong = PlainResult("slow", 1.0, us * 2), PlainResult("wrong", accuracy - 0.01, us / 9)
    assert table1.dominated(row(slow, wrong)) is None
    assert table1.dominated(row(slow, best, wrong))["network"] == "small"
    assert "small is better" in table1.compared(row(best))
    assert "is better" not in table1.compared(row(slow, wrong))


def test_times_on_another_device(training, digits):
    """The rows of a GPU, measured here on the CPU."""
    nets = training.all()
    row = on_device(nets.plain, nets.branchy, Policy(thresholds=(0.5,)), digits.test.images[:16].float() / 255, "cpu")
    assert row["gain"] == pytest.approx(row["plain_ms"] / row["branchy_ms"]) and row["plain_ms"] > 0


@pytest.mark.heavy
def test_all_files_are_written_with_their_command(tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "b_lenet", RECIPE)
    monkeypatch.setattr(room, "FIG_4", "b_lenet")
    lines = []
    made = reproduce("all", tmp_path, networks="b_lenet", from_nothing=True, samples=16, repeats=1, say=lines.append)
    assert len(made) == 1 and "The paper reports 99.25% at 5.4x" in made[0] and lines
    names = {p.name for p in tmp_path.iterdir()}
    pictures = {f"{fig}-b_lenet.{kind}" for fig in ("fig3", "fig4") for kind in ("png", "svg")}
    assert names == {"training", "table1.md", "table1.json", "fig3.json", "fig4.json"} | pictures
    stored = json.loads((tmp_path / "fig3.json").read_text())
    assert stored["command"] == "branchynet reproduce fig3 --networks b_lenet" and stored["environment"]["torch"]


def test_rows_of_other_networks_are_kept_if_made_in_the_same_way(found, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "evaluate_network", lambda recipe, *args, **more: replace(found, recipe=recipe))
    monkeypatch.setattr(room, "shipped", lambda recipe: None)
    monkeypatch.setattr(room, "load_data", lambda name: None)

    def names():
        return [row["name"] for row in json.loads((tmp_path / "table1.json").read_text())["networks"]]

    reproduce("table1", tmp_path, networks="b_alexnet", samples=16)
    reproduce("table1", tmp_path, networks="b_lenet", samples=16)
    assert names() == ["b_lenet", "b_alexnet"]
    assert json.loads((tmp_path / "table1.json").read_text())["command"].endswith("--networks b_lenet,b_alexnet")
    assert (tmp_path / "table1.md").read_text().count("reported in the paper") == 2
    reproduce("table1", tmp_path, networks="b_lenet", samples=17)
    assert names() == ["b_lenet"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("table2", {}), "unknown 'table2'; give one of table1, fig3, fig4, or all"),
        (("table1", {"networks": "b_lenet,vgg"}), "unknown network 'vgg'; give one or more of b_lenet, b_alexnet"),
        (("table1", {"networks": " , "}), "no network"),
        (("fig4", {"networks": "b_lenet"}), "Figure 4 needs b_alexnet"),
    ],
)
def test_wrong_requests(tmp_path, arguments, message):
    what, more = arguments
    with pytest.raises(InputError, match=message):
        reproduce(what, tmp_path / "out", **more)
    assert not (tmp_path / "out").exists()


def test_recipes_are_fair():
    for recipe in recipes(",".join(RECIPES)):
        assert len(recipe.epochs) == len(recipe.lrs) == 2
        lrs = [recipe.optimizer(r)(zoo.lenet().parameters()).param_groups[0]["lr"] for r in recipe.lrs]
        assert lrs == list(recipe.lrs)
        title = recipe.plain_title
        assert title in recipe.title and not title.startswith("B-")
    assert recipes("all") == recipes("b_lenet,b_alexnet,b_resnet110")
    assert adam(0.5)(zoo.lenet().parameters()).defaults["lr"] == 0.5
