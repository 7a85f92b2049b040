"""Archives of arrays: what is written can be read, and what unpacks to far more than the file is not unpacked."""

import io
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib import format as npy

from branchynet import ExitRecord, array_files
from branchynet.array_files import most_unpacked, read_arrays, write_arrays
from branchynet.errors import FileError

PIECE = bytes(1 << 20)


def bomb(path, samples, method=zipfile.ZIP_DEFLATED):
    """Write a record of `samples` samples, two exits and 16 classes whose outputs are zeros; return their bytes."""
    head = io.BytesIO()
    npy.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": (samples, 2, 16)})
    size = samples * 2 * 16 * 4
    with zipfile.ZipFile(path, "w", method) as archive, archive.open("outputs.npy", "w") as member:
        member.write(head.getvalue())
        for start in range(0, size, len(PIECE)):
            member.write(PIECE[: size - start])
    with zipfile.ZipFile(path, "a", method) as archive, archive.open("labels.npy", "w") as member:
        np.save(member, np.zeros(samples, np.int64))
    with zipfile.ZipFile(path) as archive:
        return sum(entry.file_size for entry in archive.infolist())


def test_a_small_file_that_unpacks_to_much_is_refused_before_it_is_unpacked(tmp_path):
    path = tmp_path / "record.npz"
    size = bomb(path, samples=1 << 21)
    assert size > 2**28 and path.stat().st_size < 2**20
    tracemalloc.start()
    try:
        with pytest.raises(
            FileError, match=rf"record\.npz \(it would unpack to {size} bytes, more than {2**28}\); make"
        ):
            ExitRecord.load(path)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_the_same_file_of_few_samples_is_read(tmp_path):
    bomb(tmp_path / "record.npz", samples=1000)
    assert ExitRecord.load(tmp_path / "record.npz").samples == 1000


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_methods_are_refused(tmp_path, method):
    """Python unpacks these without a limit, whatever size the archive declares."""
    bomb(tmp_path / "record.npz", samples=1000, method=method)
    with pytest.raises(FileError, match="another method than deflate"):
        ExitRecord.load(tmp_path / "record.npz")


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3000), st.sampled_from([np.float32, np.int64, np.uint8])), min_size=1, max_size=3
    ),
    st.sampled_from([0, 1]),
    st.integers(1, 200),
    st.integers(0, 20_000),
)
def test_whatever_is_written_can_be_read(arrays, spread, ratio, free):
    """Also zeros, which compress to less than the reader's limit allows."""
    made = {f"a{i}": (np.arange(size) * spread % 251).astype(dtype) for i, (size, dtype) in enumerate(arrays)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(array_files, "_ANY", free + 1200)  # the headers of three arrays
        patch.setattr(array_files, "_RATIO", ratio)
        stream = io.BytesIO()
        write_arrays(stream, made)
        found = read_arrays(stream, most_unpacked(stream.tell()))
    assert found.keys() == made.keys()
    for name, array in made.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array)


def test_only_arrays_of_constants_are_stored_uncompressed(monkeypatch):
    monkeypatch.setattr(array_files, "_ANY", 1000)
    zeros, mixed = np.zeros(100_000), np.random.default_rng(0).integers(0, 2, 100_000).astype(float)
    for array, compressed in ((zeros, False), (mixed, True)):
        stream = io.BytesIO()
        write_arrays(stream, {"a": array})
        assert (len(stream.getvalue()) < array.nbytes) == compressed


def test_no_bit_of_the_table_of_contents_hides_an_array(tmp_path):
    """A length in it may swallow the entries behind it, those of the checksum and of the network's fingerprint."""
    path = tmp_path / "record.npz"
    rng = np.random.default_rng(0)
    right = ExitRecord(outputs=rng.normal(size=(9, 2, 3)), labels=rng.integers(3, size=9), network="abc-def")
    right.save(path)
    content = path.read_bytes()
    for bit in range(8 * content.index(b"PK\1\2"), 8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            found = ExitRecord.load(path)
        except FileError as error:
            assert path.name in str(error)
        else:
            assert (found.digest, found.network) == (right.digest, right.network)
