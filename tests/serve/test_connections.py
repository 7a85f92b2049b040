"""Clients that are slow, silent or gone, and more open connections than there is room for."""

import json
import socket

import pytest

from helpers.serving import call, connect, infer, pictures, running, tensor, until, waiting


def test_slow_clients_are_cut_off_and_others_are_served(folder):
    with running(folder / "staged", client_s=0.5) as port:
        idle, head, body = connect(port), connect(port), connect(port)
        head.sendall(b"POST /v2/models/staged/infer HTTP/1.1\r\nHost: a\r\n")
        body.sendall(b"POST /v2/models/staged/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
        assert infer(port, "staged", pictures(1)).keys() >= {"exit"}
        answer = body.recv(4096)
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
