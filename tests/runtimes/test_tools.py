"""What other tools make of exported files is what docs/runtimes.md says, at the versions that it names."""

import json
from pathlib import Path

import pytest

from runtimes.tools import LAYOUTS, TOOLS, make, outcome, version_of

STATED = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "runtimes.json").read_text())["tools"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    make(folder)
    return folder


def test_every_tool_is_stated():
    assert STATED.keys() == TOOLS.keys()


@pytest.mark.filterwarnings("ignore")  # of the tools
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tool", TOOLS)
def test_the_outcome_is_the_stated_one(folder, tool, layout):
    for one in (tool, *(name for name in TOOLS if TOOLS[name][0] in ("onnx", "onnxruntime"))):
        if version_of(one) != STATED[one]["version"]:
            pytest.skip(f"docs/runtimes.md is about {one} {STATED[one]['version']}; {version_of(one)} is installed")
    found, stated = outcome(folder, layout, tool), STATED[tool]["layouts"][layout]
    assert found.get("thresholds") == stated.get("thresholds")
    lossy = TOOLS[tool][2]
    if lossy and "error" not in stated:  # how many answers change depends on the processor
        assert found["result"] in ("same answers", "other numbers", "other answers")
        assert max(found["moved"].values()) <= 0.1
        return
    assert found["result"] == stated["result"]
