"""A small Hugging Face Hub that runs in the test process.

The upload and download paths of a trainer end in HTTP calls, and a mocked client would hide every mistake in what is
sent. This server answers the real `huggingface_hub` client over loopback, keeps all files in memory, and refuses what
the real Hub refuses: writes without a token, objects whose hash or size is wrong, binary files that are sent as
text, broken model cards.

`huggingface_hub` reads `HF_ENDPOINT` when it is imported, so the client has to run in a subprocess:

    with HubServer() as hub:
        subprocess.run([sys.executable, "-c", code], env=hub.env(tmp_path / "hf_home"), check=True)
        assert hub.repos["user/model"].files["README.md"].startswith(b"---")
"""

import base64
import hashlib
import json
import os
import re
import secrets
import socket
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


LFS_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".onnx",
    ".h5",
    ".npy",
    ".npz",
    ".parquet",
    ".arrow",
    ".zip",
    ".png",
    ".jpg",
    ".jpeg",
    ".webp",
    ".gif",
    ".mp4",
)
"""Files with these endings are stored by hash, whatever their size."""

GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()

SAMPLE_BYTES = 512
"""How much of each file the client shows the server before it uploads."""

REPO_PREFIXES = {"model": "", "dataset": "datasets/", "space": "spaces/"}

API_ROUTE = re.compile(
    r"/api/(?P<kind>model|dataset|space)s/(?P<repo>[^/]+(?:/[^/]+?)??)"
    r"(?:/(?P<action>revision|tree|paths-info|preupload|commit|commits|refs|branch)(?:/(?P<rest>.+))?)?"
)
LFS_ROUTE = re.compile(r"/(?:(?P<kind>dataset|space)s/)?(?P<repo>[^/]+(?:/[^/]+)?)\.git/info/lfs/(?P<action>.+)")
RESOLVE_ROUTE = re.compile(
    r"/(?:(?P<kind>dataset|space)s/)?(?P<repo>[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"
)

REPO_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
SHA256 = re.compile(r"[0-9a-f]{64}")
CARD_KEY = re.compile(r"""["']?(?P<key>[A-Za-z_][\w.-]*)["']?:(?:\s+(?P<value>.*))?""")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?")


class HubError(Exception):
    """An answer other than success, raised anywhere while a request is handled."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **(headers or {})}
        if code is not None:
            self.headers["X-Error-Code"] = code
        self.body = body if body is not None else {"error": message}


@dataclass
class Request:
    """What the handlers need of one HTTP request."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> dict[str, Any]:
        """Return the body as a JSON object, or refuse the request."""
        data = json.loads(self.body)
        if not isinstance(data, dict):
            raise HubError(400, "The body is not a JSON object")
        return data

    def flag(self, name: str) -> bool:
        """Tell whether a query parameter is switched on."""
        return self.query.get(name, [""])[-1].lower() in ("1", "true")


@dataclass
class Reply:
    """A successful answer."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def json(cls, data: Any, status: int = 200) -> "Reply":
        """Return an answer with a JSON body."""
        return cls(status, json.dumps(data).encode(), {"Content-Type": "application/json; charset=utf-8"})


@dataclass(frozen=True)
class Snapshot:
    """The files of a repository at one commit. It never changes, because clients cache by commit hash."""

    sha: str
    title: str
    description: str
    date: str
    files: dict[str, bytes]
    lfs: frozenset[str]
    parent: "Snapshot | None"


class Repo:
    """One repository: its branches, its commits and the large files it was sent."""

    def __init__(self, repo_id: str, repo_type: str = "model", private: bool = False) -> None:
        self.repo_id = repo_id
        self.repo_type = repo_type
        self.private = private
        self.branches: dict[str, Snapshot] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self._by_sha: dict[str, Snapshot] = {}
        self.commit("main", {".gitattributes": GITATTRIBUTES}, frozenset(), "initial commit")

    @property
    def sha(self) -> str:
        """The commit hash of the main branch."""
        return self.branches["main"].sha

    @property
    def files(self) -> dict[str, bytes]:
        """A copy of the files on the main branch, by path."""
        return dict(self.branches["main"].files)

    @property
    def lfs_files(self) -> set[str]:
        """The paths on the main branch that were uploaded as large files."""
        return set(self.branches["main"].lfs)

    @property
    def commits(self) -> list[str]:
        """The commit messages of the main branch, oldest first. The first one is the Hub's own."""
        return [snapshot.title for snapshot in self.history("main")][::-1]

    @property
    def url_path(self) -> str:
        """The repository's path below the server's address."""
        return REPO_PREFIXES[self.repo_type] + self.repo_id

    def history(self, revision: str) -> list[Snapshot]:
        """Return the commits that lead to a revision, newest first."""
        snapshots: list[Snapshot] = []
        current: Snapshot | None = self.resolve(revision)
        while current is not None:
            snapshots.append(current)
            current = current.parent
        return snapshots

    def resolve(self, revision: str) -> Snapshot:
        """Return the commit that a branch name or a commit hash stands for."""
        snapshot = self.branches.get(revision.removeprefix("refs/heads/")) or self._by_sha.get(revision)
        if snapshot is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return snapshot

    def commit(
        self, branch: str, files: dict[str, bytes], lfs: frozenset[str], title: str, description: str = ""
    ) -> Snapshot:
        """Move a branch on to a new commit that holds `files`."""
        parent = self.branches.get(branch)
        seed = f"{self.url_path}\n{branch}\n{parent.sha if parent else ''}\n{len(self._by_sha)}\n{title}"
        date = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        sha = hashlib.sha1(seed.encode()).hexdigest()
        snapshot = Snapshot(sha, title, description, date, dict(files), lfs, parent)
        self.branches[branch] = self._by_sha[sha] = snapshot
        return snapshot


def git_blob_id(data: bytes) -> str:
    """Return the hash that git gives to a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def file_info(snapshot: Snapshot, path: str) -> dict[str, Any]:
    """Describe one file the way the tree endpoints do."""
    data = snapshot.files[path]
    info: dict[str, Any] = {"type": "file", "path": path, "size": len(data)}
    if path not in snapshot.lfs:
        return info | {"oid": git_blob_id(data)}
    oid = hashlib.sha256(data).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(data)}\n".encode()
    return info | {
        "oid": git_blob_id(pointer),
        "lfs": {"oid": oid, "size": len(data), "pointerSize": len(pointer)},
    }


def folder_info(path: str) -> dict[str, Any]:
    """Describe one folder the way the tree endpoints do."""
    return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}


def parents(path: str) -> Iterable[str]:
    """Yield the folders that a path lies in, outermost first."""
    parts = path.split("/")[:-1]
    return ("/".join(parts[: i + 1]) for i in range(len(parts)))


def check_path(path: Any) -> str:
    """Refuse file names that git would refuse."""
    if not isinstance(path, str) or not path or any(part in ("", ".", "..", ".git") for part in path.split("/")):
        raise HubError(400, f"Invalid path in repo: {path!r}")
    return path


def _card_scalar(value: str) -> str | None:
    value = value.strip()
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
        return value[1:-1]
    return None if value in ("", "null", "~") else value


def check_card(text: str) -> tuple[dict[str, Any], list[str], list[str]]:
    """Return the metadata, the errors and the warnings of a model card.

    The standard library reads no YAML, so this looks at the top level only: it keeps plain values and flat lists,
    skips what is nested, and reports lines that cannot be YAML.
    """
    text = text.lstrip("\ufeff").replace("\r\n", "\n")
    if not text.lstrip().startswith("---\n"):
        return {}, [], ["empty or missing yaml metadata in repo card"]
    end = re.search(r"\n---[ \t]*(?:\n|\Z)", text.lstrip())
    if end is None:
        return {}, ["the yaml metadata is not closed by a line with ---"], []
    block = text.lstrip()[4 : end.start() + 1]
    if block.strip() in ("", "{}"):
        return {}, [], ["empty or missing yaml metadata in repo card"]

    card: dict[str, Any] = {}
    seen: set[str] = set()
    errors: list[str] = []
    key: str | None = None
    for number, line in enumerate(block.splitlines(), start=2):
        item = re.fullmatch(r" *- +([^\s].*)", line)
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if line.startswith("\t"):
            errors.append(f"line {number}: tabs cannot indent yaml")
        elif key is not None and item is not None:
            is_nested = CARD_KEY.fullmatch(item[1]) is not None
            if is_nested or not isinstance(card.setdefault(key, []), list):
                card.pop(key, None)
                key = "" if is_nested else key
            elif key:
                card[key].append(_card_scalar(item[1]))
        elif line.startswith(" ") and key is not None:
            card.pop(key, None)
            key = ""
        elif line == "-" and key is not None:
            key = ""
        elif (match := CARD_KEY.fullmatch(line)) is not None:
            key, value = match["key"], (match["value"] or "").strip()
            if key in seen:
                errors.append(f"line {number}: duplicated mapping key {key!r}")
            seen.add(key)
            if value.startswith("[") and value.endswith("]"):
                card[key] = [_card_scalar(part) for part in value[1:-1].split(",") if part.strip()]
            elif value and value[0] not in "{|>&*":
                card[key] = _card_scalar(value)
        else:
            errors.append(f"line {number}: cannot be read as yaml: {line.strip()[:60]!r}")
    card.pop("", None)

    # A path on the author's disk is what a trainer writes here by mistake, and the Hub refuses it.
    for key, kind in (("base_model", "model"), ("datasets", "dataset")):
        values = card.get(key)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and HUB_ID.fullmatch(value) is None:
                errors.append(
                    f'"{key}" with value "{value}" is not valid. Use a {kind} id from https://hf.co/{kind}s.'
                )
    return card, errors, []


class HubServer:
    """A Hub on loopback, for use as a context manager. It stops, and drops its connections, at the end."""

    def __init__(
        self,
        user: str = "user",
        token: str = "hf_dummy",
        orgs: Iterable[str] = (),
        lfs_threshold: int = 10 * 1024**2,
    ) -> None:
        self.user = user
        self.token = token
        self.orgs = tuple(orgs)
        self.lfs_threshold = lfs_threshold
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []
        self._tickets: dict[str, tuple[Repo, str, int]] = {}
        self._lock = threading.RLock()
        self._httpd: _HttpServer | None = None
        self._thread: threading.Thread | None = None

    # ---------------------------------------------------------------------------------------------- life and use

    def __enter__(self) -> "HubServer":
        self._httpd = _HttpServer(self)
        self._thread = threading.Thread(
            target=self._httpd.serve_forever, kwargs={"poll_interval": 0.05}, name="hub-server", daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop serving. Does nothing the second time."""
        httpd, thread, self._httpd, self._thread = self._httpd, self._thread, None, None
        if httpd is None or thread is None:
            return
        httpd.shutdown()
        httpd.server_close()
        httpd.drop_connections()
        thread.join(timeout=10)

    @property
    def url(self) -> str:
        """The address to put in `HF_ENDPOINT`."""
        if self._httpd is None:
            raise RuntimeError("The server is not running: use it as a context manager")
        return f"http://127.0.0.1:{self._httpd.server_address[1]}"

    def env(self, hf_home: str | Path, token: str | None = "", **extra: str) -> dict[str, str]:
        """Return the environment for a client process.

        Settings of the machine that would keep the client offline, give it another cache or lead it through a proxy
        are left out. `token=None` gives a client that is not logged in.
        """
        dropped = ("HF_", "HUGGING", "TRANSFORMERS_OFFLINE", "TRANSFORMERS_CACHE")
        env = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        env = {name: value for name, value in env.items() if not name.lower().endswith("_proxy")}
        env |= {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(hf_home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        if token is not None:
            env["HF_TOKEN"] = token or self.token
        return env | extra

    def add_repo(
        self, repo_id: str, files: Mapping[str, bytes] | None = None, repo_type: str = "model", private: bool = False
    ) -> Repo:
        """Put a repository on the server without a client, for tests that only download."""
        repo = Repo(repo_id, repo_type, private)
        if files:
            lfs = frozenset(p for p, data in files.items() if self._upload_mode(p, len(data), data) == "lfs")
            repo.commit("main", {**repo.files, **files}, lfs, "add files")
        with self._lock:
            self.repos[repo.url_path] = repo
        return repo

    # -------------------------------------------------------------------------------------------------- dispatch

    def handle(self, request: Request) -> Reply:
        """Answer one request, or raise `HubError`."""
        with self._lock:
            self.requests.append((request.method, request.path))
            try:
                return self._route(request)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                # 400 and not 500: the client repeats a request after a 500, and waits in between.
                raise HubError(400, f"Malformed request: {type(error).__name__}: {error}") from error

    def _route(self, request: Request) -> Reply:
        path, method = request.path, request.method
        if path.startswith("/api/telemetry/"):
            return Reply()
        if path.startswith("/lfs-upload/") and method == "PUT":
            return self._put_object(request)

        is_user = self._is_user(request)
        if path == "/api/whoami-v2" and method == "GET":
            return self._whoami(is_user)
        if path == "/api/validate-yaml" and method == "POST":
            return self._validate_yaml(request)
        if path == "/api/repos/create" and method == "POST":
            return self._create_repo(request, is_user)
        if path == "/api/repos/delete" and method == "DELETE":
            return self._delete_repo(request, is_user)

        if (match := API_ROUTE.fullmatch(path)) is not None:
            repo = self._repo(match["kind"], match["repo"], is_user)
            return self._repo_api(request, repo, match["action"], match["rest"], is_user)
        if (match := LFS_ROUTE.fullmatch(path)) is not None and method == "POST":
            repo = self._repo(match["kind"], match["repo"], is_user)
            self._require_writer(repo.repo_id, is_user)
            if match["action"] == "objects/batch":
                return self._lfs_batch(request, repo)
            if match["action"] == "verify":
                return self._lfs_verify(request, repo)
        if (match := RESOLVE_ROUTE.fullmatch(path)) is not None and method in ("GET", "HEAD"):
            repo = self._repo(match["kind"], match["repo"], is_user)
            return self._resolve(request, repo, unquote(match["revision"]), unquote(match["path"]))
        raise HubError(404, f"Not served here: {method} {path}")

    def _repo_api(self, request: Request, repo: Repo, action: str | None, rest: str | None, is_user: bool) -> Reply:
        revision, _, subpath = (rest or "main").partition("/")
        revision, subpath = unquote(revision), unquote(subpath)
        if request.method == "GET":
            if action in (None, "revision"):
                return self._repo_info(request, repo, revision)
            if action == "tree":
                return self._tree(request, repo, revision, subpath)
            if action == "commits":
                return self._commits(repo, revision)
            if action == "refs":
                return self._refs(repo)
        if request.method == "POST":
            if action == "paths-info":
                return self._paths_info(request, repo, revision)
            if action in ("preupload", "commit", "branch"):
                self._require_writer(repo.repo_id, is_user)
            if action == "preupload":
                return self._preupload(request, repo, revision)
            if action == "commit":
                return self._commit(request, repo, revision)
            if action == "branch":
                return self._create_branch(request, repo, unquote(rest or ""))
        raise HubError(404, f"Not served here: {request.method} {request.path}")

    # ---------------------------------------------------------------------------------------------- permissions

    def _is_user(self, request: Request) -> bool:
        """Tell whether the request comes from the user. A wrong token is refused even where none is needed."""
        header = request.headers.get("Authorization")
        if header is None:
            return False
        if header != f"Bearer {self.token}":
            raise HubError(401, "Invalid credentials in Authorization header")
        return True

    def _require_writer(self, repo_id: str, is_user: bool) -> None:
        if not is_user:
            raise HubError(401, "Invalid username or password.")
        namespace = repo_id.split("/")[0]
        if namespace != self.user and namespace not in self.orgs:
            raise HubError(403, f"You don't have the rights to write under the namespace {namespace!r}")

    def _repo(self, kind: str | None, repo_id: str, is_user: bool) -> Repo:
        repo = self.repos.get(REPO_PREFIXES[kind or "model"] + unquote(repo_id))
        if repo is None or (repo.private and not is_user):
            raise HubError(404, "Repository not found", "RepoNotFound")
        return repo

    # ------------------------------------------------------------------------------------- accounts, repositories

    def _whoami(self, is_user: bool) -> Reply:
        if not is_user:
            raise HubError(401, "Invalid username or password.")
        orgs = [{"type": "org", "name": org, "roleInOrg": "write"} for org in self.orgs]
        token = {"accessToken": {"displayName": "test", "role": "write"}, "type": "access_token"}
        return Reply.json({"type": "user", "name": self.user, "fullname": self.user, "orgs": orgs, "auth": token})

    def _repo_key(self, request: Request, is_user: bool) -> tuple[str, str, dict[str, Any]]:
        data = request.json()
        name, kind = data["name"], data.get("type") or "model"
        namespace = data.get("organization") or self.user
        self._require_writer(namespace, is_user)
        if kind not in REPO_PREFIXES or not isinstance(name, str) or REPO_NAME.fullmatch(name) is None:
            raise HubError(400, f"Invalid repo type or name: {kind!r}, {name!r}")
        return f"{namespace}/{name}", kind, data

    def _create_repo(self, request: Request, is_user: bool) -> Reply:
        repo_id, kind, data = self._repo_key(request, is_user)
        key = REPO_PREFIXES[kind] + repo_id
        answer = {"url": f"{self.url}/{key}", "name": repo_id}
        if key in self.repos:
            message = f"You already created this {kind} repo"
            raise HubError(409, message, body={"error": message, **answer})
        private = data.get("visibility") == "private" or data.get("private") is True
        self.repos[key] = Repo(repo_id, kind, private)
        return Reply.json(answer)

    def _delete_repo(self, request: Request, is_user: bool) -> Reply:
        repo_id, kind, _ = self._repo_key(request, is_user)
        if self.repos.pop(REPO_PREFIXES[kind] + repo_id, None) is None:
            raise HubError(404, "Repository not found", "RepoNotFound")
        return Reply()

    def _create_branch(self, request: Request, repo: Repo, branch: str) -> Reply:
        if not branch:
            raise HubError(400, "The branch has no name")
        if branch in repo.branches:
            raise HubError(409, f"Reference already exists: refs/heads/{branch}")
        repo.branches[branch] = repo.resolve(request.json().get("startingPoint") or "main")
        return Reply.json({"success": True})

    # ------------------------------------------------------------------------------------------------- listings

    def _repo_info(self, request: Request, repo: Repo, revision: str) -> Reply:
        snapshot = repo.resolve(revision)
        siblings = []
        for path in sorted(snapshot.files):
            sibling: dict[str, Any] = {"rfilename": path}
            if request.flag("blobs"):
                info = file_info(snapshot, path)
                sibling |= {"size": info["size"], "blobId": info["oid"]}
                if "lfs" in info:
                    sibling["lfs"] = {**info["lfs"], "sha256": info["lfs"]["oid"]}
            siblings.append(sibling)
        card, _, _ = check_card(snapshot.files.get("README.md", b"").decode("utf-8", "replace"))
        info = {
            "_id": hashlib.sha1(repo.url_path.encode()).hexdigest()[:24],
            "id": repo.repo_id,
            "author": repo.repo_id.split("/")[0],
            "sha": snapshot.sha,
            "lastModified": snapshot.date,
            "createdAt": repo.history("main")[-1].date,
            "private": repo.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": card["tags"] if isinstance(card.get("tags"), list) else [],
            "cardData": card,
            "siblings": siblings,
        }
        if repo.repo_type == "model":
            info |= {name: card[name] for name in ("library_name", "pipeline_tag") if card.get(name)}
            info["modelId"] = repo.repo_id
        return Reply.json(info)

    def _tree(self, request: Request, repo: Repo, revision: str, folder: str) -> Reply:
        snapshot = repo.resolve(revision)
        start = f"{folder}/" if folder else ""
        paths = [path for path in sorted(snapshot.files) if path.startswith(start)]
        if folder and not paths:
            raise HubError(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        folders = {parent for path in paths for parent in parents(path) if parent.startswith(start)}
        if not request.flag("recursive"):
            paths = [path for path in paths if "/" not in path[len(start) :]]
            folders = {path for path in folders if "/" not in path[len(start) :]}
        return Reply.json([*map(folder_info, sorted(folders)), *(file_info(snapshot, path) for path in paths)])

    def _paths_info(self, request: Request, repo: Repo, revision: str) -> Reply:
        snapshot = repo.resolve(revision)
        if request.headers.get("Content-Type", "").startswith("application/json"):
            wanted = request.json()["paths"]
        else:
            wanted = parse_qs(request.body.decode()).get("paths", [])
        folders = {parent for path in snapshot.files for parent in parents(path)}
        answer = []
        for path in wanted:
            if path in snapshot.files:
                answer.append(file_info(snapshot, path))
            elif path in folders:
                answer.append(folder_info(path))
        return Reply.json(answer)

    def _commits(self, repo: Repo, revision: str) -> Reply:
        return Reply.json(
            [
                {
                    "id": snapshot.sha,
                    "title": snapshot.title,
                    "message": snapshot.description,
                    "date": snapshot.date,
                    "authors": [{"user": self.user}],
                }
                for snapshot in repo.history(revision)
            ]
        )

    def _refs(self, repo: Repo) -> Reply:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": snapshot.sha}
            for name, snapshot in repo.branches.items()
        ]
        return Reply.json({"branches": branches, "converts": [], "tags": [], "pullRequests": []})

    # --------------------------------------------------------------------------------------------------- uploads

    def _upload_mode(self, path: str, size: int, sample: bytes) -> str:
        """Choose how a file has to be sent. Git takes small text, everything else is stored by hash."""
        if size == 0:
            return "regular"
        is_large = path.lower().endswith(LFS_SUFFIXES) or size > self.lfs_threshold or b"\0" in sample[:SAMPLE_BYTES]
        return "lfs" if is_large else "regular"

    def _validate_yaml(self, request: Request) -> Reply:
        data = request.json()
        if data["repoType"] not in REPO_PREFIXES:
            raise HubError(400, f"Invalid repo type: {data['repoType']!r}")
        _, errors, warnings = check_card(data["content"])
        body = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
        if errors:
            raise HubError(400, "Invalid metadata in README.md", body={"error": "Invalid metadata", **body})
        return Reply.json(body)

    def _preupload(self, request: Request, repo: Repo, revision: str) -> Reply:
        self._refuse_pull_request(request)
        snapshot = repo.resolve(revision)
        answer = []
        for entry in request.json()["files"]:
            path, size = check_path(entry["path"]), int(entry["size"])
            sample = base64.b64decode(entry["sample"], validate=True)
            if len(sample) != min(size, SAMPLE_BYTES):
                raise HubError(400, f"The sample of {path} does not fit its size")
            info: dict[str, Any] = {
                "path": path,
                "uploadMode": self._upload_mode(path, size, sample),
                "shouldIgnore": False,
            }
            if path in snapshot.files:
                current = file_info(snapshot, path)
                info["oid"] = current["lfs"]["oid"] if "lfs" in current else current["oid"]
            answer.append(info)
        return Reply.json({"files": answer})

    def _refuse_pull_request(self, request: Request) -> None:
        if request.flag("create_pr"):
            raise HubError(501, "This test server has no pull requests")

    def _lfs_batch(self, request: Request, repo: Repo) -> Reply:
        data = request.json()
        if data["operation"] != "upload" or "basic" not in data["transfers"] or data["hash_algo"] != "sha256":
            raise HubError(400, "Only basic uploads with sha256 are served here")
        objects = []
        for entry in data["objects"]:
            oid, size = entry["oid"], entry["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size, "authenticated": True}
            if SHA256.fullmatch(oid) is None or not isinstance(size, int) or size <= 0:
                answer["error"] = {"code": 422, "message": "Invalid oid or size"}
            elif oid not in repo.lfs_objects:
                # The client sends the object without its token, so the address itself has to be the permission.
                ticket = secrets.token_urlsafe(16)
                self._tickets[ticket] = (repo, oid, size)
                verify = f"{self.url}/{repo.url_path}.git/info/lfs/verify"
                answer["actions"] = {
                    "upload": {"href": f"{self.url}/lfs-upload/{ticket}", "header": {}},
                    "verify": {"href": verify, "header": {}},
                }
            objects.append(answer)
        return Reply.json({"transfer": "basic", "objects": objects})

    def _put_object(self, request: Request) -> Reply:
        ticket = self._tickets.get(request.path.removeprefix("/lfs-upload/"))
        if ticket is None:
            raise HubError(403, "This upload address was never given out")
        repo, oid, size = ticket
        if len(request.body) != size:
            raise HubError(400, f"Expected {size} bytes and got {len(request.body)}")
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(400, "The sha256 of the uploaded object does not match its oid")
        repo.lfs_objects[oid] = request.body
        return Reply(headers={"ETag": f'"{oid}"'})

    def _lfs_verify(self, request: Request, repo: Repo) -> Reply:
        data = request.json()
        self._stored_object(repo, data["oid"], data["size"])
        return Reply.json({"success": True})

    def _stored_object(self, repo: Repo, oid: str, size: int | None) -> bytes:
        data = repo.lfs_objects.get(oid)
        if data is None:
            raise HubError(400, f"LFS pointer pointed to a file that does not exist: {oid}")
        if size is not None and size != len(data):
            raise HubError(400, f"LFS object {oid} has {len(data)} bytes and not {size}")
        return data

    def _commit(self, request: Request, repo: Repo, branch: str) -> Reply:
        self._refuse_pull_request(request)
        branch = branch.removeprefix("refs/heads/")
        if branch not in repo.branches:
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        if not request.headers.get("Content-Type", "").startswith("application/x-ndjson"):
            raise HubError(400, "A commit has to be sent as application/x-ndjson")
        lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
        if not lines or lines[0]["key"] != "header" or any(line["key"] == "header" for line in lines[1:]):
            raise HubError(400, "A commit starts with one header")
        header, head = lines[0]["value"], repo.branches[branch]
        if not header.get("summary"):
            raise HubError(400, "The commit has no message")
        if header.get("parentCommit") not in (None, head.sha):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        if len(lines) == 1:
            raise HubError(400, "The commit is empty")

        # All on copies, so that a refused commit leaves nothing behind.
        files, lfs = dict(head.files), set(head.lfs)
        for line in lines[1:]:
            self._apply(repo, line["key"], line["value"], files, lfs)
        if "README.md" in files and files["README.md"] != head.files.get("README.md"):
            _, errors, _ = check_card(files["README.md"].decode())
            if errors:
                raise HubError(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
        snapshot = repo.commit(branch, files, frozenset(lfs), header["summary"], header.get("description") or "")
        commit_url = f"{self.url}/{repo.url_path}/commit/{snapshot.sha}"
        return Reply.json({"success": True, "commitOid": snapshot.sha, "commitUrl": commit_url, "hookOutput": ""})

    def _apply(self, repo: Repo, key: str, value: dict[str, Any], files: dict[str, bytes], lfs: set[str]) -> None:
        """Carry out one line of a commit."""
        path = check_path(value["path"].rstrip("/") if key == "deletedFolder" else value["path"])
        if key == "file":
            if value.get("encoding") != "base64":
                raise HubError(400, f"Unknown encoding of {path}: {value.get('encoding')!r}")
            data = base64.b64decode(value["content"], validate=True)
            if self._upload_mode(path, len(data), data) == "lfs":
                raise HubError(400, f"Your push was rejected because {path} is binary or too large for git: use LFS")
            files[path] = data
            lfs.discard(path)
        elif key == "lfsFile":
            if value.get("algo") != "sha256":
                raise HubError(400, f"Unknown hash of {path}: {value.get('algo')!r}")
            files[path] = self._stored_object(repo, value["oid"], value.get("size"))
            lfs.add(path)
        elif key in ("deletedFile", "deletedFolder"):
            gone = [name for name in files if name == path or name.startswith(f"{path}/")]
            if (key == "deletedFile") != (path in files) or not gone:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del files[name]
                lfs.discard(name)
        else:
            raise HubError(400, f"Unknown operation in a commit: {key!r}")
        if key in ("file", "lfsFile") and (
            any(parent in files for parent in parents(path)) or any(name.startswith(f"{path}/") for name in files)
        ):
            raise HubError(400, f"{path} would be a file and a folder at once")

    # ------------------------------------------------------------------------------------------------- downloads

    def _resolve(self, request: Request, repo: Repo, revision: str, path: str) -> Reply:
        snapshot = repo.resolve(revision)
        # The client remembers a missing file by this hash, so it belongs to the error too.
        headers = {"X-Repo-Commit": snapshot.sha}
        if path not in snapshot.files:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        data, info = snapshot.files[path], file_info(snapshot, path)
        headers |= {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        if "lfs" in info:
            etag = f'"{info["lfs"]["oid"]}"'
            headers |= {"ETag": etag, "X-Linked-Etag": etag, "X-Linked-Size": str(len(data))}
        else:
            headers["ETag"] = f'"{info["oid"]}"'

        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if wanted is None or request.method == "HEAD":
            return Reply(200, data, headers)
        start = int(wanted[1])
        stop = min(int(wanted[2]) + 1 if wanted[2] else len(data), len(data))
        if start >= len(data) or start >= stop:
            raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{len(data)}"})
        return Reply(206, data[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})


class _HttpServer(ThreadingHTTPServer):
    """The socket side of `HubServer`. It knows its open connections, so that none outlives the test."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub: HubServer) -> None:
        self.hub = hub
        self.connections: set[socket.socket] = set()
        self.connections_lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)

    def server_bind(self) -> None:
        """Bind without the name lookup of `HTTPServer`, which can take seconds on a machine without DNS."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.connections_lock:
            self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self.connections_lock:
            self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay silent when a client goes away in the middle of an answer."""

    def drop_connections(self) -> None:
        """Close the connections that clients keep open for later requests."""
        with self.connections_lock:
            for connection in self.connections:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass


class _Handler(BaseHTTPRequestHandler):
    """Reads a request, hands it to `HubServer.handle` and writes the answer."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: _HttpServer

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test output clean."""

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        request = Request(self.command, parts.path, parse_qs(parts.query), self.headers, self._read_body())
        try:
            reply = self.server.hub.handle(request)
        except HubError as error:
            reply = Reply.json(error.body, error.status)
            # A header is one line of latin-1, and messages may quote what the client sent.
            headers = {name: " ".join(value.split()) for name, value in error.headers.items()}
            reply.headers |= {n: v.encode("ascii", "backslashreplace").decode() for n, v in headers.items()}
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(chunks)
