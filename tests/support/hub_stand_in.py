"""A Hub of one process on 127.0.0.1: what `huggingface_hub` uploads is kept in memory and served again.

It speaks the part of the Hub's API that pushing and loading a model need: creating a repository, branches, the LFS
and the commit protocol, model info, trees and downloads. `status` makes every request that writes fail with it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "stand" * 6


@dataclass
class Repository:
    """One repository: its visibility, and the files of each branch."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    messages: list[str] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        return self.branches["main"]


class Hub:
    """Use as a context manager; `environment()` is what a process needs to talk to it."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.status: int | None = None
        self.written = 0
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Variables of a process with a home and a cache of its own."""
        names = {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(home / "hf"),
            "HOME": str(home),
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        return names | ({"HF_TOKEN": token} if token else {})

    def publish(self, repo_id: str, folder: Path) -> None:
        """Put a local folder into a public repository."""
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        self.repositories[repo_id] = Repository(False, {"main": files})


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Keep quiet."""

    def do_POST(self) -> None:
        path, body = self._request()
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if self._refused():
            return None
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        for pattern, answer in (
            (r"/api/models/(.+)/preupload/(.+)", self._preupload),
            (r"/api/models/(.+)/branch/(.+)", self._branch),
            (r"/api/models/(.+)/commit/(.+)", self._commit),
            (r"/(.+)\.git/info/lfs/objects/batch()", self._batch),
        ):
            match = re.fullmatch(pattern, path)
            if match:
                return answer(match[1], match[2], body)
        return self._error(404)

    def do_PUT(self) -> None:
        path, body = self._request()
        if self._refused(token=False):
            return
        self.hub.objects[path.rpartition("/")[2]] = body
        self.hub.written += 1
        self._answer(200, b"")

    def do_GET(self) -> None:
        path, _ = self._request()
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(/.+)?)?", path)
        if match and match[4]:
            return self._error(404, "EntryNotFound")  # a tree below a folder: no repository here has one
        if match:
            return self._info(match[1], match[2] or "revision", match[3] or "main")
        return self._file(path)

    def do_HEAD(self) -> None:
        self._file(self._request()[0])

    # The answers --------------------------------------------------------------------------------------------------

    def _create(self, values: dict[str, Any]) -> None:
        name = f"{values.get('organization') or 'someone'}/{values['name']}"
        private = values.get("visibility") == "private" or values.get("private") is True
        if name in self.hub.repositories:
            return self._answer(409, json.dumps({"url": f"{self.hub.url}/{name}"}).encode())
        self.hub.repositories[name] = Repository(private)
        return self._json({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def _preupload(self, repo: str, revision: str, body: bytes) -> None:
        def mode(path: str) -> str:
            return "lfs" if path.endswith((".safetensors", ".bin")) else "regular"

        files = [
            {"path": file["path"], "uploadMode": mode(file["path"]), "shouldIgnore": False}
            for file in json.loads(body)["files"]
        ]
        self._json({"files": files})

    def _branch(self, repo: str, branch: str, body: bytes) -> None:
        branches = self.hub.repositories[repo].branches
        if branch in branches:
            return self._error(409)
        branches[branch] = dict(branches["main"])
        return self._json({})

    def _batch(self, repo: str, _: str, body: bytes) -> None:
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.hub.url}/objects/{wanted['oid']}"}}}
            for wanted in json.loads(body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, repo: str, revision: str, body: bytes) -> None:
        found = self.hub.repositories[repo]
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                found.messages.append(value["summary"])
            elif entry["key"] == "file":
                found.branches[revision][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                found.branches[revision][value["path"]] = self.hub.objects[value["oid"]]
        self.hub.written += 1
        oid = _sha(repr(found.branches[revision]).encode())
        self._json({"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True})

    def _info(self, repo: str, what: str, revision: str) -> None:
        found, files = self._find(repo, revision)
        if found is None or files is None:
            return self._error(404, "RevisionNotFound" if found else "RepoNotFound")
        if what == "tree":
            entries = [{"type": "file", "path": p, "size": len(c), "oid": _sha(c)} for p, c in files.items()]
            return self._json(entries)
        siblings = [{"rfilename": path} for path in files]
        identity = {"id": repo, "modelId": repo, "sha": _sha(repr(files).encode()), "private": found.private}
        return self._json(identity | {"siblings": siblings, "tags": [], "downloads": 0, "likes": 0, "gated": False})

    def _file(self, path: str) -> None:
        match = re.fullmatch(r"/(.+?/.+?)/resolve/(.+?)/(.+)", path)
        found, files = self._find(match[1], match[2]) if match else (None, None)
        if found is None or files is None:
            return self._error(404, "RepoNotFound")
        assert match
        if match[3] not in files:
            return self._error(404, "EntryNotFound")
        content = files[match[3]]
        commit = {"X-Repo-Commit": _sha(repr(files).encode()), "ETag": f'"{_sha(content)}"'}
        return self._answer(200, content, commit)

    # What they share ----------------------------------------------------------------------------------------------

    def _find(self, repo: str, revision: str) -> tuple[Repository | None, dict[str, bytes] | None]:
        found = self.hub.repositories.get(repo)
        if found is None or (found.private and not self._knows_token()):
            return None, None
        by_commit = {_sha(repr(files).encode()): files for files in found.branches.values()}
        return found, found.branches.get(revision, by_commit.get(revision))

    def _request(self) -> tuple[str, bytes]:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return unquote(urlsplit(self.path).path), body

    def _knows_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _refused(self, token: bool = True) -> bool:
        status = self.hub.status or (401 if token and not self._knows_token() else None)
        if status is not None:
            self._error(status)
        return status is not None

    def _error(self, status: int, code: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": "refused by the stand-in"}
        self._answer(status, json.dumps({"error": "refused by the stand-in"}).encode(), headers)

    def _json(self, values: Any) -> None:
        self._answer(200, json.dumps(values).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _sha(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
