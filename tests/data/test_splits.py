"""How the images of a folder are split into training, validation and test images."""

import shutil

import numpy as np
import pytest
from PIL import Image

from branchynet import data
from branchynet.errors import DataError, InputError
from helpers.image_files import contents, noise, write_images


class TestSplit:
    @pytest.mark.parametrize("split", [(70, 15, 15), (0.7, 0.15, 0.15), (8, 1, 1), (1, 1, 1), (1, 30, 2)])
    def test_shares(self, tmp_path, split):
        for seed, name in enumerate(("ant", "bee")):
            noise(tmp_path / name, 150, seed)
        loaded = data.load_data(f"folder:{tmp_path}", split=split)
        parts = [loaded.train, loaded.val, loaded.test]
        assert sum(map(len, parts)) == 300 and len(set.union(*map(contents, parts))) == 300
        for part, share in zip(parts, (s / sum(split) for s in split), strict=True):
            assert abs(len(part) - 300 * share) <= 4 * (300 * share * (1 - share)) ** 0.5 + 2
        if sum(split) in (100, 1):
            assert contents(loaded.test) == contents(data.load_data(f"folder:{tmp_path}").test)

    @pytest.mark.parametrize(
        "split",
        [(70, 30), (), (70, 15, 15, 0), (70, 0, 30), (80, -5, 25), (1, 1, float("nan")), (1, 1, float("inf")),
         (1e308, 1e308, 1e308), "789", (True, 1, 1)],
    )  # fmt: skip
    def test_wrong_splits(self, tmp_path, split):
        with pytest.raises(InputError, match=r"split must be three numbers above 0, .*such as 70/15/15; got"):
            data.load_data(f"folder:{write_images(tmp_path)}", split=split)

    @pytest.mark.parametrize("name", ["digits", "mnist", "cifar10"])
    def test_is_for_folders(self, name):
        with pytest.raises(InputError, match=rf"split=8/1/1 is only for folder:PATH; '{name}' has a fixed split"):
            data.load_data(name, split=(8, 1, 1))


class TestParts:
    """Folders with parts."""

    @pytest.mark.parametrize(
        "names", [("train", "val", "test"), ("Training", "validation", "Testing"), ("train", "valid", "test")]
    )
    def test_three(self, tmp_path, names):
        for part, name in enumerate(names):
            for c, label in enumerate(("bee", "ant")):
                noise(tmp_path / name / label, 10 + part, 10 * part + c)
        loaded = data.load_data(f"folder:{tmp_path}")
        assert loaded.classes == ("ant", "bee") and loaded.notes == ()
        assert loaded.counts.tolist() == [[10, 10], [11, 11], [12, 12]]
        for part, split in zip(names, (loaded.train, loaded.val, loaded.test), strict=True):
            for c, label in enumerate(loaded.classes):
                files = {np.asarray(Image.open(file)).tobytes() for file in (tmp_path / part / label).iterdir()}
                assert {image.numpy().tobytes() for image in split.images[split.labels == c]} == files
        with pytest.raises(InputError, match=r"split=8/1/1 cannot be used with .*all three parts: leave it out"):
            data.load_data(f"folder:{tmp_path}", split=(8, 1, 1))

    @pytest.mark.parametrize("given", [("train",), ("train", "val"), ("train", "test")])
    @pytest.mark.parametrize("split", [None, (1, 1, 1)])
    def test_a_missing_part_is_split_off_the_training_images(self, tmp_path, given, split):
        for p, part in enumerate(given):
            for c, label in enumerate(("ant", "bee")):
                noise(tmp_path / part / label, 200 if part == "train" else 10, 10 * p + c)
        loaded = data.load_data(f"folder:{tmp_path}", split=split)
        sizes = {"train": len(loaded.train), "val": len(loaded.val), "test": len(loaded.test)}
        assert sum(sizes.values()) == 400 + 20 * (len(given) - 1)
        shares = dict(zip(sizes, split or (70, 15, 15), strict=True))
        drawn = {part: share for part, share in shares.items() if part == "train" or part not in given}
        for part, size in sizes.items():
            if part in drawn:
                share = drawn[part] / sum(drawn.values())
                assert abs(size - 400 * share) <= 4 * (400 * share * (1 - share)) ** 0.5
            else:
                assert size == 20
        missing = [part for part in sizes if part not in given]
        assert len(given) == 1 or loaded.notes == (f"{missing[0]} images are split off the training images",)

    def test_classes_may_be_named_like_parts(self, tmp_path):
        write_images(tmp_path, ("train", "test", "val"), count=12)
        assert data.load_data(f"folder:{tmp_path}").classes == ("test", "train", "val")

    def test_inconsistent_parts(self, tmp_path):
        for part in ("train", "val", "test"):
            write_images(tmp_path / part)
        (tmp_path / "test" / "cat").mkdir()
        with pytest.raises(DataError, match=r"test/cat is a class without training images; add .*train/cat, or remove"):
            data.load_data(f"folder:{tmp_path}")
        (tmp_path / "test" / "cat").rmdir()
        shutil.copytree(tmp_path / "val", tmp_path / "valid")
        with pytest.raises(DataError, match="holds val and valid, which mean the same part: merge them"):
            data.load_data(f"folder:{tmp_path}")
        shutil.rmtree(tmp_path / "valid")
        for file in (tmp_path / "val").rglob("*.png"):
            file.unlink()
        with pytest.raises(DataError, match="holds no val images; add some, or remove its empty folder"):
            data.load_data(f"folder:{tmp_path}")
        shutil.rmtree(tmp_path / "train" / "bee")
        with pytest.raises(DataError, match=r"train holds only one folder, 'ant'; it must hold one folder per class"):
            data.load_data(f"folder:{tmp_path}")
