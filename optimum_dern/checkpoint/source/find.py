"""Find a source checkpoint, and refuse one that cannot be compressed before its weights are downloaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...models.loading import parse_dtype
from ...models.moe.structure import find_moe_layers
from ...models.skeleton import build_skeleton
from ...text_files import read_object
from ..format.conversion import NameMap
from ..format.precision import loading_dtype
from ..format.quantisation import check_quantisation
from ..format.reader import CheckpointReader
from ..format.weight_files import has_weights, weight_names
from .completeness import check_complete
from .loader import PartLoader
from .resolve import fetch_weights, remote_dtypes, resolve_checkpoint
from .ties import match_ties_


__all__ = ["Source", "find_checkpoint"]


@dataclass(frozen=True)
class Source:
    """A source checkpoint, whose weights may not be downloaded yet."""

    name: str  # as the user gave it
    folder: Path  # local folder with its files
    commit: str | None  # of a Hub model
    skeleton: Any  # its model without weights, on the meta device
    token: Any
    reader: CheckpointReader | None  # None where the weights are not downloaded yet
    download: Mapping[str, Any] = field(default_factory=dict)  # further options of `resolve_checkpoint`

    def open_weights(self) -> CheckpointReader:
        """Open the weights, and download them first where that is needed.

        Raises:
            OSError: the download failed.
            ValueError: the weights are broken or incomplete.
        """
        if self.reader is not None:
            return self.reader
        fetch_weights(self.name, self.commit, self.folder, self.token, **self.download)
        reader = CheckpointReader(self.folder)
        _match_(self.skeleton, reader)
        return reader

    def open_loader(self, device: torch.device) -> PartLoader:
        """Open the weights as `open_weights` does, to be loaded part by part into the skeleton.

        Args:
            device: to load them to.
        """
        model, reader = self.skeleton, self.open_weights()
        return PartLoader(model, find_moe_layers(model), reader, NameMap(model, list(reader.infos)), device)


def find_checkpoint(
    model: str | Path,
    revision: str | None = None,
    token: Any = None,
    trust_remote_code: bool = False,
    dtype: str | torch.dtype | None = None,
    need_weights: bool = True,
    **download: Any,
) -> Source:
    """Find a checkpoint, and refuse one that cannot be compressed before its weights are downloaded.

    Args:
        model: folder or Hub id.
        revision: branch, tag or commit of a Hub model.
        token: for a private repository.
        trust_remote_code: allow the model's own code to run.
        dtype: to compute in; by default that of its config, or of its tensors where the config has none.
        need_weights: refuse a folder without weights; else weights are only checked where they exist.
        **download: `subfolder`, `cache_dir`, `local_files_only` and `force_download`, as in `resolve_checkpoint`.

    Returns:
        The checkpoint.

    Raises:
        FileNotFoundError: there is no such checkpoint, or it has no safetensors weights.
        OSError: the download failed.
        ValueError: the dtype is unknown, the family or quantisation is not supported, or the weights are broken or
            incomplete.
    """
    folder, commit = resolve_checkpoint(model, revision, token, **download)
    reader = CheckpointReader(folder) if (commit is None if need_weights else has_weights(folder)) else None
    quantised = check_quantisation(read_object(folder / "config.json")) is not None

    def stored_dtype() -> torch.dtype | None:
        headers = reader or (CheckpointReader(folder) if has_weights(folder) else None)
        if headers is not None:
            first = folder / weight_names(folder)[0]
            return loading_dtype({name: info.dtype for name, info in headers.infos.items() if info.path == first})
        subfolder = download.get("subfolder") or ""
        return commit and loading_dtype(remote_dtypes(str(model), commit, folder, token, subfolder))

    options = {"trust_remote_code": trust_remote_code, "dequantised": quantised, "stored_dtype": stored_dtype}
    skeleton = build_skeleton(folder, dtype=parse_dtype(dtype), **options)
    if reader is not None:
        _match_(skeleton, reader)
    return Source(str(model), folder, commit, skeleton, token, reader, download)


def _match_(skeleton: Any, reader: CheckpointReader) -> None:
    """Tie the parameters of a model without weights as its checkpoint does, and refuse an incomplete checkpoint."""
    names = NameMap(skeleton, list(reader.infos))
    match_ties_(skeleton, reader, names)
    check_complete(skeleton, reader, names)
