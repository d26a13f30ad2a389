"""
A stand-in for the Hugging Face hub that takes uploads on localhost, and speaks what the hub's client sends: create_repo,
validate-yaml, preupload, LFS batch, PUT of a file or its parts, completion, verify, the commit's NDJSON, tree and resolve.

faults: [(method, regex of the path, how often, what)]. what: "reset" closes the connection in the middle of the body,
"late" does what was asked and closes it without an answer, a number is the status to answer.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse

TOKEN = "hf_secretsecretsecretsecretsecretse"
CHUNK = 1 << 20        # of a multi-part upload; files above it are sent in parts


def git_hash(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """repos: id -> {"visibility", "files": {path: bytes}, "commits": [summary]}. stored: LFS objects by SHA-256.
    requests: (method, path) of every request that was answered or broken."""

    def __init__(self):
        self.repos, self.stored, self.parts, self.requests, self.faults, self.lock = {}, {}, {}, [], [], threading.RLock()

    def fault(self, method, path):
        with self.lock:
            self.requests.append((method, path))
            for i, (wanted, pattern, times, what) in enumerate(self.faults):
                if wanted == method and re.search(pattern, path) and times:
                    self.faults[i] = wanted, pattern, times - 1, what
                    return what
        return None

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class Broken(Exception):
    """The connection is to end here."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except Broken:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))     # RST
            self.connection.close()
            self.close_connection = True

    def finish(self):
        try:
            super().finish()
        except OSError:
            pass                                       # broken on purpose

    def body(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, content, status=200, **headers):
        if self.broken == "late":
            raise Broken
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(data), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def serve(self):
        url = urlparse(self.path)
        path, self.query = unquote(url.path), parse_qs(url.query)
        self.broken = self.hub.fault(self.command, path)
        if self.broken == "reset":
            self.rfile.read(min(1000, int(self.headers.get("Content-Length") or 0)))
            raise Broken
        data = self.body()
        if isinstance(self.broken, int):
            return self.answer({"error": "not now"}, self.broken)
        if not path.startswith(("/upload/", "/complete/")) and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid username or password."}, 401)
        with self.hub.lock:
            for method, pattern, function in ROUTES:
                if self.command == method and (found := re.fullmatch(pattern, path)):
                    return function(self, data, *found.groups())
        return self.answer({"error": f"no such endpoint: {self.command} {path}"}, 404)

    do_GET = do_POST = do_PUT = do_HEAD = serve

    # -- the endpoints

    def create(self, data):
        wanted = json.loads(data)
        name = f"{wanted['organization'] or 'me'}/{wanted['name']}"
        if name.startswith("other/"):
            return self.answer({"error": "you have no rights there"}, 403)
        if name in self.hub.repos:
            return self.answer({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
        self.hub.repos[name] = {"visibility": wanted.get("visibility", "public"), "files": {}, "commits": []}
        self.answer({"url": f"{self.hub.url}/{name}"})

    def validate(self, data):
        content = json.loads(data)["content"]
        if "license: nonsense" in content:
            message = '"license" must be one of [apache-2.0, mit, ...]'
            return self.answer({"errors": [{"message": message}], "warnings": []}, 400)
        assert content.startswith("---\n")
        self.answer({"errors": [], "warnings": []})

    def preupload(self, data, repo):
        there = self.hub.repos[repo]["files"]
        names = [file["path"] for file in json.loads(data)["files"]]
        self.answer({"files": [
            {"path": name, "shouldIgnore": False, "uploadMode": "lfs" if is_lfs(name) else "regular",
             **({"oid": oid_of(name, there[name])} if name in there else {})} for name in names]})

    def batch(self, data, repo):
        objects = []
        for wanted in json.loads(data)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            entry = {"oid": oid, "size": size}
            if oid not in self.hub.stored:
                parts = range(1, -(-size // CHUNK) + 1)
                header = {"chunk_size": str(CHUNK)} | {str(n): f"{self.hub.url}/upload/{oid}/{n}" for n in parts}
                upload = {"href": f"{self.hub.url}/complete/{oid}", "header": header} if size > CHUNK else \
                    {"href": f"{self.hub.url}/upload/{oid}/1"}
                entry["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/verify/{oid}"}}
            objects.append(entry)
        self.answer({"transfer": "basic", "objects": objects})

    def put(self, data, oid, number):
        self.hub.parts[oid, int(number)] = data
        if hashlib.sha256(data).hexdigest() == oid:
            self.hub.stored[oid] = data
        self.answer(b"", ETag=f'"{hashlib.md5(data).hexdigest()}"')

    def complete(self, data, oid):
        numbers = [part["partNumber"] for part in json.loads(data)["parts"]]
        whole = b"".join(self.hub.parts[oid, n] for n in numbers)
        assert hashlib.sha256(whole).hexdigest() == oid
        self.hub.stored[oid] = whole
        self.answer({})

    def verify(self, data, oid):
        wanted = json.loads(data)
        ok = oid in self.hub.stored and len(self.hub.stored[oid]) == wanted["size"]
        self.answer({}, 200 if ok else 404)

    def commit(self, data, repo):
        lines = [json.loads(line) for line in data.splitlines()]
        files = dict(self.hub.repos[repo]["files"])
        for line in lines[1:]:
            key, value = line["key"], line["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        self.hub.repos[repo]["files"] = files
        self.hub.repos[repo]["commits"].append(lines[0]["value"]["summary"])
        self.answer({"commitUrl": f"{self.hub.url}/{repo}/commit/{'c' * 40}", "commitOid": "c" * 40, "pullRequestUrl": None})

    def info(self, data, repo):
        if repo not in self.hub.repos:
            return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        self.answer({"id": repo, "modelId": repo, "sha": "c" * 40, "tags": [], "private": False, "downloads": 0, "likes": 0,
                     "siblings": [{"rfilename": name} for name in self.hub.repos[repo]["files"]]})

    def tree(self, data, repo):
        self.answer([{"type": "file", "path": name, "size": len(content), "oid": git_hash(content)}
                     for name, content in self.hub.repos[repo]["files"].items()])

    def resolve(self, data, repo, name):
        content = self.hub.repos[repo]["files"][name]
        self.answer(content, ETag=f'"{git_hash(content)}"', X_Repo_Commit="c" * 40)


def is_lfs(path):
    return path.endswith((".safetensors", ".pkl", ".png"))


def oid_of(path, content):
    return hashlib.sha256(content).hexdigest() if is_lfs(path) else git_hash(content)


REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    ("POST", "/api/repos/create", Handler.create), ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", f"/api/models/{REPO}/preupload/main", Handler.preupload),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.batch), ("PUT", r"/upload/(\w+)/(\d+)", Handler.put),
    ("POST", r"/complete/(\w+)", Handler.complete), ("POST", r"/verify/(\w+)", Handler.verify),
    ("POST", f"/api/models/{REPO}/commit/main", Handler.commit),
    ("GET", f"/api/models/{REPO}(?:/revision/main)?", Handler.info),
    ("GET", f"/api/models/{REPO}/tree/main", Handler.tree), ("GET", f"/{REPO}/resolve/main/(.+)", Handler.resolve),
    ("HEAD", f"/{REPO}/resolve/main/(.+)", Handler.resolve),
]
