"""Measure what exits cost, and what they save, on third-party networks.

The networks are from Hugging Face `transformers`, with random weights, and large enough that one forward takes over a
millisecond. Thresholds are quantiles of the recorded entropies, so that given shares of the samples leave at each exit;
the weights do not affect the cost.

1. Three exits from ``attach(at="auto")``: the overhead if 25/25/50 and 75/15/10 % of the samples leave, at batch 1
   (with files and static graphs for one sample) and at batch 64.
2. Two exits, the first of six evenly spread ones and the last: the speed-up over the plain network if half of each
   batch of 64 leaves at the first.
3. A network of 110 layers: the time of the export, and the size of the file relative to the plain file plus the
   branches.

    python benchmarks/experiments/architectures.py  # one more trial per network, those with the fewest trials first
    python benchmarks/experiments/architectures.py MobileNetV2   # these networks only
    python benchmarks/experiments/architectures.py --ones  # question 1 at batch 1 only, which varies most

All trials are stored and medians reported, because the caches of a shared machine differ from hour to hour.

Writes benchmarks/results/architectures.json. Needs the extra `dev` (transformers).
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
import transformers
from torch import nn

from branchynet import Policy, Target, attach, bench, export, record, zoo
from branchynet.deploy.assembly import assemble
from branchynet.environment import environment
from branchynet.files import write_json
from branchynet.graph.onnx_flat import flatten
from branchynet.graph.torch_program import tensors_of
from branchynet.nn.calls import first_rows
from branchynet.policy.record_scores import scores_of_record
from branchynet.policy.scores import entropy
from branchynet.profiling.clock import interleaved
from branchynet.profiling.onnx_parts import OnnxParts
from branchynet.profiling.parts import part_outputs

SAMPLES, REPEATS, CLASSES = 128, 8, 10
SHARES = ((0.25, 0.25, 0.5), (0.75, 0.15, 0.1))
RESULTS = Path(__file__).parents[1] / "results" / "architectures.json"


def images(rows, size=96):
    return {"pixel_values": torch.randn(rows, 3, size, size) * torch.rand(rows, 1, 1, 1) * 3}


def words(rows, length=32):
    return {
        "input_ids": torch.randint(5, 2000, (rows, length)),
        "attention_mask": torch.ones(rows, length, dtype=torch.int64),
    }


def spectrograms(rows):
    return {"input_values": torch.randn(rows, 128, 64) * torch.rand(rows, 1, 1) * 3}


TOKENS = {"hidden_size": 192, "num_hidden_layers": 8, "num_attention_heads": 3, "intermediate_size": 768}
NETWORKS = {
    "ResNet": ("ResNetForImageClassification", {"embedding_size": 32, "hidden_sizes": [32, 64, 128, 256],
               "depths": [2, 2, 2, 2], "layer_type": "basic"}, images),
    "RegNet": ("RegNetForImageClassification", {"embedding_size": 32, "hidden_sizes": [64, 128, 256, 512],
               "depths": [2, 4, 8, 2], "groups_width": 32}, images),
    "ConvNeXt": ("ConvNextForImageClassification", {"hidden_sizes": [48, 96, 192, 384], "depths": [2, 2, 6, 2]},
                 images),
    "MobileNetV2": ("MobileNetV2ForImageClassification", {"image_size": 96}, images),
    "EfficientNet": ("EfficientNetForImageClassification", {"width_coefficient": 1.0, "depth_coefficient": 1.0,
                     "image_size": 96, "hidden_dim": 1280}, images),
    "ViT": ("ViTForImageClassification", {**TOKENS, "image_size": 96, "patch_size": 8}, images),
    "Swin": ("SwinForImageClassification", {"image_size": 96, "patch_size": 4, "embed_dim": 48, "depths": [2, 4],
             "num_heads": [3, 6], "window_size": 6}, images),
    "SegFormer": ("SegformerForImageClassification", {}, images),
    "BERT": ("BertForSequenceClassification", {**TOKENS, "vocab_size": 2000}, words),
    "DistilBERT": ("DistilBertForSequenceClassification", {"dim": 192, "n_layers": 6, "n_heads": 3, "hidden_dim": 768,
                   "vocab_size": 2000}, words),
    "AST": ("ASTForAudioClassification", {**TOKENS, "patch_size": 16, "frequency_stride": 16, "time_stride": 16,
            "max_length": 128, "num_mel_bins": 64}, spectrograms),
}  # fmt: skip


@torch.no_grad()
def backbone(name):
    """The network with new weights and batch statistics, because all inputs look the same to the initial ones."""
    kind, settings, inputs = NETWORKS[name]
    model = getattr(transformers, kind)
    torch.manual_seed(0)
    net = model(model.config_class(num_labels=CLASSES, **settings)).eval()
    for module in net.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            module.momentum = 1.0
            module.train()
    net(**inputs(16))
    return net.eval()


@torch.no_grad()
def calmed(net, inputs):
    """Scale the branches so that logits, and therefore entropies, differ between samples by about 1."""
    for branch, logits in zip(net.branches, net(**first_rows(inputs, 64)), strict=False):
        last = [m for m in branch.modules() if isinstance(m, nn.Linear)][-1]
        mean = logits.mean(dim=0)
        spread = (logits - mean).std()
        last.weight /= spread
        last.bias.sub_(mean).div_(spread)
    return net


def thresholds_for(net, inputs, shares):
    """Thresholds at which `shares` of the samples leave: quantiles of the entropies of the remaining samples."""
    rows = len(next(iter(inputs.values())))
    blocks = [({k: v[i : i + 64] for k, v in inputs.items()}, torch.zeros(64, dtype=torch.int64))
              for i in range(0, rows, 64)]  # fmt: skip
    scores = scores_of_record(record(net, blocks, progress=False))
    thresholds, here = [], np.ones(rows, bool)
    for n, share in enumerate(shares[:-1]):
        among = np.sort(scores[here, n])
        cut = round(share * rows)
        thresholds.append(float(among[cut - 1 : cut + 1].mean()))
        here &= scores[:, n] >= thresholds[-1]
    return tuple(thresholds)


def timed(net, inputs, thresholds, batches, name):
    """Rows of `bench`; for batch 1, of a file exported for one sample. The labels do not matter."""
    nothing, rows = torch.zeros(SAMPLES, dtype=torch.int64), []
    with tempfile.TemporaryDirectory() as folder:
        for batch in batches:
            path = export(net, Path(folder) / "model.onnx", policy=Policy(thresholds=thresholds),
                          example=first_rows(inputs, 8), free="none" if batch == 1 else "batch")  # fmt: skip
            rows += bench(path, net, (inputs, nothing), Target(batch), about={"network": name},
                          samples=SAMPLES, repeats=REPEATS)  # fmt: skip
    keep = ("batch", "plain_us", "branchy_us", "limit_us", "limit_in_order_us", "speedup", "overhead",
            "overhead_sorted", "exit_share")  # fmt: skip
    return [{key: row[key] for key in keep} for row in rows]


def first_share(net, inputs):
    """The cost of the first exit as a share of the whole, at batch 64."""
    parts = OnnxParts(flatten(net, first_rows(inputs), score=entropy))
    arrays = [t.numpy()[:64] for t in tensors_of(inputs)]
    with parts.opened(part_outputs(parts, alone=False), Target()) as opened:
        calls = [lambda call=opened[k]: call(*arrays) for k in ("upto_1", "plain")]
        first, whole = interleaved(calls, 10, rounds=20)
    return first / whole


def measured(name, ones):
    """One trial of a network; with `ones`, at batch 1 only."""
    torch.manual_seed(1)
    inputs = NETWORKS[name][2](SAMPLES)
    example = first_rows(inputs, 8)
    net = calmed(attach(backbone(name), "auto", num_exits=3, example=example).eval(), inputs)
    batches = (1,) if ones else (1, 64)
    shares = [
        {"shares": shares, "rows": timed(net, inputs, thresholds_for(net, inputs, shares), batches, name)}
        for shares in SHARES
    ]
    if ones:
        return {"three": shares}
    first = attach(backbone(name), "auto", num_exits=6, example=example).taps[0]
    two = calmed(attach(backbone(name), [first], example=example).eval(), inputs)
    (half,) = timed(two, inputs, thresholds_for(two, inputs, (0.5, 0.5)), (64,), name)
    return {"three": shares, "half": {"tap": first, "cost_share": first_share(two, inputs), **half}}


def deep():
    """Export ResNet-110 with two branches: seconds, and bytes of the file and of the plain file plus the branches."""
    torch.manual_seed(0)
    example = torch.rand(8, 3, 32, 32)
    net = attach(zoo.resnet(110), "auto", num_exits=3, example=example).eval()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        path = export(net, Path(folder) / "model.onnx", policy=Policy(thresholds=(0.1, 0.1)), example=example)
        seconds, nested = time.perf_counter() - start, path.stat().st_size
        plain = Path(folder) / "plain.onnx"
        ir.save(assemble(flatten(net.backbone, example), None, outputs=["output_1"]), plain)
        branches = sum(t.numel() * t.element_size() for t in net.branches.state_dict().values())
        alone = plain.stat().st_size + branches
    return {"network": "ResNet-110", "export_seconds": seconds, "bytes": nested, "plain_plus_branches_bytes": alone}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"by default all: {', '.join(NETWORKS)}")
    parser.add_argument("--ones", action="store_true", help="three exits at batch 1 alone")
    options = parser.parse_args()
    if unknown := set(options.networks) - NETWORKS.keys():
        parser.error(f"unknown networks {', '.join(sorted(unknown))}; take some of {', '.join(NETWORKS)}")
    torch.set_num_threads(1)
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    trials = {name: [] for name in NETWORKS} | {n["network"]: n["trials"] for n in found.get("networks", ())}
    for name in sorted(options.networks or NETWORKS, key=lambda name: len(trials[name])):
        trials[name].append(measured(name, options.ones))
        print(name, json.dumps(trials[name][-1]), flush=True)
        result = {
            "command": "python benchmarks/experiments/architectures.py",
            "environment": environment(),
            "samples": SAMPLES,
            "networks": [{"network": n, "trials": kept} for n, kept in trials.items()],
            "deep": found.get("deep"),
        }
        write_json(RESULTS, result)
    if not found.get("deep"):
        write_json(RESULTS, {**result, "deep": deep()})


if __name__ == "__main__":
    main()
