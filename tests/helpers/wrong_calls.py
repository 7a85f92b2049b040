"""Inputs and thresholds that every engine of `helpers.networks.two_inputs`, with three exits, refuses."""

import numpy as np
import torch

IMAGE, VECTOR = np.zeros((3, 2, 8, 8), np.float32), np.zeros((3, 5), np.float32)

WRONG_INPUTS = [
    ([], "0 inputs given.*reads 2: image: float32"),
    ([IMAGE], "1 inputs given.*reads 2"),
    ([IMAGE, VECTOR, VECTOR], "3 inputs given"),
    ([IMAGE[:, :1], VECTOR], r"'image' is float32 \(3, 1, 8, 8\).*image: float32 \(B, 2, 8, 8\)"),
    ([IMAGE, VECTOR[:, :4]], r"'vector' is float32 \(3, 4\)"),
    ([IMAGE, torch.zeros(3, 4)], r"'vector' is float32 \(3, 4\)"),
    ([IMAGE[0], VECTOR[0]], r"'image' is float32 \(2, 8, 8\)"),
    ([IMAGE, np.float32(1)], "'vector' is float32"),
    ([IMAGE.astype(np.float64), VECTOR], "'image' is float64"),
    ([IMAGE, torch.zeros(3, 5).double()], r"'vector' is float64 \(3, 5\)"),
    ([IMAGE, VECTOR.astype(np.int64)], "'vector' is int64"),
    ([IMAGE, VECTOR.astype(">f4")], "'vector' is >f4"),
    ([IMAGE, VECTOR.tolist()], "'vector' is list"),
    ([IMAGE, VECTOR[:2]], r"'image', 'vector' have batch sizes \[3, 2\]"),
    ([IMAGE[:0], VECTOR], r"batch sizes \[0, 3\]"),
]

WRONG_THRESHOLDS = [
    (given, message, rows)
    for rows in (0, 3)
    for given, message in [
        ((), "0 thresholds given for 3 exits; give 2"),
        ((0.5,), "1 thresholds"),
        ((0.5,) * 3, "3 thresholds"),
        (0.5, "must be a list; got 0.5"),
        (("low", "high"), "must be numbers.*'low'"),
        ((float("nan"), 0.5), "nan"),
    ]
    if rows or given != ()  # the policies of no samples
]
