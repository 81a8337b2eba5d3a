"""The server: its life, and which endpoint answers what."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import unquote

from helpers.hub.accounts import Accounts
from helpers.hub.downloads import Downloads
from helpers.hub.listings import Listings
from helpers.hub.messages import HubError, Reply, Request
from helpers.hub.repos import Repo
from helpers.hub.sockets import HttpServer
from helpers.hub.uploads import Uploads


API_ROUTE = re.compile(
    r"/api/(?P<kind>model|dataset|space)s/(?P<repo>[^/]+(?:/[^/]+?)??)"
    r"(?:/(?P<action>revision|tree|paths-info|preupload|commit|commits|refs|branch)(?:/(?P<rest>.+))?)?"
)
LFS_ROUTE = re.compile(r"/(?:(?P<kind>dataset|space)s/)?(?P<repo>[^/]+(?:/[^/]+)?)\.git/info/lfs/(?P<action>.+)")
RESOLVE_ROUTE = re.compile(
    r"/(?:(?P<kind>dataset|space)s/)?(?P<repo>[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"
)


class HubServer(Accounts, Listings, Uploads, Downloads):
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
        self._httpd: HttpServer | None = None
        self._thread: threading.Thread | None = None

    # ---------------------------------------------------------------------------------------------- life and use

    def __enter__(self) -> HubServer:
        self._httpd = HttpServer(self)
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
