import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from branchynet import data
from branchynet.data import archives, datasets
from branchynet.errors import DataError, InputError
from helpers.image_files import IDX, PLACE, REAL, SMALL, TAR, idx, numbers, same_place, write_cifar, write_idx

pytestmark = pytest.mark.usefixtures("own_cache")


class TestArchives:
    def check(self, name, root, sizes):
        loaded = data.load_data(name, root=root, download=False)
        assert (len(loaded.train), len(loaded.val), len(loaded.test)) == sizes
        assert loaded.name == name and len(loaded.classes) == 10
        assert loaded.shape == ((3, 32, 32) if name == "cifar10" else (1, 28, 28))
        for split in (loaded.train, loaded.val, loaded.test):
            assert split.images.dtype == torch.uint8 and split.labels.dtype == torch.int64
            assert set(split.labels.tolist()) <= set(range(10))
        return loaded

    @pytest.mark.parametrize("name", REAL)
    def test_published_files(self, name):
        if not (PLACE and archives._find(name, Path(PLACE))):
            pytest.skip(f"needs {name} in the folder that {archives.VARIABLE} names")
        loaded = self.check(name, PLACE, REAL[name])
        assert tuple(loaded.test.labels[:10].tolist()) == archives.ARCHIVES[name].opening
        assert set(loaded.train.labels.tolist()) == set(loaded.val.labels.tolist()) == set(range(10))

    @pytest.mark.parametrize("name", SMALL)
    def test_smaller_files_of_the_same_format(self, name, tmp_path):
        (write_cifar if name == "cifar10" else write_idx)(tmp_path / archives.ARCHIVES[name].folders[0])
        self.check(name, tmp_path, SMALL[name])

    @pytest.mark.parametrize("where", ["mnist", "MNIST/raw", "MNIST", "."])
    @pytest.mark.parametrize("packed", [True, False])
    def test_folders_of_mnist(self, tmp_path, where, packed):
        write_idx(tmp_path / where, packed=packed)
        loaded = data.load_data("mnist", root=tmp_path, download=False)
        assert sorted(numbers(loaded.train) + numbers(loaded.val)) == list(range(60))
        assert numbers(loaded.test) == list(range(20))
        for split in (loaded.train, loaded.val, loaded.test):
            assert split.labels.tolist() == [n % 10 for n in numbers(split)]

    @pytest.mark.parametrize("where", ["cifar-10-batches-bin", "cifar10", "cifar10/cifar-10-batches-bin", "."])
    @pytest.mark.parametrize("packed", [True, False])
    def test_folders_of_cifar10(self, tmp_path, where, packed):
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

    def test_the_split_does_not_depend_on_random_states(self, tmp_path):
        write_idx(tmp_path)
        splits = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            before = torch.get_rng_state(), np.random.get_state()[1].tolist()
            loaded = data.load_data("mnist", root=tmp_path)
            assert torch.equal(before[0], torch.get_rng_state()) and before[1] == np.random.get_state()[1].tolist()
            splits.append((numbers(loaded.train), numbers(loaded.val)))
        assert splits[0] == splits[1]

    def test_the_split_never_changes(self):
        """With a changed split, training images of old runs would become test images of new ones."""
        assert datasets._order(10).tolist() == [2, 8, 4, 9, 1, 6, 7, 3, 0, 5]
        assert hashlib.sha256(datasets._order(60000).tobytes()).hexdigest().startswith("7e036c4b3f1dd66e")

    def test_files_of_another_data_set(self, tmp_path):
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
    def test_missing_without_download(self, name, tmp_path):
        with pytest.raises(DataError, match=rf"{name} is not given .*set BRANCHYNET_DATA .*or allow the download"):
            data.load_data(name, download=False)
        with pytest.raises(DataError, match=f"{name} is not in {tmp_path} and was not downloaded"):
            data.load_data(name, root=tmp_path, download=False)

    def test_root_does_not_exist(self, tmp_path, monkeypatch):
        with pytest.raises(DataError, match=r"root='.*nothing' is not a folder"):
            data.load_data("mnist", root=tmp_path / "nothing")
        monkeypatch.setenv(archives.VARIABLE, str(tmp_path / "nothing"))
        with pytest.raises(DataError, match=r"BRANCHYNET_DATA='.*nothing' is not a folder"):
            data.load_data("cifar10")

    def test_partial_files(self, tmp_path):
        (write_idx(tmp_path / "mnist") / IDX[2]).unlink()
        with pytest.raises(DataError, match=f"mnist lacks {IDX[2]}; add them"):
            data.load_data("mnist", root=tmp_path)
        (write_cifar(tmp_path / "cifar10") / "data_batch_3.bin").unlink()
        with pytest.raises(DataError, match=r"cifar10 lacks data_batch_3.bin"):
            data.load_data("cifar10", root=tmp_path)

    def test_size_is_for_folders(self):
        with pytest.raises(InputError, match=r"only for folder:PATH; 'digits' has a fixed size"):
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
            (0, struct.pack(">4I", 0x803, 10**5, 28, 28) + bytes(1000), r"announces 78400000 bytes and holds few"),
            (0, struct.pack(">4I", 0x803, 2**31, 28, 28) + bytes(1000), r"announces 1,683,627,180,032 bytes, more"),
            (0, struct.pack(">4I", 0x803, 684785, 28, 28) + bytes(1000), r"announces 536,871,440 bytes, more"),
            (1, struct.pack(">2I", 0x801, 2**29 + 1) + bytes(1000), r"announces 536,870,913 bytes, more"),
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
                r"data_batch_2.bin must be a multiple of 3073 bytes long, but it has 3072 bytes",
            ),
            ({"test_batch": b""}, r"test_batch.bin must be a multiple of 3073 bytes long, but it has 0 bytes"),
            ({"data_batch_4": b"\x0a" + bytes(3072)}, r"training labels in .* reach 10, but there are 10 classes"),
        ],
    )
    def test_cifar(self, tmp_path, packed, changed, message):
        write_cifar(tmp_path, packed, **changed)
        with pytest.raises(DataError, match=message):
            data.load_data("cifar10", root=tmp_path)

    @pytest.mark.parametrize("packed", [True, False])
    def test_cifar_of_many_bytes(self, tmp_path, packed, monkeypatch):
        write_cifar(tmp_path, packed)
        monkeypatch.setattr(archives, "MOST_BYTES", 6 * 20 * 3073 - 6)  # the test batch has 20 records
        with pytest.raises(DataError, match=r"test_batch.bin holds 61,460 bytes, more than 61,459"):
            data.load_data("cifar10", root=tmp_path)

    def test_cifar_archive_lacks_a_batch(self, tmp_path):
        write_cifar(tmp_path, True, data_batch_5=None)
        with pytest.raises(DataError, match=r"data_batch_5.bin must be .* but it is missing"):
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


def test_names():
    assert data.__all__ == sorted(data.__all__, key=lambda name: (not name[0].isupper(), name))
    assert all(hasattr(data, name) for name in data.__all__)
