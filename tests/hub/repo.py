"""A repository of the loopback Hub, and what can go wrong with it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


TOKEN = "hf_" + "t" * 34
USER = "you"
LARGE = (".safetensors", ".png")


@dataclass
class Fault:
    """What goes wrong, and when.

    Attributes:
        request: regular expression over "METHOD /path" that a request must match.
        action: a status to answer with; "drop": hang up having read a part of the body; "lose": do the work, then hang
            up without an answer.
        times: how often.
        headers: of the answer.
        also: what happens at the same time.
    """

    request: str
    action: int | str
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    also: Callable[[], object] = lambda: None


@dataclass
class Repo:
    """One repository: its commits, newest last, each with all files at that point."""

    private: bool = False
    commits: list[tuple[str, str, dict[str, bytes]]] = field(default_factory=list)

    def add_commit(self, message: str, files: dict[str, bytes]) -> str:
        oid = hashlib.sha1(f"{len(self.commits)}{message}{sorted(files)}".encode()).hexdigest()
        self.commits.append((oid, message, files))
        return oid

    @property
    def head(self) -> str:
        return self.commits[-1][0]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][2]

    def at(self, revision: str) -> dict[str, bytes] | None:
        if revision == "main":
            return self.files
        return next((files for oid, _, files in self.commits if oid == revision), None)


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def entry(path: str, content: bytes) -> dict[str, Any]:
    """A file as lists of files show it."""
    found: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
    if path.endswith(LARGE):
        oid = hashlib.sha256(content).hexdigest()
        found |= {"oid": blob_id(b"pointer to " + oid.encode())}
        found["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 130}
    return found
