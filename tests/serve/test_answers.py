"""A server on the loopback interface: its answers are those of the engine, through Triton's client and plain HTTP."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tritonclient.http as triton
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from branchynet import Policy, load
from branchynet.runs.predict import predict_files
from branchynet.serve.presets import write_presets
from helpers.serving import LABELS, POLICY, call, call_json, infer, pictures, running, same

OURS = {"staged": "staged", "nested": "nested.onnx", "adaptive": "adaptive.onnx"}
FAST, SLOW = Policy("entropy", (1.1, 1.2)), Policy("entropy", (0.2, None))


@pytest.fixture(scope="module")
def folder(folder):
    write_presets(folder / "staged" / "policies.json", {"fast": FAST, "slow": SLOW})
    write_presets(folder / "nested.policies.json", {"fast": FAST})
    return folder


@pytest.fixture(scope="module")
def port(folder):
    with running(folder, max_batch=8, manage=True) as found:
        yield found


@pytest.fixture(params=OURS)
def model(request):
    return request.param


def engine(folder, model):
    return load(folder / OURS[model], threads=1)


def test_samples_leave_at_every_exit(folder):
    assert {*engine(folder, "staged")(pictures(30)).exit} == {1, 2, 3}  # else the tests below show little


@pytest.mark.parametrize("count", [1, 7, 30])
def test_answers_in_json_are_those_of_the_engine(folder, port, model, count):
    x = pictures(count)
    same(infer(port, model, x), engine(folder, model)(x))


@pytest.mark.parametrize("binary", [False, True])
def test_a_client_of_triton_gets_the_answers_of_the_engine(folder, port, model, binary):
    x = pictures(20)
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready(model, "1")
        about = client.get_model_metadata(model)
        assert about["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 1, 6, 6]}]
        given = triton.InferInput("input", list(x.shape), "FP32")
        given.set_data_from_numpy(x, binary_data=binary)
        names = [one["name"] for one in about["outputs"]]
        wanted = [triton.InferRequestedOutput(name, binary_data=binary) for name in names]
        found = client.infer(model, [given], outputs=wanted, request_id="a")
        answer = {name: found.as_numpy(name) for name in names}
        classes = answer.pop("class_name")
        same(answer, engine(folder, model)(x))
        assert [getattr(one, "decode", lambda one=one: one)() for one in classes] == [
            LABELS[n] for n in answer["label"]
        ]
        assert found.get_response()["id"] == "a"
        same({name: client.infer(model, [given]).as_numpy(name) for name in answer}, engine(folder, model)(x))


@pytest.mark.parametrize("thresholds", [[0.1, 1.3], [None, 1.0], "never,1.0", "1.1, 0.3", [-1e300, 1e300]])
def test_a_request_may_give_thresholds(folder, port, model, thresholds):
    x = pictures(20)
    texts = thresholds.split(",") if isinstance(thresholds, str) else thresholds
    plain = [None if t in (None, "never") else float(t) for t in texts]
    same(infer(port, model, x, {"thresholds": thresholds}), engine(folder, model)(x, thresholds=plain))


@pytest.mark.parametrize("model", ["staged", "adaptive"])
def test_samples_may_have_thresholds_each(folder, port, model):
    x, limits = pictures(9), np.linspace(0, 1.4, 9).astype(np.float32)
    inputs = [("input", x), ("threshold_1", limits), ("threshold_2", limits[:1])]
    value = {"inputs": [tensor(name, array) for name, array in inputs]}
    status, answer = call_json(port, "POST", f"/v2/models/{model}/infer", value)
    assert status == 200
    wanted = engine(folder, model)(x, thresholds=[limits, limits[:1]])
    assert answer["outputs"][1]["data"] == wanted.exit.tolist()


def test_a_file_of_one_threshold_per_exit_says_so(port):
    value = {"inputs": [tensor("input", pictures(2)), tensor("threshold_1", np.zeros(2, np.float32))]}
    status, answer = call_json(port, "POST", "/v2/models/nested/infer", value)
    assert status == 400 and "one threshold per exit, not one per sample" in answer["error"]


def tensor(name, array):
    return {"name": name, "shape": list(array.shape), "datatype": "FP32", "data": array.ravel().tolist()}


def test_requests_with_other_thresholds_are_answered_beside_each_other(folder, port, model):
    """Each request must get its own answer, whatever shares its batches."""
    x = pictures(60)
    limits = [None, [0.1, 1.3], [1.2, None], [None, None]]
    sizes = [1, 2, 5]

    def one(n):
        rows, given = x[n : n + sizes[n % 3]], limits[n % 4]
        found = infer(port, model, rows, None if given is None else {"thresholds": given})
        same(found, reference(rows, thresholds=given))

    reference = engine(folder, model)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(50)))


def test_policies_have_names(folder, port):
    x = pictures(20)
    reference = engine(folder, "staged")
    for name, policy in (("fast", FAST), ("slow", SLOW)):
        same(infer(port, "staged", x, {"policy": name}), reference(x, thresholds=policy.thresholds))
    status, error = infer(port, "staged", x, {"policy": "fest"})
    assert status == 400 and error == "the model has no policy 'fest'; did you mean 'fast'?"
    assert infer(port, "adaptive", x, {"policy": "fast"}) == (400, "the model has no policy 'fast'; it has none")
    about = call_json(port, "GET", "/models/staged")[1]
    assert about["policies"]["fast"]["policy"] == FAST.to_json() and about["labels"] == LABELS


def test_files_of_other_tools_keep_their_outputs(port):
    x = np.array([[1, -2, 3]], np.float32)
    for model, rows in (("other", 1), ("other", 5), ("fixed", 2)):
        found = infer(port, model, np.repeat(x, rows, axis=0), name="x")
        np.testing.assert_array_equal(found["y"], np.repeat(2 * x, rows, axis=0))
        np.testing.assert_array_equal(found["z"], np.repeat(x > 0, rows, axis=0))
    assert call_json(port, "GET", "/v2/models/fixed")[1]["inputs"][0]["shape"] == [2, 3]
    status, error = infer(port, "fixed", x, name="x")
    assert status == 400 and "float32 (1, 3)" in error and "(2, 3)" in error
    status, error = infer(port, "other", x, {"thresholds": [1.0]}, name="x")
    assert status == 400 and "no thresholds" in error


@pytest.mark.parametrize(
    ("x", "name", "parameters", "message"),
    [
        (pictures(2)[:, 0], "input", None, r"float32 \(2, 6, 6\); the network reads input: float32 \(B, 1, 6, 6\)"),
        (pictures(2), "inputs", None, "inputs"),
        (pictures(1)[:0], "input", None, "no samples"),
        (pictures(1), "input", {"thresholds": [1.0]}, "1 thresholds given for 3 exits; give 2"),
        (pictures(1), "input", {"thresholds": [1.0, 1.0, 1.0]}, "3 thresholds given for 3 exits; give 2"),
        (pictures(1), "threshold_1", None, "0 inputs given|no inputs|the network reads"),
    ],
)
def test_what_does_not_fit_the_model_is_said(port, model, x, name, parameters, message):
    status, error = infer(port, model, x, parameters, name=name)
    assert status == 400
    with pytest.raises(AssertionError, match=message):  # shows the text if it does not match
        raise AssertionError(error)


def test_other_datatypes_are_refused(port, model):
    one = {"name": "input", "shape": [1, 1, 6, 6], "datatype": "FP64", "data": [0.0] * 36}
    status, answer = call_json(port, "POST", f"/v2/models/{model}/infer", {"inputs": [one]})
    assert status == 400 and "float64 (1, 1, 6, 6); the network reads input: float32" in answer["error"]


@pytest.mark.parametrize(
    ("path", "method", "message"),
    [
        ("/v2/models/stage", "GET", "there is no model 'stage'; did you mean 'staged'?"),
        ("/v2/models/stage/infer", "POST", "there is no model 'stage'; did you mean 'staged'?"),
        ("/v2/models/staged/versions/2", "GET", "the model 'staged' has no version '2', only 1"),
        ("/v2/models/staged/versions/2/infer", "POST", "the model 'staged' has no version '2', only 1"),
        ("/v2/repository/models/none/load", "POST", "there is no model 'none'"),
        ("/v2/models/..%2Fstaged", "GET", ""),
    ],
)
def test_unknown_models_and_versions_are_not_found(port, path, method, message):
    status, answer = call_json(port, method, path)
    assert status == 404 and message in answer.get("error", "")


def test_models_are_listed_loaded_and_unloaded(folder, port):
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        names = ["adaptive", "fixed", "nested", "other", "staged"]
        assert [one["name"] for one in client.get_model_repository_index()] == names
        client.unload_model("adaptive")
        assert not client.is_model_ready("adaptive") and client.is_server_ready()
        status, error = infer(port, "adaptive", pictures(1))
        assert status == 503 and error == "the model 'adaptive' is not ready: it was unloaded"
        client.load_model("adaptive")
        assert client.is_model_ready("adaptive")
        shutil.copy(folder / "nested.onnx", folder / "late.onnx")
        client.load_model("late")
        same(infer(port, "late", pictures(3)), engine(folder, "nested")(pictures(3)))
        client.unload_model("late")
        (folder / "late.onnx").unlink()


@pytest.fixture
def image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def form(content, name="image"):
    head = f'--x\r\nContent-Disposition: form-data; name="{name}"; filename="a.png"\r\n\r\n'
    return head.encode() + content + b"\r\n--x--\r\n", {"Content-Type": "multipart/form-data; boundary=x"}


def test_an_image_file_is_predicted_as_on_the_command_line(folder, port, model, image):
    (wanted,) = predict_files(engine(folder, model), [image])
    for body, headers in ((image.read_bytes(), {}), form(image.read_bytes())):
        status, _, answer = call(port, "POST", f"/predict?model={model}", body, headers)
        found = json.loads(answer)
        assert status == 200 and found["model"] == model, found
        assert found["class"] == wanted["label"] == LABELS[found["label"]] and found["exit"] == wanted["exit"]
        assert found["score"] == pytest.approx(wanted["score"], abs=1e-5) and 0.25 < found["probability"] <= 1
        assert all(one["us"] > 0 for one in found["stages"]) and found["us"] >= sum(o["us"] for o in found["stages"])


def test_a_prediction_shows_the_stages_that_the_sample_passed(port, image):
    path = "/predict?model=staged&thresholds=never,never"
    stages = json.loads(call(port, "POST", path, image.read_bytes())[2])["stages"]
    assert [(one["exit"], one["threshold"]) for one in stages] == [(1, None), (2, None), (3, None)]
    stages = json.loads(call(port, "POST", "/predict?model=staged", image.read_bytes())[2])["stages"]
    for one, threshold in zip(stages, [*POLICY.thresholds, None], strict=False):
        assert one["threshold"] == threshold
    assert [one["score"] < one["threshold"] for one in stages[:2]] == [False] * (len(stages) - 1) + [True] * (
        len(stages) < 3
    )


def test_a_broken_image_is_said(port, image):
    for body, headers, message in (
        (b"", {}, "the body is empty"),
        (b"no image", {}, "cannot read the image (it is none of BMP, GIF"),
        (image.read_bytes()[:60], {}, "cannot read the image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", {}, "it is none of"),
        (*form(b"no image"), "it is none of"),
        (b"--x--\r\n", {"Content-Type": "multipart/form-data; boundary=x"}, "the form has no file"),
        (b"", {"Content-Type": "multipart/form-data"}, "the form cannot be read"),
    ):
        status, _, answer = call(port, "POST", "/predict?model=nested", body, headers)
        assert status == 400 and message in json.loads(answer)["error"], (body, answer)
    for query, message in (
        ("", "the server has 5 models; name one"),
        ("?model=other", "not one image"),
        ("?model=nested&threshold=1", "'threshold', which is unknown"),
        ("?model=nested&deadline_ms=soon", "must be a number; got 'soon'"),
    ):
        status, _, answer = call(port, "POST", f"/predict{query}", image.read_bytes())
        assert status == 400 and message in json.loads(answer)["error"], answer


def test_metrics_count_what_was_answered(folder):
    with running(folder / "staged") as port:
        wanted = load(folder / "staged")(pictures(30)).exit
        for n in range(30):
            infer(port, "staged", pictures(30)[n : n + 1])
        assert infer(port, "staged", pictures(1)[:0])[0] == 400
        page = call(port, "GET", "/metrics")[2].decode()
    found = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }
    here = ("model", "staged")
    assert found["branchynet_requests_total", here, ("protocol", "http"), ("status", "200")] == 30
    assert found["branchynet_requests_total", here, ("protocol", "http"), ("status", "400")] == 1
    for exit in (1, 2, 3):
        count, label = (wanted == exit).sum(), ("exit", str(exit))
        assert found["branchynet_answers_total", label, here] == count
        assert found["branchynet_exit_share", label, here] == pytest.approx(count / 30)
        assert found["branchynet_score_count", label, here] == count
        assert found["branchynet_request_seconds_count", label, here] == count
        assert found["branchynet_batch_samples_sum", label, here] == (wanted >= exit).sum()
        assert found["branchynet_queue_seconds_count", label, here] == (wanted >= exit).sum()
    assert found["branchynet_ready", here] == 1 and found["branchynet_waiting_samples", here] == 0


def test_the_description_of_the_interface_names_every_route(port):
    paths = call_json(port, "GET", "/openapi.json")[1]["paths"]
    assert {"/v2/models/{model}/infer", "/v2/repository/index", "/predict", "/metrics"} <= {*paths}
    for path, routes in paths.items():
        for route in routes.values():
            named = {one["name"] for one in route.get("parameters", ()) if one["in"] == "path"}
            assert named == {*re.findall(r"{(\w+)}", path)}


def test_the_page_of_the_interface_reads_nothing_from_elsewhere(port):
    status, headers, body = call(port, "GET", "/docs")
    assert status == 200 and "default-src 'none'" in headers["content-security-policy"]
    links = re.findall(r'(?:src|href)="([^"]+)"', body.decode())
    assert len(links) == 3 and b"//" not in re.sub(rb"^\s*//.*$", b"", body, flags=re.MULTILINE)
    for link in links:
        status, headers, found = call(port, "GET", link)
        kind = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}[link.rpartition(".")[2]]
        assert status == 200 and headers.get_content_type() == kind and found
