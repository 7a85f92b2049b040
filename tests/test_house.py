"""The size and the shape of the code: files, functions, signatures, names of modules, and what an import costs."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import branchynet

SOURCE = Path(branchynet.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
MOST_LINES, MOST_BODY, MOST_PARAMETERS, MOST_OF_A_VERB = 350, 80, 8, 12
VERBS = {name for name in branchynet.__all__ if inspect.isfunction(getattr(branchynet, name))}
COMMANDS = [SOURCE / "cli" / name for name in ("verbs.py", "exporting.py", "serving.py")]


def functions(path):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


def body_lines(function):
    """Lines without the docstring."""
    lines = function.end_lineno - function.lineno + 1
    documented = ast.get_docstring(function, clean=False) is not None
    return lines - (function.body[0].end_lineno - function.body[0].lineno + 1 if documented else 0)


def parameters(function):
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def named(path, function):
    return f"{path.relative_to(SOURCE)}: {function.name}"


def test_no_file_is_long():
    files = [*FILES, *Path(__file__).parent.rglob("*.py")]
    assert {str(path) for path in files if len(path.read_text().splitlines()) > MOST_LINES} == set()


def test_no_function_is_long():
    long = [named(p, f) for p in FILES for f in functions(p) if body_lines(f) > MOST_BODY]
    assert long == []


def test_no_signature_is_long():
    long = [
        f"{named(path, function)} has {parameters(function)}"
        for path in FILES
        if path not in COMMANDS
        for function in functions(path)
        if parameters(function) > (MOST_OF_A_VERB if function.name in VERBS else MOST_PARAMETERS)
    ]
    assert long == []


def test_no_module_has_the_name_of_a_public_function():
    modules = {path.parent.name if path.name == "__init__.py" else path.stem for path in FILES}
    assert modules & VERBS == set()


def test_types_are_told_of_every_public_name():
    stub = ast.parse((SOURCE / "__init__.pyi").read_text())
    named = [alias.asname for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(named) == sorted([*branchynet.__all__, "nn"])  # which a star import leaves out


@pytest.mark.parametrize("heavy", ["torch", "onnx", "onnxruntime", "scipy"])
def test_an_import_alone_imports_little(heavy):
    code = f"import sys, branchynet; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
