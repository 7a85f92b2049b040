"""Files are written whole or not at all."""

import os
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from branchynet.errors import FileError
from branchynet.files import read_json, replacing, write_json

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(values)
def test_json_comes_back(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("json") / "value.json"
    write_json(path, value)
    assert read_json(path) == value
    assert [p.name for p in path.parent.iterdir()] == ["value.json"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, object()])
def test_what_json_cannot_hold_leaves_the_old_file(tmp_path, value):
    path = tmp_path / "value.json"
    write_json(path, {"old": 1})
    with pytest.raises((TypeError, ValueError)):
        write_json(path, [value])
    assert read_json(path) == {"old": 1} and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("old", [None, "old"])
@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, FileError, MemoryError])
def test_a_block_that_fails_leaves_the_old_file_and_its_own_error(tmp_path, old, error):
    path = tmp_path / "file.txt"
    if old:
        path.write_text(old)
    with pytest.raises(error, match="mine"), replacing(path) as temporary:
        temporary.write_text("half")
        raise error("mine")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == ({"file.txt": old} if old else {})


def test_the_old_file_stays_while_the_new_one_is_written(tmp_path):
    path = tmp_path / "file.onnx"
    path.write_text("old")
    with replacing(path) as temporary:
        assert temporary.parent == tmp_path and temporary != path and temporary.suffix == ".onnx"
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_errors_of_the_system_become_ours_and_name_the_final_file(tmp_path):
    path = tmp_path / "file.txt"
    with pytest.raises(
        FileError, match=r"cannot write .*/file\.txt: No space left on device; free some space"
    ) as raised:
        with replacing(path):
            raise OSError(28, "No space left on device")
    assert isinstance(raised.value, OSError) and not list(tmp_path.iterdir())


def test_folders_are_made_and_files_in_the_way_are_named(tmp_path):
    write_json(tmp_path / "a" / "b" / "c.json", 1)
    assert read_json(tmp_path / "a" / "b" / "c.json") == 1
    for wrong in (tmp_path / "a" / "b" / "c.json" / "d.json", tmp_path / "a", tmp_path / ("x" * 300)):
        with pytest.raises(FileError, match=f"cannot write {wrong}"):
            write_json(wrong, 2)
    assert read_json(tmp_path / "a" / "b" / "c.json") == 1
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["c.json"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_file_has_the_mode_of_any_new_file(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_json(tmp_path / "ours.json", 1)
        (tmp_path / "plain.json").write_text("1")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours.json", "plain.json")]
    assert modes[0] == modes[1]


def test_writers_at_once_leave_one_whole_file(tmp_path):
    path = tmp_path / "file.txt"
    texts = [str(i) * 50_000 for i in range(8)]

    def write(text):
        for _ in range(20):
            with replacing(path) as temporary:
                temporary.write_text(text)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            assert path.read_text() in texts
    assert path.read_text() in texts and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", ["", "{", '{"a": 1', "nonsense", b"\xff\xfe\x00"])
def test_what_is_not_json_is_named(tmp_path, content):
    path = tmp_path / "file.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FileError, match=r"file\.json is not valid JSON .*make it again"):
        read_json(path)


def test_a_missing_file_is_named(tmp_path):
    for missing in (tmp_path / "none.json", tmp_path, Path(tmp_path) / "a" / "b"):
        with pytest.raises(FileError, match=f"cannot read {missing}"):
            read_json(missing)
