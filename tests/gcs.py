"""A Google Cloud Storage server in memory, on the loopback address, with faults on demand.

It speaks the part of the JSON API that gcsfs, google-cloud-storage and tensorstore use. One page holds a whole listing.
"""

import base64
import contextlib
import email
import hashlib
import http.server
import io
import json
import os
import random
import re
import threading
import time
import urllib.parse
from collections.abc import Iterator

BUCKET_NAME = "bucket"  # the only one there is

# Paths of requests.
OBJECT = re.compile(r"/(?:download/)?storage/v1/b/([^/]+)/o/([^/]+)")
LIST = re.compile(r"/storage/v1/b/([^/]+)/o")
UPLOAD = re.compile(r"/(?:resumable/)?upload/storage/v1/b/([^/]+)/o")
COPY = re.compile(r"/storage/v1/b/([^/]+)/o/([^/]+)/(?:rewriteTo|copyTo|moveTo)(?:/b/([^/]+))?/o/([^/]+)")
BUCKET = re.compile(r"/storage/v1/b/([^/]+)(?:/storageLayout)?")


class Server(http.server.ThreadingHTTPServer):
    """`faults(method, path)` may return None, a status such as 503, a number of seconds below 100 to wait,
    "drop" (not done, no response) or "lose" (done, no response).
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, tuple[bytes, int]] = {}  # "bucket/name" to its bytes and generation
        self.uploads: dict[str, tuple[str, bytearray, dict]] = {}
        self.lock = threading.RLock()
        self.requests: list[tuple[str, str]] = []
        self.generation = 0
        self.faults = lambda method, path: None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to take this server for Google's."""
        return {"STORAGE_EMULATOR_HOST": self.url, "TENSORSTORE_GCS_HTTP_URL": self.url, "NO_GCE_CHECK": "true"}

    def handle_error(self, request, client_address):
        pass  # clients that are killed break their connections


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_):
        pass

    def _respond(self, status: int, body: bytes | dict = b"", **headers: str) -> None:
        if isinstance(body, dict):
            body, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _fail(self, status: int) -> None:
        self._respond(status, {"error": {"code": status, "message": f"fault {status}"}})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _handle(self) -> None:
        server, split = self.server, urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(split.query))
        body = self._body()
        server.requests.append((self.command, self.path))
        fault = server.faults(self.command, self.path)
        if fault == "drop":
            self.close_connection = True
            self.connection.close()
            return
        if fault == "lose":
            self.wfile = io.BytesIO()
            self.close_connection = True
        elif fault and fault < 100:
            time.sleep(fault)
        elif fault:
            self._fail(fault)
            return
        actions = {
            COPY: self._copy, OBJECT: self._object, UPLOAD: self._upload, LIST: self._list, BUCKET: self._bucket
        }  # fmt: skip
        for pattern, action in actions.items():
            if match := pattern.fullmatch(split.path):
                names = [name and urllib.parse.unquote(name) for name in match.groups()]
                return action(*names, query=query, body=body)
        self._fail(404)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _handle

    def _bucket(self, bucket: str, query: dict, body: bytes) -> None:
        if bucket != BUCKET_NAME:
            return self._fail(404)
        self._respond(200, {"kind": "storage#bucket", "name": bucket, "id": bucket})

    def _list(self, bucket: str, query: dict, body: bytes) -> None:
        if bucket != BUCKET_NAME:
            return self._fail(404)
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], {}
        with self.server.lock:
            names = sorted(key.split("/", 1)[1] for key in self.server.objects if key.startswith(f"{bucket}/"))
        for name in names:
            if not name.startswith(prefix) or not query.get("startOffset", "") <= name:
                continue
            if "endOffset" in query and name >= query["endOffset"]:
                continue
            if delimiter and delimiter in name[len(prefix) :]:
                prefixes[prefix + name[len(prefix) :].split(delimiter)[0] + delimiter] = None
            elif description := self._describe(bucket, name):
                items.append(description)
        self._respond(200, {"kind": "storage#objects", "items": items, "prefixes": list(prefixes)})

    def _describe(self, bucket: str, name: str) -> dict | None:
        content, generation = self.server.objects.get(f"{bucket}/{name}", (None, 0))
        if content is None:
            return None
        return {
            "kind": "storage#object", "bucket": bucket, "name": name, "id": f"{bucket}/{name}/{generation}",
            "size": str(len(content)), "generation": str(generation), "metageneration": "1",
            "contentType": "application/octet-stream", "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(), "etag": str(generation),
        }  # fmt: skip

    def _object(self, bucket: str, name: str, query: dict, body: bytes) -> None:
        with self.server.lock:
            content, generation = self.server.objects.get(f"{bucket}/{name}", (None, 0))
            if not self._holds(query, generation):
                return
            if content is None:
                return self._fail(404)
            if self.command == "DELETE":
                del self.server.objects[f"{bucket}/{name}"]
                return self._respond(204)
            description = self._describe(bucket, name)
        if query.get("alt") != "media":
            return self._respond(200, description)
        headers = {"x_goog_generation": str(generation), "Content_Type": "application/octet-stream"}
        if not (match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))):
            return self._respond(200, content, **headers)
        first, last = match.groups()
        start = int(first) if first else max(0, len(content) - int(last))
        stop = min(int(last) + 1, len(content)) if first and last else len(content)
        if start >= len(content):
            return self._fail(416)
        headers["Content_Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self._respond(206, content[start:stop], **headers)

    def _holds(self, query: dict, generation: int) -> bool:
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != generation:
            self._fail(412)
            return False
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == generation:
            self._respond(304)
            return False
        return True

    def _store(self, bucket: str, name: str, content: bytes, query: dict) -> None:
        if bucket != BUCKET_NAME:
            return self._fail(404)
        with self.server.lock:
            if self._holds(query, self.server.objects.get(f"{bucket}/{name}", (b"", 0))[1]):
                self.server.generation += 1
                self.server.objects[f"{bucket}/{name}"] = bytes(content), self.server.generation
                self._respond(200, self._describe(bucket, name))

    def _upload(self, bucket: str, query: dict, body: bytes) -> None:
        if "upload_id" in query:
            return self._part(bucket, query["upload_id"], body)
        if query["uploadType"] == "media":
            return self._store(bucket, query["name"], body, query)
        if query["uploadType"] == "multipart":
            content_type = self.headers["Content-Type"]
            metadata, content = _parts(body, content_type)
            return self._store(bucket, query.get("name") or metadata["name"], content, query)
        name = query.get("name") or json.loads(body)["name"]
        upload = f"{random.getrandbits(64):x}"
        self.server.uploads[upload] = name, bytearray(), query
        location = f"{self.server.url}/resumable/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={upload}"
        self._respond(200, Location=location)

    def _part(self, bucket: str, upload: str, body: bytes) -> None:
        name, content, query = self.server.uploads[upload]
        extent = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", self.headers.get("Content-Range", "bytes 0-0/*"))
        if extent[1] is not None and body:
            del content[int(extent[1]) :]
            content += body
        if extent[3] == str(len(content)):
            return self._store(bucket, name, bytes(content), query)
        self._respond(308, **({"Range": f"bytes=0-{len(content) - 1}"} if content else {}))

    def _copy(self, bucket: str, name: str, to_bucket: str | None, to_name: str, query: dict, body: bytes) -> None:
        with self.server.lock:
            if f"{bucket}/{name}" not in self.server.objects:
                return self._fail(404)
            to_bucket = to_bucket or bucket  # of moveTo
            self.server.generation += 1
            self.server.objects[f"{to_bucket}/{to_name}"] = (
                self.server.objects[f"{bucket}/{name}"][0],
                self.server.generation,
            )
            if "/moveTo/" in self.path:
                del self.server.objects[f"{bucket}/{name}"]
            description = self._describe(to_bucket, to_name)
        self._respond(200, description if "/moveTo/" in self.path else {"done": True, "resource": description})


def _parts(body: bytes, content_type: str) -> tuple[dict, bytes]:
    """The metadata and the content of a multipart upload."""
    boundary = email.message_from_string(f"Content-Type: {content_type}\n\n").get_boundary().encode()
    _, first, second = body.split(b"--" + boundary)[:3]
    separator = re.compile(rb"\r?\n\r?\n")
    end = b"\r\n" if second.endswith(b"\r\n") else b"\n"
    return json.loads(separator.split(first, 1)[1]), separator.split(second, 1)[1].removesuffix(end)


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """Runs a server; os.environ points this process and its children to it."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    before = {name: os.environ.get(name) for name in server.environment}
    os.environ.update(server.environment)
    try:
        yield server
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
        server.shutdown()
        server.server_close()
