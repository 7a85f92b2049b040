"""Schemathesis sends what the description of the interface allows and what it does not, and reads all answers."""

import json
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest

from helpers.serving import call_json, infer, pictures, running

EXAMPLES = 2000
# Descriptions cannot say which names, shapes and thresholds fit a model, so requests that they allow may be refused.
CHECKS = ["--checks", "all", "--exclude-checks", "positive_data_acceptance"]
SLOW = {"timeout_s": 3600, "client_s": 3600}  # a machine with other programs may be slow

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(find_spec("schemathesis") is None, reason="NOT TESTED: schemathesis is not installed"),
]


def fuzzed(port, path, examples, *options, change=lambda description: None):
    """How many requests were sent; no answer has a status of 500 or more, or one that the description leaves out."""
    _, description = call_json(port, "GET", "/openapi.json")
    change(description)
    (path / "openapi.json").write_text(json.dumps(description))
    where = ["openapi.json", "--url", f"http://127.0.0.1:{port}", "--max-examples", str(examples), "--no-color"]
    where += ["--request-timeout", "600"]
    command = [sys.executable, "-m", "schemathesis.cli", "run", *where, *CHECKS, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000, cwd=path)
    assert done.returncode == 0, done.stdout + done.stderr
    return int(re.search(r"(\d+) generated", done.stdout)[1])


def answered(port, *models):
    """How many requests were answered."""
    return sum(call_json(port, "GET", f"/models/{model}/traffic")[1]["requests"] for model in models)


def test_no_request_is_a_fault_of_the_server(folder, tmp_path):
    with running(folder, **SLOW) as port:
        assert fuzzed(port, tmp_path, 70) >= EXAMPLES
        assert infer(port, "staged", pictures(3))["exit"].shape == (3,)


def test_no_request_to_load_or_unload_is_a_fault_of_the_server(folder, tmp_path):
    with running(folder, manage=True, **SLOW) as port:
        assert fuzzed(port, tmp_path, 50, "--include-path-regex", "/load$|/unload$|/index$") >= 100
        assert call_json(port, "POST", "/v2/repository/models/staged/load")[0] == 200
        assert infer(port, "staged", pictures(3))["exit"].shape == (3,)


def object_of(**properties):
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


def fits(description):
    """Describe requests that the models can answer, with any thresholds and deadlines."""
    number = {"type": "number", "minimum": -9, "maximum": 9}
    tensor = object_of(
        name={"const": "input"},
        shape={"const": [1, 1, 6, 6]},
        datatype={"const": "FP32"},
        data={"type": "array", "items": number, "minItems": 36, "maxItems": 36},
    )
    thresholds = {"type": "array", "items": {"type": ["number", "null"]}, "minItems": 2, "maxItems": 2}
    options = object_of(thresholds=thresholds, deadline_ms={"type": "number", "exclusiveMinimum": 0})
    infer = description["paths"]["/v2/models/{model}/infer"]["post"]
    infer["parameters"][0]["schema"] = {"enum": ["staged", "nested", "adaptive"]}
    fields = infer["requestBody"]["content"]["application/json"]["schema"]["properties"]
    fields["inputs"] = {"type": "array", "items": tensor, "minItems": 1, "maxItems": 1}
    fields["parameters"] = {**options, "required": []}


def test_no_thresholds_and_no_deadline_are_a_fault_of_the_server(folder, tmp_path):
    only = ["--include-path", "/v2/models/{model}/infer", "--mode", "positive"]
    with running(folder, **SLOW) as port:
        assert fuzzed(port, tmp_path, 400, *only, change=fits) >= 200
        assert answered(port, "staged", "nested", "adaptive") >= 50
