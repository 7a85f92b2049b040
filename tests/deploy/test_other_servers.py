"""Files for other servers: read by the published schemas, and run by the rules in the servers' documentation."""

import asyncio
import doctest
import itertools
import json
import re
import subprocess
import sys
import types

import numpy as np
import openvino
import pytest
import torch
import yaml
from torch import nn

from branchynet import BranchyNet, Policy, export, load
from branchynet.deploy.other_servers import docker_context, kserve, openvino_server, triton_repository
from branchynet.errors import FileError, InputError
from helpers import triton_repository as triton
from helpers.serving import LABELS, network, pictures, until, write_models

NAMES = ("label", "exit", "score", "output")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


def check_equal(found, wanted):
    """Triton's tensors have a dimension besides the batch; other batches may round differently."""
    for name in NAMES:
        right = getattr(wanted, name)
        right = right[:, None] if right.ndim == 1 else right
        assert found[name].dtype == right.dtype and found[name].shape == right.shape
        np.testing.assert_allclose(found[name], right, rtol=1e-5, atol=1e-6)


def test_a_nested_file_is_a_triton_model_with_dynamic_batching(models, tmp_path):
    top = triton_repository(models / "nested.onnx", tmp_path / "repository", name="digits", max_batch=16)
    config, x = triton.read_config(top / "digits"), pictures(16)
    assert (config.name, config.backend, config.max_batch_size) == ("digits", "onnxruntime", 16)
    assert config.HasField("dynamic_batching") and [one.name for one in config.input] == ["input"]
    check_equal(triton.run(top / "digits", config, {"input": x}), load(models / "nested.onnx")(x))
    files = {one.name: one.label_filename for one in config.output}
    assert files["output"] == "labels.txt" and (top / "digits" / "labels.txt").read_text().split() == LABELS
    assert load(top / "digits" / "1" / "model.onnx").labels == tuple(LABELS)


def test_a_file_whose_thresholds_are_inputs_takes_them_per_sample_in_triton(models, tmp_path):
    top = triton_repository(models / "adaptive.onnx", tmp_path / "repository")
    config, x = triton.read_config(top / "model"), pictures(9)
    each = [np.linspace(0, 1.2, 9, dtype=np.float32), np.linspace(1.2, 0, 9, dtype=np.float32)]
    found = triton.run(
        top / "model", config, {"input": x, **{f"threshold_{n}": t[:, None] for n, t in enumerate(each, 1)}}
    )
    wanted = load(models / "adaptive.onnx")(x, thresholds=each)
    assert {*wanted.exit} == {1, 2, 3}
    check_equal(found, wanted)


def answered(model, batches, thresholds=None):
    requests = [
        types.SimpleNamespace(tensors=[triton.Tensor("input", x), *(triton.Tensor(*one) for one in (thresholds or ()))])
        for x in batches
    ]
    answers = asyncio.run(model.execute(requests))
    assert not any(answer.has_error() for answer in answers), answers[0].error().message()
    return [{one.tensor_name: one.as_numpy() for one in answer.tensors} for answer in answers]


def test_the_stages_in_triton_answer_as_the_engine_and_only_for_samples_that_stay(models, tmp_path):
    engine = load(models / "staged", threads=1)
    top = triton_repository(models / "staged", tmp_path / "repository", name="digits")
    config, called = triton.read_config(top / "digits"), []
    assert config.backend == "python" and {one.name: one.optional for one in config.input} == {
        "input": False, "threshold_1": True, "threshold_2": True,
    }  # fmt: skip
    assert {path.name for path in top.iterdir()} == {"digits", *(f"digits_stage_{n}" for n in (1, 2, 3))}
    model = triton.python_model(top, "digits", called)
    batches = [pictures(n, n) for n in (1, 5, 40)]
    found = answered(model, batches)
    for answer, x in zip(found, batches, strict=True):
        check_equal(answer, engine(x))
        for one in config.output:
            assert answer[one.name].shape[1:] == tuple(one.dims)
    exits = np.concatenate([engine(x).exit for x in batches])
    for stage in (1, 2, 3):
        assert sum(n for name, n in called if name == f"digits_stage_{stage}") == (exits >= stage).sum()
    each = [np.linspace(0, 1.2, 7, dtype=np.float32), np.full(7, 0.6, np.float32)]
    given = [(f"threshold_{n}", t[:, None]) for n, t in enumerate(each, 1)]
    check_equal(answered(model, [pictures(7)], given)[0], engine(pictures(7), thresholds=each))


def test_a_stage_that_fails_in_triton_is_told_in_the_answer(models, tmp_path):
    top = triton_repository(models / "staged", tmp_path / "repository", name="digits")
    (top / "digits_stage_2" / "1" / "model.onnx").write_bytes(b"")
    model = triton.python_model(top, "digits", [])
    (answer,) = asyncio.run(model.execute([types.SimpleNamespace(tensors=[triton.Tensor("input", pictures(40))])]))
    assert answer.has_error() and answer.error().message().startswith("stage 2 failed: ")


def test_openvino_model_server_gets_a_configuration_and_a_model_that_runs(models, tmp_path):
    top = openvino_server(models / "nested.onnx", tmp_path / "server", name="digits")
    (one,) = json.loads((top / "config.json").read_text())["model_config_list"]
    assert one["config"]["name"] == "digits" and one["config"]["target_device"] == "CPU"
    x, wanted = pictures(7), load(models / "nested.onnx")(pictures(7))
    core = openvino.Core()
    compiled = core.compile_model(
        top / one["config"]["base_path"] / "1" / "model.onnx", "CPU", one["config"]["plugin_config"]
    )
    found = compiled({"input": x})
    assert found["label"].tolist() == wanted.label.tolist() and found["exit"].tolist() == wanted.exit.tolist()


def instructions(path):
    """The instructions of a Dockerfile, continued lines joined; each has at most one of a kind here."""
    lines = path.read_text().replace("\\\n", "").splitlines()
    return {line.partition(" ")[0]: line.partition(" ")[2] for line in lines}


@pytest.mark.parametrize("model", ["nested.onnx", "staged"])
def test_the_commands_of_a_dockerfile_serve_the_model_and_tell_its_health(models, tmp_path, model):
    top = docker_context(models / model, tmp_path / "context", name="digits")
    found = instructions(top / "Dockerfile")
    assert list(found) == ["FROM", "ARG", "RUN", "COPY", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"]
    assert found["COPY"] == "models /models" and found["USER"] == "10001" and "torch" not in found["RUN"]
    entry, options = json.loads(found["ENTRYPOINT"]), json.loads(found["CMD"])
    assert entry == ["branchynet", "serve", "/models", "--host", "0.0.0.0"]
    health = json.loads(found["HEALTHCHECK"].partition("CMD ")[2])
    assert options == ["--port", "8000", "--grpc-port", "8001"] and ":8000/" in health[2]
    command = [sys.executable, "-m", "branchynet", "serve", str(top / "models"), "--port", "0", "--grpc-port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stderr.readline()
        port = re.search(r"serving digits at http://127\.0\.0\.1:(\d+)", line)[1]
        check = [sys.executable, "-c", health[2].replace(":8000/", f":{port}/")]
        until(lambda: subprocess.run(check, capture_output=True).returncode == 0)
    finally:
        process.terminate()
        process.communicate(timeout=20)
    assert process.returncode == 0 and subprocess.run(check, capture_output=True).returncode == 1


def test_a_service_of_kserve_runs_the_image_without_rights(tmp_path):
    found = yaml.safe_load(
        kserve(tmp_path / "service.yaml", image="registry.example/digits:1", name="digits").read_text()
    )
    assert (found["apiVersion"], found["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    assert found["metadata"] == {"name": "digits"}
    (container,) = found["spec"]["predictor"]["containers"]
    assert container["name"] == "kserve-container" and container["image"] == "registry.example/digits:1"
    port = container["ports"][0]["containerPort"]
    assert container["args"] == ["--port", str(port)]
    assert container["readinessProbe"]["httpGet"] == {"path": "/v2/health/ready", "port": port}
    assert container["securityContext"]["runAsNonRoot"] is True


@pytest.mark.parametrize("function", [triton_repository, kserve])
def test_docstring_examples(function, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (test,) = doctest.DocTestFinder().find(function, globs={})
    report = []
    assert doctest.DocTestRunner().run(test, out=report.append).attempted and not report, "".join(report)


TARGETS = (triton_repository, openvino_server, docker_context)


@pytest.mark.parametrize("write", TARGETS)
def test_what_exists_is_not_replaced_and_nothing_partial_remains(models, tmp_path, write):
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match=r"mine exists; give another path, or remove it"):
        write(models / "nested.onnx", tmp_path / "mine")
    with pytest.raises(InputError, match="the name of a model has letters"):
        write(models / "nested.onnx", tmp_path / "new", name="../a")
    with pytest.raises(FileError):
        write(models / "no.onnx", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_models_that_do_not_fit_are_refused(models, tmp_path):
    net, example = network(), torch.from_numpy(pictures(2))
    about = {"policy": Policy("entropy", (0.7, 0.9)), "example": example}
    one = export(net, tmp_path / "one.onnx", free="none", **about)
    flat = export(net, tmp_path / "flat.onnx", policy=None, example=example)
    words = BranchyNet(nn.Sequential(nn.Linear(3, 8), nn.ReLU()), {"0": Mean()}, output=Mean()).eval()
    lengths = export(
        words, tmp_path / "words.onnx", policy=Policy("entropy", (0.5,)), example=torch.randn(2, 5, 3),
        free={"input": {1: "length"}},
    )  # fmt: skip
    half = export(net, tmp_path / "half.onnx", precision="bf16", **about)
    cases = [(one, "reads one sample per call"), (flat, "has no exits"), (lengths, "free lengths"), (half, "bf16")]
    for write, (path, text) in itertools.product((triton_repository, openvino_server), cases):
        with pytest.raises((InputError, FileError), match=text):
            write(path, tmp_path / "new")
    with pytest.raises(InputError, match="run every stage for every sample; export with layout='nested'"):
        openvino_server(models / "staged", tmp_path / "new")
    with pytest.raises(InputError, match="max_batch must be"):
        triton_repository(models / "nested.onnx", tmp_path / "new", max_batch=0)
    for name, image in (("Digits", "a"), ("a" * 64, "a"), ("a", ""), ("a", "x\ny")):
        with pytest.raises(InputError, match=r"the name of a service|image must be"):
            kserve(tmp_path / "new", image=image, name=name)
    kserve(tmp_path / "new", image="a")
    with pytest.raises(InputError, match="new exists"):
        kserve(tmp_path / "new", image="a")


class Mean(nn.Module):
    """A classifier of the mean over the length."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        return self.last(x.mean(dim=1))
