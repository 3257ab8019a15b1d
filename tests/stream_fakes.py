"""A server that plays hand-written answers, byte for byte, and remembers what it was asked."""
import contextlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Reply:
    """One answer of the server.

    body: pieces of bytes, each sent at once, and events that are waited for between them.
    cut: the connection is closed in mid-answer.
    """
    body: list = field(default_factory=list)
    status: int = 200
    headers: dict = field(default_factory=dict)
    cut: bool = False
    chunked: bool = True


def vllm(*deltas, finish="stop", usage=None):
    """A stream in the shape that vLLM documents, one event per piece.

    deltas: each a dict, or the text of its content.
    """
    head = {
        "id": "chatcmpl-7",
        "object": "chat.completion.chunk",
        "created": 1763683200,
        "model": "test/model-7b",
    }

    def choice(delta, reason=None):
        only = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**head, "choices": [only]}

    events = [choice({"role": "assistant", "content": ""})]
    for delta in deltas:
        events.append(choice(delta if isinstance(delta, dict) else {"content": delta}))
    if finish:
        events.append(choice({"content": ""}, finish))
        events[-1]["choices"][0]["stop_reason"] = None
    if usage:
        prompt, completion = usage
        counts = {
            "prompt_tokens": prompt,
            "total_tokens": prompt + completion,
            "completion_tokens": completion,
        }
        events.append({**head, "choices": [], "usage": counts})
    lines = [f"data: {json.dumps(event)}\n\n".encode() for event in events]
    return lines + [b"data: [DONE]\n\n"] * bool(finish)


# Streams as they are on the wire, written down from what the servers document and send: field for
# field, with the fields that a client does not know.
#
# vLLM 0.11 with --reasoning-parser: thoughts in reasoning_content, null fields, a usage chunk
VLLM_WIRE = b'''\
data: {"id":"chatcmpl-3f9c","object":"chat.completion.chunk","created":1763683200,\
"model":"Qwen/Qwen3-32B","choices":[{"index":0,"delta":{"role":"assistant","content":""},\
"logprobs":null,"finish_reason":null}],"prompt_token_ids":null}

data: {"id":"chatcmpl-3f9c","object":"chat.completion.chunk","created":1763683200,\
"model":"Qwen/Qwen3-32B","choices":[{"index":0,"delta":{"reasoning_content":"12 * 7"},\
"logprobs":null,"finish_reason":null,"token_ids":null}]}

data: {"id":"chatcmpl-3f9c","object":"chat.completion.chunk","created":1763683200,\
"model":"Qwen/Qwen3-32B","choices":[{"index":0,"delta":{"reasoning_content":" is 84."},\
"logprobs":null,"finish_reason":null,"token_ids":null}]}

data: {"id":"chatcmpl-3f9c","object":"chat.completion.chunk","created":1763683200,\
"model":"Qwen/Qwen3-32B","choices":[{"index":0,"delta":{"content":"\\n\\nIt is"},\
"logprobs":null,"finish_reason":null,"token_ids":null}]}

data: {"id":"chatcmpl-3f9c","object":"chat.completion.chunk","created":1763683200,\
"model":"Qwen/Qwen3-32B","choices":[{"index":0,"delta":{"content":" 84."},\
"logprobs":null,"finish_reason":"stop","stop_reason":null,"token_ids":null}]}

data: {"id":"chatcmpl-3f9c","object":"chat.completion.chunk","created":1763683200,\
"model":"Qwen/Qwen3-32B","choices":[],"usage":{"prompt_tokens":18,"total_tokens":31,\
"completion_tokens":13}}

data: [DONE]

'''

# ollama's /v1: every delta names the role, thoughts are in reasoning, a fingerprint of its own
OLLAMA_WIRE = b'''\
data: {"id":"chatcmpl-523","object":"chat.completion.chunk","created":1763683200,\
"model":"qwen3:32b","system_fingerprint":"fp_ollama","choices":[{"index":0,"delta":\
{"role":"assistant","content":"","reasoning":"12 * 7"},"finish_reason":null}]}

data: {"id":"chatcmpl-523","object":"chat.completion.chunk","created":1763683200,\
"model":"qwen3:32b","system_fingerprint":"fp_ollama","choices":[{"index":0,"delta":\
{"role":"assistant","content":"","reasoning":" is 84."},"finish_reason":null}]}

data: {"id":"chatcmpl-523","object":"chat.completion.chunk","created":1763683201,\
"model":"qwen3:32b","system_fingerprint":"fp_ollama","choices":[{"index":0,"delta":\
{"role":"assistant","content":"It is"},"finish_reason":null}]}

data: {"id":"chatcmpl-523","object":"chat.completion.chunk","created":1763683201,\
"model":"qwen3:32b","system_fingerprint":"fp_ollama","choices":[{"index":0,"delta":\
{"role":"assistant","content":" 84."},"finish_reason":null}]}

data: {"id":"chatcmpl-523","object":"chat.completion.chunk","created":1763683202,\
"model":"qwen3:32b","system_fingerprint":"fp_ollama","choices":[{"index":0,"delta":\
{"role":"assistant","content":""},"finish_reason":"stop"}]}

data: [DONE]

'''

# vLLM's errors in the middle of a stream, of now and of older versions; [DONE] follows all the same
VLLM_ERROR = b'''\
data: {"error": {"message": "EngineCore died", "type": "InternalServerError", "param": null, \
"code": 500}}

data: [DONE]

'''
OLD_VLLM_ERROR = b'''\
data: {"object": "error", "message": "EngineCore died", "type": "InternalServerError", \
"param": null, "code": 500}

data: [DONE]

'''
# ollama says it on a line of its own, without "data:"
OLLAMA_ERROR = b'''\
{"error": "EngineCore died"}
'''


def variants_of(wire):
    """{what differs: the same stream as other servers and proxies would send it}"""
    return {
        "as it is": wire,
        "CR LF": wire.replace(b"\n", b"\r\n"),
        "no blank behind data:": wire.replace(b"data: ", b"data:"),
        "keep-alive comments": wire.replace(b"data: ", b": ping\n\n: keep-alive\n\ndata: "),
        "event names and ids": wire.replace(b"data: ", b"event: message\nid: 7\ndata: "),
        "no [DONE]": wire.replace(b"data: [DONE]\n\n", b""),
    }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer_json(self, body, status=200, headers={}):
        body = json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Content-Length": len(body), **headers}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.path == "/v1/models" and self.server.models is not None:
            models = [{"id": name, "object": "model"} for name in self.server.models]
            self.answer_json({"object": "list", "data": models})
        else:
            self.answer_json({"detail": "Not Found"}, 404)

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append((asked, dict(self.headers)))
            replies = self.server.replies
            reply = replies.pop(0) if len(replies) > 1 else replies[0]
        if callable(reply):
            reply = reply(asked)
        if isinstance(reply.body, dict):
            self.answer_json(reply.body, reply.status, reply.headers)
            return
        self.send_response(reply.status)
        self.send_header("Content-Type", "text/event-stream")
        if reply.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Connection", "close")
        self.end_headers()
        for piece in reply.body:
            if isinstance(piece, threading.Event):
                assert piece.wait(60)
            elif reply.chunked:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            else:
                self.wfile.write(piece)
        if reply.cut or not reply.chunked:
            self.close_connection = True
        else:
            self.wfile.write(b"0\r\n\r\n")


def catching_environment(folder):
    """Environment variables of a machine whose ~/.netrc knows a password for this machine, and
    whose proxies answer nothing."""
    netrc = folder / "netrc"
    hosts = "127.0.0.1", "localhost"
    lines = [f"machine {host} login ada password wrong\n" for host in hosts]
    netrc.write_text("".join(lines), encoding="utf-8")
    nobody = "http://127.0.0.1:9"   # the port that discards
    proxies = "http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"
    empty = {name: "" for name in ("no_proxy", "NO_PROXY")}
    return {"NETRC": str(netrc), **empty, **{name: nobody for name in proxies}}


@contextlib.contextmanager
def play(*replies, models=("test/model-7b",), port=0):
    """A server with `address` and `asked` ([(body, headers)]), on a free port where none is named.

    replies: each a Reply, a function from the question to one, or a Reply's body. Each question
    gets the next reply; where none is left, the last one again.
    """
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.replies = []
    for reply in replies:
        ready = isinstance(reply, Reply) or callable(reply)
        server.replies.append(reply if ready else Reply(reply))
    server.models = models
    server.asked = []
    server.lock = threading.Lock()
    server.handle_error = lambda *_: None   # a client that has left is no news
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
