"""A hub on this machine that fails in all the ways a network does, for tests."""
import hashlib
import http.server
import io
import json
import threading

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat import hub

NAME = "somebody/sums"


def parquet_bytes(first, count):
    """A parquet file of `count` rows, in row groups of 100."""
    numbers = range(first, first + count)
    table = pa.table({
        "question": [f"{n} + {n * 7919 % 1009}?" for n in numbers],
        "answer": list(numbers),
        "choices": [{"text": [str(n), "0"], "label": ["A", "B"]} for n in numbers],
    })
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=100)
    return file.getvalue()


SMALL = {
    "main/train/0000.parquet": parquet_bytes(0, 250),
    "main/train/0001.parquet": parquet_bytes(250, 30),
    "main/test/0000.parquet": parquet_bytes(1000, 5),
}


class Hub:
    """A server with data sets, and another host to which its files are redirected.

    files: {name of a data set: {path on its branch: bytes}}.
    trouble: {path: what goes wrong in its next requests}: a status, "cut", "drop", "capped",
    "from_start", "garbage", "damaged", "short", "changed".
    """

    def __init__(self):
        self.files = {NAME: dict(SMALL)}
        self.trouble = {}
        self.hashes = True          # whether the listing tells them,
        self.tags = False           # and whether the reply that redirects does
        self.page = 1000            # entries of a page
        self.prefix = ""            # of all paths, as a mirror may have one
        self.next_host = None       # that the address of the next page names
        self.retry_after = "0"
        self.redirects = False
        self.requests = []          # (server, path, range, authorization)
        self.servers = []
        self.url, self.storage = self._serve("hub"), self._serve("storage")

    def _serve(self, server_name):
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                hub.answer(self, server_name)

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        self.servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    def close(self):
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def fetched(self, path):
        """The ranges of the requests for a file, in order."""
        return [given for _, asked, given, _ in self.requests if asked.endswith(path)]

    def answer(self, handler, server_name):
        path, _, query = handler.path.partition("?")
        headers = handler.headers
        self.requests.append(
            (server_name, path, headers.get("Range"), headers.get("Authorization")))
        if server_name == "hub" and not path.startswith(self.prefix):
            return handler.send_error(404)
        path = path.removeprefix(self.prefix)
        for name, files in self.files.items():
            if path == f"/api/datasets/{name}/tree/{hub.BRANCH}":
                return self._send_listing(handler, path, query, files)
            prefix = f"/datasets/{name}/resolve/{hub.BRANCH}/"
            if path.startswith(prefix) and path.removeprefix(prefix) in files:
                file = path.removeprefix(prefix)
                return self._send_file(handler, server_name, file, files[file])
        return handler.send_error(404)

    def _send_listing(self, handler, path, query, files):
        trouble = (self.trouble.get("listing") or [None]).pop(0)
        if isinstance(trouble, int):
            return self._refuse(handler, trouble)
        begin = int(query.partition("cursor=")[2] or 0)
        entries = [{"type": "directory", "path": "main/test/x.parquet", "oid": "0", "size": 0}]
        for file, content in files.items():
            entry = {"type": "file", "path": file, "oid": "1", "size": len(content)}
            if self.hashes:
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content)}
            entries.append(entry)
        handler.send_response(200)
        if begin + self.page < len(entries):
            host = self.next_host or self.url
            following = f"{host}{self.prefix}{path}?recursive=true&cursor={begin + self.page}"
            handler.send_header("Link", f'<{following}>; rel="next"')
        handler.end_headers()
        page = entries[begin:begin + self.page]
        handler.wfile.write(json.dumps({"error": "x"} if trouble == "other" else page).encode())

    def _refuse(self, handler, status):
        handler.send_response(status)
        handler.send_header("Retry-After", self.retry_after)
        handler.end_headers()

    def _send_file(self, handler, server_name, file, body):
        if self.redirects and server_name == "hub":
            handler.send_response(302)
            handler.send_header("Location", f"{self.storage}{handler.path}?Signature=secret")
            if self.tags:
                digest = hashlib.sha256(body).hexdigest()
                handler.send_header("X-Linked-Etag", f'"{digest}"')
            handler.end_headers()
            return
        trouble = (self.trouble.get(file) or [None]).pop(0)
        if isinstance(trouble, int):
            self._refuse(handler, trouble)
            return
        wanted = handler.headers.get("Range")
        start = int(wanted[6:-1]) if wanted else 0
        if trouble == "from_start":     # as a server that knows no ranges
            start = 0
        if start >= len(body):
            handler.send_error(416)
            return
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if trouble == "garbage":        # of the right length, without the end of parquet
            body = body[:-6] + b"</html"
        if trouble == "damaged":        # the end is whole, a page is not
            body = body[:40] + bytes(200) + body[240:]
        if trouble == "changed":        # whole, and another file than the listed one
            body = parquet_bytes(0, 3)
        if trouble == "short":          # whole, as it says, but not what is listed
            body = body[:len(body) // 2]
        end = len(body)
        if trouble == "capped":         # a part of the range that was asked for
            end = start + 700
        sent = len(body) if trouble != "capped" else end
        handler.send_header("Content-Length", str(sent - start))
        handler.end_headers()
        if trouble == "cut":
            end = start + len(body) // 3
        if trouble == "drop":           # after a little more of it
            end = start + 700
        handler.wfile.write(body[start:end])
