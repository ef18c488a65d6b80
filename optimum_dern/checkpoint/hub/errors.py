"""Errors of a push to the Hub: what happened, what to do, and where the finished checkpoint is."""

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path
from typing import Any


__all__ = ["HubPushError", "explained"]

logger = getLogger(__name__)

CHANGED = ("somebody else has changed the repository in the meantime", "look at what changed and push again")
REFUSED = ("the request was refused", "mend what the answer names")
FAILED = ("the server failed", "try again later")
MENDS = {  # HTTP status -> what it means here, and what to do about it
    401: ("the token is missing, wrong or expired", "log in with `hf auth login`, or give token=..."),
    402: ("the account's plan does not allow it", "see https://huggingface.co/settings/billing"),
    403: ("the token has no permission to write there", "give a token with write access, or create_pr=True"),
    404: (
        "there is no such namespace, repository or revision, or the token may not see it",
        "check the names; `hf repos branch create REPOSITORY REVISION` makes a new branch",
    ),
    409: CHANGED,
    412: CHANGED,
    429: ("too many requests", "wait some minutes and push again"),
}


class HubPushError(RuntimeError):
    """Raised where the Hub refuses a push, or where the upload fails.

    Args:
        message: what happened, and what to do.
        status: HTTP status of the Hub's answer; None where there was no answer.
        folder: with the finished checkpoint; None where the push was refused before anything was written.
    """

    def __init__(self, message: str, status: int | None = None, folder: Path | None = None) -> None:
        super().__init__(message)
        self.status, self.folder = status, folder


@contextmanager
def explained(api: Any, repo_id: str, folder: Path | None = None, options: list[str] | None = None) -> Iterator[None]:
    """Turn any error of the Hub's client into one that says what to do, and where the finished checkpoint is.

    Args:
        api: client of huggingface_hub.
        repo_id: repository.
        folder: with the finished checkpoint; None where nothing has been written yet.
        options: of the `hf upload` command that replaces this push.

    Raises:
        HubPushError: instead of any other error.
    """
    if folder is None:
        state = "nothing was saved or uploaded"
    else:
        command = shlex.join(["hf", "upload", repo_id, str(folder), ".", *(options or [])])
        state = f"the finished checkpoint is whole in {folder}; upload it with: {command}"
    try:
        yield
    except Exception as error:
        status, reason = _diagnose(error, api.endpoint)
        raise HubPushError(f"could not push to {repo_id}: {reason}; {state}", status, folder) from error
    except KeyboardInterrupt:
        logger.warning("push to %s interrupted: %s", repo_id, state)
        raise


def _diagnose(error: BaseException, endpoint: str) -> tuple[int | None, str]:
    """Return the HTTP status, if there is one, and a text of what went wrong and what to do."""
    from huggingface_hub.errors import LocalTokenNotFoundError

    cause: BaseException | None = error
    while cause is not None and getattr(cause, "response", None) is None:
        cause = cause.__cause__ or cause.__context__  # an upload's own error hides in a RuntimeError
    if cause is None and isinstance(error, LocalTokenNotFoundError):
        return None, "{}; {}".format(*MENDS[401])
    garbled = isinstance(error, UnicodeError | json.JSONDecodeError)  # an answer, not an argument
    if cause is None and isinstance(error, ValueError) and not garbled:
        return None, str(error).strip()
    if cause is None:
        detail = f"{type(error).__name__}: {error}".strip(": ")
        return None, f"{endpoint} was not reached or broke off ({detail}); check the connection and HF_ENDPOINT"
    status = cause.response.status_code
    said = getattr(cause, "server_message", None) or next(filter(None, map(str.strip, str(cause).splitlines())), "")
    meaning, mend = MENDS.get(status, FAILED if status >= 500 else REFUSED)
    return status, f"{meaning} (HTTP {status}: {said}); {mend}"
