"""Commits, and the large files that are sent before them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
from typing import Any

from helpers.hub.cards import check_card
from helpers.hub.endpoints import Endpoints
from helpers.hub.messages import HubError, Reply, Request
from helpers.hub.repos import LFS_SUFFIXES, REPO_PREFIXES, Repo, check_path, file_info, parents


SAMPLE_BYTES = 512
"""How much of each file the client shows the server before it uploads."""


SHA256 = re.compile(r"[0-9a-f]{64}")


class Uploads(Endpoints):
    """Files that arrive: small ones inside of a commit, large ones before it."""

    _tickets: dict[str, tuple[Repo, str, int]]

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
