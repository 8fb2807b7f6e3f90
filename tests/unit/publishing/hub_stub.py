"""A stand-in for the Hub on loopback: as much of its HTTP interface as the client uses to push, over LFS without Xet.

It keeps commits in memory and counts requests. `Rules` makes it misbehave. It is no proof of how the real Hub behaves:
Xet, rate limits, gating and the Hub's own licence checks are not here.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import yaml

GOOD_TOKEN = "hf_" + "A1b2C3d4E5" * 3
READ_TOKEN = "hf_" + "R0r0R0r0R0" * 3
LFS_SUFFIXES = (".safetensors", ".onnx", ".png")


@dataclass
class Repository:
    """Branches of one repository: the last commit and its files."""

    private: bool
    branches: dict[str, str]
    files: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    titles: dict[str, dict[str, str]] = field(default_factory=lambda: {"main": {}})
    """By branch and file: the title of the commit that changed it last."""
    commits: list[str] = field(default_factory=list)

    def branch_of(self, revision: str) -> str:
        """The branch of that name, or whose last commit it is."""
        return next(name for name, sha in self.branches.items() if revision in (name, sha))

    def change(self, files: dict[str, bytes | None], title: str, branch: str = "main") -> str:
        """A commit: contents by path, None to delete one."""
        kept = {path: content for path, content in files.items() if content is not None}
        gone = files.keys() - kept.keys()
        now = {path: content for path, content in (self.files[branch] | kept).items() if path not in gone}
        self.titles[branch] = {path: title if path in files else self.titles[branch][path] for path in now}
        self.files[branch] = now
        sha = hashlib.sha1(repr([*self.commits, sorted(now.items()), title]).encode()).hexdigest()
        self.branches[branch] = sha
        self.commits.append(sha)
        return sha


@dataclass
class Rules:
    """How the stand-in misbehaves: an answer instead of the right one, by a part of the path."""

    answers: dict[str, int] = field(default_factory=dict)
    """Part of a path -> status; 0 hangs up."""
    garbled: dict[str, str | None] = field(default_factory=dict)
    """Part of a path, which ends in $ -> what is answered after the request was done; None hangs up."""
    skipped: bool = False
    """Garbled requests are not done."""
    unreachable_after: str = ""
    """After a request with this part of a path all others hang up."""
    commit_before: str = ""
    """Somebody commits to every repository before a request with this part of a path is done."""
    once: bool = False
    """Only the first request of each such path fails."""


class Hub(ThreadingHTTPServer):
    """The server and what it stores."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.rules = Rules()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def reset(self) -> None:
        self.repositories.clear()
        self.objects.clear()
        self.requests.clear()
        self.rules = Rules()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    garbled: str | None = ""
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride] - the server that made this handler

    def log_message(self, format: str, *args: Any) -> None:
        """Tests look at `requests` instead."""

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        rules, answers = self.server.rules, dict(self.server.rules.answers)
        if rules.unreachable_after and rules.unreachable_after in path:
            rules.answers = {"": 0}
        elif rules.commit_before and rules.commit_before in path:
            for repository in self.server.repositories.values():
                repository.change({"NOTES.md": b"meanwhile"}, "By hand")
        for part, status in answers.items():
            if part in path:
                if self.server.rules.once:
                    del self.server.rules.answers[part]
                if status == 0:
                    self.close_connection = True
                    return
                # Some servers echo what they were sent.
                echo = f"no: {self.headers.get('Authorization', '')}"
                self.send(status, {"error": echo, "errors": [{"message": echo}], "warnings": []})
                return
        self.garbled = next((said for part, said in self.server.rules.garbled.items() if part in f"{path}$"), "")
        if self.garbled != "" and self.server.rules.skipped:
            self.send(200, {})
            return
        if not path.startswith("/objects/") and (refusal := self.refusal()) is not None:
            self.send(refusal, {"error": "Invalid credentials" if refusal == 401 else "no write access"})
            return
        for method, pattern, action in ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                action(self, *match.groups())
                return
        self.send(404, {"error": "Not found"})

    def refusal(self) -> int | None:
        """Status for a token that may not do this."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token == GOOD_TOKEN or self.path.startswith("/api/agent-harnesses"):
            return None
        return 403 if token == READ_TOKEN else 401

    def send(self, status: int, data: Any, headers: dict[str, str] | None = None) -> None:
        if self.garbled is None:
            self.close_connection = True
            return
        content = (self.garbled or json.dumps(data)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def repository(self, name: str) -> Repository | None:
        found = self.server.repositories.get(name)
        if found is None:
            self.send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return found

    # ---- what the client asks ----

    def create(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
        answer = {"url": f"{self.server.url}/{name}", "name": name, "id": name}
        if name in self.server.repositories:
            self.send(409, {"error": "You already created this model repo", **answer})
            return
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.server.repositories[name] = Repository(private, {"main": "0" * 40})
        self.send(200, answer)

    def validate(self) -> None:
        matter = json.loads(self.body)["content"].split("---")[1]
        errors = [] if isinstance(yaml.safe_load(matter), dict) else [{"message": "no metadata"}]
        self.send(400 if errors else 200, {"errors": errors, "warnings": []})

    def info(self, name: str, revision: str | None = None) -> None:
        if (repository := self.repository(name)) is None:
            return
        branch = repository.branch_of(revision or "main")
        siblings = [{"rfilename": file} for file in repository.files[branch]]
        sha = repository.branches[branch]
        self.send(200, {"id": name, "sha": sha, "private": repository.private, "siblings": siblings, "tags": []})

    def branch(self, name: str, branch: str) -> None:
        if (repository := self.repository(name)) is None:
            return
        if branch in repository.branches:
            self.send(409, {"error": "Reference already exists"})
        else:
            repository.branches[branch] = repository.branches["main"]
            repository.files[branch] = dict(repository.files["main"])
            repository.titles[branch] = dict(repository.titles["main"])
            self.send(200, {})

    def tree(self, name: str, revision: str) -> None:
        if (repository := self.repository(name)) is None:
            return
        branch = repository.branch_of(revision)
        if not repository.files[branch]:
            self.send(404, {"error": "nothing here"}, {"X-Error-Code": "EntryNotFound"})
            return
        entries = []
        for path, content in repository.files[branch].items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
            if path.endswith(LFS_SUFFIXES):
                pointer = hashlib.sha1(content).hexdigest()
                lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
                entry |= {"oid": pointer, "lfs": lfs}
            if "expand=true" in self.path.lower():
                title = repository.titles[branch][path]
                entry["lastCommit"] = {"id": "1" * 40, "title": title, "date": "2026-01-01T00:00:00.000Z"}
            entries.append(entry)
        self.send(200, entries)

    def preupload(self, name: str, revision: str) -> None:
        if (repository := self.repository(name)) is None:
            return
        known = repository.files[revision]
        files = []
        for file in json.loads(self.body)["files"]:
            large = file["path"].endswith(LFS_SUFFIXES)
            entry: dict[str, Any] = {"path": file["path"], "uploadMode": "lfs" if large else "regular"}
            entry["shouldIgnore"] = False
            if file["path"] in known:
                content = known[file["path"]]
                entry["oid"] = hashlib.sha256(content).hexdigest() if large else blob_id(content)
            files.append(entry)
        self.send(200, {"files": files})

    def lfs(self, name: str) -> None:
        answers = []
        for item in json.loads(self.body)["objects"]:
            answer = {"oid": item["oid"], "size": item["size"], "authenticated": True}
            if item["oid"] not in self.server.objects:
                answer["actions"] = {"upload": {"href": f"{self.server.url}/objects/{item['oid']}"}}
            answers.append(answer)
        self.send(200, {"transfer": "basic", "objects": answers})

    def store(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.objects[oid] = self.body
        self.send(200, {})

    def commit(self, name: str, revision: str) -> None:
        if (repository := self.repository(name)) is None:
            return
        files: dict[str, bytes | None] = {}
        title = ""
        for line in self.body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            match entry["key"]:
                case "header":
                    title = value["summary"]
                    if value.get("parentCommit", repository.branches[revision]) != repository.branches[revision]:
                        self.send(412, {"error": "A commit has happened since. Please refresh and try again."})
                        return
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.server.objects[value["oid"]]
                case "deletedFile":
                    files[value["path"]] = None
        sha = repository.change(files, title, revision)
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{name}/commit/{sha}"}
        self.send(200, answer | {"hookOutput": ""})


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, str, Any]] = [
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate),
    ("GET", rf"/api/models/{NAME}", Handler.info),
    ("GET", rf"/api/models/{NAME}/revision/([\w.-]+)", Handler.info),
    ("GET", rf"/api/models/{NAME}/tree/([\w.-]+)", Handler.tree),
    ("POST", rf"/api/models/{NAME}/branch/([\w.-]+)", Handler.branch),
    ("POST", rf"/api/models/{NAME}/preupload/([\w.-]+)", Handler.preupload),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.lfs),
    ("PUT", r"/objects/(\w+)", Handler.store),
    ("POST", rf"/api/models/{NAME}/commit/([\w.-]+)", Handler.commit),
]


def blob_id(content: bytes) -> str:
    """Git's name for a content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A stand-in that listens until the block ends."""
    hub = Hub()
    thread = Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
