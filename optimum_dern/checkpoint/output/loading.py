"""Load a compressed checkpoint together with its report, so that it can be saved and pushed with it again."""

from pathlib import Path
from typing import Any

from ...models.loading import model_class
from ...results.report import CompressionReport
from ...text_files import read_object
from ..source.provenance import OWN_CODE, locating_options
from .publishing import REPORT_NAME, keep_publishable_


__all__ = ["load_compressed_model"]


def load_compressed_model(model: str | Path, revision: str | None = None, token: Any = None, **kwargs: Any) -> Any:
    """Load a checkpoint that `DernCompressor` wrote: the plain transformers model, with its report.

    Plain `from_pretrained` loads it as well; this function also sets `model.dern_report`, and makes `save_pretrained`
    and `push_to_hub` write config, provenance and card with the weights.

    Args:
        model: folder or Hub id.
        revision: branch, tag or commit of a Hub model.
        token: for a private repository.
        **kwargs: arguments of transformers' `from_pretrained`, such as `dtype` and `device_map`.

    Returns:
        The model, in the class that its config names.

    Raises:
        ValueError: the checkpoint has no `dern_report.json`.
    """
    from transformers.utils import cached_file

    name, files, source = str(model), {}, {"revision": revision, "token": token, **locating_options(kwargs)}
    for filename in (REPORT_NAME, "config.json"):
        found = cached_file(name, filename, _raise_exceptions_for_missing_entries=False, **source)
        if found is None:
            raise ValueError(
                f"{name} has no {filename}, so it is not a checkpoint of optimum-dern; "
                "load it with transformers' AutoModelForCausalLM.from_pretrained"
            )
        files[filename] = read_object(Path(found))
    code = {OWN_CODE: kwargs[OWN_CODE]} if OWN_CODE in kwargs else {}
    loaded = model_class(name, **source, **code).from_pretrained(name, **{**kwargs, **source})
    keep_publishable_(loaded, CompressionReport.from_dict(files[REPORT_NAME]), files["config.json"])
    return loaded
