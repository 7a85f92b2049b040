"""Providers and threads of `load`."""

import importlib.util

import onnx_ir as ir
import pytest

from branchynet import Policy, load
from branchynet.deploy.assembly import assemble
from branchynet.errors import InputError
from helpers.loop import same
from helpers.networks import draw, two_inputs
from helpers.onnx_graphs import flat_of

RUNTIMES = ["onnxruntime"] + ["openvino"] * (importlib.util.find_spec("openvino") is not None)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("options") / "model.onnx"
    ir.save(assemble(flat_of(two_inputs)[2], Policy(thresholds=(0.9, 1.0))), path)
    return path


@pytest.mark.parametrize(
    "providers",
    [
        "CPUExecutionProvider",
        ("CPUExecutionProvider", {}),
        [("CPUExecutionProvider", {})],
        [["CPUExecutionProvider", {}]],
        (("CPUExecutionProvider", {"arena_extend_strategy": "kSameAsRequested"}),),
    ],
)
def test_providers_are_names_or_names_with_options(file, providers):
    x = draw(flat_of(two_inputs)[1], 3, 0)
    same(load(file, providers=providers)(*x), load(file)(*x))


@pytest.mark.parametrize(
    ("providers", "message"),
    [
        ([("AbacusExecutionProvider", {"beads": 10})], "has no 'AbacusExecutionProvider'; it has"),
        ([("CPUExecutionProvider", 5)], r"names, or pairs of a name and a dict of options; got \('CPU"),
        ([("CPUExecutionProvider",)], r"names, or pairs"),
        ([3], "names, or pairs .*got 3"),
        (7, "names, or pairs .*got 7"),
        ([({}, {})], r"names, or pairs .*got \{\}"),
    ],
)
def test_malformed_and_missing_providers_are_reported(file, providers, message):
    with pytest.raises(InputError, match=message):
        load(file, providers=providers)


@pytest.mark.parametrize("threads", [0, -2, 1.5, "2", [1]])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_wrong_numbers_of_threads_are_refused(file, runtime, threads):
    with pytest.raises(InputError, match=r"threads must be (at least 1|a whole number)"):
        load(file, threads=threads, runtime=runtime)
