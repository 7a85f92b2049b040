"""A complete run that the tests of the command line share."""

import pytest

from helpers.command import PAPER, call


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A complete run, made by the verbs one after the other."""
    path = tmp_path_factory.mktemp("cli") / "run"
    with pytest.MonkeyPatch.context() as patch:
        train = ("train", path, *PAPER, "--warm-start-epochs", 2, "--epochs", 3, "--batch-size", 64, "--quiet")
        assert call(patch, *train) == 0
        assert call(patch, "choose", path, "--max-drop", "2%", "--no-promise") == 0
        assert call(patch, "export", path) == 0
        bench = ("bench", path, "--batch", "1,7", "--runtime", "onnxruntime,openvino", "--json", path / "rows.json")
        assert call(patch, *bench, "--quiet") == 0
        assert call(patch, "report", path) == 0
    return path
