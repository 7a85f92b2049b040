"""A small transformer for text that every installation has: which package is a snippet of source code from?

A sample is 128 bytes from a Python file of one of ten packages. Whole files are held out for validation and test. Used
by design.py.
"""

import hashlib
import importlib.util
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from branchynet.reproduce.recipes import COSINE, adam
from branchynet.training.loop import fit
from branchynet.training.options import FitOptions

PACKAGES = ("matplotlib", "networkx", "numpy", "onnx", "rich", "scipy", "sklearn", "sympy", "torch", "transformers")
LENGTH = 128
SNIPPETS = {"train": 15000, "val": 500, "test": 500}  # of each package


def part_of(path):
    """The part of a file, from its name: one file in ten for validation, one for test."""
    return {0: "val", 1: "test"}.get(hashlib.sha256(str(path).encode()).digest()[0] % 10, "train")


def snippets(seed=0):
    """``{part: (bytes (S, 128) int64, package (S,) int64)}``, with equally many of each package."""
    generator = np.random.default_rng(seed)
    texts = {part: ([], []) for part in SNIPPETS}
    for label, package in enumerate(PACKAGES):
        root = Path(importlib.util.find_spec(package).origin).parent
        files = {part: [] for part in SNIPPETS}
        for path in sorted(root.rglob("*.py")):
            content = path.read_bytes()
            if len(content) > 2 * LENGTH:
                files[part_of(path.relative_to(root.parent))].append(np.frombuffer(content, np.uint8))
        for part, count in SNIPPETS.items():
            sizes = np.array([len(content) for content in files[part]], np.float64)
            for n in generator.choice(len(sizes), count, p=sizes / sizes.sum()):
                start = generator.integers(len(files[part][n]) - LENGTH)
                texts[part][0].append(files[part][n][start : start + LENGTH])
                texts[part][1].append(label)
    return {
        part: (torch.from_numpy(np.stack(rows)).long(), torch.tensor(labels)) for part, (rows, labels) in texts.items()
    }


class Block(nn.Module):
    """Self-attention and a feed-forward part, each on normed input and added to it: `(B, L, D)` -> `(B, L, D)`."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.narrow(nn.functional.gelu(self.wide(self.norm2(x))))


class Coder(nn.Module):
    """Bytes `(B, 128)` int64 in groups of four through transformer blocks: logits `(B, 10)`."""

    def __init__(self, blocks=6, width=96, heads=4, group=4):
        super().__init__()
        self.embed = nn.Embedding(256, 32)
        self.group = nn.Linear(32 * group, width)
        self.place = nn.Parameter(torch.randn(LENGTH // group, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, len(PACKAGES))
        self.grouped = group

    def forward(self, text):
        x = self.embed(text).unflatten(1, (-1, self.grouped)).flatten(2)
        x = self.group(x) + self.place
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.norm(x).mean(dim=1))


class Text:
    """The task for design.py: 3 epochs from nothing, then 2 with exits or without; `make` builds the network."""

    name, slack, channels_last = "text", (0.0,), False
    epochs, rate, batch = (3, 2), 1e-3, 128

    def __init__(self, folder, precision, seed=0, make=Coder):
        self.folder, self.precision, self.seed, self.make = folder, precision, seed, make

    @cached_property
    def parts(self):
        return {part: TensorDataset(*tensors) for part, tensors in snippets().items()}

    def loader(self, part):
        return DataLoader(self.parts[part], self.batch if part == "train" else 500, shuffle=part == "train")

    def test(self):
        return self.parts["test"].tensors

    def example(self):
        return self.parts["val"].tensors[0][:8]

    def baseline(self):
        torch.manual_seed(self.seed)
        return self._fit(self.make(), 0, "baseline")

    def continued(self):
        return self._fit(self.baseline(), 1, "continued")

    def with_exits(self, add, run):
        baseline = self.baseline()
        torch.manual_seed(self.seed)
        return self._fit(add(baseline), 1, run)

    def published(self):
        """The paper has no transformer."""
        return None

    def _fit(self, net, part, run):
        fit(
            net, self.loader("train"), self.loader("val"), epochs=self.epochs[part], optimizer=adam(self.rate),
            run=self.folder / run,
            options=FitOptions(seed=self.seed + 100 * part, mixed_precision=self.precision, schedule=COSINE),
        )  # fmt: skip
        return net
