"""Files that leave."""

from __future__ import annotations

import re

from helpers.hub.endpoints import Endpoints
from helpers.hub.messages import HubError, Reply, Request
from helpers.hub.repos import Repo, file_info


class Downloads(Endpoints):
    """A file of a commit, or a part of it."""

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
