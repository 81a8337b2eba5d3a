"""Repositories, their commits and their files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from helpers.hub.messages import HubError


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

REPO_PREFIXES = {"model": "", "dataset": "datasets/", "space": "spaces/"}


@dataclass(frozen=True)
class Snapshot:
    """The files of a repository at one commit. It never changes, because clients cache by commit hash."""

    sha: str
    title: str
    description: str
    date: str
    files: dict[str, bytes]
    lfs: frozenset[str]
    parent: Snapshot | None


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
