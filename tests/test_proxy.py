"""The one address: what is passed on, and what clients are told when it cannot be."""

import json
import socket
import struct
import threading
import time
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai
import pytest
from conftest import comes_true

from factorllm import FactorLLMError, serve
from factorllm.serving.proxy import Front, Proxy, UnavailableError, check_free, url_of
from factorllm.serving.settings import ServeSettings


class Engine(BaseHTTPRequestHandler):
    """Answers with what it was sent; a stream in pieces, the second when `go` is set, and so to what is slow."""

    go = threading.Event()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body.get("prompt") == "slow":
            self.go.wait(10)
        self.send_response(429 if body.get("prompt") == "too much" else 200)
        self.send_header("Content-Type", "text/event-stream" if body.get("stream") else "application/json")
        self.end_headers()
        if body.get("stream"):
            for text in ("first", "second"):
                self.wfile.write(b"data: %s\n\n" % json.dumps({"choices": [{"index": 0, "text": text}]}).encode())
                self.go.wait(10)
            self.wfile.write(b"data: [DONE]\n\n")
        else:
            self.wfile.write(json.dumps({"choices": [{"index": 0, "text": json.dumps(body)}]}).encode())

    def log_message(self, *_):
        pass


class Told(Front):
    name = "one"

    def __init__(self, address):
        self.address, self.held = address, 0

    @contextmanager
    def place(self, path, body):
        if body.get("prompt") == "refused":
            raise FactorLLMError("this is refused")
        if body.get("prompt") == "not now":
            raise UnavailableError("it cannot be loaded")
        self.held += 1
        try:
            yield self.address, body | {"seed": 7}
        finally:
            self.held -= 1

    def metrics(self):
        return "some_total 1\n"


@contextmanager
def running(server):
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def front():
    Engine.go.clear()
    with running(ThreadingHTTPServer(("127.0.0.1", 0), Engine)) as address:
        yield Told(address)


@pytest.fixture
def address(front):
    with running(Proxy("127.0.0.1", 0, front)) as found:
        yield found


@pytest.fixture
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def ask(address: str, method: str, path: str, content: bytes | None = None, **headers: str):
    connection = HTTPConnection(address.removeprefix("http://"), timeout=10)
    connection.request(method, path, content, headers)
    reply = connection.getresponse()
    return reply.status, reply.read()


def test_a_request_is_passed_on_as_the_front_rewrites_it(client, front):
    answer = client.completions.create(model="one", prompt="hello")
    assert json.loads(answer.choices[0].text) == {"model": "one", "prompt": "hello", "seed": 7}
    assert [model.id for model in client.models.list()] == ["one"]
    assert comes_true(lambda: front.held == 0)


def test_a_stream_comes_piece_by_piece(client, front):
    stream = iter(client.completions.create(model="one", prompt="hello", stream=True))
    assert next(stream).choices[0].text == "first"  # the second is not sent before the first has come
    assert front.held == 1
    Engine.go.set()
    assert next(stream).choices[0].text == "second"


def test_refusals_reach_the_client_and_the_connection_lives_on(client):
    with pytest.raises(openai.BadRequestError, match="this is refused"):
        client.completions.create(model="one", prompt="refused")
    with pytest.raises(openai.InternalServerError, match="it cannot be loaded") as error:
        client.completions.create(model="one", prompt="not now")
    assert error.value.status_code == 503
    with pytest.raises(openai.RateLimitError):  # the engine's own
        client.completions.create(model="one", prompt="too much")
    assert client.completions.create(model="one", prompt="hello").choices


def request(content: bytes, version: str = "1.1", *headers: str) -> bytes:
    lines = [f"POST /v1/completions HTTP/{version}", "Host: it", *(headers or [f"Content-Length: {len(content)}"])]
    return "\r\n".join([*lines, "", ""]).encode() + content


def open_with(address: str, *requests: bytes) -> socket.socket:
    host, _, port = address.removeprefix("http://").partition(":")
    client = socket.create_connection((host, int(port)), timeout=10)
    client.sendall(b"".join(requests))
    return client


def test_a_client_that_goes_away_gives_its_place_back(address, front):
    gone = open_with(address, request(b'{"prompt": "slow"}'))
    assert comes_true(lambda: front.held == 1)
    gone.close()
    assert comes_true(lambda: front.held == 0, 5)  # what is slow takes 10 s


def test_a_client_that_sends_its_next_request_already_has_not_gone(address, front):
    with open_with(address, request(b'{"prompt": "slow"}'), request(b'{"prompt": "next"}')) as client:
        assert comes_true(lambda: front.held == 1)
        Engine.go.set()
        said = client.recv(4096)
        while b"next" not in said:
            said += client.recv(4096)
    assert said.index(b"slow") < said.index(b"next")


@pytest.mark.parametrize("body", [{"prompt": "old"}, {"prompt": "old", "stream": True}])
def test_a_client_of_http_1_0_gets_no_chunks(body, address):
    Engine.go.set()
    said = b""
    with open_with(address, request(json.dumps(body).encode(), "1.0")) as client:
        while piece := client.recv(4096):
            said += piece
    head, _, answer = said.partition(b"\r\n\r\n")
    assert b"chunked" not in head
    texts = [
        json.loads(line.removeprefix(b"data: "))["choices"][0]["text"] for line in answer.split(b"\n\n") if b"{" in line
    ]
    assert texts == (["first", "second"] if "stream" in body else [json.dumps(body | {"seed": 7})])


def test_an_engine_that_is_gone_is_told(client, front):
    front.address = "http://127.0.0.1:9"
    with pytest.raises(openai.InternalServerError, match="does not answer"):
        client.completions.create(model="one", prompt="hello")
    assert front.held == 0


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("GET", "/health", None, 200),
        ("GET", "/metrics", None, 200),
        ("GET", "/elsewhere", None, 404),
        ("POST", "/v1/embeddings", b"{}", 404),
        ("POST", "/v1/completions", b"{", 400),
        ("POST", "/v1/completions", b"[1]", 400),
        ("POST", "/v1/completions", b"\xff", 400),
    ],
)
def test_paths_and_bodies(address, method, path, content, status):
    found, said = ask(address, method, path, content)
    assert found == status
    if status >= 400:
        assert json.loads(said)["error"]["message"]


@pytest.mark.parametrize("method", [b"GET", b"POST"])
def test_an_address_that_is_none_is_refused(method, address):
    asked = method + b" http://[/v1/models HTTP/1.1\r\nHost: it\r\nContent-Length: 2\r\n\r\n{}"
    with open_with(address, asked) as client:
        assert client.recv(4096).startswith(b"HTTP/1.1 404 ")


def in_chunks(*pieces: bytes) -> bytes:
    sized = b"".join(b"%X;told=no\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return request(sized + b"0\r\nA-Trailer: it\r\n\r\n", "1.1", "Transfer-Encoding: chunked")


def test_a_body_may_come_in_chunks(address):
    with open_with(
        address, in_chunks(b'{"prompt":', b' "in pieces, twelve"}'), in_chunks(b'{"prompt": "next"}')
    ) as client:
        said = b""
        while b"next" not in said:
            said += client.recv(4096) or pytest.fail(said.decode())
    assert said.index(b"in pieces, twelve") < said.index(b"next")


@pytest.mark.parametrize("size", [b"", b"-1", b"0x2", b"+2", b"4000001", b"f" * 9, b"many"])
def test_chunks_of_no_size_and_of_too_large_a_one_are_refused(size, address):
    with open_with(address, request(size + b"\r\n{}\r\n0\r\n\r\n", "1.1", "Transfer-Encoding: chunked")) as client:
        said = b""
        while piece := client.recv(4096):
            said += piece
    assert said.startswith(b"HTTP/1.1 400 ")
    assert said.count(b"HTTP/1.1") == 1  # nothing of it was taken for another request


@pytest.mark.parametrize("length", [str(1 << 40), "9" * 5000])
def test_a_body_that_is_too_large_is_not_read(length, address):
    status, _ = ask(address, "POST", "/v1/completions", b"{}", **{"Content-Length": length})
    assert status == 400


def test_a_port_that_is_taken_is_refused(address, front):
    port = int(address.rpartition(":")[2])
    with pytest.raises(FactorLLMError, match=f"listen on 127.0.0.1:{port}: .*; use another --port"):
        Proxy("127.0.0.1", port, front)


@pytest.mark.engine
@pytest.mark.parametrize("form", [{}, {"lossless": "dense"}, {"dense_prompt": "dense"}])
def test_a_port_that_is_taken_is_refused_before_the_model_is_made_ready(form, address):
    settings = ServeSettings(port=int(address.rpartition(":")[2]))
    with pytest.raises(FactorLLMError, match=r"listen on 127.0.0.1:\d+: .*; use another --port"):
        serve("not even looked for", "llamacpp", settings=settings, **form)


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "no..name"])
def test_a_host_that_is_not_here_is_refused(host, front):
    with pytest.raises(FactorLLMError, match=f"listen on {host}:8080: .*; use another --host"):
        Proxy(host, 8080, front)


def test_addresses_of_ipv6(front):
    try:
        check_free("::1", 0)
    except FactorLLMError:
        pytest.skip("no IPv6 here")
    assert url_of("::1", 8080) == "http://[::1]:8080"
    with running(Proxy("::1", 0, front)) as found:
        assert ask(f"http://[::1]:{found.rpartition(':')[2]}", "GET", "/health")[0] == 200


def test_a_head_is_answered_without_a_body(address):
    assert [ask(address, "HEAD", path) for path in ("/health", "/nothing")] == [(200, b""), (404, b"")]


def test_other_methods_are_refused_in_openais_form(address):
    status, content = ask(address, "PUT", "/v1/completions", b"{}")
    said = {"message": "Unsupported method ('PUT')", "type": "server_error", "code": 501}
    assert (status, json.loads(content)) == (501, {"error": said})


def test_a_client_that_resets_the_connection_leaves_no_traceback(address, capsys):
    host, _, port = address.removeprefix("http://").partition(":")
    client = socket.create_connection((host, int(port)))
    client.sendall(b"GET /health HTTP/1.1\r\nHost: it\r\n\r\n")
    client.recv(4096)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, not an end
    client.close()
    time.sleep(1)
    assert capsys.readouterr().err == ""
