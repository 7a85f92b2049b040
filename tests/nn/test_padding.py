"""torch's transformer blocks with a padding mask, for which torch has a fast path in nested tensors."""

import numpy as np
import pytest
import torch
from torch import nn

from branchynet import Policy, attach, export, load
from branchynet.nn.calls import evaluating
from helpers.loop import entropy
from helpers.trunks import trunk

LENGTHS = torch.tensor([7, 2, 5, 7, 3, 6])


class Text(nn.Module):
    """torch's transformer blocks with a padding mask."""

    def __init__(self, block):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.block, self.f = nn.Linear(8, 8), block(), nn.Linear(8, 3)

    def forward(self, x, mask):
        y = self.first(x)
        padded = mask == 0
        if isinstance(self.block, nn.TransformerDecoder):
            y = self.block(y, y, tgt_key_padding_mask=padded, memory_key_padding_mask=padded)
        elif isinstance(self.block, nn.MultiheadAttention):
            y = self.block(y, y, y, key_padding_mask=padded)[0]
        else:
            y = self.block(y, src_key_padding_mask=padded)
        return self.f((y * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def layer():
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


BLOCKS = {
    "encoder": (lambda: nn.TransformerEncoder(layer(), 3), "block.layers.1"),
    "layer": (layer, "block.linear1"),
    "attention": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), "first"),
    "decoder": (
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 2),
        "block.layers.0",
    ),
}


@pytest.mark.parametrize("block", BLOCKS)
def test_padding_masks_reach_every_exit(block, tmp_path):
    make, tap = BLOCKS[block]
    mask = (torch.arange(7) < LENGTHS[:, None]).float()
    x = torch.randn(6, 7, 8, generator=torch.Generator().manual_seed(1))
    net = attach(Text(make), [tap], example=(x, mask), num_classes=3)
    trained = [output.detach() for output in net.train().requires_grad_(True).apply(no_dropout)(x, mask)]
    net.eval()
    with torch.no_grad():  # torch uses its fast path only under no_grad
        for got, want in zip(net(x, mask), trained, strict=True):
            torch.testing.assert_close(got, want)
    policy = Policy(thresholds=(float(np.median(entropies(trained[0]))),))
    engine = load(export(net, tmp_path / "model.onnx", policy=policy, example=(x, mask)), threads=1)
    answer = engine(x.numpy(), mask.numpy())
    assert set(answer.exit) == {1, 2}
    want = torch.stack(trained)[torch.from_numpy(answer.exit - 1), torch.arange(6)]
    torch.testing.assert_close(torch.from_numpy(answer.output), want, atol=1e-4, rtol=1e-4)
    assert torch.backends.mha.get_fastpath_enabled()


def no_dropout(module):
    if isinstance(module, nn.Dropout):
        module.p = 0.0
    if isinstance(module, nn.MultiheadAttention):
        module.dropout = 0.0


def entropies(logits):
    return [entropy(row) for row in logits.numpy()]


def test_the_fast_path_is_on_again_when_the_last_block_ends():
    net, other = trunk(), trunk()
    with evaluating(net):
        with pytest.raises(KeyError), evaluating(other):
            raise KeyError
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with evaluating(net):
            pass
        assert not torch.backends.mha.get_fastpath_enabled(), "it was off before"
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
