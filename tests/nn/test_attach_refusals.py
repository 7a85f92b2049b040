"""Taps that `attach` refuses."""

import pytest
import torch
from torch import nn

from branchynet import attach
from branchynet.errors import GraphError


class Late(nn.Module):
    """`softmax` reads the output; `aux` runs after the output is computed, but does not read it."""

    def __init__(self):
        super().__init__()
        self.a, self.head, self.softmax, self.aux = nn.Linear(6, 6), nn.Linear(6, 4), nn.Softmax(1), nn.Linear(6, 6)
        self.length_first = nn.GRU(6, 6)

    def forward(self, x):
        x = torch.tanh(self.a(x))
        logits = self.head(x)
        self.length_first(x.expand(3, -1, -1))
        return {"logits": logits, "p": self.softmax(logits), "aux": self.aux(x)}


@pytest.mark.filterwarnings("ignore:.*holds more than the answer")
@pytest.mark.parametrize(
    ("tap", "message"),
    [
        ("softmax", "'softmax' runs after the backbone's output is computed"),
        ("head", "'head' runs after"),
        ("length_first", r"'length_first' has shape \(3, 2, 6\), whose first dimension is not the batch of 2.*tap="),
    ],
)
def test_taps_that_could_save_nothing_or_have_no_batch_are_refused(tap, message):
    with pytest.raises(GraphError, match=message):
        attach(Late(), [tap], example=torch.randn(5, 6))
    assert attach(Late(), ["aux"], example=torch.randn(5, 6)).num_exits == 2
