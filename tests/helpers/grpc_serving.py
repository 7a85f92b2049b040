"""A server with gRPC in a thread, and raw calls to it."""

import contextlib
import threading

import grpc
import tritonclient.grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from branchynet.serve.server import prepared
from branchynet.serve.settings import ServeSettings
from helpers.serving import until


@contextlib.contextmanager
def running(path, **settings):
    """Serve over both protocols on free ports; yields the server, which has stopped afterwards."""
    server, listener = prepared(path, ServeSettings(**{"port": 0, "grpc_port": 0, "drain_s": 5.0, **settings}))
    server.http_port = listener.getsockname()[1]
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive())
        yield server
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive()


@contextlib.contextmanager
def stub(port, *options):
    """The published stub, without the checks of a client. Channels with other options share no connection."""
    with grpc.insecure_channel(f"127.0.0.1:{port}", options) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def request(model, x, name="input", raw=True, **fields):
    """A `ModelInferRequest` for one input in FP32."""
    found = service_pb2.ModelInferRequest(model_name=model, **fields)
    tensor = found.inputs.add(name=name, datatype="FP32", shape=x.shape)
    if raw:
        found.raw_input_contents.append(x.tobytes())
    else:
        tensor.contents.fp32_contents.extend(x.ravel().tolist())
    return found


@contextlib.contextmanager
def refused(code, text):
    """The block's call must end with this status, and its details must contain this text."""
    try:
        yield
    except grpc.RpcError as error:
        assert (error.code(), text in error.details()) == (code, True), (error.code(), error.details())
    else:
        raise AssertionError(f"the call was not refused; wanted {code}")


def tensor(x, name="input"):
    """An input for the clients of `tritonclient`, in FP32."""
    found = tritonclient.grpc.InferInput(name, x.shape, "FP32")
    found.set_data_from_numpy(x)
    return found
