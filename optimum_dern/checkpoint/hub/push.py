"""Publish a checkpoint on the Hugging Face Hub: check permissions, save it to a folder, upload it in one commit.

Making the checkpoint may have taken hours, so it survives a failed upload: the folder is kept, and the error says
where it is and which command uploads it.
"""

import re
import shutil
import tempfile
from collections.abc import Callable
from logging import getLogger
from pathlib import Path
from typing import Any

from ...versions import __version__
from .errors import HubPushError, explained


__all__ = ["HubPushError", "push_checkpoint"]

logger = getLogger(__name__)

CARD_NAME = "README.md"
MESSAGE = "Upload a checkpoint compressed with optimum-dern"
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def push_checkpoint(
    save: Callable[[Path], None],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    folder: str | Path | None = None,
) -> str:
    """Save a checkpoint to a folder and publish what was saved in one commit.

    An existing card in the repository is kept, since cards are edited there.  Everything else is replaced, and weight
    files of an earlier push that the new checkpoint lacks are deleted.

    Args:
        save: writes the checkpoint to the folder that it is given.
        repo_id: `name` or `namespace/name`; created if missing.
        private: whether a new repository is private; None leaves it to the account's default.
        token: for the Hub; by default the one of `hf auth login`.
        revision: branch to commit to.
        commit_message: message of the commit.
        create_pr: open a pull request instead of committing.
        folder: where to save first; by default a temporary one, which is kept if the upload fails.

    Returns:
        URL of the commit, or of the pull request.

    Raises:
        ValueError: an argument is invalid; nothing was done.
        HubPushError: the Hub refused, or the upload failed; the message names the folder with the checkpoint.
    """
    from huggingface_hub import HfApi

    _check_arguments(repo_id, revision, create_pr, folder)
    api = HfApi(token=token, library_name="optimum-dern", library_version=__version__)
    with explained(api, repo_id):
        repo_id, options = _prepare_repository(api, repo_id, private, revision, create_pr)
    target = Path(tempfile.mkdtemp(prefix="optimum-dern-") if folder is None else folder).absolute()
    try:
        files = _save(save, target)
    except BaseException:
        if folder is None:  # it holds no whole checkpoint
            shutil.rmtree(target, ignore_errors=True)
        raise
    with explained(api, repo_id, target, options):
        head = api.model_info(repo_id, revision=revision)
        commit = api.create_commit(
            repo_id,
            _operations(files, {file.rfilename for file in head.siblings or []}, repo_id),
            commit_message=commit_message or MESSAGE,
            revision=revision,
            create_pr=create_pr,
            parent_commit=head.sha,  # a commit in between is refused, not overwritten
        )
    if folder is None:
        shutil.rmtree(target, ignore_errors=True)
    return commit.pr_url or commit.commit_url


def _check_arguments(repo_id: str, revision: str | None, create_pr: bool, folder: str | Path | None) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        if not isinstance(repo_id, str):
            raise HFValidationError(f"It must be a string, not {type(repo_id).__name__}.")
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{error} Give 'name' or 'namespace/name', as in 'me/OLMoE-DERN-50'") from None
    if create_pr and revision not in (None, "main"):
        raise ValueError(f"a pull request is made against 'main': leave out create_pr=True or revision={revision!r}")
    if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
        raise ValueError(f"folder={str(folder)!r} is a file; give a folder, new or existing")


def _prepare_repository(
    api: Any, repo_id: str, private: bool | None, revision: str | None, create_pr: bool
) -> tuple[str, list[str]]:
    """Create and check the repository; return its full id, and the options of the `hf upload` that replaces a push."""
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if not create_pr:  # an existing repository is found without write permission, too
        api.auth_check(repo_id, write=True)
    head = api.model_info(repo_id, revision=revision)
    if private and head.private is False:
        raise ValueError(
            "it exists and is public, and private=True is only for new ones; choose another name, or "
            f"`hf repos settings {repo_id} --private`"
        )
    names = {file.rfilename for file in head.siblings or []}
    options = ["--revision", revision] if revision else []
    options += ["--create-pr"] if create_pr else []
    options += ["--exclude", CARD_NAME] if CARD_NAME in names else []
    if any(map(WEIGHTS.fullmatch, names)):
        options += ["--delete", "model.safetensors*", "--delete", "model-?????-of-?????.safetensors"]
    return repo_id, options


def _save(save: Callable[[Path], None], folder: Path) -> dict[str, Path]:
    """Save into a folder and return the files written, by name in the repository; others there are not published."""
    before = _stamps(folder)
    save(folder)
    after = _stamps(folder)
    return {name: folder / name for name in after if after[name] != before.get(name) or name == CARD_NAME}


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    files = {file.relative_to(folder).as_posix(): file.stat() for file in sorted(folder.rglob("*")) if file.is_file()}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in files.items()}


def _operations(files: dict[str, Path], present: set[str], repo_id: str) -> list[Any]:
    """List the commit's operations for a repository that holds the files `present`."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    if CARD_NAME in present:
        logger.warning("%s keeps the %s that it has; delete it there to publish the new one", repo_id, CARD_NAME)
        files = {name: path for name, path in files.items() if name != CARD_NAME}
    stale = sorted(name for name in present if WEIGHTS.fullmatch(name) and name not in files)
    return [
        *(CommitOperationAdd(name, path) for name, path in files.items()),
        *(CommitOperationDelete(name, is_folder=False) for name in stale),
    ]
