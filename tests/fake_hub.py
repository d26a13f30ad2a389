"""A small stand-in for the Hugging Face hub on localhost: serves directories as repositories, and its refusals.

Run as a context: `with fake_hub({"me/tiny": directory}) as (url, environment):` and start programs with `environment`.
"""

import contextlib
import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "a" * 40


def handler(repositories, sizes):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in {"content_length": len(body), **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = unquote(urlparse(self.path).path).strip("/")
            parts = path.removeprefix("api/models/").split("/")
            name, rest = "/".join(parts[:2]), parts[2:]
            if name.startswith("gated/"):
                return self.answer(403, x_error_code="GatedRepo", x_error_message="Access to this model is restricted")
            if name not in repositories:
                return self.answer(401, x_error_code="RepoNotFound")
            if len(rest) > 1 and rest[0] in ("revision", "tree", "resolve") and rest[1] not in ("main", COMMIT):
                return self.answer(404, x_error_code="RevisionNotFound")
            root = Path(repositories[name])
            if rest[:1] == ["resolve"]:
                file = root / "/".join(rest[2:])
                body = file.read_bytes()
                if self.command == "HEAD" and file.name in sizes:
                    return self.answer(200, ETag='"0"', X_Repo_Commit=COMMIT, content_length=sizes[file.name])
                return self.answer(200, body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=COMMIT)
            files = sorted(p for p in root.rglob("*") if p.is_file())
            if rest[:1] == ["tree"]:
                listing = [{"type": "file", "path": str(p.relative_to(root)), "size": p.stat().st_size,
                            "oid": hashlib.sha1(p.read_bytes()).hexdigest()} for p in files]
                return self.answer(200, json.dumps(listing).encode(), content_type="application/json")
            siblings = [{"rfilename": str(p.relative_to(root))} for p in files]
            info = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": [],
                     "private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
            self.answer(200, json.dumps(info).encode(), content_type="application/json")

    return Handler


@contextlib.contextmanager
def fake_hub(repositories, cache, sizes=None):
    """Yields (url, environment for a program that takes it for the hub). sizes: {file name: claimed size}."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(repositories, sizes or {}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    environment = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1",
                                "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment.pop("HF_TOKEN", None)
    environment.pop("HF_HUB_OFFLINE", None)
    try:
        yield url, environment
    finally:
        server.shutdown()
        server.server_close()
