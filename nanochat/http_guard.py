"""
Who may ask a server, how much of it one client may hold, and what its page may do in a browser.

Access decides by a request's head alone, before anything of it is read or routed:

    Host      must be a name of this machine, so that a foreign name which was pointed at it by DNS
              (DNS rebinding) reaches nothing
    Origin    where a browser sends one, must be this server itself or one of allowed_origins
    key       every path but OPEN_PATHS needs `Authorization: Bearer KEY`, where keys are set

    framing   a body has a length or comes in chunks: a head that says both is read by two programs
              as two different requests, of which the second was never checked (request smuggling)

GuardedProtocol bounds connections: their number, the time in which a request's head must arrive,
the time for which a client may leave an answer unread, and the bytes that one of them may bring
before the others have their turn.
"""
import base64
import hashlib
import hmac
import json
import re
import socket
from pathlib import Path

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from nanochat.common import UserError
from nanochat.openai_api import ApiError, error_body

LOOPBACK = ("localhost", "127.0.0.1", "::1")
# What is answered without a key: whether the server is alive, and the page that asks for the key.
OPEN_PATHS = ("/health", "/")
PAGE_DATA = "/about"        # says without a key that one is needed, and refuses a wrong one
READING = ("GET", "HEAD")   # what asks for a page; HEAD, for nothing but whether it is there

HEAD_SECONDS = 20           # in which the head of a request must be complete
MAX_CONNECTIONS = 1000
STALL_SECONDS = 60          # for which an answer may wait for its client to read on
READ_BYTES = 4_096          # taken from one connection at a time: asyncio would take 262,144

# "name", "name:port" or "[IPv6 address]:port"
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:/?#@\\\s]+)(?::[0-9]{0,5})?")


def is_loopback(host):
    """Whether only this machine can reach a server that listens on host."""
    return host in LOOPBACK or host.startswith("127.")


def header_values(scope, name):
    """The values of a header of an ASGI scope, a list of str. name: bytes in lower case."""
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def host_name(netloc):
    """The host of "host:port", without the port and the brackets of an IPv6 address; "" for
    anything else."""
    match = HOST.fullmatch(netloc)
    return match[1].strip("[]").lower() if match else ""


def check_names(allowed_hosts, allowed_origins):
    """UserError for one that no request could match. Both are lists, as Access takes them."""
    for name in allowed_hosts:
        if name != "*" and name.lower() not in (host_name(name), host_name(f"[{name}]")):
            raise UserError(
                f"allowed_hosts: {name} is no name of a host, which has neither scheme nor port: "
                "--allowed_hosts=chat.example.org")
    for origin in allowed_origins:
        scheme, _, netloc = origin.partition("://")
        is_written_so = origin == origin.lower() and scheme.isalnum()
        # a page that was opened from a file has the origin null
        if origin not in ("*", "null") and not (is_written_so and host_name(netloc)):
            raise UserError(
                f"allowed_origins: {origin} is no origin, which is a scheme, a host in lower case "
                "and perhaps a port: --allowed_origins=http://localhost:3000")


def has_two_framings(scope):
    """Whether the body of a request has a length and comes in chunks as well."""
    names = {name for name, _ in scope["headers"]}
    return {b"content-length", b"transfer-encoding"} <= names


def not_http():
    """The answer to bytes that are no request, as it is sent."""
    body = json.dumps(error_body(ApiError(400, "this is not a valid HTTP request")))
    head = (
        "HTTP/1.1 400 Bad Request",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
    )
    return "\r\n".join((*head, "", body)).encode("ascii")


class Access:
    """What a request's head must say.

    host               the address on which the server listens
    keys               the keys; empty: none is needed
    allowed_hosts      names besides this machine's own; "*": any
    allowed_origins    origins of pages that may use the server from elsewhere; "*": any
    """

    def __init__(self, host="127.0.0.1", keys=(), allowed_hosts=(), allowed_origins=()):
        self.hosts = {*LOOPBACK, host.lower(), *(name.lower() for name in allowed_hosts)}
        self.origins = set(allowed_origins)
        self.digests = [hashlib.sha256(key.encode("utf-8")).digest() for key in keys]

    @property
    def needs_key(self):
        """Whether keys are set."""
        return bool(self.digests)

    def check_key(self, scope):
        """The tenant of a request: "" without keys, else a text for each key. ApiError for one
        without a valid key that needs it."""
        if not self.needs_key:
            return ""
        tenant = self.tenant(scope)
        if tenant is None and not self.is_open(scope):
            problem = "a valid key is needed: send the header Authorization: Bearer KEY"
            raise ApiError(401, problem, code="invalid_api_key")
        return tenant or ""

    def is_open(self, scope):
        """Whether a request is answered without a key."""
        if scope["method"] not in READING:
            return False
        if scope["path"] == PAGE_DATA:
            return not header_values(scope, b"authorization")
        return scope["path"] in OPEN_PATHS

    def check_host(self, scope):
        """ApiError for a Host that is not this server's."""
        hosts = header_values(scope, b"host")
        name = host_name(hosts[0]) if len(hosts) == 1 else ""
        own = scope["server"][0] if scope.get("server") else ""
        if name not in self.hosts | {own} and "*" not in self.hosts:
            problem = "this server does not go by that name: start it with --allowed_hosts=NAME"
            raise ApiError(403, problem, code="foreign_host")

    def check_origin(self, scope):
        """ApiError for a page from elsewhere."""
        origins = header_values(scope, b"origin")
        hosts = header_values(scope, b"host")
        for origin in origins:
            is_own = [origin.partition("://")[2]] == hosts
            if not is_own and not self.allows_origin(origin):
                problem = "pages from elsewhere are refused: start it with --allowed_origins=ORIGIN"
                raise ApiError(403, problem, code="foreign_origin")

    def allows_origin(self, origin):
        """Whether pages of an origin may use this server from elsewhere."""
        return origin in self.origins or "*" in self.origins

    def tenant(self, scope):
        """Whose key a request has, or None. All keys are compared, each in constant time."""
        values = header_values(scope, b"authorization")
        scheme, _, key = values[0].partition(" ") if len(values) == 1 else ("", "", "")
        digest = hashlib.sha256(key.encode("latin-1")).digest()
        matches = [hmac.compare_digest(digest, known) for known in self.digests]
        if scheme != "Bearer" or not any(matches):
            return None
        return f"key-{matches.index(True)}"

    def cross_origin_headers(self, scope):
        """The headers that let a page of an allowed origin read the answer."""
        for origin in header_values(scope, b"origin"):
            if self.allows_origin(origin):
                return [
                    (b"access-control-allow-origin", origin.encode("latin-1")),
                    (b"access-control-allow-headers", b"authorization, content-type"),
                    (b"access-control-allow-methods", b"GET, POST"),
                    (b"vary", b"origin"),
                ]
        return []


def listen(host, port):
    """A listening socket. UserError where it cannot be had.

    It is opened before anything is loaded, so that a port in use is known at once. Every piece of
    an answer is sent when it is there: Nagle's algorithm would keep it for the client's
    acknowledgement of the last one, which takes 40 ms.
    """
    try:
        family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot listen on {host}, port {port} ({reason}): choose another with --port=N"
        ) from error
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def load_page(name):
    """The page in a file of this folder, and its headers.

    Its policy names the one script and the one style by their hashes: nothing else ever runs.
    """
    page = (Path(__file__).parent / name).read_text(encoding="utf-8")

    def hashed(tag):
        text = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1]
        digest = hashlib.sha256(text.encode("utf-8")).digest()
        return f"'sha256-{base64.b64encode(digest).decode()}'"

    policy = (
        "default-src 'none'",
        f"script-src {hashed('script')}",
        f"style-src {hashed('style')}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
    return page, {
        "Content-Security-Policy": "; ".join(policy),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


class GuardedProtocol(AutoHTTPProtocol):
    """uvicorn's protocol of one connection, with bounds on what it may hold."""

    def connection_made(self, transport):
        """Begin to wait for a request, in place of a connection that waits longer where there are
        too many."""
        super().connection_made(transport)
        if hasattr(transport, "max_size"):
            transport.max_size = READ_BYTES
        self.head_timer = self.stall_timer = None
        self.waits_since = self.loop.time()
        self._watch_head()
        if len(self.connections) > MAX_CONNECTIONS:
            idle = [one for one in self.connections if one.waits_for_client()]
            oldest = min(idle or [self], key=lambda one: one.waits_since)
            oldest.transport.abort()

    def data_received(self, data):
        """Read on. A head that is not complete yet has HEAD_SECONDS from its first byte."""
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc):
        """The client has closed the connection, or it was closed here."""
        self._stop_timer()
        self._stop_stall_timer()
        super().connection_lost(exc)

    def pause_writing(self):
        """The client does not read as fast as it is answered. It has STALL_SECONDS to read on."""
        super().pause_writing()
        self.stall_timer = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self):
        """The client has read on."""
        self._stop_stall_timer()
        super().resume_writing()

    def send_400_response(self, msg):
        """Say that something is no HTTP, unless it comes amid an answer, and close the connection.
        """
        is_amid_answer = not self.waits_for_client() and self.cycle.response_started
        if not is_amid_answer:
            self.transport.write(not_http())
        self.transport.close()

    def waits_for_client(self):
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _watch_head(self):
        if not self.waits_for_client():
            self._stop_timer()
            self.waits_since = self.loop.time()
        elif self.head_timer is None:
            self.head_timer = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _stop_timer(self):
        if self.head_timer is not None:
            self.head_timer.cancel()
            self.head_timer = None

    def _stop_stall_timer(self):
        if self.stall_timer is not None:
            self.stall_timer.cancel()
            self.stall_timer = None

    def _give_up(self):
        self.head_timer = None
        if self.waits_for_client():
            self.transport.close()
