"""What every group of endpoints needs: the state of the server, and who may do what."""

from __future__ import annotations

from urllib.parse import unquote

from helpers.hub.messages import HubError, Request
from helpers.hub.repos import REPO_PREFIXES, Repo


class Endpoints:
    """What every group of endpoints needs of the server."""

    user: str
    token: str
    orgs: tuple[str, ...]
    lfs_threshold: int
    repos: dict[str, Repo]

    @property
    def url(self) -> str:
        """The address to put in `HF_ENDPOINT`."""
        raise NotImplementedError

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
