"""A free length ends where the network's lookups leave their tables."""

import pytest
import torch
from torch import nn

from branchynet import Policy, attach, export, load
from branchynet.errors import InputError, RunError
from branchynet.graph.free_program import free_program
from helpers.transformers_models import SEQUENCES

ROWS = 24  # of each table of positions
PAD = 1


class Words(nn.Module):
    """Embeds tokens and their positions, as `positions` computes them from the ids."""

    def __init__(self, positions):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places, self.fc = nn.Embedding(50, 4, PAD), nn.Embedding(ROWS, 4), nn.Linear(4, 3)
        self.positions = positions

    def forward(self, ids):
        return self.fc((self.words(ids) + self.places(self.positions(ids))).mean(1))


def plain(ids):
    return torch.arange(ids.shape[1])


def after_padding(ids):
    """As RoBERTa: padding has the position `PAD`, the others follow."""
    real = ids.ne(PAD).long()
    return real.cumsum(1) * real + PAD


def every_second(ids):
    return 2 * torch.arange(ids.shape[1]) + 3


def clamped(ids):
    """As the buckets of relative distances: far ones share the last row."""
    return torch.arange(ids.shape[1]).clamp(max=ROWS - 1)


def from_values(ids):
    return ids.clamp(max=ROWS - 1)


def tokens(rows, length):
    ids = torch.randint(2, 50, (rows, length))
    ids[1::2, length // 2 :] = PAD
    return ids


def takes(net, length):
    try:
        net(tokens(3, length))
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("positions", [plain, after_padding, every_second, clamped, from_values])
@pytest.mark.parametrize("example", [2, 7, 10])
def test_the_largest_length_is_the_largest_that_the_network_takes(positions, example):
    net = Words(positions).eval()
    (length,) = free_program(net, tokens(4, example), score=None, free={"ids": {1: "n"}})[2]
    taken = [n for n in range(2, 4 * ROWS) if takes(net, n)]
    assert length.least == taken[0]
    assert length.most == (None if taken[-1] == 4 * ROWS - 1 else taken[-1])


def test_a_network_at_its_limit_is_not_made_shorter():
    net = Words(plain).eval()
    (length,) = free_program(net, tokens(4, ROWS), score=None, free={"ids": {1: "n"}})[2]
    assert length.most == ROWS


@pytest.mark.heavy
def test_a_file_of_roberta_refuses_what_its_table_does_not_hold(tmp_path):
    case = next(case for case in SEQUENCES if case.model == "RobertaForSequenceClassification")
    inputs = {"input_ids": torch.randint(5, 50, (4, 9)), "attention_mask": torch.ones(4, 9, dtype=torch.int64)}
    backbone = case.backbone()
    net = attach(backbone, case.at, example=inputs).eval()
    free = {name: {1: "length"} for name in inputs}
    path = export(
        net, tmp_path / "net.onnx", policy=Policy(thresholds=(0.5,) * len(case.at)), example=inputs, free=free
    )
    engine = load(path, threads=1)
    most = backbone.config.max_position_embeddings - backbone.config.pad_token_id - 1
    engine(**{name: torch.ones(2, most, dtype=torch.int64) for name in inputs})
    with pytest.raises(InputError, match=rf"the length of 'input_ids' is {most + 1}; this file takes 2 to {most}"):
        engine(**{name: torch.ones(2, most + 1, dtype=torch.int64) for name in inputs})


@pytest.mark.parametrize("layout", ["nested", "stages"])
def test_an_index_beyond_a_table_is_an_error_of_ours(tmp_path, layout):
    net = attach(Words(after_padding), {"words": nn.Sequential(nn.Flatten(), nn.LazyLinear(3))}, example=tokens(4, 7))
    how = {"policy": Policy(thresholds=(0.5,)), "example": tokens(4, 7), "layout": layout}
    engine = load(export(net.eval(), tmp_path / "net", **how), threads=1)
    wrong = tokens(4, 7)
    wrong[2, 3] = 50
    with pytest.raises(RunError, match=r"fails with ids int64 \(4, 7\) .*50.*an index beyond an embedding table"):
        engine(wrong)
    if layout == "stages":
        with pytest.raises(RunError, match="an index beyond an embedding table"):
            next(iter(engine.stream(wrong)))
        with pytest.raises(RunError, match="an index beyond an embedding table"):
            engine.stage(1).run({"ids": wrong.numpy()})
