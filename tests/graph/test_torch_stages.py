"""The cut of torch.export graphs: the computation of each stage, the values that cross, and refused networks."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule

from branchynet import Policy
from branchynet.graph import torch_stages
from branchynet.graph.torch_flat import name_of, torch_flatten
from branchynet.graph.torch_stages import StageInput, cut_stages
from helpers.changeable_trunk import example, trunk
from helpers.networks import FAMILIES, build, draw

LIGHT = {"expand", "reshape", "permute", "transpose", "mul", "arange", "unsqueeze"}  # may be recomputed
ONE = Policy(thresholds=(1.0,))


def calls(module):
    return [node for node in module.graph.nodes if node.op == "call_function"]


@torch.inference_mode()
def run(cut, inputs, rows):
    """The last stage's output for `rows` of a batch, if all other samples leave at the first exit."""
    held = dict(zip(cut.inputs, inputs, strict=True))
    batch = len(inputs[0])
    for n, stage in enumerate(cut.stages):
        if n == 1:
            axes = {t.name: t.axis for later in cut.stages[1:] for t in later.takes}
            held = {k: v if axes.get(k) is None else v.index_select(axes[k], rows) for k, v in held.items()}
            batch = len(rows)
        output, score, *given = stage.module(batch, *(held[t.name] for t in stage.takes))
        held.update(zip(stage.gives, given, strict=True))
        assert score.shape == (batch,) and score.dtype == output.dtype == torch.float32
    return output


def check_last(net, cut, x):
    """The last exit's output is right for all rows, some rows, and one row."""
    with torch.no_grad():
        want = torch.cat([net(x[r : r + 1])[-1] for r in range(len(x))])
    for rows in ([*range(len(x))], [4, 1], [2]):
        torch.testing.assert_close(run(cut, (x,), torch.tensor(rows)), want[rows])


@functools.cache
def cut_of(family):
    """(net, example, its cut, the flat graph)."""
    net, inputs = build(family, 0)
    graphs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_stages, "torch_flatten", lambda *args: graphs.append(torch_flatten(*args)) or graphs[0])
        cut = cut_stages(net, inputs, Policy(thresholds=(1.0,) * (net.num_exits - 1)))
    return net, inputs, cut, graphs[0]


# The rule


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_every_node_is_in_the_first_stage_whose_exit_needs_it(family):
    _, _, cut, flat = cut_of(family)

    @functools.cache
    def ancestors(node):
        return frozenset([node]).union(*(ancestors(n) for n in node.all_input_nodes))

    wanted = {}
    for n, ends in reversed(list(enumerate(zip(flat.outputs, flat.scores, strict=True)))):
        wanted.update(dict.fromkeys(ancestors(ends[0]) | ancestors(ends[1]), n))
    wanted = {node.name: n for node, n in wanted.items() if node.op == "call_function" and name_of(node) != "sym_size"}
    ran = {}
    for n, stage in enumerate(cut.stages):
        assert isinstance(stage.module, GraphModule) and stage.exit == n + 1
        for node in calls(stage.module):
            if name_of(node) == "getitem" and wanted[node.name] != n:
                assert node.all_input_nodes[0] in calls(stage.module)
            elif wanted[node.name] != n:
                assert name_of(node) in LIGHT and wanted[node.name] < n
                continue
            assert ran.setdefault(node.name, n) == n
    assert ran.keys() == wanted.keys(), "each runs once"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_stages_read_only_what_earlier_ones_give(family):
    _, _, cut, _ = cut_of(family)
    known = set(cut.inputs)
    for stage in cut.stages:
        assert {t.name for t in stage.takes} <= known
        assert [n.target for n in stage.module.graph.nodes if n.op == "placeholder"][1:] == [
            t.name for t in stage.takes
        ]
        known.update(stage.gives)
    assert not cut.stages[-1].gives


def test_an_exit_left_out_takes_its_branch_with_it():
    net, inputs, whole, _ = cut_of(FAMILIES[3])
    cut = cut_stages(net, inputs, Policy(thresholds=(None, 1.0)))
    assert [stage.exit for stage in cut.stages] == [2, 3]
    weights = {id(p) for stage in cut.stages for p in stage.module.parameters()}
    assert weights == {id(p) for p in net.parameters()} - {id(p) for p in net.branches[0].parameters()}
    assert sum(len(calls(s.module)) for s in cut.stages) < sum(len(calls(s.module)) for s in whole.stages) - 5


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_weights_are_shared(family):
    net, _, cut, _ = cut_of(family)
    own = {id(tensor) for tensor in (*net.parameters(), *net.buffers())}
    for stage in cut.stages:
        for tensor in (*stage.module.parameters(), *stage.module.buffers()):
            assert id(tensor) in own


# Values that cross


def test_batch_leading_values_are_picked_and_constants_pass():
    position = nn.Parameter(torch.randn(8))

    def seen(self, h):
        self.kept = (position * 2).cos()
        return h + self.kept

    net = trunk(seen, lambda self, h, value: value * self.kept)
    cut = cut_stages(net, example(), ONE)
    assert sorted((t.axis is None, name) for t in cut.stages[1].takes for name in [t.name.split("_")[0]]) == [
        (False, "add"),
        (True, "cos"),
    ]
    check_last(net, cut, example())


def test_sizes_are_read_off_the_smaller_batch():
    net = trunk(
        lambda self, h: h.view(h.shape[0], 2, 4).transpose(1, 2).reshape(h.shape[0] * 4, 2).view(-1, 4, 2),
        lambda self, h, value: value.reshape(h.shape[0], 8) + torch.arange(h.shape[0])[:, None].float() * 0,
    )
    cut = cut_stages(net, example(), ONE)
    assert "sym_size" not in {name_of(n) for stage in cut.stages for n in calls(stage.module)}
    assert all("rows" in stage.module.code for stage in cut.stages)
    check_last(net, cut, example())


def test_a_batch_that_does_not_lead_is_picked_where_it_stands():
    net = trunk(
        lambda self, h: self.lstm(h.view(-1, 4, 2).transpose(0, 1))[0],
        lambda self, h, value: torch.cat([value.sum(2), value.amax(2)]).T,
        read=lambda h: h.sum((0, 2))[:, None],
    )
    cut = cut_stages(net, example(), ONE)
    assert [t.axis for t in cut.stages[1].takes] == [1]
    check_last(net, cut, example())


def test_cheap_values_without_a_batch_dimension_are_computed_again():
    net = trunk(
        lambda self, h: torch.tanh(h.reshape(-1, 4)),
        lambda self, h, value: value.reshape(-1, 2, 4).flip(2).flatten(1),  # not as the branch reads it
        read=lambda h: h.reshape(-1, 8).sum(1, keepdim=True) * 2,
    )
    cut = cut_stages(net, example(), ONE)
    assert {"reshape", "tanh"} <= {name_of(n) for n in calls(cut.stages[1].module)}
    assert [t.name for t in cut.stages[1].takes] == ["linear"]
    check_last(net, cut, example())


def test_repeated_values_are_repeated_again_not_picked():
    net = trunk(
        lambda self, h: h[:, None].expand(-1, 5, -1), lambda self, h, value: value.mean(1), read=lambda h: h[:, :, 0]
        .sum(1, keepdim=True),
    )  # fmt: skip
    cut = cut_stages(net, example(), ONE)
    assert "expand" in {name_of(n) for n in calls(cut.stages[1].module)}
    check_last(net, cut, example())


def test_parts_of_one_value_are_taken_apart_where_it_is_made():
    net = trunk(lambda self, h: h.topk(4).values, lambda self, h, value: h.gather(1, h.topk(4).indices.repeat(1, 2)))
    cut = cut_stages(net, example(), ONE)
    assert "topk" not in {name_of(n) for n in calls(cut.stages[1].module)}, "merged with the one of the first stage"
    assert len(cut.stages[1].takes) == 2
    check_last(net, cut, example())


def test_picked_rows_of_a_transposed_view_can_be_viewed():
    # On the whole batch the view needs no copy, and is exported as a view; picked rows have another memory layout.
    net = trunk(
        lambda self, h: h.view(-1, 2, 4).transpose(1, 2) + 1,
        lambda self, h, value: value.transpose(1, 2).reshape(-1, 8),
    )
    cut = cut_stages(net, example(), ONE)
    check_last(net, cut, example())


def test_what_trunk_and_branch_repeat_is_done_once():
    def pooled(self, h):
        return F.max_pool1d(torch.relu(h)[:, None], 2)

    net = trunk(None, lambda self, h, value: pooled(self, h).flatten(1).repeat(1, 2))
    net.branches[0].read = lambda h: pooled(None, h).sum(2)
    cut = cut_stages(net, example(), ONE)
    names = [name_of(n) for stage in cut.stages for n in calls(stage.module)]
    assert names.count("relu") == 2, "one shared, one behind the second layer"
    (taken,) = cut.stages[1].takes
    assert taken.name.startswith(("max_pool", "getitem", "squeeze", "flatten", "reshape", "unsqueeze"))
    check_last(net, cut, example())


def test_equal_numbers_of_different_types_are_not_merged():
    net = trunk(lambda self, h: h + (h * 9).long() * 1.0, lambda self, h, value: value * ((h * 9).long() * 1 & 3))
    cut = cut_stages(net, example(), ONE)
    check_last(net, cut, example())


def test_copies_are_dropped():
    net = trunk(lambda self, h: F.dropout(h.clone(), 0.5, self.training), lambda self, h, value: value.clone() * 2)
    cut = cut_stages(net, example(), ONE)
    assert "clone" not in {name_of(n) for stage in cut.stages for n in calls(stage.module)}
    check_last(net, cut, example())


def test_constants_need_not_be_parameters():
    def then(self, h, value):
        with torch.autocast("cpu", enabled=False):
            return h * self.plain + torch.tensor([1.0, 2.0] * 4) + self.a.weight[:, 0]

    net = trunk(None, then)
    net.backbone.b.weight = nn.Parameter(torch.randn(8, 8))
    net.backbone.c.bias = net.branches[0].fc.bias  # tied
    check_last(net, cut_stages(net, example(), ONE), example())


def test_overwriting_in_place_is_undone():
    def then(self, h, value):
        h[:, 0] = 0
        return h.mul_(2).relu_()

    net = trunk(None, then)
    net.backbone.relu = nn.ReLU(inplace=True)  # the branch gets a copy
    check_last(net, cut_stages(net, example(), ONE), example())


def test_attention_is_not_taken_for_random():
    net = trunk(None, lambda self, h, value: F.scaled_dot_product_attention(*[h.view(-1, 1, 2, 4)] * 3).flatten(1))
    check_last(net, cut_stages(net, example(), ONE), example())


# Other kinds of networks


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        h = torch.relu(self.a(x))
        return self.b(h), self.d(torch.relu(self.c(h)))


def test_a_network_with_exits_of_its_own():
    net = Several().eval()
    cut = cut_stages(net, example(), ONE)
    assert [stage.exit for stage in cut.stages] == [1, 2] and cut.stages[1].takes == (StageInput("relu", 0),)
    assert {id(p) for s in cut.stages for p in s.module.parameters()} == {id(p) for p in net.parameters()}
    check_last(net, cut, example())


def test_a_network_with_one_exit_is_one_stage():
    cut = cut_stages(nn.Sequential(nn.Linear(6, 4)), example(1), Policy())
    assert len(cut.stages) == 1 and cut.output_shape == (4,) and cut.arguments == ("input",)


def test_inputs_keep_their_own_names_and_modes_their_state():
    net, inputs, cut, _ = cut_of(FAMILIES[3])
    assert cut.arguments == ("image", "vector")
    named = cut_stages(net.train(), dict(zip(("image", "vector"), inputs, strict=True)), Policy(thresholds=(1.0, 1.0)))
    assert named.arguments == ("image", "vector") and net.training
    net.eval()
    assert [s.takes for s in named.stages] == [s.takes for s in cut.stages]


def test_drawn_inputs_agree_with_the_network_at_every_exit():
    net, inputs, cut, _ = cut_of(FAMILIES[4])
    x = draw(inputs, 5, 3)
    with torch.no_grad():
        torch.testing.assert_close(run(cut, x, torch.arange(5)), net(*x)[-1])
