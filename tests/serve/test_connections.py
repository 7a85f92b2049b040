"""Clients that are slow, silent or gone, and more open connections than there is room for."""

import contextlib
import json
import resource
import socket

import pytest

from helpers.serving import call, connect, infer, pictures, running, started, tensor, until, waiting


def received(connection, end):
    """What arrives until these bytes, or until the connection is closed; the body may come after the headers."""
    found = b""
    while not found.endswith(end) and (more := connection.recv(4096)):
        found += more
    return found


def test_slow_clients_are_cut_off_and_others_are_served(folder):
    with running(folder / "staged", client_s=0.5) as port:
        idle, head, body = connect(port), connect(port), connect(port)
        head.sendall(b"POST /v2/models/staged/infer HTTP/1.1\r\nHost: a\r\n")
        body.sendall(b"POST /v2/models/staged/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
        assert infer(port, "staged", pictures(1)).keys() >= {"exit"}
        answer = received(body, b"}")
        assert answer.startswith(b"HTTP/1.1 408 ") and b"only 1 bytes of the body arrived in time" in answer
        for client in (idle, head, body):
            assert client.recv(4096) == b""
            client.close()


def test_half_closed_connections_leave_nothing_behind(folder):
    """Like a closed one, a half-closed connection may get no answer, because a server cannot tell them apart."""
    body = json.dumps({"inputs": [tensor(pictures(1))]}).encode()
    head = b"POST /v2/models/staged/infer HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
    with running(folder / "staged", connections=20) as port:
        for sent in 30 * [head % len(body) + body, head % len(body) + body[:9], head[:30]]:
            with connect(port) as client:
                client.sendall(sent)
                client.shutdown(socket.SHUT_WR)
                found = b"".join(iter(lambda client=client: client.recv(4096), b""))
            assert found == b"" or (found.startswith(b"HTTP/1.1 200 ") and found.endswith(b"}"))
        assert waiting(port) == 0 and infer(port, "staged", pictures(1)).keys() >= {"exit"}


@pytest.mark.parametrize("sent", [b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"POST / HTTP/9.9\r\n\r\n", b"\x00" * 100])
def test_what_is_no_http_is_refused(folder, sent):
    with running(folder / "staged") as port:
        with connect(port) as client:
            client.sendall(sent)
            assert client.recv(4096).startswith(b"HTTP/1.1 400 ")
        assert call(port, "GET", "/v2/health/live")[0] == 200


def test_many_open_connections_do_not_stop_the_others(folder):
    with running(folder / "staged", connections=200) as port:
        idle = [connect(port) for _ in range(150)]
        assert infer(port, "staged", pictures(1)).keys() >= {"exit"}
        idle += [connect(port) for _ in range(100)]
        until(lambda: call(port, "GET", "/v2/health/live")[0] == 503)
        for one in idle:
            one.close()
        until(lambda: call(port, "GET", "/v2/health/live")[0] == 200)


@contextlib.contextmanager
def open_connections(port, count):
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(connect(port)) for _ in range(count)]


def alive(connection):
    """Whether a connection that was idle so far is answered."""
    connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n\r\n")
    answer = received(connection, b"}")
    return answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"}")


def served(port):
    """Whether a new connection is answered."""
    with contextlib.suppress(OSError), connect(port) as new:
        return alive(new)
    return False


def test_ten_thousand_connections_are_served(folder):
    """As many as the limit of open files lets this process and the server have, if that is fewer."""
    count = min(9_990, resource.getrlimit(resource.RLIMIT_NOFILE)[1] - 400)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    process, port = started(folder / "staged", "--port", 0, "--client-s", 120, files=(100, hard))
    try:
        with open_connections(port, count) as idle:
            assert infer(port, "staged", pictures(1)).keys() >= {"exit"}
            assert all(alive(one) for one in idle[:: len(idle) // 20])
        assert infer(port, "staged", pictures(1)).keys() >= {"exit"}
        process.terminate()
        assert process.wait(30) == 0 and process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_without_files_for_more_connections_the_open_ones_are_served(folder):
    process, port = started(folder / "staged", "--port", 0, files=(150, 150))
    try:
        assert any("the system allows 150 open files" in line for line in process.lines)
        with connect(port) as first:
            assert alive(first)
            with open_connections(port, 200):
                assert alive(first)
            until(lambda: served(port))  # when the server has closed the others too
            assert alive(first)
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
