"""Folders of the user's images: reading and notes."""

import os
import shutil
import statistics
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from branchynet import data
from branchynet.data import folders, images
from branchynet.errors import DataError, InputError
from helpers.image_files import noise, write_images


class TestFolder:
    def test_split(self, tmp_path):
        loaded = data.load_data(f"folder:{write_images(tmp_path, ('bee', 'ant', 'cat'), count=60)}")
        assert loaded.classes == ("ant", "bee", "cat") and loaded.shape == (3, 6, 5)
        for split, share in ((loaded.train, 0.7), (loaded.val, 0.15), (loaded.test, 0.15)):
            assert abs(len(split) - 180 * share) < 4 * (180 * share * (1 - share)) ** 0.5
            assert len(set(split.labels[:10].tolist())) > 1, "classes come one after the other"
        # the green of write_images is the number, the red 20 times the class in the order given
        seen = {(int(x[0, 0, 0]), int(x[1, 0, 0])) for s in (loaded.train, loaded.val, loaded.test) for x in s.images}
        assert seen == {(20 * c, i) for c in range(3) for i in range(60)}
        assert set((loaded.train.images[loaded.train.labels == 0][:, 0]).unique().tolist()) == {20}

    @given(st.lists(st.integers(3, 40), min_size=2, max_size=5), st.integers(0, 99))
    @settings(deadline=None, max_examples=50)
    def test_every_image_in_one_part_and_every_class_in_every_part(self, counts, seed):
        labels = np.repeat(np.arange(len(counts)), counts)
        places = np.random.default_rng(seed).random(len(labels)) ** (1 + seed % 9)
        part = folders.split_by_place(labels, places, ((70, 15, 15), (1, 1, 1), (0.98, 0.01, 0.01))[seed % 3])
        for c in range(len(counts)):
            assert set(part[labels == c].tolist()) == {0, 1, 2}

    @pytest.mark.parametrize("seed", range(5))
    def test_adding_or_removing_an_image_moves_no_other(self, tmp_path, seed):
        """The same holds for another name, another folder, or a copy."""
        rng = np.random.default_rng(seed)
        for name in ("ant", "bee"):
            (tmp_path / name).mkdir()
            for i in range(30):
                Image.fromarray(rng.integers(0, 255, (6, 5), np.uint8)).save(tmp_path / name / f"{i:02}.png")

        def where(folder):
            loaded = data.load_data(f"folder:{folder}")
            parts = {"train": loaded.train, "val": loaded.val, "test": loaded.test}
            return {x.numpy().tobytes(): name for name, split in parts.items() for x in split.images}

        before = where(tmp_path)
        assert len(before) == 60 and set(before.values()) == {"train", "val", "test"}
        Image.fromarray(rng.integers(0, 255, (6, 5), np.uint8)).save(tmp_path / "ant" / "0.png")
        after = where(tmp_path)
        assert len(after) == 61 and before.items() <= after.items()
        (tmp_path / "bee" / "07.png").unlink()
        (tmp_path / "bee" / "08.png").rename(tmp_path / "bee" / "zzz.png")
        (tmp_path / "bee" / "09 copy.png").write_bytes((tmp_path / "bee" / "09.png").read_bytes())
        moved = where(tmp_path.rename(tmp_path.with_name(f"moved-{seed}")))
        assert len(moved) == 60 and moved.items() <= after.items()

    def test_order_of_the_file_system_does_not_matter(self, tmp_path, monkeypatch):
        write_images(tmp_path)
        first = data.load_data(f"folder:{tmp_path}")
        listing = Path.iterdir
        monkeypatch.setattr(Path, "iterdir", lambda self: reversed(sorted(listing(self))))
        again = data.load_data(f"folder:{tmp_path}")
        assert first.classes == again.classes and torch.equal(first.train.images, again.train.images)

    def test_sizes(self, tmp_path):
        write_images(tmp_path, ("ant",), size=(6, 5))
        write_images(tmp_path, ("bee",), size=(30, 41), ending="JPG")
        loaded = data.load_data(f"folder:{tmp_path}")
        assert loaded.shape == (3, 6, 5)
        assert loaded.notes == (
            "10 of 20 images are resized to 6 x 5 (height x width), the median of heights 6 to 30 and widths 5 to 41; "
            "give a size to change this",
        )
        assert data.load_data(f"folder:{tmp_path}", size=(12, 9)).shape == (3, 12, 9)

    @pytest.mark.parametrize("size", [(0, 9), (9, -1), (9,), (9, 9, 9), (9.0, 9), (True, 9), 9, "9x9", (9, None)])
    def test_wrong_sizes(self, tmp_path, size):
        with pytest.raises(InputError, match=r"size must be \(H, W\), two integers of at least 1; got"):
            data.load_data(f"folder:{write_images(tmp_path)}", size=size)

    @given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=6, max_size=20))
    @settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_the_size_is_the_median(self, tmp_path, sizes):
        with tempfile.TemporaryDirectory(dir=tmp_path) as base:
            for i, (height, width) in enumerate(sizes):
                folder = Path(base) / "ab"[i % 2]
                folder.mkdir(exist_ok=True)
                Image.new("L", (width, height), i).save(folder / f"{i}.png")
            shape = data.load_data(f"folder:{base}").shape
        assert shape == (1, *(statistics.median_low(side) for side in zip(*sizes, strict=True)))

    @pytest.mark.parametrize("orientation", [1, 2, 3, 5, 6, 8])
    @pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
    def test_sizes_are_those_of_the_upright_image(self, tmp_path, orientation, ending):
        for name in "ab":
            (tmp_path / name).mkdir()
            for i in range(3):
                exif = Image.Exif()
                exif[0x112] = orientation
                Image.new("RGB", (8, 4), (i, 90, 90)).save(tmp_path / name / f"{i}.{ending}", exif=exif)
        if ending != "png":  # its header does not hold the orientation
            assert data.load_data(f"folder:{tmp_path}").shape[1:] == ((8, 4) if orientation > 4 else (4, 8))
        assert images.decode(tmp_path / "a" / f"0.{ending}").shape[1:] == ((8, 4) if orientation > 4 else (4, 8))

    def test_images_are_gray_if_all_files_are(self, tmp_path):
        write_images(tmp_path, mode="L")
        assert data.load_data(f"folder:{tmp_path}").shape == (1, 6, 5)
        Image.new("RGB", (5, 6), (1, 2, 3)).save(tmp_path / "bee" / "color.png")
        loaded = data.load_data(f"folder:{tmp_path}")
        assert loaded.shape == (3, 6, 5)
        every = torch.cat([s.images for s in (loaded.train, loaded.val, loaded.test)])
        gray = (every[:, 0] == every[:, 1]).flatten(1).all(1) & (every[:, 0] == every[:, 2]).flatten(1).all(1)
        assert gray.sum() == 20 and len(every) == 21

    def test_other_files_are_ignored(self, tmp_path):
        write_images(tmp_path)
        (tmp_path / "ant" / "notes.txt").write_text("x")
        (tmp_path / "ant" / ".hidden.png").write_text("x")
        (tmp_path / ".git").mkdir()
        (tmp_path / "labels.csv").write_text("x")
        loaded = data.load_data(f"folder:{tmp_path}")
        assert len(loaded.train) + len(loaded.val) + len(loaded.test) == 20

    def test_unreadable(self, tmp_path):
        write_images(tmp_path)
        bad = tmp_path / "bee" / "03.png"
        bad.write_bytes(bad.read_bytes()[:40])
        with pytest.raises(DataError, match=r"cannot read the image .*03\.png .*replace or remove it"):
            data.load_data(f"folder:{tmp_path}")

    def test_not_a_folder_of_classes(self, tmp_path):
        for name in ("folder:", f"folder:{tmp_path / 'nothing'}"):
            with pytest.raises(DataError, match=r"does not name a folder; give folder:PATH"):
                data.load_data(name)
        with pytest.raises(DataError, match=r"holds no folders; it must hold one folder per class"):
            data.load_data(f"folder:{tmp_path}")
        write_images(tmp_path, ("ant",))
        with pytest.raises(DataError, match=r"holds only one folder, 'ant'"):
            data.load_data(f"folder:{tmp_path}")
        write_images(tmp_path, ("bee",), count=2)
        with pytest.raises(DataError, match=r"bee holds 2 images directly in it; a class needs at least 3"):
            data.load_data(f"folder:{tmp_path}")

    def test_too_large(self, tmp_path, monkeypatch):
        monkeypatch.setattr(folders, "MOST_BYTES", 20 * 3 * 30 - 1)
        with pytest.raises(DataError, match=r"20 images of 6 x 5 do not fit in memory; give a smaller size"):
            data.load_data(f"folder:{write_images(tmp_path)}")

    @pytest.mark.parametrize("where", ["first", "last"])
    @pytest.mark.parametrize("huge", [(1025, 1024), (1, 1024 * 1024 + 1), (6000, 5000)])
    def test_one_large_image_does_not_enlarge_the_others(self, tmp_path, where, huge):
        write_images(tmp_path)
        name = "0.png" if where == "first" else "99.png"
        Image.new("1", huge[::-1]).save(tmp_path / "ant" / name)
        assert data.load_data(f"folder:{tmp_path}").shape[1:] == (6, 5)
        assert data.load_data(f"folder:{tmp_path}", size=(4, 3)).shape[1:] == (4, 3)

    @pytest.mark.parametrize("large", [(1025, 1024), (1, 1024 * 1024 + 1), (2000, 3000)])
    def test_photographs_need_a_size(self, tmp_path, large):
        write_images(tmp_path, count=3, size=large, mode="1", ending="png")
        with pytest.raises(DataError, match=rf"the median size .* is {large[0]} x {large[1]} pixels, .*give a size"):
            data.load_data(f"folder:{tmp_path}")
        assert data.load_data(f"folder:{tmp_path}", size=(4, 3)).shape[1:] == (4, 3)

    def test_too_large_images_are_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(images, "MOST_PIXELS", 29)
        write_images(tmp_path)
        with pytest.raises(DataError, match=r"ant/00.png .*5 x 6 pixels are more than 29"):
            data.load_data(f"folder:{tmp_path}", size=(2, 2))

    def test_classes_are_printable(self, tmp_path):
        names = [b"a\x1b[31mb", b"caf\xe9", "café".encode(), b"line\nbreak", b"[red]", b"<b>", b"$x$", b":smile:"]
        try:
            for name in names:
                folder = tmp_path / os.fsdecode(name)
                folder.mkdir()
                for i in range(3):
                    Image.new("L", (3, 3), i).save(folder / f"{i}.png")
        except OSError:
            pytest.skip("this file system keeps no such names")
        output = {r"a\x1b[31mb", r"caf\xe9", "café", r"line\nbreak", "[red]", "<b>", "$x$", ":smile:"}
        loaded = data.load_data(f"folder:{tmp_path}")
        assert set(loaded.classes) == output and all(name.isprintable() for name in loaded.classes)

    def test_more_than_256_classes(self, tmp_path):
        write_images(tmp_path, tuple(f"{c:03}" for c in range(260)), count=3, size=(2, 2), mode="L", ending="bmp")
        loaded = data.load_data(f"folder:{tmp_path}")
        assert loaded.test.labels.sort().values.tolist() == list(range(260))


class TestNotes:
    def test_images_per_class(self, tmp_path):
        for part, count in (("train", 20), ("val", 11), ("test", 12)):
            for c, label in enumerate(("ant", "honey bee")):
                noise(tmp_path / part / label, count + c, 100 * count + c)
        assert str(data.load_data(f"folder:{tmp_path}")).splitlines()[1:] == [
            "class      train  val  test",
            "ant           20   11    12",
            "honey bee     21   12    13",
            "all           41   23    25",
        ]

    def test_many_classes_are_summarized(self, tmp_path):
        for c in range(25):
            noise(tmp_path / f"{c:02}", 10 + c, c, (2, 2))
        loaded = data.load_data(f"folder:{tmp_path}")
        first, *rows = str(loaded).splitlines()
        assert first.endswith(f"{sum(range(10, 35))} images of 1 x 2 x 2 (channels x height x width), 25 classes")
        assert [row.split()[0] for row in rows[:4]] == ["class", "fewest", "most", "all"]
        low, high = loaded.counts.min(axis=1), loaded.counts.max(axis=1)
        assert rows[1].split()[-3:] == list(map(str, low)) and rows[2].split()[-3:] == list(map(str, high))

    @pytest.mark.parametrize("count", [3, 9, 10])
    def test_small_classes(self, tmp_path, count):
        noise(tmp_path / "ant", count, 0)
        noise(tmp_path / "bee", 30, 1)
        notes = data.load_data(f"folder:{tmp_path}").notes
        assert any(f"fewer than 10 images, too few to learn or to evaluate: 'ant' ({count})" in n for n in notes) == (
            count < 10
        )

    def test_classes_missing_from_a_part(self, tmp_path):
        for seed, (part, label) in enumerate((p, c) for p in ("train", "val", "test") for c in ("ant", "bee", "cat")):
            noise(tmp_path / part / label, 10, seed)
        shutil.rmtree(tmp_path / "val" / "bee")
        for file in (tmp_path / "test" / "cat").iterdir():
            file.unlink()
        assert data.load_data(f"folder:{tmp_path}").notes == (
            "classes without val images: 'bee'",
            "classes without test images: 'cat'",
        )

    @pytest.mark.parametrize(("part", "copies"), [("val", 1), ("test", 3), ("test", 10)])
    def test_copies_of_training_images(self, tmp_path, part, copies):
        for seed, (each, label) in enumerate((p, c) for p in ("train", "val", "test") for c in ("ant", "bee")):
            noise(tmp_path / each / label, 10, seed)
        for i in range(copies):
            shutil.copy(tmp_path / "train" / "ant" / f"{i:03}.png", tmp_path / part / "ant" / f"{i:03}.png")
        (note,) = data.load_data(f"folder:{tmp_path}").notes
        assert note.startswith(f"{copies} of 20 {part} images are copies of training images")
