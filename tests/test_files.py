"""Files are written atomically."""

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from branchynet import files
from branchynet.errors import FileError
from branchynet.files import checksum, locked, read_json, remove_partial, replacing, write_json

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


def node(path, kind):
    """Create something at `path` that is not a regular file."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    else:
        try:
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        except OSError:
            pytest.skip("only root makes devices")
    return path


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs nodes of Unix")
@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder"])
def test_what_is_no_regular_file_stays(tmp_path, kind, linked):
    path = node(tmp_path / "node", kind)
    before = path.stat()
    if linked:
        path = tmp_path / "link"
        path.symlink_to("node")
    with pytest.raises(FileError, match=rf"cannot write {path}: it is a .*regular file"):
        write_json(path, 1)
    after = (tmp_path / "node").stat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert names(tmp_path) == (["link", "node"] if linked else ["node"])


@pytest.mark.parametrize("old", [None, "old"])
def test_links_stay_and_their_target_is_written(tmp_path, old):
    (tmp_path / "there").mkdir()
    target, link, longer = tmp_path / "there" / "file.json", tmp_path / "link.json", tmp_path / "longer"
    link.symlink_to("there/file.json")
    longer.symlink_to("link.json")
    if old:
        target.write_text(old)
    for value, path in enumerate((link, longer)):
        write_json(path, value)
        assert read_json(target) == value == read_json(path) and path.is_symlink()
    assert names(tmp_path / "there") == ["file.json"]


def test_a_circle_of_links_is_named(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(FileError, match=r"cannot write .*a: "):
        write_json(tmp_path / "a", 1)
    assert (tmp_path / "a").is_symlink() and names(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_names_that_no_file_has_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileError, match=r"path|null"):
        write_json(name, 1)
    assert names(tmp_path) == []


@pytest.mark.parametrize("inside", ["file", "file/run", "file/run/file"])
def test_a_file_in_place_of_a_folder_is_named(tmp_path, inside):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("file")
    for write in (lambda: write_json(tmp_path / inside / "x.json", 1), lambda: locked(tmp_path / inside).__enter__()):
        with pytest.raises(FileError, match=rf"cannot write .*: {tmp_path / 'file'} is a file, not a folder"):
            write()
    with pytest.raises(FileError, match=r"cannot write .*: .*link is a file, not a folder"):
        files.make_folder(tmp_path / "link" / "run")


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


# Killed and concurrent processes


WRITER = """
import sys, time
from branchynet.files import locked, replacing
with locked(sys.argv[1]), replacing(sys.argv[1] + "/file.txt") as temporary:
    temporary.write_text("half")
    print(temporary.name, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def writer(tmp_path):
    """Another process that is writing ``file.txt`` in a locked folder, and the name of its temporary file."""
    child = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        yield child, child.stdout.readline().strip()
    finally:
        child.kill()
        child.communicate()


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


@pytest.mark.skipif(files.fcntl is None, reason="needs file locks of Unix")
def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path, writer):
    child, half = writer
    (tmp_path / ".other-abc.partial.txt").write_text("of another file")
    with replacing(tmp_path / "file.txt") as temporary:
        temporary.write_text("new")
    remove_partial(tmp_path / "file.txt")
    assert names(tmp_path) == sorted([half, ".other-abc.partial.txt", "file.txt"])
    child.send_signal(signal.SIGKILL)
    child.wait()
    write_json(tmp_path / "file.json", 1)  # another file
    assert half in names(tmp_path)
    with replacing(tmp_path / "file.txt") as temporary:
        temporary.write_text("newer")
    assert names(tmp_path) == sorted([".other-abc.partial.txt", "file.json", "file.txt"])
    assert (tmp_path / "file.txt").read_text() == "newer"


def test_a_folder_is_one_processes(tmp_path, writer):
    child, _ = writer
    with pytest.raises(FileError, match=rf"{tmp_path} is in use: another process"), locked(tmp_path):
        pass
    with locked(tmp_path / "other"):
        pass
    child.send_signal(signal.SIGKILL)
    child.wait()
    with locked(tmp_path):  # the lock of a killed process is released
        pass


def test_a_thread_may_lock_again_and_others_may_not(tmp_path):
    found = []

    def other():
        try:
            with locked(tmp_path):
                found.append("locked")
        except FileError as error:
            found.append(str(error))

    with locked(tmp_path), locked(tmp_path / "." / "x" / ".."):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(found) == 1 and "in use" in found[0]
    other()
    assert found[1:] == ["locked"]


def test_a_folder_that_cannot_be_locked_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"cannot write .*file"), locked(tmp_path / "file"):
        pass


def test_the_content_reaches_the_disk_before_the_name(tmp_path, monkeypatch):
    done, sync, rename = [], os.fsync, Path.replace

    def synced(handle):
        done.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else os.pread(handle, 100, 0))
        sync(handle)

    def renamed(path, target):
        done.append("name")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    with replacing(tmp_path / "x.txt") as temporary:
        temporary.write_text("new")
    assert done == [b"new", "name", "folder"]


@pytest.mark.parametrize("name", ["a[b", "a*b", "a?b.c", "[red]", "a\nb"])
def test_names_with_signs_of_patterns_are_names(tmp_path, name):
    path = tmp_path / f"{name}.txt"
    for text in ("1", "2"):
        with replacing(path) as temporary:
            temporary.write_text(text)
    assert path.read_text() == "2" and names(tmp_path) == [path.name]


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", "1e400", "-1e400", "[" * 10**5, '{"a":' * 10**5, "1" * 10**4])
def test_json_that_no_number_or_stack_can_hold_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(FileError, match=r"x\.json is not valid JSON"):
        read_json(tmp_path / "x.json")


def test_a_huge_file_is_not_read_as_json(tmp_path):
    with (tmp_path / "x.json").open("wb") as stream:
        stream.truncate(files.MOST_JSON + 1)  # a sparse file
    with pytest.raises(FileError, match=r"more than"):
        read_json(tmp_path / "x.json")


parts = st.lists(st.tuples(st.text(max_size=4), st.text(max_size=4) | st.binary(max_size=4)), max_size=4)


@given(parts, parts)
def test_other_contents_have_other_checksums(one, other):
    def plain(value):
        return [(name, content.encode() if isinstance(content, str) else content) for name, content in value]

    assert (checksum(one) == checksum(other)) == (plain(one) == plain(other))


def test_systems_without_file_locks_write_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    (tmp_path / ".x-abc.partial.json").write_text("half")
    for value in (1, 2):
        write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == 2
    assert names(tmp_path) == [".x-abc.partial.json", "x.json"]  # another process may still be writing it
