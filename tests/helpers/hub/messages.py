"""What a client asks and what the server answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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
    def json(cls, data: Any, status: int = 200) -> Reply:
        """Return an answer with a JSON body."""
        return cls(status, json.dumps(data).encode(), {"Content-Type": "application/json; charset=utf-8"})
