"""Repositories of the fake Hub, with their branches and commits."""

import hashlib
from dataclasses import dataclass, field


__all__ = ["Commit", "Repository", "git_oid"]


@dataclass
class Commit:
    """One commit: all files of the tree, and the operations of the request."""

    message: str
    files: dict[str, bytes]
    operations: list[dict]
    parent: str | None = None
    expected: str | None = None  # the parent commit that the client named
    oid: str = ""

    def __post_init__(self) -> None:
        state = repr((self.parent, self.message, sorted(self.files.items())))
        self.oid = hashlib.sha1(state.encode()).hexdigest()


@dataclass
class Repository:
    """A repository: branches with their commits, and large files by their SHA-256."""

    private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.branches.setdefault("main", [Commit("initial commit", {".gitattributes": b""}, [])])

    def find(self, revision: str) -> Commit | None:
        """Find the commit of a branch or a commit id."""
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((commit for branch in self.branches.values() for commit in branch if commit.oid == revision), None)

    def commits(self, revision: str = "main") -> list[Commit]:
        """List the commits of a branch after the initial one."""
        return self.branches[revision][1:]


def git_oid(content: bytes) -> str:
    """Compute the git object id of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
