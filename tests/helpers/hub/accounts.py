"""Accounts, repositories and branches."""

from __future__ import annotations

import re
from typing import Any

from helpers.hub.endpoints import Endpoints
from helpers.hub.messages import HubError, Reply, Request
from helpers.hub.repos import REPO_PREFIXES, Repo


REPO_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


class Accounts(Endpoints):
    """Who the client is, and which repositories and branches there are."""

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
