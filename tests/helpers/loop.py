"""The oracle: inference as in the paper's Figure 2, one sample and one exit at a time."""

import numpy as np
import torch

BATCHES = (0, 1, 2, 7, 64)
QUANTILES = ((0.0, 0.0, 0.0), (0.3, 0.5, 0.5), (0.75, 0.4, 0.1), (1.0, 1.0, 1.0), (0.0, 0.6, 0.9))


def entropy(logits):
    """Entropy in nats of (C,) logits; for (C, H, W), the mean over all positions."""
    if np.ndim(logits) > 1:
        positions = np.reshape(logits, (len(logits), -1)).T
        return float(np.mean([entropy(z) for z in positions]))
    z = np.asarray(logits, np.float64)
    p = np.exp(z - z.max())
    p /= p.sum()
    return float(-sum(q * np.log(q) for q in p if q > 0))


def doubt(logits):
    """1 - the largest probability of (C,) logits."""
    z = np.asarray(logits, np.float64)
    return float(1 - 1 / np.exp(z - z.max()).sum())


def figure_2(outputs, thresholds, score=entropy):
    """(exit, logits) for one sample with the exits' `outputs` (N, C); None means never."""
    for n, logits in enumerate(outputs, 1):
        if n == len(outputs):
            return n, logits
        threshold = thresholds[n - 1]
        if threshold is not None and score(logits) < threshold:
            return n, logits


@torch.no_grad()
def every_exit(net, inputs):
    """Every exit's logits (S, N, C) by the PyTorch network, one sample at a time; inputs are a tuple or a dict."""
    net.eval()
    named = inputs if isinstance(inputs, dict) else {}
    listed = () if named else inputs
    samples = len(next(iter((*listed, *named.values()))))
    rows = []
    for s in range(samples):
        exits = net(*(i[s : s + 1] for i in listed), **{k: i[s : s + 1] for k, i in named.items()})
        rows.append(np.stack([o.numpy()[0] for o in exits]))
    return np.stack(rows) if rows else np.empty((0, net.num_exits, 0), np.float32)


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


def agree(answer, outputs, thresholds, atol=1e-4):
    """An engine's exits, outputs, scores and labels agree with Figure 2 on `outputs` (S, N, C)."""
    expected = [figure_2(sample, thresholds) for sample in outputs]
    assert answer.exit.tolist() == [n for n, _ in expected]
    if expected:
        logits = np.stack([z for _, z in expected])
        np.testing.assert_allclose(answer.output, logits, atol=atol)
        np.testing.assert_allclose(answer.score, [entropy(z) for z in logits], atol=atol)
        np.testing.assert_array_equal(answer.label, answer.output.argmax(axis=1))
        top = np.sort(logits, axis=1)
        clear = top[:, -1] - top[:, -2] > 1e-4
        assert (answer.label == logits.argmax(axis=1))[clear].all()


def agree_everywhere(engine, inputs, outputs):
    """The same at many thresholds and batch sizes; every exit must answer some sample."""
    seen, exits = set(), outputs.shape[1]
    for quantiles in QUANTILES:
        thresholds = safe_thresholds(outputs, quantiles[: exits - 1])
        for batch in BATCHES:
            for start in range(0, len(outputs) - batch + 1, max(batch, 16)):
                rows = slice(start, start + batch)
                answer = engine(*(i[rows] for i in inputs), thresholds=thresholds)
                agree(answer, outputs[rows], thresholds)
                seen.update(answer.exit.tolist())
    assert seen == set(range(1, exits + 1)), "the thresholds must let every exit answer some sample"


def agree_in_batches(engine, net, inputs, thresholds):
    """The engine agrees with the naive loop at several batch sizes."""
    outputs = every_exit(net, inputs)
    left = {figure_2(sample, thresholds)[0] for sample in outputs}
    assert len(left) == outputs.shape[1], "every exit should answer some sample"
    arrays = [t.numpy() for t in (inputs.values() if isinstance(inputs, dict) else inputs)]
    for batch in (1, 7, len(outputs)):
        for start in range(0, len(outputs), batch):
            rows = slice(start, start + batch)
            agree(engine(*(a[rows] for a in arrays)), outputs[rows], thresholds, atol=1e-3)


def same(ours, theirs):
    """Two predictions are equal, including their dtypes."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
