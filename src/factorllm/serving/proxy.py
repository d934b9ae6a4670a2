"""One OpenAI address in front of others: each request is given a place, and what comes back from there is passed on as
it comes."""

from __future__ import annotations

import errno
import json
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from socket import AF_INET, AF_INET6, MSG_PEEK, SO_REUSEADDR, SOL_SOCKET, AddressFamily, socket
from urllib.parse import urlsplit

from factorllm.errors import FactorLLMError

PLACED = ("/v1/completions", "/v1/chat/completions")
"""What is given a place; a body has a `prompt`, or `messages`."""

_LARGEST = 64 << 20  # bytes of a body
_PIECE = 1 << 16
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;.*)?\r?\n")  # of a piece of a body


def text_of(body: dict) -> str:
    """What a request says, as one text: its prompts, or the contents of its messages. Prompts in tokens say nothing."""
    messages = body.get("messages")
    said = [each.get("content") for each in messages if isinstance(each, dict)] if isinstance(messages, list) else []
    said.append(body.get("prompt"))
    return "\n".join(piece for each in said for piece in texts_of(each))


def texts_of(said: object) -> Iterator[str]:
    """The texts of a content: itself, or its parts, of which images have none."""
    for piece in said if isinstance(said, list) else [said]:
        text = piece.get("text") if isinstance(piece, dict) else piece
        if isinstance(text, str):
            yield text


class UnavailableError(FactorLLMError):
    """A request that is right cannot be answered, by no fault of the client's."""


class Front(ABC):
    """What stands behind the one address.

    Attributes:
        name: of its model, for /v1/models.
    """

    name: str

    @abstractmethod
    def place(self, path: str, body: dict) -> AbstractContextManager[tuple[str, dict]]:
        """The address, http://HOST:PORT, that answers a request, and the body to send there; held until it is answered.

        Raises:
            UnavailableError: when the engine cannot answer, and the client is told to ask again (status 503).
            FactorLLMError: when the request is wrong; the client is told (status 400).
        """

    def metrics(self) -> str:
        """For /metrics, in Prometheus' text format."""
        return ""


def check_free(host: str, port: int) -> None:
    """Refuse an address at which nothing can listen, before what is to be served there is made.

    Raises:
        FactorLLMError: saying what to do instead.
    """
    try:
        with socket(_family(host)) as tried:
            tried.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)  # what was served there a moment ago is no hindrance
            tried.bind((host, port))
    except OSError as error:
        raise _cannot_listen(host, port, error) from None


def url_of(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if _family(host) is AF_INET6 else f"http://{host}:{port}"


def _family(host: str) -> AddressFamily:
    return AF_INET6 if ":" in host else AF_INET


def _cannot_listen(host: str, port: int, error: OSError) -> FactorLLMError:
    wrong = "--port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "--host"
    return FactorLLMError(f"nothing can listen on {host}:{port}: {error.strerror}; use another {wrong}")


class Proxy(ThreadingHTTPServer):
    """Listens on an address; `serve_forever` answers, each request in a thread of its own.

    Raises:
        FactorLLMError: when nothing can listen there.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, port: int, front: Front):
        self.front, self.address_family = front, _family(host)
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise _cannot_listen(host, port, error) from None

    def handle_error(self, request, client_address) -> None:
        """A client that went away is no fault."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def serve_front(front: Front, host: str, port: int, served: str | Path, say: Callable[[str], None]) -> None:
    """Let a front answer at an address until interrupted.

    Args:
        served: what it serves, for the user.

    Raises:
        FactorLLMError: when nothing can listen there.
    """
    with Proxy(host, port, front) as proxy:
        say(f"serving {served} at {url_of(host, port)}/v1; stop with Ctrl-C")
        with suppress(KeyboardInterrupt):
            proxy.serve_forever()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def do_GET(self) -> None:
        front, path = self.server.front, self._asked()
        if path == "/health":
            self._answer(200, {"status": "ok"})
        elif path == "/v1/models":
            model = {"id": front.name, "object": "model", "owned_by": "factorllm"}
            self._answer(200, {"object": "list", "data": [model]})
        elif path == "/metrics":
            self._send(200, "text/plain; version=0.0.4", front.metrics().encode())
        else:
            self._refuse(404, f"there is no {path}")

    def do_HEAD(self) -> None:
        """As those ask who only look whether it is there."""
        self.do_GET()

    def do_POST(self) -> None:
        path, body = self._asked(), self._body()
        if path not in PLACED:
            self._refuse(404, f"there is no {path}; use {' or '.join(PLACED)}")
        elif body is None:
            self._refuse(400, "the body is no JSON mapping of at most 64 MiB")
        else:
            self._pass_on(path, body)

    def _asked(self) -> str:
        """The path, without what follows it; of an address that is none, all of it."""
        with suppress(ValueError):
            return urlsplit(self.path).path
        return self.path

    def _pass_on(self, path: str, body: dict) -> None:
        try:
            with self.server.front.place(path, body) as (address, sent):
                connection = HTTPConnection(urlsplit(address).netloc)
                try:
                    content = json.dumps(sent).encode()
                    connection.request("POST", path, content, {"Content-Type": "application/json"})
                    self._wait_for(connection.sock)
                    self._copy(connection.getresponse())
                finally:  # a client that went away: the engine stops at a closed connection
                    connection.close()
        except UnavailableError as error:
            self._refuse(503, str(error))
        except FactorLLMError as error:
            self._refuse(400, str(error))
        except (OSError, HTTPException):
            # The client has gone, or the engine's server has: where an answer has begun, it can only be broken off.
            self.close_connection = True
            if not self._begun:
                self._refuse(502, "the engine's server does not answer")

    def _wait_for(self, engine: socket) -> None:
        """Wait until an answer begins.

        Raises:
            ConnectionError: when the client has gone, for whom others would wait.
        """
        with DefaultSelector() as both:
            both.register(engine, EVENT_READ)
            both.register(self.connection, EVENT_READ)
            while engine not in [key.fileobj for key, _ in both.select()]:
                if not self.connection.recv(1, MSG_PEEK):
                    raise ConnectionAbortedError
                both.unregister(self.connection)  # it has sent its next request already

    _begun = False

    def _copy(self, reply: HTTPResponse) -> None:
        """Pass an answer on, each piece when it is there."""
        self._begun = True
        chunked = self.request_version != "HTTP/1.0"  # there, all is the answer until the connection ends
        self.send_response(reply.status)
        self.send_header("Content-Type", reply.getheader("Content-Type", "application/json"))
        self.send_header(*(("Transfer-Encoding", "chunked") if chunked else ("Connection", "close")))
        self.end_headers()
        while piece := reply.read1(_PIECE):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
            self.wfile.flush()
        if chunked:
            self.wfile.write(b"0\r\n\r\n")
        self._begun = False  # the next request of this connection

    def _body(self) -> dict | None:
        chunked = self.headers.get("Transfer-Encoding", "").lower() == "chunked"
        content = self._chunks() if chunked else self._counted()
        if content is None:
            self.close_connection = True  # what follows would be taken for the next request
            return None
        with suppress(ValueError, RecursionError):
            body = json.loads(content)
            return body if isinstance(body, dict) else None
        return None

    def _counted(self) -> bytes | None:
        """A body whose length is told; None where it is not, or too large."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or len(length) > len(str(_LARGEST)) or int(length) > _LARGEST:
            return None
        return self.rfile.read(int(length))

    def _chunks(self) -> bytes | None:
        """A body in pieces, as clients send it that do not know its length before; None as in `_counted`."""
        content = bytearray()
        while (size := self._size()) and len(content) + size <= _LARGEST:
            content += self.rfile.read(size)
            self.rfile.readline(_PIECE)
        if size:
            return None
        while self.rfile.readline(_PIECE).strip():
            pass  # what follows the last piece says nothing of the body
        return bytes(content)

    def _size(self) -> int:
        """Of the next piece, with the end of its line; too large where it is no number."""
        found = _SIZE.fullmatch(self.rfile.readline(_PIECE))
        return int(found[1], 16) if found else _LARGEST + 1

    def _refuse(self, status: int, message: str) -> None:
        kind = "invalid_request_error" if status < 500 else "server_error"
        self._answer(status, {"error": {"message": message, "type": kind, "code": status}})

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library refuses, such as other methods, in OpenAI's form too, which clients read."""
        self.close_connection = True
        self._refuse(code, message or explain or self.responses[code][0])

    def _answer(self, status: int, content: dict) -> None:
        self._send(status, "application/json", json.dumps(content).encode())

    def _send(self, status: int, kind: str, content: bytes) -> None:
        with suppress(OSError):  # the client has gone
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing of users' requests is written anywhere."""
