"""What the gRPC interface refuses, and what it does with deadlines, cancelled calls, streams, and when it stops."""

import contextlib
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
import tritonclient.grpc
from grpc import StatusCode
from tritonclient.utils import InferenceServerException

from branchynet import load
from branchynet.errors import FileError, InputError
from branchynet.serve import runner, server
from branchynet.serve.settings import ServeSettings
from helpers.grpc_serving import refused, request, running, stub, tensor
from helpers.serving import call, connect, pictures, until

KEY = "0123456789abcdef"
LONG = 20_000.0  # milliseconds that samples wait for a full batch, unless a test fills it


def waiting(serving):
    return serving.repository.ready("staged").runner.waiting


@contextlib.contextmanager
def client(serving, **options):
    with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{serving.grpc.port}", **options) as found:
        yield found


def test_a_full_queue_is_resource_exhausted_and_a_cancelled_call_leaves_it(folder):
    with running(folder / "staged", queue=4, max_batch=8, max_wait_ms=LONG) as serving, stub(serving.grpc.port) as raw:
        first = raw.ModelInfer.future(request("staged", pictures(4)))
        until(lambda: waiting(serving) == 4)
        with pytest.raises(grpc.RpcError) as caught:
            raw.ModelInfer(request("staged", pictures(1)))
        assert caught.value.code() is StatusCode.RESOURCE_EXHAUSTED
        assert "the queue is full: 4 of at most 4 samples wait" in caught.value.details()
        assert int(dict(caught.value.trailing_metadata())["retry-after"]) >= 1
        with refused(StatusCode.INVALID_ARGUMENT, "a request must have 1 to 4 samples"):
            raw.ModelInfer(request("staged", pictures(5)))
        first.cancel()
        until(lambda: waiting(serving) == 0)


def test_the_deadline_of_a_client_is_that_of_its_samples(folder, monkeypatch):
    timeouts, answer = [], runner.Runner.answer

    async def noted(self, request, timeout):
        timeouts.append(timeout)
        return await answer(self, request, timeout)

    monkeypatch.setattr(runner.Runner, "answer", noted)
    with running(folder / "staged", timeout_s=300) as serving, client(serving) as one:
        one.infer("staged", [tensor(pictures(1))])
        one.infer("staged", [tensor(pictures(1))], client_timeout=200)
        one.infer("staged", [tensor(pictures(1))], client_timeout=200, parameters={"deadline_ms": 100_000})
        one.infer("staged", [tensor(pictures(1))], client_timeout=200, parameters={"deadline_ms": 250_000})
        one.infer("staged", [tensor(pictures(1))], client_timeout=5000)
    assert timeouts[0] == timeouts[4] == 300 and timeouts[2] == 100
    assert 0 < timeouts[1] < 200 and 0 < timeouts[3] < 200


def test_a_deadline_that_passes_is_told(folder, monkeypatch):
    monkeypatch.setattr(runner, "_INLINE", -1.0)  # in the thread, which looks for deadlines first
    with running(folder / "staged", max_wait_ms=LONG) as serving, stub(serving.grpc.port) as raw:
        message = request("staged", pictures(3))
        message.parameters["deadline_ms"].double_param = 1e-6
        with refused(StatusCode.DEADLINE_EXCEEDED, "and 3 of 3 samples had reached no exit"):
            raw.ModelInfer(message)
        assert waiting(serving) == 0


def test_a_stream_hands_out_each_answer_when_it_is_ready(folder):
    x, wanted, found = pictures(2), load(folder / "staged", threads=1)(pictures(2)), []
    with running(folder / "staged", max_batch=2, max_wait_ms=LONG) as serving, client(serving) as one:
        one.start_stream(lambda result, error: found.append(error or result))
        one.async_stream_infer("staged", [tensor(x[:1])], request_id="0")
        until(lambda: waiting(serving) == 1)
        one.async_stream_infer("staged", [tensor(x[:1])], request_id="wrong", parameters={"thresholds": "low"})
        until(lambda: len(found) == 1)  # while the first still waits
        assert waiting(serving) == 1
        assert isinstance(found[0], InferenceServerException) and "thresholds must be" in str(found[0])
        one.async_stream_infer("staged", [tensor(x[1:])], request_id="1")  # fills the batch
        until(lambda: len(found) == 3)
        for result in found[1:]:
            row = int(result.get_response().id)
            assert result.as_numpy("exit") == wanted.exit[row] and result.as_numpy("label") == wanted.label[row]
        one.async_stream_infer("staged", [tensor(x[:1])])
        until(lambda: waiting(serving) == 1)
        one.stop_stream(cancel_requests=True)
        until(lambda: waiting(serving) == 0)


def test_a_request_needs_the_key_except_for_health(folder, tmp_path):
    (tmp_path / "key").write_text(KEY)
    with running(folder / "staged", api_key_file=str(tmp_path / "key")) as serving, client(serving) as one:
        assert one.is_server_live() and one.is_server_ready()
        calls = (
            one.get_server_metadata,
            lambda headers: one.get_model_metadata("staged", headers=headers),
            lambda headers: one.infer("staged", [tensor(pictures(1))], headers=headers),
        )
        for one_call in calls:
            for wrong in ({}, {"authorization": "Bearer no"}, {"x-key-bin": b"a"}):
                with pytest.raises(InferenceServerException, match=r"UNAUTHENTICATED.*no valid API key"):
                    one_call(headers=wrong)
            for right in ({"authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}):
                one_call(headers=right)
        errors = []
        one.start_stream(lambda result, error: errors.append(error))
        until(lambda: errors)
        assert "no valid API key" in str(errors[0])


def test_tls_is_that_of_http(folder, tmp_path):
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    ]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*made, *names, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    x = pictures(2)
    with running(folder / "staged", certificate=str(certificate), private_key=str(key)) as serving:
        where = f"localhost:{serving.grpc.port}"
        with tritonclient.grpc.InferenceServerClient(where, ssl=True, root_certificates=str(certificate)) as one:
            assert (
                one.infer("staged", [tensor(x)]).as_numpy("exit").tolist() == load(folder / "staged")(x).exit.tolist()
            )
        with stub(serving.grpc.port) as raw, refused(StatusCode.UNAVAILABLE, ""):  # without TLS
            raw.ModelInfer(request("staged", x))
    settings = ServeSettings(port=0, grpc_port=0, certificate=str(certificate), private_key=str(key))
    key.write_text("no key")
    with pytest.raises(FileError, match=r"cert\.pem and .*key\.pem are not a certificate and its private key"):
        server.serve(folder / "staged", settings)
    subprocess.run(
        ["openssl", "genpkey", "-algorithm", "ed25519", "-aes256", "-pass", "pass:x", "-out", key], check=True
    )
    with pytest.raises(FileError, match="without a password"):
        server.serve(folder / "staged", settings)


def test_large_and_compressed_messages_are_refused(folder):
    with running(folder / "staged", max_body=1000) as serving, stub(serving.grpc.port) as raw:
        with refused(StatusCode.RESOURCE_EXHAUSTED, "larger than max"):
            raw.ModelInfer(request("staged", pictures(30)))
        with refused(StatusCode.UNIMPLEMENTED, "gzip"):
            raw.ModelInfer(request("staged", np.zeros((5, 1, 6, 6), np.float32)), compression=grpc.Compression.Gzip)
        assert raw.ModelInfer(request("staged", pictures(1))).model_name == "staged"


def test_connections_that_send_nothing_are_closed_and_others_are_served(folder):
    with running(folder / "staged", client_s=0.5) as serving, connect(serving.grpc.port) as silent:
        with stub(serving.grpc.port) as raw:
            assert raw.ModelInfer(request("staged", pictures(1))).model_name == "staged"
        with contextlib.suppress(ConnectionResetError):
            while silent.recv(1000):  # the server's own greeting, and then the end
                pass


def test_connections_beyond_the_limit_are_refused(folder):
    with running(folder / "staged", connections=1) as serving, stub(serving.grpc.port) as raw:
        raw.ModelInfer(request("staged", pictures(1)))
        with stub(serving.grpc.port, ("other", 1)) as more, refused(StatusCode.UNAVAILABLE, ""):
            more.ModelInfer(request("staged", pictures(1)))
        raw.ModelInfer(request("staged", pictures(1)))


def test_a_port_in_use_is_told_before_anything_is_served(folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot serve gRPC at 127.0.0.1:{port} .*give another --grpc-port"):
            server.serve(folder / "staged", ServeSettings(port=0, grpc_port=port))
    assert capsys.readouterr() == ("", "")
    with pytest.raises(InputError, match="port and grpc_port must differ; both are 7000"):
        ServeSettings(port=7000, grpc_port=7000)
    with pytest.raises(InputError, match="grpc_port must not be negative; got -1"):
        ServeSettings(grpc_port=-1)


def test_a_stopped_server_answers_what_it_accepted(folder):
    command = [sys.executable, "-m", "branchynet", "serve", str(folder / "staged"), "--port", "0", "--grpc-port", "0"]
    process = subprocess.Popen([*command, "--max-wait-ms", "2000"], stderr=subprocess.PIPE, text=True)
    try:
        lines = process.stderr.readline() + process.stderr.readline()
        http, port = (int(re.search(start + r"(\d+)", lines)[1]) for start in (r"http://\S+:", "gRPC at port "))
        x, streamed = pictures(6), []
        wanted = load(folder / "staged", threads=1)(x)
        with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{port}") as one, ThreadPoolExecutor(6) as pool:
            one.start_stream(lambda result, error: streamed.append(error or result))
            one.async_stream_infer("staged", [tensor(x[:1])])
            accepted = [pool.submit(one.infer, "staged", [tensor(x[n : n + 1])]) for n in range(6)]
            until(lambda: b'branchynet_waiting_samples{model="staged"} 7.0' in call(http, "GET", "/metrics")[2])
            process.send_signal(signal.SIGTERM)
            for n, found in enumerate(accepted):
                assert found.result().as_numpy("exit") == wanted.exit[n]
            until(lambda: streamed)
            assert streamed[0].as_numpy("exit") == wanted.exit[0]
            assert process.wait(20) == 0
            with pytest.raises(InferenceServerException, match="UNAVAILABLE"):
                one.infer("staged", [tensor(x[:1])])
    finally:
        process.kill()
        process.stderr.close()
