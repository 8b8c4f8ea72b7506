# SPDX-License-Identifier: Apache-2.0
"""A hub of one process, for `huggingface_hub` itself to talk to: there is no network in tests.

It keeps what is committed to it, and gives it back; as much of the protocol as that takes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c" * 40


class Hub(BaseHTTPRequestHandler):
    """One request; the server's ``files`` are kept by ``org/name`` and path."""

    server: Any
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        path, body = urlsplit(self.path).path, self._body()
        if path == "/api/repos/create":
            facts = json.loads(body)
            name = "/".join(filter(None, (facts.get("organization"), facts["name"])))
            self.server.files.setdefault(name, {})
            return self._json({"url": f"{self.server.address}/{name}", "name": name, "id": name})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if not path.startswith("/api/models/"):
            return self._json({"error": f"no {path} here"}, 404)
        _, _, _, organization, name, action, _ = path.split("/")
        if action == "preupload":
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        lines = [json.loads(line) for line in body.splitlines()]
        for line in lines:
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.server.files[f"{organization}/{name}"][line["value"]["path"]] = content
        url = f"{self.server.address}/{organization}/{name}/commit/{COMMIT}"
        return self._json({"success": True, "commitOid": COMMIT, "commitUrl": url})

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.split("/")[1:]]
        if parts[:2] == ["api", "models"]:
            name = "/".join(parts[2:4])
            if name not in self.server.files:
                return self._json({"error": "Repository not found"}, 404)
            held = self.server.files[name]
            if parts[4:5] == ["tree"]:
                return self._json([
                    {"type": "file", "path": path, "size": len(content), "oid": _digest(content)}
                    for path, content in held.items()
                ])  # fmt: skip
            siblings = [{"rfilename": path} for path in held]
            return self._json({"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings})
        content = self.server.files.get("/".join(parts[:2]), {}).get("/".join(parts[4:]))
        if content is None:
            return self._json({"error": f"no {self.path} here"}, 404)
        self.server.fetched.append("/".join(parts[4:]))
        headers = {"ETag": f'"{_digest(content)}"', "X-Repo-Commit": COMMIT}
        return self._send(content, 200, "application/octet-stream", headers)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *_: Any) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _json(self, value: Any, status: int = 200) -> None:
        headers = {} if status == 200 else {"X-Error-Code": "RepoNotFound"}
        self._send(json.dumps(value).encode(), status, "application/json", headers)

    def _send(self, content: bytes, status: int, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": kind, "Content-Length": len(content), **headers}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def hub() -> Iterator[Any]:
    """Run a hub; its ``address`` is for ``HF_ENDPOINT``."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.files, server.fetched = {}, []
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
