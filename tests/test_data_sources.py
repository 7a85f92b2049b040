import dataclasses
import functools
import gzip
import hashlib
import http.server
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from branchynet import data
from branchynet.data import archives, images, sets
from branchynet.errors import DataError, InputError
from datasets import (
    IDX,
    REAL,
    SMALL,
    TAR,
    idx,
    write_cifar,
    write_idx,
    write_images,
)

pytestmark = pytest.mark.usefixtures("own_cache")


class TestDownload:
    @pytest.fixture
    def serve(self, tmp_path, monkeypatch):
        """A real server on the loopback interface, as the one place where the archives are."""
        folder = tmp_path / "served"
        folder.mkdir()
        asked = []

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *args):
                asked.append(self.path)

        handler = functools.partial(Handler, directory=str(folder))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.02,))
            thread.start()
            url = f"http://127.0.0.1:{server.server_port}/"

            def announce(name, urls=(url,)):
                sums = {
                    file: hashlib.sha256((folder / file).read_bytes()).hexdigest()
                    for file in archives.ARCHIVES[name].sha256
                }
                changed = dataclasses.replace(archives.ARCHIVES[name], urls=urls, sha256=sums)
                monkeypatch.setitem(archives.ARCHIVES, name, changed)
                return url

            yield folder, announce, asked
            server.shutdown()
            thread.join()

    @pytest.mark.parametrize("name", REAL)
    def test_once(self, name, serve):
        folder, announce, asked = serve
        write_cifar(folder, packed=True) if name == "cifar10" else write_idx(folder)
        announce(name)
        first = data.load_data(name)
        assert (len(first.train), len(first.val), len(first.test)) == SMALL[name]
        files = len(archives.ARCHIVES[name].sha256)
        assert len(asked) == files
        for download in (True, False):
            assert torch.equal(data.load_data(name, download=download).train.images, first.train.images)
        assert len(asked) == files

    def test_damaged_in_the_cache(self, serve, own_cache):
        folder, announce, asked = serve
        write_idx(folder)
        announce("mnist")
        data.load_data("mnist")
        cached = archives._cache("mnist") / IDX[1]
        cached.write_bytes(cached.read_bytes()[:-9])
        with pytest.raises(DataError, match=r"damaged or not complete"):
            data.load_data("mnist", download=False)
        assert len(data.load_data("mnist").train) == 50
        assert len(asked) == 5

    def test_wrong_checksum(self, serve):
        folder, announce, _ = serve
        write_idx(folder)
        announce("mnist")
        (folder / IDX[1]).write_bytes(gzip.compress(idx(np.zeros(60, np.uint8))))
        message = (
            rf"mnist could not be downloaded \(http://127.*/{IDX[1]}: SHA256 hash .*does not match.*BRANCHYNET_DATA"
        )
        with pytest.raises(DataError, match=message):
            data.load_data("mnist")
        assert not (archives._cache("mnist") / IDX[1]).exists()

    def test_gone(self, serve):
        folder, announce, _ = serve
        write_cifar(folder, packed=True)
        announce("cifar10")
        (folder / TAR).unlink()
        with pytest.raises(DataError, match=r"cifar10 could not be downloaded .*404"):
            data.load_data("cifar10")

    def test_second_address(self, serve):
        folder, announce, asked = serve
        write_idx(folder)
        url = announce("mnist")
        announce("mnist", urls=(url + "gone/", url))
        assert len(data.load_data("mnist").train) == 50
        assert len([path for path in asked if "gone" not in path]) >= 4

    def test_nobody_listens(self, serve):
        folder, announce, _ = serve
        write_idx(folder)
        announce("mnist", urls=("http://127.0.0.1:9/",))
        with pytest.raises(DataError, match=r"could not be downloaded \(http://127.0.0.1:9/.*set BRANCHYNET_DATA"):
            data.load_data("mnist")

    def test_what_is_published(self):
        for archive in archives.ARCHIVES.values():
            assert all(len(value) == 64 and int(value, 16) for value in archive.sha256.values())
            assert all(url.startswith("http") and url.endswith("/") for url in archive.urls)


class TestDigits:
    def test_digits(self):
        digits = data.load_data("digits")
        assert digits.shape == (1, 28, 28) and digits.classes == tuple("0123456789")
        assert (len(digits.train), len(digits.val), len(digits.test)) == (1197, 300, 300)
        every = torch.cat([s.labels for s in (digits.train, digits.val, digits.test)])
        assert torch.bincount(every).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
        assert digits.train.images.max() == 255 and digits.train.images.min() == 0
        assert digits.train.labels[:8].tolist() == [2, 8, 2, 6, 6, 7, 1, 9]
        assert torch.equal(digits.test.images, data.load_data("digits").test.images)


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
        parts = sets._parts(labels, places)
        assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
        for c in range(len(counts)):
            assert all((labels[part] == c).any() for part in parts)

    @pytest.mark.parametrize("seed", range(5))
    def test_a_picture_more_or_less_moves_no_other(self, tmp_path, seed):
        """Nor does another name, another folder, or a copy."""
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
        assert data.load_data(f"folder:{tmp_path}").shape == (3, 6, 5)
        assert data.load_data(f"folder:{tmp_path}", size=(12, 9)).shape == (3, 12, 9)
        with pytest.raises(InputError, match=r"size must be \(H, W\), both at least 1"):
            data.load_data(f"folder:{tmp_path}", size=(0, 9))

    def test_grey_stays_grey_until_one_is_not(self, tmp_path):
        write_images(tmp_path, mode="L")
        assert data.load_data(f"folder:{tmp_path}").shape == (1, 6, 5)
        Image.new("RGB", (5, 6), (1, 2, 3)).save(tmp_path / "bee" / "colour.png")
        loaded = data.load_data(f"folder:{tmp_path}")
        assert loaded.shape == (3, 6, 5)
        every = torch.cat([s.images for s in (loaded.train, loaded.val, loaded.test)])
        grey = (every[:, 0] == every[:, 1]).flatten(1).all(1) & (every[:, 0] == every[:, 2]).flatten(1).all(1)
        assert grey.sum() == 20 and len(every) == 21

    def test_what_is_no_image_is_passed_over(self, tmp_path):
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
            with pytest.raises(DataError, match=r"names no folder; give folder:PATH"):
                data.load_data(name)
        with pytest.raises(DataError, match=r"holds 0 folders \[\]; it must hold one for each class"):
            data.load_data(f"folder:{tmp_path}")
        write_images(tmp_path, ("ant",))
        with pytest.raises(DataError, match=r"holds 1 folders \['ant'\]"):
            data.load_data(f"folder:{tmp_path}")
        write_images(tmp_path, ("bee",), count=2)
        with pytest.raises(DataError, match=r"bee holds 2 images directly in it; a class needs three"):
            data.load_data(f"folder:{tmp_path}")

    def test_folders_of_parts_are_not_classes(self, tmp_path):
        write_images(tmp_path / "train")
        write_images(tmp_path / "test")
        with pytest.raises(DataError, match=r"holds 0 images directly in it"):
            data.load_data(f"folder:{tmp_path}")

    def test_too_large(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sets, "MOST_BYTES", 20 * 3 * 30 - 1)
        with pytest.raises(DataError, match=r"20 images of 6 x 5 do not fit in memory; give a size"):
            data.load_data(f"folder:{write_images(tmp_path)}")

    @pytest.mark.parametrize("where", ["first", "last"])
    @pytest.mark.parametrize("huge", [(1025, 1024), (1, 1024 * 1024 + 1), (6000, 5000)])
    def test_one_large_picture_does_not_enlarge_the_others(self, tmp_path, where, huge):
        write_images(tmp_path)
        name = "0.png" if where == "first" else "99.png"
        Image.new("1", huge[::-1]).save(tmp_path / "ant" / name)
        if where == "last":
            assert data.load_data(f"folder:{tmp_path}").shape[1:] == (6, 5)
        else:
            with pytest.raises(
                DataError, match=rf"ant/0.png, the first image, is {huge[0]} x {huge[1]}.*size=\(H, W\)"
            ):
                data.load_data(f"folder:{tmp_path}")
        assert data.load_data(f"folder:{tmp_path}", size=(4, 3)).shape[1:] == (4, 3)

    def test_a_picture_beyond_all_measure_is_refused(self, tmp_path, monkeypatch):
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
        told = {r"a\x1b[31mb", r"caf\xe9", "café", r"line\nbreak", "[red]", "<b>", "$x$", ":smile:"}
        loaded = data.load_data(f"folder:{tmp_path}")
        assert set(loaded.classes) == told and all(name.isprintable() for name in loaded.classes)

    def test_more_than_256_classes(self, tmp_path):
        write_images(tmp_path, tuple(f"{c:03}" for c in range(260)), count=3, size=(2, 2), mode="L", ending="bmp")
        loaded = data.load_data(f"folder:{tmp_path}")
        assert loaded.test.labels.sort().values.tolist() == list(range(260))
