"""The named scores in numpy, in float64."""

import numpy as np


def softmax(z):
    """Softmax in float64, without torch."""
    p = np.exp(z.astype(np.float64) - z.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


ORACLES = {
    "entropy": lambda p: -(p * np.log(p)).sum(axis=1),
    "max_probability": lambda p: 1 - p.max(axis=1),
    "margin": lambda p: 1 - (np.sort(p, axis=1)[:, -1] - np.sort(p, axis=1)[:, -2]),
}


def agreement(outputs):
    """The score of the last of `outputs` (n, C), logits of one sample: NaN rows of earlier exits agree with nothing."""
    label, differing, probability = int(np.argmax(outputs[-1])), 0, 0.0
    for logits in outputs:
        if np.isnan(logits).any():
            differing += 1
            continue
        differing += int(np.argmax(logits)) != label
        probability += softmax(logits[None])[0, label] / len(outputs)
    return (differing + 1 - probability) / len(outputs)
