"""The examples and the examples in docstrings run and show what they claim."""

import doctest
import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import torch

import branchynet

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


@pytest.mark.parametrize(
    ("name", "size", "least", "most"),
    [
        ("segmentation", {"epochs": 2, "samples": 640}, 0.8, 1),  # pixels right; three of four are background
        ("multi_label", {"epochs": 3, "samples": 1000}, 0.75, 1),  # labels right; guessing reaches 0.5
        ("regression", {"epochs": 4, "samples": 3000}, 0, 0.3),  # mean error; always predicting the mean has 0.37
    ],
)
def test_other_tasks(name, size, least, most, capsys):
    example(name).main(**size, progress=False)
    share, reached = re.search(r"exit 1: ([\d.]+) [a-z ]+: ([\d.]+)", capsys.readouterr().out).groups()
    assert 0 <= float(share) <= 1 and least <= float(reached) <= most


def test_examples_are_short():
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) < 80, path


def docstring_examples():
    names = {name: getattr(branchynet, name) for name in branchynet.__all__}
    for module in (value for value in list(names.values()) if inspect.ismodule(value)):
        names |= {name: getattr(module, name) for name in getattr(module, "__all__", ())}
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [
        test
        for name, value in names.items()
        if inspect.isclass(value) or inspect.isfunction(value)
        for test in finder.find(value, name, globs=names)
    ]
    return [pytest.param(test, id=test.name) for test in found if test.examples]


@pytest.mark.parametrize("test", docstring_examples())
def test_docstring_examples(test, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    report = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(test, out=report.append)
    assert not report, "".join(report)
