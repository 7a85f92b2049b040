"""The oracle: inference as the paper's Figure 2 writes it, one sample and one exit at a time, with nothing clever."""

import numpy as np
import torch


def entropy(logits):
    """Of (C,) logits in nats; of (C, H, W) the mean over all positions."""
    if np.ndim(logits) > 1:
        positions = np.reshape(logits, (len(logits), -1)).T
        return float(np.mean([entropy(z) for z in positions]))
    z = np.asarray(logits, np.float64)
    p = np.exp(z - z.max())
    p /= p.sum()
    return float(-sum(q * np.log(q) for q in p if q > 0))


def figure_2(outputs, thresholds):
    """(exit, logits) for one sample whose exits gave `outputs` (N, C); None never leaves."""
    for n, logits in enumerate(outputs, 1):
        if n == len(outputs):
            return n, logits
        threshold = thresholds[n - 1]
        if threshold is not None and entropy(logits) < threshold:
            return n, logits


@torch.no_grad()
def every_exit(net, inputs):
    """Every exit's logits (S, N, C) from the PyTorch network, each sample run by itself; inputs a tuple or a dict."""
    net.eval()
    named = inputs if isinstance(inputs, dict) else {}
    listed = () if named else inputs
    samples = len(next(iter((*listed, *named.values()))))
    rows = []
    for s in range(samples):
        exits = net(*(i[s : s + 1] for i in listed), **{k: i[s : s + 1] for k, i in named.items()})
        rows.append(np.stack([o.numpy()[0] for o in exits]))
    return np.stack(rows) if rows else np.empty((0, net.exits, 0), np.float32)


def safe_thresholds(outputs, quantiles, gap=1e-4):
    """Thresholds near the quantiles of the recorded entropies, each midway in a gap wider than `gap`."""
    thresholds = []
    for n, quantile in enumerate(quantiles):
        scores = np.sort([entropy(sample[n]) for sample in outputs])
        edges = np.concatenate([[scores[0] - 1], scores, [scores[-1] + 1]])
        wide = np.flatnonzero(np.diff(edges) > gap)
        nearest = wide[np.abs(wide - quantile * len(scores)).argmin()]
        thresholds.append(float((edges[nearest] + edges[nearest + 1]) / 2))
    return tuple(thresholds)
