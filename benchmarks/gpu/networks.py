"""ResNet-50, ViT-S/16 and BERT-base from configurations of `transformers`, with random weights and two branches."""

import torch
import transformers
from torch import nn

from branchynet import attach

CLASSES = 1000


def resnet50(tiny):
    small = {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "embedding_size": 8} if tiny else {}
    net = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=CLASSES, **small))
    return net, ["resnet.encoder.stages.0", "resnet.encoder.stages.1"], pixels(32 if tiny else 224)


def vit_s(tiny):
    size = 32 if tiny else 224
    layers, width, heads = (3, 16, 2) if tiny else (12, 384, 6)
    config = transformers.ViTConfig(
        image_size=size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        num_labels=CLASSES,
    )
    net = transformers.ViTForImageClassification(config)
    return net, quarters(net, layers), pixels(size)


def bert_base(tiny):
    layers, width, heads = (3, 16, 2) if tiny else (12, 768, 12)
    config = transformers.BertConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        num_labels=CLASSES,
    )
    net = transformers.BertForSequenceClassification(config)
    length = 8 if tiny else 128

    def tokens(rows, generator):
        return torch.randint(1000, 30000, (rows, length), generator=generator)

    return net, quarters(net, layers), tokens


NETWORKS = {"ResNet-50": resnet50, "ViT-S/16": vit_s, "BERT-base": bert_base}


def pixels(size):
    def images(rows, generator):
        return torch.randn(rows, 3, size, size, generator=generator)

    return images


def quarters(net, layers):
    """The names of the layers after a quarter and a half of the layers."""
    lists = [name for name, one in net.named_modules() if isinstance(one, nn.ModuleList) and len(one) == layers]
    return [f"{lists[0]}.{max(0, layers // 4 - 1)}", f"{lists[0]}.{layers // 2 - (layers > 3)}"]


def branch(features, classes):
    """A normalized mean over the positions, and a linear layer."""
    if features.dim() == 4:
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features.shape[1], classes))
    return nn.Sequential(Mean(), nn.LayerNorm(features.shape[2]), nn.Linear(features.shape[2], classes))


class Mean(nn.Module):
    """The mean over the tokens."""

    def forward(self, x):
        return x.mean(1)


class UpTo(nn.Module):
    """All exits up to one, without decisions; the output is that of the last of them."""

    def __init__(self, net, exit):
        super().__init__()
        self.net, self.exit = net, exit

    def forward(self, x):
        *earlier, output = self.net(x)[: self.exit]
        return output + sum(0 * one for one in earlier)


@torch.no_grad()
def built(name, device, *, tiny=False, seed=0):
    """Return the network with branches in eval mode, and a function of the number of rows that returns inputs."""
    torch.manual_seed(seed)
    backbone, at, draw = NETWORKS[name](tiny)
    generator = torch.Generator().manual_seed(seed)
    x = draw(16, generator)
    net = attach(backbone, at, example=x[:2], branch=branch).to(device)
    layout = torch.channels_last if x.dim() == 4 else torch.preserve_format
    net.to(memory_format=layout)

    def inputs(rows):
        return draw(rows, generator).to(device, memory_format=layout)

    x = inputs(32)
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = None  # the mean over all batches: random weights need statistics of their own
    net.train(bool(norms))(x)
    net.eval()
    for n, output in enumerate(net(x)):
        head = [m for m in (*net.branches, backbone)[n].modules() if isinstance(m, nn.Linear)][-1]
        gain = 1.5 / output.std(0).mean()
        head.bias.copy_((head.bias - output.mean(0)) * gain)
        head.weight.mul_(gain)
    return net, inputs
