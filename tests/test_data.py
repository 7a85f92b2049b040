import dataclasses
import functools
import gzip
import hashlib
import http.server
import io
import os
import struct
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from branchynet import data
from branchynet.data import archives, sets
from branchynet.errors import DataError, FileError, InputError

IDX = tuple(archives.ARCHIVES["mnist"].sha256)
TAR = "cifar-10-binary.tar.gz"
PLACE = Path(os.environ.get(archives.VARIABLE) or Path(__file__).parents[2] / "shared" / "data")
REAL = {"mnist": (50000, 10000, 10000), "fashion-mnist": (50000, 10000, 10000), "cifar10": (45000, 5000, 10000)}
SMALL = {"mnist": (50, 10, 20), "fashion-mnist": (50, 10, 20), "cifar10": (54, 6, 20)}  # of 60 images and 20
same_place = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """No test sees the machine's data sets or downloads, unless it says so."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(archives, "_cache", lambda name: cache / name)
    monkeypatch.delenv(archives.VARIABLE, raising=False)


def idx(array):
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def numbered(count, shape):
    """Images that tell their number by their first two bytes."""
    images = np.zeros((count, *shape), dtype=np.uint8)
    images.reshape(count, -1)[:, 0] = np.arange(count) // 256
    images.reshape(count, -1)[:, 1] = np.arange(count) % 256
    return images


def numbers(split):
    flat = split.images.flatten(1).int()
    return (flat[:, 0] * 256 + flat[:, 1]).tolist()


def write_idx(folder, train=60, test=20, packed=True):
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in zip(IDX, (train, train, test, test), strict=True):
        content = idx(numbered(count, (28, 28)) if "images" in name else np.arange(count, dtype=np.uint8) % 10)
        path = folder / (name if packed else name.removesuffix(".gz"))
        path.write_bytes(gzip.compress(content, mtime=0) if packed else content)
    return folder


def cifar_files(count=12, test=20):
    train = numbered(5 * count, (3072,)).reshape(5, count, 3072)
    batches = [*train, numbered(test, (3072,))]
    return {
        file: np.hstack([np.arange(len(batch), dtype=np.uint8)[:, None] % 10, batch]).tobytes()
        for file, batch in zip(archives.CIFAR_BATCHES, batches, strict=True)
    }


def write_cifar(folder, packed=False, **changed):
    folder.mkdir(parents=True, exist_ok=True)
    files = cifar_files() | {name + ".bin": content for name, content in changed.items()}
    files = {file: content for file, content in files.items() if content is not None}
    if not packed:
        for file, content in files.items():
            (folder / file).write_bytes(content)
        return folder
    with tarfile.open(folder / TAR, "w:gz") as tar:
        for file, content in sorted(files.items(), reverse=True):  # the published archive is in no order either
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{file}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return folder


def write_images(base, classes=("ant", "bee"), count=10, size=(6, 5), mode="RGB", ending="png"):
    for c, name in enumerate(classes):
        (base / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            colour = (20 * c, i, 200) if mode == "RGB" else 20 * c + i
            Image.new(mode, size[::-1], colour).save(base / name / f"{i:02}.{ending}")
    return base


class TestArchives:
    @pytest.mark.parametrize("name", REAL)
    def test_published_files(self, name, tmp_path):
        """The real ones where this machine has them, else small ones of the same make."""
        root, sizes = PLACE, REAL[name]
        if not (root.is_dir() and archives._find(name, root)):
            (write_cifar if name == "cifar10" else write_idx)(tmp_path / archives.ARCHIVES[name].folders[0])
            root, sizes = tmp_path, SMALL[name]
        loaded = data.load_data(name, root=root, download=False)
        assert (len(loaded.train), len(loaded.val), len(loaded.test)) == sizes
        assert loaded.name == name and len(loaded.classes) == 10
        assert loaded.shape == ((3, 32, 32) if name == "cifar10" else (1, 28, 28))
        for split in (loaded.train, loaded.val, loaded.test):
            assert split.images.dtype == torch.uint8 and split.labels.dtype == torch.int64
            assert set(split.labels.tolist()) <= set(range(10))
        if sizes == REAL[name]:
            assert tuple(loaded.test.labels[:10].tolist()) == archives.ARCHIVES[name].opening
            assert set(loaded.train.labels.tolist()) == set(loaded.val.labels.tolist()) == set(range(10))

    @pytest.mark.parametrize("where", ["mnist", "MNIST/raw", "MNIST", "."])
    @pytest.mark.parametrize("packed", [True, False])
    def test_places_of_mnist(self, tmp_path, where, packed):
        write_idx(tmp_path / where, packed=packed)
        loaded = data.load_data("mnist", root=tmp_path, download=False)
        assert sorted(numbers(loaded.train) + numbers(loaded.val)) == list(range(60))
        assert numbers(loaded.test) == list(range(20))
        for split in (loaded.train, loaded.val, loaded.test):
            assert split.labels.tolist() == [n % 10 for n in numbers(split)]

    @pytest.mark.parametrize("where", ["cifar-10-batches-bin", "cifar10", "cifar10/cifar-10-batches-bin", "."])
    @pytest.mark.parametrize("packed", [True, False])
    def test_places_of_cifar10(self, tmp_path, where, packed):
        write_cifar(tmp_path / where, packed=packed)
        loaded = data.load_data("cifar10", root=tmp_path, download=False)
        assert sorted(numbers(loaded.train) + numbers(loaded.val)) == list(range(60))
        assert numbers(loaded.test) == list(range(20))
        for split in (loaded.train, loaded.val):  # labels start again in each batch of 12
            assert split.labels.tolist() == [n % 12 % 10 for n in numbers(split)]

    def test_variable_and_root(self, tmp_path, monkeypatch):
        write_idx(tmp_path / "a" / "mnist", train=60)
        write_idx(tmp_path / "b" / "mnist", train=120)
        monkeypatch.setenv(archives.VARIABLE, str(tmp_path / "a"))
        assert len(data.load_data("mnist").train) == 50
        assert len(data.load_data("mnist", root=tmp_path / "b").train) == 100

    def test_no_random_state_matters(self, tmp_path):
        write_idx(tmp_path)
        splits = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            before = torch.get_rng_state(), np.random.get_state()[1].tolist()
            loaded = data.load_data("mnist", root=tmp_path)
            assert torch.equal(before[0], torch.get_rng_state()) and before[1] == np.random.get_state()[1].tolist()
            splits.append((numbers(loaded.train), numbers(loaded.val)))
        assert splits[0] == splits[1]

    def test_split_is_the_same_for_ever(self):
        """A changed split would mix the training images of old runs into the tests of new ones."""
        assert sets._order(10).tolist() == [2, 8, 4, 9, 1, 6, 7, 3, 0, 5]
        assert hashlib.sha256(sets._order(60000).tobytes()).hexdigest().startswith("7e036c4b3f1dd66e")

    def test_mixed_up(self, tmp_path):
        folder = write_idx(tmp_path)
        opening = np.array(archives.ARCHIVES["mnist"].opening * 2, dtype=np.uint8)
        (folder / IDX[3]).write_bytes(gzip.compress(idx(opening)))
        assert len(data.load_data("mnist", root=tmp_path).test) == 20
        with pytest.raises(DataError, match=r"are mnist, not fashion-mnist; keep .* 'fashion-mnist'"):
            data.load_data("fashion-mnist", root=tmp_path)


class TestMissing:
    def test_unknown_name(self):
        with pytest.raises(DataError, match=r"unknown data set 'mnits'; did you mean 'mnist'\?"):
            data.load_data("mnits")
        with pytest.raises(DataError, match=r"known names: 'digits', .*'folder:PATH'"):
            data.load_data("/home/me/pictures")

    @pytest.mark.parametrize("name", REAL)
    def test_nowhere(self, name, tmp_path):
        with pytest.raises(DataError, match=rf"{name} is not given .*set BRANCHYNET_DATA .*or allow the download"):
            data.load_data(name, download=False)
        with pytest.raises(DataError, match=f"{name} is not in {tmp_path} and was not downloaded"):
            data.load_data(name, root=tmp_path, download=False)

    def test_no_such_root(self, tmp_path, monkeypatch):
        with pytest.raises(DataError, match=r"root='.*nothing' is no folder"):
            data.load_data("mnist", root=tmp_path / "nothing")
        monkeypatch.setenv(archives.VARIABLE, str(tmp_path / "nothing"))
        with pytest.raises(DataError, match=r"BRANCHYNET_DATA='.*nothing' is no folder"):
            data.load_data("cifar10")

    def test_some_files(self, tmp_path):
        (write_idx(tmp_path / "mnist") / IDX[2]).unlink()
        with pytest.raises(DataError, match=f"mnist lacks {IDX[2]}; add them"):
            data.load_data("mnist", root=tmp_path)
        (write_cifar(tmp_path / "cifar10") / "data_batch_3.bin").unlink()
        with pytest.raises(DataError, match=r"cifar10 lacks data_batch_3.bin"):
            data.load_data("cifar10", root=tmp_path)

    def test_size_is_for_folders(self):
        with pytest.raises(InputError, match=r"only for folder:PATH; 'digits' has a size of its own"):
            data.load_data("digits", size=(8, 8))


class TestMalformed:
    @given(arrays.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 5))), st.booleans())
    @same_place
    def test_idx_round_trip(self, tmp_path, array, packed):
        path = tmp_path / ("x.gz" if packed else "x")
        path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))
        np.testing.assert_array_equal(archives.read_idx(path, array.shape[1:]), array)

    @given(st.data(), st.booleans())
    @same_place
    def test_idx_cut_off_anywhere(self, tmp_path, draw, packed):
        content = idx(np.arange(50, dtype=np.uint8))
        content = gzip.compress(content) if packed else content
        path = tmp_path / ("x.gz" if packed else "x")
        path.write_bytes(content[: draw.draw(st.integers(0, len(content) - 1))])
        with pytest.raises(DataError, match=r"cannot read .*x.*get it again"):
            archives.read_idx(path, ())

    @given(st.binary(max_size=60))
    @same_place
    def test_idx_of_any_bytes(self, tmp_path, content):
        path = tmp_path / "x"
        path.write_bytes(content)
        try:
            assert idx(archives.read_idx(path, ())) == content
        except DataError:
            pass

    @pytest.mark.parametrize(
        ("file", "content", "message"),
        [
            (0, idx(np.zeros(60, np.uint8)), r"starts with 0x00000801, not 0x00000803"),
            (0, b"<html>" * 20, r"starts with 0x3c68746d"),
            (0, idx(np.zeros((60, 28, 27), np.uint8)), r"60 x 28 x 27 bytes; it must hold S x 28 x 28"),
            (0, idx(np.zeros((0, 28, 28), np.uint8)), r"S at least 1"),
            (0, struct.pack(">4I", 0x803, 2**31, 28, 28) + bytes(1000), r"announces 1683627180032 bytes and holds few"),
            (0, idx(np.zeros((60, 28, 28), np.uint8)) + b"\0", r"announces 47040 bytes and holds more"),
            (1, idx(np.zeros(59, np.uint8)), r"60 images but .* 59 labels"),
            (1, idx(np.full(60, 10, np.uint8)), r"training labels in .* reach 10, but there are 10 classes"),
            (3, idx(np.full(20, 255, np.uint8)), r"test labels in .* reach 255"),
        ],
    )
    def test_idx(self, tmp_path, file, content, message):
        folder = write_idx(tmp_path / "mnist")
        (folder / IDX[file]).write_bytes(gzip.compress(content))
        with pytest.raises(DataError, match=message):
            data.load_data("mnist", root=tmp_path)

    def test_not_gzip(self, tmp_path):
        (write_idx(tmp_path) / IDX[0]).write_bytes(idx(np.zeros((60, 28, 28), np.uint8)))
        with pytest.raises(DataError, match=r"cannot read .*Not a gzipped file"):
            data.load_data("mnist", root=tmp_path)

    def test_too_few_to_hold_out(self, tmp_path):
        write_idx(tmp_path, train=2)
        with pytest.raises(DataError, match=r"2 training images are too few"):
            data.load_data("mnist", root=tmp_path)

    @pytest.mark.parametrize("packed", [True, False])
    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            (
                {"data_batch_2": bytes(3072)},
                r"data_batch_2.bin must hold records of 3073 bytes but there is 3072 bytes",
            ),
            ({"test_batch": b""}, r"test_batch.bin must hold records of 3073 bytes but there is 0 bytes"),
            ({"data_batch_4": b"\x0a" + bytes(3072)}, r"training labels in .* reach 10, but there are 10 classes"),
        ],
    )
    def test_cifar(self, tmp_path, packed, changed, message):
        write_cifar(tmp_path, packed, **changed)
        with pytest.raises(DataError, match=message):
            data.load_data("cifar10", root=tmp_path)

    def test_cifar_archive_lacks_a_batch(self, tmp_path):
        write_cifar(tmp_path, True, data_batch_5=None)
        with pytest.raises(DataError, match=r"data_batch_5.bin must hold .* but there is no such file"):
            data.load_data("cifar10", root=tmp_path)

    @pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99, 0.9999])
    def test_cifar_archive_cut_off(self, tmp_path, share):
        path = write_cifar(tmp_path, True) / TAR
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        with pytest.raises(DataError, match=r"get it again"):
            data.load_data("cifar10", root=tmp_path)

    def test_cifar_archive_damaged(self, tmp_path):
        path = write_cifar(tmp_path, True) / TAR
        content = bytearray(path.read_bytes())
        content[-6] ^= 1  # in the checksum
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"CRC check failed.*get it again"):
            data.load_data("cifar10", root=tmp_path)


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
        loaded = data.load_data(f"folder:{write_images(tmp_path, ('bee', 'ant', 'cat'), count=20)}")
        assert loaded.classes == ("ant", "bee", "cat") and loaded.shape == (3, 6, 5)
        for split, count in ((loaded.train, 14), (loaded.val, 3), (loaded.test, 3)):
            assert torch.bincount(split.labels).tolist() == [count] * 3
            assert len(set(split.labels[:6].tolist())) > 1, "classes come one after the other"
        # the green of write_images is the number, the red 20 times the class in the order given
        seen = {(int(x[0, 0, 0]), int(x[1, 0, 0])) for s in (loaded.train, loaded.val, loaded.test) for x in s.images}
        assert seen == {(20 * c, i) for c in range(3) for i in range(20)}
        assert set((loaded.train.images[loaded.train.labels == 0][:, 0]).unique().tolist()) == {20}

    @given(st.lists(st.integers(3, 40), min_size=2, max_size=5))
    @settings(deadline=None, max_examples=25)
    def test_every_image_in_one_part_and_every_class_in_every_part(self, counts):
        labels = np.repeat(np.arange(len(counts)), counts)
        parts = sets._stratified(labels)
        assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
        for c, count in enumerate(counts):
            train, val, test = ((labels[part] == c).sum() for part in parts)
            assert val == test and abs(val - 0.15 * count) <= 0.55 and train >= 1

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
        assert len(data.load_data(f"folder:{tmp_path}").train) == 12

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

    def test_more_than_256_classes(self, tmp_path):
        write_images(tmp_path, tuple(f"{c:03}" for c in range(260)), count=3, size=(2, 2), mode="L", ending="bmp")
        loaded = data.load_data(f"folder:{tmp_path}")
        assert loaded.test.labels.sort().values.tolist() == list(range(260))


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


def small_split(count=37, shape=(1, 4, 5)):
    return data.Split(torch.from_numpy(numbered(count, shape)), torch.arange(count))


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


class TestGrowing:
    def test_sizes_by_epoch_over_the_same_batches(self):
        full = data.loader(small_split(), 8)
        growing = data.Growing(full, (2, 3, 5))
        assert len(growing) == len(full)
        for epoch, side in ((1, 2), (2, 3), (3, 5), (9, 5), (2, 3)):
            growing.set_epoch(epoch)
            for (x, y), (whole, labels) in zip(growing, full, strict=True):
                assert x.shape == (*whole.shape[:2], side, side) and torch.equal(y, labels)
                assert float(x.mean()) == pytest.approx(float(whole.mean()), abs=0.2)

    def test_full_size_is_left_alone(self):
        square = data.Split(torch.randint(256, (8, 1, 4, 4), dtype=torch.uint8), torch.zeros(8, dtype=torch.int64))
        full = data.loader(square, 8)
        ((x, _),), ((whole, _),) = data.Growing(full, (4,)), full
        assert torch.equal(x, whole)

    @pytest.mark.parametrize("sides", [(), (16, 0)])
    def test_wrong_sides(self, sides):
        with pytest.raises(InputError, match="sides must be one size"):
            data.Growing(data.loader(small_split(), 8), sides)


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

    def test_shift_moves_every_way_and_each_image_by_itself(self):
        images = torch.zeros(500, 1, 5, 5)
        images[:, :, 2, 2] = 1
        moved = data.shift(2)(images)
        assert (moved.sum(0)[0] > 0).all() and moved.sum() == 500

    def test_flip_crop(self):
        images = torch.arange(16.0).view(1, 1, 4, 4).expand(400, 1, 4, 4)
        mirrored = (data.flip_crop(0)(images) == images.flip(3)).flatten(1).all(1)
        kept = (data.flip_crop(0)(images) == images).flatten(1).all(1)
        assert 150 < mirrored.sum() < 250 and 150 < kept.sum() < 250

    def test_affine_by_nothing(self):
        images = torch.rand(3, 2, 6, 9)
        torch.testing.assert_close(data.affine(0, 0, 0)(images), images, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("sign", [1.0, 0.0])
    def test_affine_by_known_amounts(self, monkeypatch, sign):
        """With chance at its ends: quarter and half turns, and moves by whole pixels, are exact."""
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

    def test_affine_keeps_shapes_of_things(self, monkeypatch):
        """A quarter turn of a wide image is no stretch: a dot 3 columns from the centre goes 3 rows from it."""
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

    def test_compose_in_turn(self):
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
        # what a network sees of a file is what it saw of the same image in training, to the bit
        seen, _ = next(
            iter(data.loader(data.Split(torch.from_numpy(image)[None], torch.zeros(1, dtype=torch.int64)), 1))
        )
        np.testing.assert_array_equal(read, seen.numpy())
        data.save_image(read[0], tmp_path / "y.png")
        np.testing.assert_array_equal(data.read_image(tmp_path / "y.png", image.shape), read)

    def test_colour_and_size(self, tmp_path):
        Image.new("RGB", (40, 20), (255, 0, 0)).save(tmp_path / "red.png")
        red = data.read_image(tmp_path / "red.png", (3, 10, 10))
        assert red.shape == (1, 3, 10, 10) and (red[0, 0] == 1).all() and (red[0, 1:] == 0).all()
        grey = data.read_image(tmp_path / "red.png", (1, 20, 40))
        assert grey.shape == (1, 1, 20, 40) and grey[0, 0, 0, 0] == pytest.approx(76 / 255)
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
        with pytest.raises(DataError, match=r"cannot read the image .*none\.png \(No such file"):
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


def test_names():
    assert data.__all__ == sorted(data.__all__, key=lambda name: (not name[0].isupper(), name))
    assert all(hasattr(data, name) for name in data.__all__)
