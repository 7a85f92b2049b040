"""Is the server right, and what does it cost? All on one machine, over the loopback interface.

overhead: a request of one sample beyond the time of the engine: in JSON, with binary tensors, and over gRPC. Requests,
calls of the engine, and requests that only ask whether the server lives take turns in random order; the last show what
HTTP and gRPC cost by themselves, with a client in Python. On a machine with other programs, the fastest tenth says more
than the median.
requests: every answer of many requests from several connections is compared with that of the engine, and the memory of
the server in the second half with that at its start.
overload: requests arrive at five times the rate that the server reaches, whatever it answers. The 99th percentile of
the accepted ones is compared with that of a server without load.
fuzz: schemathesis, if it is installed, sends what the description of the interface allows and what it does not, and
looks for statuses of 500 and more.

The network is B-LeNet, designed for batches, in stages; the overload has B-ResNet-110, so that the network and not the
client is the bottleneck. Images are test images.

    python benchmarks/experiments/serving.py [--requests 100000] [--seconds 60] [--only overhead,requests,overload,fuzz]

Writes benchmarks/results/serving.json.
"""

import argparse
import asyncio
import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import grpc
import numpy as np
import torch
from tritonclient.grpc import service_pb2

from branchynet import Policy, export, load, zoo
from branchynet.data import load_data
from branchynet.environment import environment
from branchynet.files import read_json, write_json

RESULTS = Path(__file__).parents[1] / "results" / "serving.json"
COMMAND = "python benchmarks/experiments/serving.py"
CONNECTIONS = 16
THRESHOLD = 0.3  # nats, at every exit
OVERLOAD = 5.0
TURNS = 2000
EXAMPLES = 150  # per route


@contextlib.contextmanager
def served(folder, *options):
    """A server in a process of its own: its port, its process number, and the port of gRPC if there is one."""
    command = [sys.executable, "-m", "branchynet", "serve", str(folder), "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        ports = [re.search(r":(\d+)$", process.stderr.readline().strip())[1]]
        if "--grpc-port" in options:
            ports += re.findall(r"gRPC at port (\d+)", process.stderr.readline())
        yield int(ports[0]), process.pid, int(ports[-1])
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            process.kill()


def exported(net, data, folder):
    """A folder of stages, and test images."""
    net = net.eval()
    images = load_data(data).test.inputs()
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:2000]].numpy()
    policy = Policy("entropy", (THRESHOLD,) * len(net.branches))
    return export(net, folder, policy=policy, example=torch.from_numpy(images[:2]), layout="stages"), images


def message(model, x, name, binary):
    """The bytes of a request."""
    one = {"name": name, "shape": list(x.shape), "datatype": "FP32"}
    head, tail, headers = {"inputs": [one], "outputs": [{"name": "label"}, {"name": "exit"}]}, b"", ""
    if binary:
        one["parameters"] = {"binary_data_size": x.nbytes}
        tail = x.tobytes()
    else:
        one["data"] = x.ravel().tolist()
    text = json.dumps(head).encode()
    if binary:
        headers = f"Inference-Header-Content-Length: {len(text)}\r\n"
    body = text + tail
    start = f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: a\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
    return start.encode() + body


async def ask(reader, writer, request):
    """The status and the body of the answer."""
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(re.search(rb"content-length: (\d+)", head)[1])
    return int(head[9:12]), await reader.readexactly(length)


def grpc_message(model, x, name):
    """The bytes of a request over gRPC."""
    found = service_pb2.ModelInferRequest(model_name=model, raw_input_contents=[x.tobytes()])
    found.inputs.add(name=name, datatype="FP32", shape=x.shape)
    for output in ("label", "exit"):
        found.outputs.add(name=output)
    return found.SerializeToString()


async def overhead(port, grpc_port, engine, images, name):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    channel = grpc.insecure_channel(f"127.0.0.1:{grpc_port}")
    infer, live = (channel.unary_unary(f"/inference.GRPCInferenceService/{n}") for n in ("ModelInfer", "ServerLive"))
    taken = {kind: [] for kind in ("engine", "json", "binary", "grpc", "http_empty", "grpc_empty")}
    requests = {kind: [message("net", x[None], name, kind == "binary") for x in images[:50]] for kind in taken}
    requests["http_empty"] = [b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n\r\n"] * 50
    requests["grpc"] = [grpc_message("net", x[None], name) for x in images[:50]]
    order = np.random.default_rng(0)
    for turn in range(TURNS):
        n = turn % 50
        for kind in order.permutation(list(taken)):
            start = time.perf_counter()
            if kind == "engine":
                engine(images[n : n + 1])
            elif kind.startswith("grpc"):
                live(b"") if kind == "grpc_empty" else infer(requests[kind][n])
            else:
                assert (await ask(reader, writer, requests[kind][n]))[0] == 200
            taken[kind].append(1e6 * (time.perf_counter() - start))
    writer.close()
    channel.close()
    rows = {}
    for part, share in (("median", 50), ("fastest_tenth", 10)):
        us = {kind: float(np.percentile(found, share)) for kind, found in taken.items()}
        beyond = {f"{kind}_beyond": us[kind] - us["engine"] for kind in ("json", "binary", "grpc")}
        rows[f"{part}_us"] = {**us, **beyond}
    return rows


def resident(pid):
    """Memory of a process in MB."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


async def compare(port, pid, engine, images, name, count):
    wanted = engine.answer_all(images)
    requests = [message("net", x[None], name, n % 2 == 1) for n, x in enumerate(images)]
    numbers, wrong, memory = iter(range(count)), 0, []

    async def client():
        nonlocal wrong
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in numbers:
            n = number % len(images)
            status, body = await ask(reader, writer, requests[n])
            outputs = json.loads(body)["outputs"] if status == 200 else [{"data": [None]}] * 2
            wrong += [one["data"][0] for one in outputs] != [wanted.label[n], wanted.exit[n]]
            if number in (count // 2, count - 1):
                memory.append(resident(pid))
        writer.close()

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CONNECTIONS)))
    seconds = time.perf_counter() - start
    return {"requests": count, "wrong": wrong, "per_second": count / seconds, "memory_mb": memory}


async def overload(port, images, name, seconds):
    requests = [message("net", x[None], name, True) for x in images]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    alone = []
    for n in range(300):
        start = time.perf_counter()
        await ask(reader, writer, requests[n % len(requests)])
        alone.append(time.perf_counter() - start)
    writer.close()
    rate = OVERLOAD / float(np.mean(alone))
    idle, accepted, statuses, skipped = [], [], {}, 0

    async def one(n, due):
        pair = idle.pop() if idle else await asyncio.open_connection("127.0.0.1", port)
        status, _ = await ask(*pair, requests[n % len(requests)])
        idle.append(pair)
        statuses[status] = statuses.get(status, 0) + 1
        if status == 200:
            accepted.append(time.perf_counter() - due)

    start, tasks, n = time.perf_counter(), set(), 0
    while (now := time.perf_counter()) < start + seconds:
        while (due := start + n / rate) <= now:
            if len(tasks) < 1000:
                tasks.add(task := asyncio.create_task(one(n, due)))
                task.add_done_callback(tasks.discard)
            else:
                skipped += 1
            n += 1
        await asyncio.sleep(0.001)
    await asyncio.gather(*tasks)
    p99 = {"alone_p99_ms": 1e3 * float(np.percentile(alone, 99)), "p99_ms": 1e3 * float(np.percentile(accepted, 99))}
    return {"seconds": seconds, "offered_per_second": rate, "statuses": statuses, "not_sent": skipped, **p99}


def fuzz(port, folder):
    """How many requests schemathesis generated, and the statuses that it reports; None where it is not installed."""
    if (tool := shutil.which("schemathesis")) is None:
        return None
    where = f"http://127.0.0.1:{port}/openapi.json"
    options = ["--max-examples", str(EXAMPLES), "--checks", "not_a_server_error", "--workers", "1"]
    done = subprocess.run([tool, "run", where, *options], capture_output=True, text=True, timeout=3600, cwd=folder)
    generated = int(re.search(r"(\d+) generated, ", done.stdout)[1])
    return {"requests": generated, "server_errors": sorted({*re.findall(r"\[(5\d\d)\]", done.stdout)})}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--only", default="overhead,requests,overload,fuzz")
    given = parser.parse_args()
    parts = given.only.split(",")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        if {*parts} & {"overhead", "requests", "fuzz"}:
            path, images = exported(
                zoo.b_lenet(pretrained=True, target="batch"), "mnist", Path(folder) / "lenet" / "net"
            )
            engine = load(path, threads=1)
            name = engine.inputs[0].name
            with served(path, "--grpc-port", "0") as (port, pid, grpc_port):
                if "overhead" in parts:
                    found["overhead"] = asyncio.run(overhead(port, grpc_port, engine, images, name))
                if "requests" in parts:
                    found["requests"] = asyncio.run(compare(port, pid, engine, images, name, given.requests))
                if "fuzz" in parts:
                    found["fuzz"] = fuzz(port, folder)
        if "overload" in parts:
            path, images = exported(zoo.b_resnet(110, pretrained=True), "cifar10", Path(folder) / "resnet" / "net")
            name = load(path, threads=1).inputs[0].name
            with served(path, "--queue-ms", "20", "--max-batch", "8") as (port, *_):
                found["overload"] = asyncio.run(overload(port, images, name, given.seconds))
    for part, values in found.items():
        print(part, json.dumps(values, indent=2))
    kept = read_json(RESULTS) if RESULTS.exists() else {}
    write_json(RESULTS, {**kept, "command": COMMAND, "environment": environment(), **found})


if __name__ == "__main__":
    main()
