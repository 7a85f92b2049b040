import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from branchynet.errors import InputError
from branchynet.losses import iou_error, pixel_error


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    classes=st.integers(1, 20),  # beyond 16 pairs of classes outgrow uint8
    positions=st.integers(1, 9),
    ignore=st.sampled_from([-100, 255, 0]),
    dtype=st.sampled_from([torch.int64, torch.int32, torch.uint8]),
    seed=st.integers(0, 999),
)
def test_dense_losses_against_counting(batch, classes, positions, ignore, dtype, seed):
    rng = np.random.default_rng(seed)
    ignore = 255 if dtype is torch.uint8 and ignore < 0 else ignore
    output = rng.normal(size=(batch, classes, positions, 2))
    target = rng.integers(classes, size=(batch, positions, 2))
    target[rng.random(target.shape) < 0.3] = ignore
    wrong, without = [], []
    for answer, label in zip(output.argmax(axis=1), target, strict=True):
        counted = label != ignore
        answer, label = answer[counted], label[counted]
        wrong.append((answer != label).mean() if counted.any() else 0)
        ious = [
            ((answer == c) & (label == c)).sum() / ((answer == c) | (label == c)).sum()
            for c in range(classes)
            if ((answer == c) | (label == c)).any()
        ]
        without.append(1 - np.mean(ious) if ious else 0)
    given = torch.tensor(output), torch.tensor(target).to(dtype), ignore
    assert pixel_error(*given).tolist() == pytest.approx(wrong, abs=1e-6)
    assert iou_error(*given).tolist() == pytest.approx(without, abs=1e-6)


@pytest.mark.parametrize("loss", [pixel_error, iou_error])
def test_dense_losses_refuse_what_does_not_fit(loss):
    output = torch.zeros(2, 3, 4, 4)
    for target in (torch.zeros(2, 4, 4), torch.zeros(2, 3, 4, 4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)):
        with pytest.raises(InputError, match=r"outputs \(2, 3, 4, 4\) need integer targets"):
            loss(output, target)


def test_iou_refuses_a_class_that_is_none():
    with pytest.raises(InputError, match=r"0\.\.2 .*ignore_index=-100"):
        iou_error(torch.zeros(1, 3, 2, 2), torch.full((1, 2, 2), 255))
