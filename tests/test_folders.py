"""Folders that several processes replace at the same time are whole."""

import subprocess
import sys

WRITER = r"""
import sys
from branchynet.folders import replacing_folder
for _ in range(50):
    with replacing_folder(sys.argv[1], "stages.json", r"stage_\d+\.onnx") as folder:
        for name in ("stages.json", "stage_1.onnx"):
            (folder / name).write_text(sys.argv[2])
"""


def test_processes_that_write_one_folder_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "net"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, path, mark]) for mark in "abc"]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert [entry.name for entry in tmp_path.iterdir()] == ["net"]
    assert sorted(file.name for file in path.iterdir()) == ["stage_1.onnx", "stages.json"]
    assert len({file.read_text() for file in path.iterdir()}) == 1
