"""Normalization, in training, in files and in `predict`."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from torch import nn

from branchynet import BranchyNet, Policy, export, load
from branchynet.data import Normalization, Split, load_data, loader, shift
from branchynet.data.normalization import normalization_of, stored_normalization
from branchynet.errors import InputError
from branchynet.runs.predict import predict_files
from helpers.image_files import write_images


@given(arrays.arrays(np.uint8, st.tuples(*(st.integers(1, 5) for _ in range(4)))))
def test_training_images_get_mean_0_and_deviation_1(images):
    found = normalization_of(images)
    pixels = images.astype(np.float64) / 255
    np.testing.assert_allclose(found.mean, pixels.mean(axis=(0, 2, 3)), atol=1e-12)  # float64's own rounding
    constant = pixels.max(axis=(0, 2, 3)) == pixels.min(axis=(0, 2, 3))
    np.testing.assert_allclose(found.std, np.where(constant, 1, pixels.std(axis=(0, 2, 3))), atol=1e-12)


@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.5,), (0,)), ((0.5,), (-1,)), ((), ()), ((0.5, 0.5), (1,)), ((float("nan"),), (1,)), ((0,), (float("inf"),))],
)
def test_wrong_normalizations(mean, std):
    with pytest.raises(InputError, match="mean and std must be finite numbers, one of each per channel, std above 0"):
        Normalization(mean, std)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_another_number_of_channels_is_refused(channels):
    images, labels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(InputError, match="is not for images of 3 channels"):
        Split(images, labels, Normalization((0.5,) * channels, (0.5,) * channels))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_all_parts_have_the_normalization_of_the_training_images(tmp_path, mode):
    name = f"folder:{write_images(tmp_path, count=30, mode=mode)}"
    plain, normalized = load_data(name), load_data(name, normalize=True)
    expected = normalization_of(plain.train.images.numpy())
    for part in ("train", "val", "test"):
        raw, split = getattr(plain, part), getattr(normalized, part)
        assert split.digest == raw.digest
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (expected.mean, expected.std))
        assert torch.allclose(split.inputs(), (raw.images / 255 - mean) / std, atol=1e-5)  # float32's own rounding
        assert torch.equal(torch.cat([x for x, _ in loader(split, 7)]), split.inputs())
        assert torch.equal(split.inputs(slice(3)), split.inputs()[:3])


def test_augmentation_is_before_normalization():
    """Augmentation fills with black, not with the mean."""
    split = Split(
        torch.full((4, 1, 3, 3), 255, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), Normalization((0.5,), (2,))
    )
    seen = torch.cat([x for _ in range(20) for x, _ in loader(split, 4, augment=shift(2))])
    assert set(seen.unique().tolist()) == {-0.25, 0.25}


@pytest.mark.parametrize(
    ("preprocessing", "expected"),
    [
        (None, None),
        ("pixels / 255", None),
        ({"scale": 1 / 255}, None),
        ({"mean": 0.5, "std": 0.25}, Normalization((0.5,) * 3, (0.25,) * 3)),
        ({"mean": [0.5, 0, 1], "std": 2}, Normalization((0.5, 0, 1), (2, 2, 2))),
    ],
)
def test_stored_normalizations(preprocessing, expected):
    assert stored_normalization(preprocessing, 3) == expected


@pytest.mark.parametrize(
    ("preprocessing", "message"),
    [
        ({"mean": 0.5}, "std=None, but for 3 channels"),
        ({"std": 0.5}, "mean=None, but for 3 channels"),
        ({"mean": [0.5, 0.5], "std": 1}, r"mean=\[0.5, 0.5\], but for 3 channels"),
        ({"mean": "0.5", "std": 1}, "mean='0.5', but for 3 channels"),
        ({"mean": True, "std": 1}, "mean=True, but for 3 channels"),
        ({"mean": [123.7, 116.3, 103.5], "std": [58.4, 57.1, 57.4]}, "not a mean of pixels in .*divided by 255"),
        ({"mean": 0.5, "std": 0}, "std above 0"),
        ({"mean": float("nan"), "std": 1}, "mean=nan"),
        ({"mean": 0.5, "std": float("nan")}, "finite"),
    ],
)
def test_wrong_stored_normalizations(preprocessing, message):
    with pytest.raises(InputError, match=message):
        stored_normalization(preprocessing, 3)


@pytest.mark.parametrize(
    "preprocessing", [None, {"mean": [0.2, 0.5, 0.7], "std": [0.1, 0.2, 0.3]}, {"mean": 0.4, "std": 0.5}]
)
def test_predict_applies_the_stored_preprocessing(tmp_path, preprocessing):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, 5, 6, 3), np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i:02}.png")
    torch.manual_seed(0)
    net = BranchyNet(nn.Sequential(nn.Flatten(), nn.Linear(90, 7)), {})
    # With these weights, the mean decides the prediction.
    net.backbone[1].weight.data.mul_(torch.linspace(-3, 3, 7)[:, None])
    how = {"preprocessing": preprocessing} if preprocessing else {}
    export(net, tmp_path / "net.onnx", policy=Policy(thresholds=()), example=torch.zeros(2, 3, 5, 6), **how)
    images = pixels.transpose(0, 3, 1, 2) / np.float32(255)
    if preprocessing:
        images = (images - np.reshape(preprocessing["mean"], (-1, 1, 1))) / np.reshape(preprocessing["std"], (-1, 1, 1))
    with torch.no_grad():
        expected = net(torch.from_numpy(images.astype(np.float32)))[-1].argmax(1)
    answers = predict_files(load(tmp_path / "net.onnx"), sorted(tmp_path.glob("*.png")))
    assert [answer["label"] for answer in answers] == [str(n) for n in expected.tolist()]
    assert json.dumps(load(tmp_path / "net.onnx").metadata["preprocessing"]) == json.dumps(preprocessing)
