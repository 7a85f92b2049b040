"""The examples run, and reach what they show."""

import importlib.util
import re
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_own_network(capsys):
    example("own_network").main(epochs=3, progress=False)
    right = float(re.search(r"right: ([\d.]+)", capsys.readouterr().out)[1])
    assert right > 0.8


def test_own_loop(capsys):
    example("own_loop").main(epochs=3)
    assert float(re.findall(r"([\d.]+)%", capsys.readouterr().out)[-1]) > 80


def test_examples_are_short():
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) < 80, path
