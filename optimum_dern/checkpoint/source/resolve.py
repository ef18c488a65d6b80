"""Find the local folder of a checkpoint, and download from the Hub only the files that compression needs.

Weights are downloaded after everything else, so that a model that cannot be compressed is refused before a download
that may take hours.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...checks.arguments import check_argument
from ...paths import check_utf8
from ...results.public_names import is_hub_id
from ..format.sidecars import FOLDERS
from ..format.weight_files import ADAPTER_NAME, PICKLED, check_whole_model, entry_names, no_weights, weight_names
from .integrity import whole_downloads


__all__ = ["check_checkpoint", "fetch_weights", "remote_dtypes", "resolve_checkpoint"]

LARGE = (*PICKLED, ".safetensors", ".gguf", ".onnx", ".h5", ".msgpack", ".ot", ".npz", ".pkl", ".distcp", ".ckpt")
LOGIN = "log in with `hf auth login`, or give token=..."


def resolve_checkpoint(
    model: str | Path, revision: str | None = None, token: Any = None, subfolder: str = "", **download: Any
) -> tuple[Path, str | None]:
    """Find a checkpoint's folder; of a Hub model, download the files it needs except its weights.

    Args:
        model: folder or Hub id.
        revision: branch, tag or commit of a Hub model.
        token: for a private repository.
        subfolder: of the folder or repository, where the checkpoint is in one.
        **download: `cache_dir`, `local_files_only` and `force_download` of `snapshot_download`.

    Returns:
        The folder, and the commit of a Hub model.

    Raises:
        FileNotFoundError: the path, repository or revision does not exist, or has no safetensors weights.
        PermissionError: the repository is private or gated.
        OSError: the download failed.
    """
    inside = f"{subfolder}/" if subfolder else ""
    ignored = [*(f"*{kind}" for kind in LARGE), f"{inside}*/*", f"{inside}.*"]
    wanted = {"allow_patterns": [f"{inside}*"], "ignore_patterns": ignored}
    folder, commit = _find(model, revision, token, subfolder, **wanted, **download)
    if commit is not None:
        _check_weights(model, commit, folder, token, inside, download.get("local_files_only", False))
    return folder, commit


def check_checkpoint(model: str | Path, revision: str | None = None) -> None:
    """Check that a checkpoint exists, with the errors of `resolve_checkpoint`; only its configs are downloaded."""
    _find(model, revision, None, allow_patterns=["config.json", ADAPTER_NAME])


def fetch_weights(
    model: str, commit: str, folder: Path, token: Any = None, subfolder: str = "", **download: Any
) -> None:
    """Download a Hub model's weights, and the needed files in folders of its repository, such as chat templates.

    Args:
        model: Hub id.
        commit: of the repository.
        folder: where `resolve_checkpoint` found the other files; weights that it has already are kept.
        token: as in `resolve_checkpoint`, like `subfolder` and `download`.

    Raises:
        OSError: the download failed.
    """
    inside = f"{subfolder}/" if subfolder else ""

    def fetch(names: list[str]) -> None:
        _fetch(model, commit, token, allow_patterns=[f"{inside}{name}" for name in names], **download)

    # A single file takes precedence over an index, so shards are needed only if the repository has no such file.
    fetch([*entry_names(folder), *(f"{name}/*" for name in FOLDERS)])
    shards = [name for name in weight_names(folder) if not (folder / name).is_file()]
    if shards:
        fetch(shards)


def remote_dtypes(model: str, commit: str, folder: Path, token: Any = None, subfolder: str = "") -> dict[str, str]:
    """Return the safetensors dtypes in a Hub model's first weight file, of which only the header is downloaded.

    Arguments and errors are those of `fetch_weights`.
    """
    from huggingface_hub import HfApi

    api, entry, inside = HfApi(token=token), entry_names(folder)[0], f"{subfolder}/" if subfolder else ""
    with _explained(model, commit):
        single = not entry.endswith(".json") and api.file_exists(model, f"{inside}{entry}", revision=commit)
        first = entry if single else weight_names(folder)[0]
        tensors = api.parse_safetensors_file_metadata(model, f"{inside}{first}", revision=commit).tensors
    return {name: tensor.dtype for name, tensor in tensors.items()}


def _find(
    model: str | Path, revision: str | None, token: Any, subfolder: str = "", **download: Any
) -> tuple[Path, str | None]:
    """Find a checkpoint's folder, which must have a config.json; a Hub model is downloaded, and has a commit."""
    check_argument("the model", model, str | Path, "the folder of a checkpoint, or a Hub id (owner/name)")
    check_argument("subfolder", subfolder, str, "a name, or leave it out")
    check_utf8(model, subfolder)
    folder, commit = Path(model).expanduser(), None
    if not folder.is_dir():
        if isinstance(model, Path) or folder.is_absolute() or folder.exists() or not is_hub_id(model):
            what = "is a file, not a folder" if folder.exists() else "does not exist"
            raise FileNotFoundError(
                f"{str(model)!r} {what}; give the folder of a checkpoint, or a Hub id (owner/name)"
            )
        folder = _fetch(model, revision, token, **download)
        commit = folder.name
    folder /= subfolder
    if not (folder / "config.json").is_file():
        check_whole_model(model, folder)
        where = f"{model}, subfolder {subfolder!r}," if subfolder else model
        raise FileNotFoundError(f"{where} has no config.json; give a checkpoint that transformers loads")
    return folder, commit


def _fetch(model: str, revision: str | None, token: Any, **download: Any) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(download.get("cache_dir") or constants.HF_HUB_CACHE).expanduser()
    folder = cache / repo_folder_name(repo_id=model, repo_type="model")
    with whole_downloads(folder), _explained(model, revision):
        return Path(snapshot_download(model, revision=revision, token=token, **download))


def _check_weights(model: str, commit: str, folder: Path, token: Any, inside: str, local: bool) -> None:
    """Refuse a Hub model without safetensors weights, whose other files are in `folder`."""
    entries = entry_names(folder)
    if any((folder / name).is_file() for name in entries):
        return
    if local:
        raise FileNotFoundError(
            f"the weights of {model} are not in the local cache, and local_files_only is set; leave it out, and they "
            "are downloaded"
        )
    from huggingface_hub import HfApi

    with _explained(model, commit):
        files = HfApi(token=token).list_repo_files(model, revision=commit)
    files = [name.removeprefix(inside) for name in files if name.startswith(inside)]
    if not any(name in files for name in entries):
        raise no_weights(model, folder, files, f"{model!r}, revision={commit!r}")


@contextmanager
def _explained(model: str, revision: str | None) -> Iterator[None]:
    """Turn any error of the Hub's client into an OSError that says what to do."""
    try:
        yield
    except Exception as error:
        raise _explanation(error, model, revision) from error


def _explanation(error: BaseException, model: str, revision: str | None) -> OSError:
    from huggingface_hub import constants, errors

    answered = error
    while not hasattr(answered, "response") and answered.__cause__ is not None:
        answered = answered.__cause__  # "not in the cache" hides why the Hub did not give it
    error = answered if hasattr(answered, "response") else error
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        url = f"{constants.ENDPOINT}/{model}"
        return PermissionError(f"{model} is gated: ask for access at {url}, then {LOGIN}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return FileNotFoundError(
            f"{model!r} is neither a local folder nor a model on the Hub that you can see; check the name, or, if it "
            f"is private, {LOGIN}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError(f"{model} has no revision {revision!r}; give one of its branches, tags or commits")
    if status in (401, 403):
        return PermissionError(f"the Hub refuses {model} to your token, or without one (HTTP {status}); {LOGIN}")
    if constants.HF_HUB_OFFLINE:
        return FileNotFoundError(
            f"there is no local folder {model!r}, {model} is not wholly in the local cache, and HF_HUB_OFFLINE is "
            "set; unset it, or give a local folder"
        )
    reason = f"HTTP {status}" if status else f"{type(error).__name__}: {' '.join(str(error).split())}"
    return OSError(
        f"could not download {model} from {constants.ENDPOINT} ({reason}), and there is no local folder of that name; "
        "check the connection and the free disk space, then give the same command again: what has been downloaded "
        "stays"
    )
