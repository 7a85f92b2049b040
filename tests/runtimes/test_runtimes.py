"""Files of every layout give the answers of ONNX Runtime on the CPU in every runtime of `load`."""

import onnxruntime
import pytest

from runtimes.cells import LAYOUTS, NETWORKS, check, make

HERE = {
    "onnxruntime": True,
    "openvino": True,
    "onnxruntime-cuda": "CUDAExecutionProvider" in onnxruntime.get_available_providers(),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    make(folder)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("runtime", HERE)
def test_a_file_gives_the_same_answers(folder, runtime, network, layout):
    if not HERE[runtime]:
        pytest.skip("needs an NVIDIA GPU and onnxruntime-gpu")
    check(folder, network, layout, runtime)
