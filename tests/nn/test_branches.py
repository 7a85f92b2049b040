"""Ready-made branches: shapes of inputs and outputs, and the default branch for each kind of features."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from branchynet.errors import InputError
from branchynet.nn.branches import ConvBranch, InputMLP, PooledLinear, TokenLinear, default_branch

sizes, classes = st.integers(1, 9), st.integers(1, 5)


def answers(branch, features, num_classes):
    """The branch returns a finite row of `num_classes` per sample, from that sample alone, and is trainable."""
    branch.eval()
    before = features.clone()
    output = branch(features)
    assert output.shape == (len(features), num_classes) and output.isfinite().all()
    for row in range(len(features)):
        torch.testing.assert_close(branch(features[row : row + 1]), output[row : row + 1], atol=1e-5, rtol=1e-4)
    output.sum().backward()
    assert all(p.grad is not None for p in branch.parameters())
    assert features.equal(before)


@settings(max_examples=25, deadline=None)
@given(st.tuples(st.integers(1, 3), sizes, sizes, sizes), classes, st.lists(st.integers(1, 6), max_size=3))
def test_conv_branch_reads_feature_maps_of_any_size(shape, num_classes, channels):
    branch = ConvBranch(shape[1], num_classes, channels)
    answers(branch, torch.randn(shape), num_classes)
    widths = [m.out_channels for m in branch.modules() if isinstance(m, nn.Conv2d)]
    assert widths == channels
    assert branch[-1].in_features == (channels or [shape[1]])[-1]


@settings(max_examples=25, deadline=None)
@given(st.tuples(st.integers(1, 3), sizes, sizes, sizes), classes, st.integers(1, 5))
def test_pooled_linear_reads_feature_maps_of_any_size(shape, num_classes, grid):
    branch = PooledLinear(shape[1], num_classes, grid)
    answers(branch, torch.randn(shape), num_classes)
    assert sum(p.numel() for p in branch.parameters()) == num_classes * (shape[1] * grid**2 + 1)


@settings(max_examples=25, deadline=None)
@given(st.lists(sizes, min_size=2, max_size=3), classes)
def test_token_linear_reads_tokens_or_vectors(shape, num_classes):
    branch = TokenLinear(shape[-1], num_classes)
    features = torch.randn(shape)
    answers(branch, features, num_classes)
    mean = features.mean(1) if len(shape) == 3 else features
    torch.testing.assert_close(branch(features), branch.classifier(branch.norm(mean)))


@settings(max_examples=25, deadline=None)
@given(st.one_of(st.tuples(sizes), st.tuples(sizes, sizes, sizes)), classes, st.integers(0, 4), st.integers(1, 4))
def test_input_mlp_reads_pixels_or_vectors_of_any_size(shape, num_classes, hidden, pool):
    branch = InputMLP(shape, num_classes, hidden, pool)
    answers(branch, torch.randn(2, *shape), num_classes)
    linear = [m for m in branch.modules() if isinstance(m, nn.Linear)]
    assert [m.out_features for m in linear] == ([hidden] if hidden else []) + [num_classes]
    assert any(isinstance(m, nn.MaxPool2d) for m in branch) == (len(shape) == 3 and pool > 1)


@pytest.mark.parametrize(
    ("shape", "kind", "width"),
    [
        ((2, 5, 6, 7), ConvBranch, 8),
        ((2, 40, 6, 7), ConvBranch, 40),
        ((2, 99, 3, 3), ConvBranch, 64),
        ((2, 5, 6), TokenLinear, 6),
        ((2, 5), TokenLinear, 5),
    ],
)
def test_the_default_branch_fits_the_features(shape, kind, width):
    features = torch.randn(shape)
    branch = default_branch(features, 4)
    assert type(branch) is kind
    assert [m for m in branch.modules() if isinstance(m, nn.Linear)][-1].in_features == width
    answers(branch, features, 4)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(2), r"shape \(2,\).*branch="),
        (torch.zeros(2, 3, dtype=torch.int64), "int64.*later submodule"),
        (torch.zeros(2, 3, dtype=torch.bool), "bool"),
    ],
)
def test_features_that_no_default_branch_reads_are_refused(features, message):
    with pytest.raises(InputError, match=message):
        default_branch(features, 4)
