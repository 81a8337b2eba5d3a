"""What is in a repository."""

from __future__ import annotations

import hashlib
from typing import Any
from urllib.parse import parse_qs

from helpers.hub.cards import check_card
from helpers.hub.endpoints import Endpoints
from helpers.hub.messages import HubError, Reply, Request
from helpers.hub.repos import Repo, file_info, folder_info, parents


class Listings(Endpoints):
    """Reads: what a repository holds, and how it came there."""

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
