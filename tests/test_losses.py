import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from branchynet.errors import InputError
from branchynet.losses import iou_error, joint_loss, pixel_error
from helpers.training_runs import CLASSES


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


logits = st.integers(0, 2**32 - 1).map(np.random.default_rng)


@settings(max_examples=50, deadline=None)
@given(
    rng=logits,
    exits=st.integers(1, 4),
    batch=st.integers(1, 5),
    classes=st.integers(2, 6),
    distill=st.sampled_from([0.0, 0.7]),
)
def test_joint_loss_is_the_weighted_sum_of_the_exits(rng, exits, batch, classes, distill):
    outputs, target = rng.normal(scale=3, size=(exits, batch, classes)), rng.integers(classes, size=batch)
    weights = rng.uniform(0.1, 2, exits)
    log_p = outputs - np.log(np.exp(outputs).sum(axis=2, keepdims=True))
    parts = -log_p[:, np.arange(batch), target].mean(axis=1)
    parts[:-1] += distill * (np.exp(log_p[-1]) * (log_p[-1] - log_p[:-1])).sum(axis=2).mean(axis=1)
    tensors = tuple(torch.tensor(o, requires_grad=True) for o in outputs)
    joint = joint_loss(tensors, torch.tensor(target), weights, distill=distill)
    assert joint.item() == pytest.approx(float(weights @ parts), rel=1e-9)
    joint.backward()
    # The last exit gets no gradient from distillation.
    onehot = np.eye(classes)[target]
    np.testing.assert_allclose(tensors[-1].grad, weights[-1] * (np.exp(log_p[-1]) - onehot) / batch, atol=1e-12)


def test_joint_loss_has_equal_weights_by_default_and_takes_one_tensor():
    outputs, target = tuple(torch.randn(3, 5, CLASSES)), torch.arange(5) % CLASSES
    assert torch.equal(joint_loss(outputs, target), joint_loss(outputs, target, [1, 1, 1]))
    assert torch.equal(joint_loss(outputs[0], target), F.cross_entropy(outputs[0], target))


def test_joint_loss_takes_any_loss():
    outputs, target = (torch.zeros(3, 1), torch.ones(3, 1)), torch.full((3, 1), 2.0)
    assert float(joint_loss(outputs, target, [1, 10], F.mse_loss)) == 4 + 10


@pytest.mark.parametrize(
    ("weights", "text"),
    [([1], "2 exits"), ([1, -0.5], "-0.5"), ([0, 0], "all 0"), ([1, math.nan], "nan"), ([math.inf, 1], "inf")],
)
def test_joint_loss_refuses_weights(weights, text):
    with pytest.raises(InputError, match=text):
        joint_loss((torch.zeros(2, 3), torch.zeros(2, 3)), torch.tensor([0, 1]), weights)


def test_joint_loss_names_the_exit_of_another_shape():
    with pytest.raises(InputError, match=r"exit 2 .*\(2, 5\).*last exit \(2, 3\)"):
        joint_loss((torch.zeros(2, 3), torch.zeros(2, 5), torch.zeros(2, 3)), torch.tensor([0, 1]))


@pytest.mark.parametrize("target", [torch.tensor([0, 3]), torch.tensor([0]), torch.tensor([0.0, 1.0])])
def test_joint_loss_names_a_target_that_does_not_fit(target):
    with pytest.raises(InputError, match=r"exit 1 .*\(2, 3\)"):
        joint_loss((torch.zeros(2, 3), torch.zeros(2, 3)), target)
