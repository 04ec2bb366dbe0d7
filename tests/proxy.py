"""A proxy in front of an S3 server that breaks what passes through it: the faults that a network and a busy S3 have."""

import contextlib
import http.client
import http.server
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.'
    b"</Message></Error>"
)
Fault = str
SLOW, CUT, LOST_ANSWER, HALF_ANSWER, STALL = "slow down", "cut", "lost answer", "half an answer", "stall"
HALF_STALL = "half an answer, and then nothing"
HALF_REQUEST = "half a request"  # the connection to the server is cut in the middle of what is sent
CONFLICT, DENIED, EXPIRED, WRONG_REGION = "conflict", "denied", "expired", "wrong region"
LOST_RACE, NO_UPLOAD = "lost race", "no such upload"
STRIKE_BEFORE, STRIKE_AFTER = "strike before", "strike after"  # `strike` is called, and no answer comes
ELSEWHERE = "elsewhere"  # a right answer that names another region, as after a redirect that was followed
STALL_S = 3.0
ANSWERS = {
    SLOW: (503, SLOW_DOWN),
    CONFLICT: (409, SLOW_DOWN.replace(b"SlowDown", b"ConditionalRequestConflict")),
    DENIED: (403, SLOW_DOWN.replace(b"SlowDown", b"AccessDenied")),
    LOST_RACE: (412, SLOW_DOWN.replace(b"SlowDown", b"PreconditionFailed")),
    NO_UPLOAD: (404, SLOW_DOWN.replace(b"SlowDown", b"NoSuchUpload")),
    EXPIRED: (400, SLOW_DOWN.replace(b"SlowDown", b"ExpiredToken")),
    WRONG_REGION: (301, SLOW_DOWN.replace(b"SlowDown", b"PermanentRedirect")),
}
Rule = Callable[[str, str], bool]  # method and path


def anything(_method: str, _path: str) -> bool:
    return True


@dataclass
class FaultProxy:
    """Passes requests on to `port`, but for those that a rule gives a fault to."""

    port: int
    own_port: int = 0
    injected: int = 0
    seen: list[tuple[str, str]] = field(default_factory=list)
    strike: Callable[[], None] = lambda: None
    _plan: list[tuple[Fault, Rule, int]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.own_port}"

    def inject(self, fault: Fault, times: int = 1, rule: Rule = anything) -> None:
        """Break the next `times` requests that fit the rule."""
        with self._lock:
            self._plan.append((fault, rule, times))

    def reset(self) -> None:
        """Break nothing any more."""
        with self._lock:
            self._plan.clear()
            self.seen.clear()
            self.injected = 0

    def fault_of(self, method: str, path: str) -> Fault | None:
        with self._lock:
            self.seen.append((method, path))
            for index, (fault, rule, times) in enumerate(self._plan):
                if times and rule(method, path):
                    self._plan[index] = (fault, rule, times - 1)
                    self.injected += 1
                    return fault
        return None


@contextlib.contextmanager
def fault_proxy(port: int, own_port: int = 0) -> Iterator[FaultProxy]:
    """A proxy in front of the server on `port`."""
    proxy = FaultProxy(port)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else the body of each answer waits 40 ms for its headers to be acknowledged

        def log_message(self, *_: object) -> None:
            pass

        def pass_on(self) -> None:
            body = self.body()
            fault = proxy.fault_of(self.command, self.path)
            if fault == STRIKE_BEFORE:
                proxy.strike()
            if fault in (CUT, STRIKE_BEFORE):
                return self.hang_up()
            if fault == STALL:
                threading.Event().wait(STALL_S)  # not a sleep: tests take those away from who tries again
                return self.hang_up()
            if fault in ANSWERS:
                status, text = ANSWERS[fault]
                return self.answer(status, [("Content-Type", "application/xml")], text)
            server = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=30)
            try:
                server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in ("connection", "expect"):
                        server.putheader(name, value)
                server.endheaders(body[: len(body) // 2] if fault == HALF_REQUEST else body)
                if fault == HALF_REQUEST:
                    return self.hang_up()
                answer = server.getresponse()
                data = answer.read()
            except OSError:
                return self.hang_up()  # the server behind is down
            finally:
                server.close()
            if fault == STRIKE_AFTER:
                proxy.strike()
            if fault in (LOST_ANSWER, STRIKE_AFTER):
                return self.hang_up()
            headers = answer.getheaders()
            if fault == ELSEWHERE:
                headers.append(("x-amz-bucket-region", "eu-west-3"))
            cut_at = len(data) // 2 if fault in (HALF_ANSWER, HALF_STALL) else len(data)
            return self.answer(answer.status, headers, data, cut_at, STALL_S if fault == HALF_STALL else 0.0)

        def body(self) -> bytes:
            """The body as it came on the wire: what was sent in chunks is passed on in the same chunks."""
            if "chunked" not in (self.headers.get("Transfer-Encoding") or ""):
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            raw = b""
            while True:
                line = self.rfile.readline()
                size = int(line.split(b";")[0], 16)
                raw += line + self.rfile.read(size + 2)
                if size == 0:
                    return raw

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = pass_on

        def answer(
            self,
            status: int,
            headers: list[tuple[str, str]],
            data: bytes,
            cut_at: int | None = None,
            stall_s: float = 0.0,
        ) -> None:
            self.send_response_only(status)
            kept = [
                (name, value)
                for name, value in headers
                if name.lower() not in ("connection", "transfer-encoding", "content-length")
            ]
            length = {name.lower(): value for name, value in headers}.get("content-length", str(len(data)))
            for name, value in [*kept, ("Content-Length", length if self.command == "HEAD" else str(len(data)))]:
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data[:cut_at])
            if cut_at is not None and cut_at < len(data):
                threading.Event().wait(stall_s)
                self.hang_up()

        def hang_up(self) -> None:
            self.close_connection = True
            self.wfile.flush()
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):  # the client may hang up too
                super().handle()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", own_port), Handler)
    server.daemon_threads = True
    proxy.own_port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
