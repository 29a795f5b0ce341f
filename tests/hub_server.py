"""A small Hub on loopback: model repositories with branches, large files, private ones, and failures on demand."""

import base64
import hashlib
import http.server
import json
import re
import threading
import urllib.parse


WRITE, READ = "hf_write", "hf_read"  # tokens that may write, and may only read


class HubServer:
    """Speaks the endpoints that `huggingface_hub` needs to make a repository, commit to it and load from it.

    Attributes:
        repos: by name, `private` and `branches`: files by path, and the number of commits.
        requests: method and path of each request.
        failing: how many of the next requests that send something are answered with 503.
        hidden: a file that the Hub fails to give out.
        cut: a file of which each answer ends in the middle.
        accepts: another token that may write.
        tells: errors repeat what was sent to prove who asks.
        dying: after so many bytes of large files the server goes away in the middle of one.
    """

    def __init__(self, port):
        self.port, self.repos, self.blobs = port, {}, {}
        self.hidden = self.cut = self.accepts = None
        self.tells = False
        self.requests, self.failing, self.dying, self.authorizations = [], 0, None, []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        server = self

        class Handler(_Handler):
            hub = server

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def files(self, repo, branch="main"):
        return self.repos[repo]["branches"][branch]["files"]

    def commits(self, repo, branch="main"):
        return self.repos[repo]["branches"][branch]["commits"]


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: HubServer

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.route("GET")

    def do_HEAD(self):
        self.route("HEAD")

    def do_POST(self):
        self.route("POST")

    def do_PUT(self):
        self.route("PUT")

    def route(self, method):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.hub.requests.append(f"{method} {path}")
        self.hub.authorizations.append(self.headers.get("Authorization", ""))
        length = int(self.headers.get("Content-Length", 0))
        if method == "PUT" and self.hub.dying is not None and length > self.hub.dying:
            self.rfile.read(self.hub.dying)
            threading.Thread(target=self.hub.__exit__).start()
            self.connection.close()
            return None
        body = self.chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        if method in ("POST", "PUT") and self.hub.failing:
            self.hub.failing -= 1
            return self.answer(503, {"error": f"busy{self.told()}"})
        for pattern, function in ROUTES:
            if found := re.fullmatch(pattern, f"{method} {path}"):
                return function(self, body, *found.groups())
        return self.answer(404, {"error": f"{method} {path}"})

    def chunks(self):
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, status, content=None, headers=()):
        data = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", dict(headers).get("X-Length", str(len(data))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def told(self):
        return f"; you have sent {self.headers.get('Authorization', '')}" if self.hub.tells else ""

    def may(self, write, repo=None):
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if write:
            return token in (WRITE, self.hub.accepts)
        return not self.hub.repos[repo]["private"] or token in (WRITE, READ)

    def create(self, body):
        asked = json.loads(body)
        if not self.may(write=True):
            return self.answer(401, {"error": f"Invalid username or password.{self.told()}"})
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in self.hub.repos:
            return self.answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        branches = {"main": {"files": {}, "commits": 0}}
        private = bool(asked.get("private")) or asked.get("visibility") == "private"  # hub 1 and 2
        self.hub.repos[name] = {"private": private, "branches": branches}
        return self.answer(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def branch(self, body, repo, branch):
        branches = self.hub.repos[repo]["branches"]
        if branch in branches:
            return self.answer(409, {"error": "exists"})
        branches[branch] = {"files": dict(branches["main"]["files"]), "commits": 0}
        return self.answer(200)

    def info(self, body, repo, revision=None):
        if repo not in self.hub.repos or not self.may(False, repo):
            return self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        branch = (revision or "/revision/main").removeprefix("/revision/")
        files = self.hub.files(repo, "main" if len(branch) == 40 else branch)
        siblings = [{"rfilename": name} for name in files]
        return self.answer(200, {"id": repo, "modelId": repo, "sha": _sha(files), "siblings": siblings})

    def preupload(self, body, repo, branch):
        files = [
            {"path": file["path"], "uploadMode": _mode(file["path"]), "shouldIgnore": False}
            for file in json.loads(body)["files"]
        ]
        return self.answer(200, {"files": files})

    def large(self, body, repo):
        objects = []
        for item in json.loads(body)["objects"]:
            actions = {}
            if item["oid"] not in self.hub.blobs:
                actions = {"actions": {"upload": {"href": f"{self.hub.url}/blobs/{item['oid']}", "header": {}}}}
            objects.append({**item, **actions})
        return self.answer(200, {"transfer": "basic", "objects": objects})

    def put(self, body, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        return self.answer(200)

    def commit(self, body, repo, branch):
        if not self.may(write=True):
            return self.answer(403, {"error": "Forbidden"})
        state = self.hub.repos[repo]["branches"][branch]
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                state["files"][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                state["files"][value["path"]] = self.hub.blobs[value["oid"]]
        state["commits"] += 1
        oid = _sha(state["files"])
        return self.answer(
            200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"}
        )

    def resolve(self, body, repo, branch, path):
        if repo not in self.hub.repos or not self.may(False, repo):
            return self.answer(404, {}, {"X-Error-Code": "RepoNotFound"})
        if path == self.hub.hidden:
            return self.answer(500, {"error": "down"})
        files = self.hub.files(repo, "main" if len(branch) == 40 else branch)
        headers = {"X-Repo-Commit": _sha(files)}
        if path not in files:
            return self.answer(404, {}, {"X-Error-Code": "EntryNotFound", **headers})
        content = files[path]
        headers |= {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Length": str(len(content))}
        if path == self.hub.cut and self.command == "GET":
            self.answer(200, content[: len(content) // 2], headers)
            return self.connection.close()
        return self.answer(200, content, headers)

    def valid(self, body):
        return self.answer(200, {"errors": [], "warnings": []})


REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (r"POST /api/repos/create", _Handler.create),
    (rf"POST /api/models/{REPO}/branch/([\w.-]+)", _Handler.branch),
    (rf"POST /api/models/{REPO}/preupload/([\w.-]+)", _Handler.preupload),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", _Handler.large),
    (r"PUT /blobs/(\w+)", _Handler.put),
    (rf"POST /api/models/{REPO}/commit/([\w.-]+)", _Handler.commit),
    (rf"GET /api/models/{REPO}(/revision/[\w.-]+)?", _Handler.info),
    (rf"(?:GET|HEAD) /{REPO}/resolve/([\w.-]+)/(.+)", _Handler.resolve),
    (r"POST /api/validate-yaml", _Handler.valid),
]


def _mode(path):
    return "lfs" if path.endswith((".safetensors", ".png", ".pt", ".pth")) else "regular"


def _sha(files):
    digest = hashlib.sha1()
    for name in sorted(files):
        digest.update(name.encode() + files[name])
    return digest.hexdigest()
