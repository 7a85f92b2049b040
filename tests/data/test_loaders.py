import dataclasses
import functools
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from branchynet import data
from branchynet.errors import DataError, FileError, InputError
from helpers.image_files import (
    same_place,
    small_split,
)

pytestmark = pytest.mark.usefixtures("own_cache")


class TestValues:
    def split(self, count=4, shape=(1, 2, 2), labels=None):
        labels = torch.arange(count) % 2 if labels is None else labels
        return data.Split(torch.zeros(count, *shape, dtype=torch.uint8), labels)

    def test_split(self):
        assert len(self.split(7)) == 7
        for images, labels, message in (
            (torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64), r"images must be uint8 .*float32"),
            (torch.zeros(2, 2, 2, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), r"\(S, C, H, W\)"),
            (torch.zeros(0, 1, 2, 2, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), r"not empty"),
            (
                torch.zeros(2, 1, 2, 2, dtype=torch.uint8),
                torch.zeros(3, dtype=torch.int64),
                r"labels must be int64 \(2,\)",
            ),
            (torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.zeros(2), r"labels must be int64 .*float32"),
        ):
            with pytest.raises(InputError, match=message):
                data.Split(images, labels)

    def test_image_data(self):
        whole = data.ImageData("mine", ("a", "b"), self.split(), self.split(), self.split())
        assert whole.shape == (1, 2, 2)
        with pytest.raises(dataclasses.FrozenInstanceError):
            whole.name = "other"  # type: ignore[misc]
        with pytest.raises(InputError, match=r"val images are \(3, 2, 2\) but train images are \(1, 2, 2\)"):
            data.ImageData("mine", ("a", "b"), self.split(), self.split(shape=(3, 2, 2)), self.split())
        with pytest.raises(InputError, match=r"test labels lie in 0..2, but there are 2 classes"):
            data.ImageData("mine", ("a", "b"), self.split(), self.split(), self.split(3, labels=torch.arange(3)))


class TestLoader:
    @given(st.integers(1, 50), st.integers(1, 60), st.booleans(), st.integers(0, 2**31))
    @settings(deadline=None, max_examples=25)
    def test_every_sample_once(self, count, batch_size, shuffle, seed):
        split = small_split(count)
        torch.manual_seed(seed)
        batches = list(data.loader(split, batch_size, shuffle=shuffle))
        assert [len(y) for _, y in batches] == [batch_size] * (count // batch_size) + [count % batch_size] * (
            count % batch_size > 0
        )
        order = torch.cat([y for _, y in batches])
        assert sorted(order.tolist()) == list(range(count))
        assert shuffle or order.tolist() == list(range(count))
        images = torch.cat([x for x, _ in batches])
        assert images.dtype == torch.float32 and images.min() >= 0 and images.max() <= 1
        assert torch.equal((images * 255).round().byte(), split.images[order])

    def order(self, loader):
        return torch.cat([y for _, y in loader]).tolist()

    def test_global_generator_decides(self):
        loader = data.loader(small_split(), 8, shuffle=True, augment=data.shift(2))
        passes = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            passes.append([(x.clone(), y) for x, y in loader])
        flat = [torch.cat([x.flatten() for x, _ in batches]) for batches in passes]
        assert torch.equal(flat[0], flat[1]) and not torch.equal(flat[0], flat[2])
        assert self.order(loader) != self.order(loader)

    def test_resumed_in_a_new_process(self):
        """A second loader seeded before epoch 2 gives epoch 2 of the first."""
        first, second = (data.loader(small_split(), 8, shuffle=True, augment=data.affine()) for _ in range(2))
        for epoch in (1, 2):
            torch.manual_seed(epoch)
            last = list(first)
        torch.manual_seed(2)
        for (x, y), (again, labels) in zip(last, second, strict=True):
            assert torch.equal(x, again) and torch.equal(y, labels)

    def test_own_seed(self):
        orders = []
        for state in (1, 2):
            torch.manual_seed(state)
            loader = data.loader(small_split(), 8, shuffle=True, seed=5)
            orders.append((self.order(loader), self.order(loader)))
        assert orders[0] == orders[1] and orders[0][0] != orders[0][1]

    def test_dataset_by_index(self):
        image, label = data.loader(small_split(), 8).dataset[3]
        assert image.shape == (1, 4, 5) and label == 3 and float(image[0, 0, 1]) == pytest.approx(3 / 255)

    def test_batch_size(self):
        with pytest.raises(InputError, match=r"batch_size must be at least 1; got 0"):
            data.loader(small_split(), 0)


class TestProgressiveLoader:
    def test_sizes_by_epoch_over_the_same_batches(self):
        full = data.loader(small_split(), 8)
        growing = data.ProgressiveLoader(full, (2, 3, 5))
        assert len(growing) == len(full)
        for epoch, side in ((1, 2), (2, 3), (3, 5), (9, 5), (2, 3)):
            growing.set_epoch(epoch)
            for (x, y), (whole, labels) in zip(growing, full, strict=True):
                assert x.shape == (*whole.shape[:2], side, side) and torch.equal(y, labels)
                assert float(x.mean()) == pytest.approx(float(whole.mean()), abs=0.2)

    def test_full_size_is_unchanged(self):
        square = data.Split(torch.randint(256, (8, 1, 4, 4), dtype=torch.uint8), torch.zeros(8, dtype=torch.int64))
        full = data.loader(square, 8)
        ((x, _),), ((whole, _),) = data.ProgressiveLoader(full, (4,)), full
        assert torch.equal(x, whole)

    @pytest.mark.parametrize("sides", [(), (16, 0)])
    def test_wrong_sides(self, sides):
        with pytest.raises(InputError, match="sides must hold at least one size"):
            data.ProgressiveLoader(data.loader(small_split(), 8), sides)


class TestAugment:
    @pytest.mark.parametrize(
        "augment", [data.shift(2), data.flip_crop(), data.affine(), data.compose(data.shift(1), data.affine())]
    )
    @pytest.mark.parametrize("shape", [(9, 3, 8, 8), (4, 1, 5, 7), (1, 1, 1, 1)])
    def test_shape_range_and_repeat(self, augment, shape):
        images = torch.rand(shape)
        kept = images.clone()
        torch.manual_seed(3)
        first = augment(images)
        torch.manual_seed(3)
        assert torch.equal(first, augment(images)) and torch.equal(images, kept)
        assert first.shape == images.shape and first.dtype == images.dtype
        assert 0 <= first.min() and first.max() <= 1

    @given(st.integers(0, 3), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31))
    @settings(deadline=None, max_examples=25)
    def test_shift_is_a_window_of_the_padded_image(self, pixels, height, width, seed):
        torch.manual_seed(seed)
        images = torch.rand(5, 2, height, width)
        padded = torch.nn.functional.pad(images, (pixels,) * 4)
        span = range(2 * pixels + 1)
        for i, moved in enumerate(data.shift(pixels)(images)):
            assert any(torch.equal(moved, padded[i, :, y : y + height, x : x + width]) for y in span for x in span)

    def test_shift_moves_each_image_in_its_own_direction(self):
        images = torch.zeros(500, 1, 5, 5)
        images[:, :, 2, 2] = 1
        moved = data.shift(2)(images)
        assert (moved.sum(0)[0] > 0).all() and moved.sum() == 500

    def test_flip_crop(self):
        images = torch.arange(16.0).view(1, 1, 4, 4).expand(400, 1, 4, 4)
        mirrored = (data.flip_crop(0)(images) == images.flip(3)).flatten(1).all(1)
        kept = (data.flip_crop(0)(images) == images).flatten(1).all(1)
        assert 150 < mirrored.sum() < 250 and 150 < kept.sum() < 250

    def test_affine_with_zero_amounts(self):
        images = torch.rand(3, 2, 6, 9)
        torch.testing.assert_close(data.affine(0, 0, 0)(images), images, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("sign", [1.0, 0.0])
    def test_affine_by_known_amounts(self, monkeypatch, sign):
        """With extreme random numbers: quarter and half turns, and shifts by whole pixels, are exact."""
        monkeypatch.setattr(torch, "rand", lambda *size: torch.full(size, sign))
        images = torch.arange(96.0).view(2, 1, 6, 8)
        square = images[..., :6]
        close = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-3)
        close(data.affine(90, 0, 0)(square), torch.rot90(square, 1 if sign else -1, (2, 3)))
        close(data.affine(180, 0, 0)(images), images.flip(2, 3))
        moved = torch.zeros_like(images)
        if sign:
            moved[..., :3, :4] = images[..., 3:, 4:]
        else:
            moved[..., 3:, 4:] = images[..., :3, :4]
        close(data.affine(0, 0.5, 0)(images), moved)

    def test_affine_keeps_shapes(self, monkeypatch):
        """A quarter turn does not stretch a wide image: a dot 3 columns from the center moves to 3 rows from it."""
        monkeypatch.setattr(torch, "rand", lambda *size: torch.ones(size))
        images = torch.zeros(1, 1, 9, 15)
        images[..., 4, 10] = 1
        turned = data.affine(90, 0, 0)(images)
        assert turned[0, 0].flatten().argmax() == 1 * 15 + 7 and turned.max() > 0.99

    def test_affine_zooms(self, monkeypatch):
        monkeypatch.setattr(torch, "rand", lambda *size: torch.ones(size))
        images = torch.zeros(1, 1, 20, 20)
        images[..., 5:15, 5:15] = 1
        assert data.affine(0, 0, 0.5)(images).sum() == pytest.approx(225, rel=0.1)

    def test_compose(self):
        images = torch.ones(1, 1, 1, 1)
        assert data.compose(lambda x: x + 1, lambda x: x * 10)(images).item() == 20
        assert data.compose()(images).item() == 1

    def test_bad_amounts(self):
        for make in (
            lambda: data.shift(-1),
            lambda: data.flip_crop(-1),
            lambda: data.affine(degrees=-1),
            lambda: data.affine(translate=-0.1),
            lambda: data.affine(scale=1),
        ):
            with pytest.raises(InputError, match=r"at least 0.*got"):
                make()


class TestImages:
    @given(
        st.sampled_from([1, 3]).flatmap(
            lambda c: arrays.arrays(np.uint8, st.tuples(st.just(c), st.integers(1, 9), st.integers(1, 9)))
        )
    )
    @same_place
    def test_round_trip(self, tmp_path, image):
        data.save_image(image, tmp_path / "x.png")
        read = data.read_image(tmp_path / "x.png", image.shape)
        assert read.dtype == np.float32 and read.shape == (1, *image.shape)
        # reading a file gives exactly the pixels of the image in training
        seen, _ = next(
            iter(data.loader(data.Split(torch.from_numpy(image)[None], torch.zeros(1, dtype=torch.int64)), 1))
        )
        np.testing.assert_array_equal(read, seen.numpy())
        data.save_image(read[0], tmp_path / "y.png")
        np.testing.assert_array_equal(data.read_image(tmp_path / "y.png", image.shape), read)

    def test_color_and_size(self, tmp_path):
        Image.new("RGB", (40, 20), (255, 0, 0)).save(tmp_path / "red.png")
        red = data.read_image(tmp_path / "red.png", (3, 10, 10))
        assert red.shape == (1, 3, 10, 10) and (red[0, 0] == 1).all() and (red[0, 1:] == 0).all()
        gray = data.read_image(tmp_path / "red.png", (1, 20, 40))
        assert gray.shape == (1, 1, 20, 40) and gray[0, 0, 0, 0] == pytest.approx(76 / 255)
        board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
        Image.fromarray(board).save(tmp_path / "board.png")
        small = data.read_image(tmp_path / "board.png", (1, 8, 8))
        assert np.abs(small - 0.5).max() < 0.05, "shrunk without a filter"

    def test_upright(self, tmp_path):
        pixels = np.zeros((8, 16), np.uint8)
        pixels[:, :8] = 255
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was turned: the left of the file is the top of the picture
        Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
        read = data.read_image(tmp_path / "x.png", (1, 16, 8))[0, 0]
        assert (read[:8] == 1).all() and (read[8:] == 0).all()

    def test_depths_and_palettes(self, tmp_path):
        Image.fromarray(np.full((4, 4), 128 * 257, np.uint16)).save(tmp_path / "deep.png")
        assert (data.read_image(tmp_path / "deep.png", (1, 4, 4)) == np.float32(128 / 255)).all()
        palette = Image.new("P", (4, 4), 1)
        palette.putpalette([0, 0, 0, 10, 20, 30])
        palette.save(tmp_path / "palette.png", transparency=b"\x00\xff")
        read = data.read_image(tmp_path / "palette.png", (3, 4, 4))
        np.testing.assert_allclose(read[0, :, 0, 0] * 255, [10, 20, 30], atol=1e-4)
        for mode in ("1", "LA", "RGBA", "CMYK"):
            Image.new(mode, (4, 4)).save(tmp_path / "mode.tiff")
            assert data.read_image(tmp_path / "mode.tiff", (3, 4, 4)).shape == (1, 3, 4, 4)

    def test_unreadable(self, tmp_path):
        with pytest.raises(DataError, match=r"there is no image .*none\.png; give the path"):
            data.read_image(tmp_path / "none.png", (1, 4, 4))
        with pytest.raises(DataError, match=r"cannot read the image"):
            data.read_image(tmp_path, (1, 4, 4))
        whole = io.BytesIO()
        Image.effect_noise((32, 32), 90).save(whole, "PNG")
        for length in (0, 10, 50, 300):
            (tmp_path / "cut.png").write_bytes(whole.getvalue()[:length])
            with pytest.raises(DataError, match=r"cannot read the image .*cut\.png"):
                data.read_image(tmp_path / "cut.png", (1, 4, 4))

    def test_bomb(self, tmp_path, monkeypatch):
        Image.new("L", (100, 100)).save(tmp_path / "x.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        with pytest.raises(DataError, match=r"x\.png \(DecompressionBomb"):
            data.read_image(tmp_path / "x.png", (1, 4, 4))

    def test_bad_shapes(self, tmp_path):
        for shape in ((2, 4, 4), (1, 0, 4)):
            with pytest.raises(InputError, match=r"shape must be \(1, H, W\) or \(3, H, W\)"):
                data.read_image(tmp_path / "x.png", shape)
        for shape in ((4, 4), (2, 4, 4), (1, 0, 4)):
            with pytest.raises(InputError, match=r"an image must have shape"):
                data.save_image(np.zeros(shape), tmp_path / "x.png")

    def test_save(self, tmp_path):
        data.save_image(torch.full((3, 2, 2), 2.0), tmp_path / "new" / "x.jpg")
        assert (data.read_image(tmp_path / "new" / "x.jpg", (3, 2, 2)) == 1).all()
        with pytest.raises(InputError, match=r"no image format ends in '.abc'; use .png"):
            data.save_image(np.zeros((1, 2, 2)), tmp_path / "x.abc")
        with pytest.raises(FileError):
            data.save_image(np.zeros((1, 2, 2)), tmp_path / "new" / "x.jpg" / "y.png")
