"""The server of the fake Hub."""

import os
import threading
from http.server import ThreadingHTTPServer

from .endpoints import Handler
from .protocol import WRITER
from .repository import Commit, Repository


__all__ = ["LoopbackHub"]


class LoopbackHub:
    """Fake Hub whose server runs while the context is open.

    Attributes:
        url: for HF_ENDPOINT.
        repositories: by id.
        failures: repository id -> (stage, status) that it answers with, `stage` being one of `protocol.ROUTES`, and
            optionally the file that this is about.
        requests: (stage, repository id or None, user agent) in order.
        payloads: of the requests to create a repository.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.failures: dict[str, tuple] = {}
        self.requests: list[tuple[str, str | None, str]] = []
        self.payloads: list[dict] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, repo_id: str, private: bool = False, **files: bytes) -> Repository:
        """Add a repository with files; `__` in a file's name stands for a dot."""
        repository = self.repositories[repo_id] = Repository(private)
        if files:
            named = {name.replace("__", "."): content for name, content in files.items()}
            repository.branches["main"].append(Commit("earlier", named, [], repository.find("main").oid))
        return repository

    def environment(self, home: os.PathLike, token: str | None = WRITER) -> dict[str, str]:
        """Return the environment of a process that must talk to this Hub only."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        ours = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        ours |= {"HF_HUB_DISABLE_XET": "1"}  # that protocol needs a storage server of its own
        return kept | ours | ({"HF_TOKEN": token} if token else {})
