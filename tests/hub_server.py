"""A stand-in of the Hugging Face hub: the part of its HTTP interface that uploads and downloads need."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import huggingface_hub.constants
import pytest

LARGE = 1024
"""Files from so many bytes on are known by their sha256, as those in LFS are; others by git's sha1."""


class Hub:
    """Repositories in memory.

    Attributes:
        files: content by repository (``datasets/owner/name`` for data) and path.
        asked: method and path of every request, and the range asked for.
        cut: the next download of this path breaks off in the middle, once.
        altered: content that is served in place of a path's, under the hash of the right one.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.asked: list[tuple[str, str, str | None]] = []
        self.cut: set[str] = set()
        self.altered: dict[str, bytes] = {}
        self.uploads: dict[str, bytes] = {}
        self.url = ""

    def revision(self, repo: str) -> str:
        text = "".join(f"{path}{_etag(content)}" for path, content in sorted(self.files[repo].items()))
        return hashlib.sha1(text.encode()).hexdigest()

    def downloads(self, path: str) -> list[str | None]:
        """The ranges that were asked for of a file."""
        return [part for method, asked, part in self.asked if method == "GET" and asked.endswith("/" + path)]


def _etag(content: bytes) -> str:
    if len(content) >= LARGE:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._note()
        self._file(body=False)

    def do_GET(self) -> None:
        self._note()
        match = re.match(r"/api/(models|datasets)/([^/]+/[^/]+)/?(.*)", self._path)
        if not match:
            self._file(body=True)
            return
        kind, name, rest = match.groups()
        repo = name if kind == "models" else f"datasets/{name}"
        if repo not in self.hub.files:
            self._missing()
        elif rest.startswith("tree"):
            self._json([self._entry(path, content) for path, content in self.hub.files[repo].items()])
        else:
            siblings = [{"rfilename": path} for path in self.hub.files[repo]]
            self._json({"id": name, "sha": self.hub.revision(repo), "siblings": siblings, "private": False})

    def do_POST(self) -> None:
        self._note()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self._path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.hub.files.setdefault(name, {})
            self._json({"url": f"{self.hub.url}/{name}"})
        elif "/preupload/" in self._path:
            files = [
                {"path": file["path"], "uploadMode": _mode(file), "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._json({"files": files})
        elif self._path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.hub.url}/put/{one['oid']}", "header": {}}}}
                for one in json.loads(body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects})
        elif "/commit/" in self._path:
            self._commit(body)
        else:
            self._json({})

    def do_PUT(self) -> None:
        self._note()
        self.hub.uploads[self._path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
        self._json({})

    @property
    def _path(self) -> str:
        return self.path.partition("?")[0]

    def _note(self) -> None:
        self.hub.asked.append((self.command, self._path, self.headers.get("Range")))

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        small = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry = {"type": "file", "path": path, "size": len(content), "oid": small}
        if len(content) >= LARGE:
            entry["lfs"] = {"oid": _etag(content), "size": len(content), "pointerSize": 100}
        return entry

    def _commit(self, body: bytes) -> None:
        match = re.match(r"/api/models/([^/]+/[^/]+)/commit", self._path)
        assert match
        for line in body.splitlines():
            one = json.loads(line)
            if one["key"] == "file":
                content = b64decode(one["value"]["content"])
                self.hub.files[match[1]][one["value"]["path"]] = content
            elif one["key"] == "lfsFile":
                self.hub.files[match[1]][one["value"]["path"]] = self.hub.uploads[one["value"]["oid"]]
        oid = self.hub.revision(match[1])
        url = f"{self.hub.url}/{match[1]}/commit/{oid}"
        self._json({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def _file(self, *, body: bool) -> None:
        match = re.match(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._path)
        if not match or match[1] not in self.hub.files or match[3] not in self.hub.files[match[1]]:
            self._missing()
            return
        repo, _, path = match.groups()
        right = self.hub.files[repo][path]
        content = self.hub.altered.get(path, right)
        asked = re.match(r"bytes=(\d+)", self.headers.get("Range") or "bytes=0")
        assert asked
        start = int(asked[1])
        part = content[start:]
        self.send_response(206 if start else 200)
        for name, value in {
            "ETag": f'"{_etag(right)}"',
            "X-Repo-Commit": self.hub.revision(repo),
            "Accept-Ranges": "bytes",
            "Content-Length": str(len(part)),
        }.items():
            self.send_header(name, value)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if not body:
            return
        if path in self.hub.cut:
            self.hub.cut.discard(path)
            self.wfile.write(part[: len(part) // 2])
            self.close_connection = True
        else:
            self.wfile.write(part)

    def _json(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _missing(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("X-Error-Message", "Repository not found")
        self.send_header("Content-Length", "0")
        self.end_headers()


def _mode(file: dict[str, Any]) -> str:
    return "lfs" if file["size"] >= LARGE else "regular"


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub on a free port of this machine."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def stand_in(cache: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The client of this process asks the stand-in, as with HF_ENDPOINT, and keeps files in ``cache``."""
    with serving() as hub:
        known = huggingface_hub.constants
        monkeypatch.setattr(known, "ENDPOINT", hub.url)
        form = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(known, "HUGGINGFACE_CO_URL_TEMPLATE", form)
        monkeypatch.setattr(known, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(known, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(known, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setattr(known, "DOWNLOAD_CHUNK_SIZE", 256)
        monkeypatch.setenv("HF_TOKEN", "of nobody")
        yield hub
