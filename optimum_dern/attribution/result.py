"""`Attribution`: what every expert and neuron does for each domain, and which are a domain's own."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..text_files import json_text, replacing


__all__ = ["MEASURES", "Attribution"]

MEASURES = {  # of an expert, per domain
    "share": "share of the tokens' choices that fall on the expert",
    "gate": "share of the gate weights",
    "contribution": "share of the sum of |g e|, the sizes of contributions to the layer's output",
    "energy": "share of the sum of |g e|^2",
}


@dataclass(frozen=True)
class Attribution:
    """Shares by domain; of D domains, L MoE layers, E experts and f neurons an expert."""

    model: str
    tokens: Mapping[str, int]  # by domain
    layers: list[int]  # positions of the MoE layers
    measures: Mapping[str, Tensor]  # (D, L, E) each, by a key of `MEASURES`; every layer adds up to 1
    neurons: Tensor  # (D, L, E, f) share of a layer's sum of |g h w|^2
    examples: list[list[list[dict[str, Any]]]]  # by layer and expert: tokens of largest contribution, with context

    @property
    def domains(self) -> list[str]:
        """The names of the domains."""
        return list(self.tokens)

    def skew(self, measure: str = "share") -> Tensor:
        """Return by how much more an expert works for a domain than for any other: (D, L, E).

        Args:
            measure: a key of `MEASURES`, or "neurons" for (D, L, E, f).

        Raises:
            ValueError: there is only one domain.
        """
        if len(self.tokens) < 2:
            raise ValueError("one domain has nothing to be compared with; give at least two")
        values = self.neurons if measure == "neurons" else self.measures[measure]
        others = torch.stack([values[[j for j in range(len(values)) if j != i]].amax(0) for i in range(len(values))])
        return values - others

    def most_skewed(self, domain: str, count: int, measure: str = "share") -> dict[int, list[int]]:
        """Return the experts of each layer that are most a domain's own, ascending, by the layer's position."""
        skew = self.skew(measure)[self._number(domain)]  # (L, E)
        return {
            position: sorted(row.argsort(descending=True, stable=True)[:count].tolist())
            for position, row in zip(self.layers, skew, strict=True)
        }

    def most_skewed_neurons(self, domain: str, count: int) -> dict[int, list[tuple[int, int]]]:
        """Return the neurons of each layer that are most a domain's own, as (expert, neuron), by position."""
        skew = self.skew("neurons")[self._number(domain)]  # (L, E, f)
        width = skew.shape[2]
        return {
            position: [divmod(i, width) for i in row.flatten().argsort(descending=True, stable=True)[:count].tolist()]
            for position, row in zip(self.layers, skew, strict=True)
        }

    def _number(self, domain: str) -> int:
        if domain not in self.tokens:
            raise ValueError(f"there is no domain {domain!r}; there are {', '.join(self.tokens)}")
        return self.domains.index(domain)

    def to_dict(self) -> dict[str, Any]:
        """Return all but the neurons as JSON-able values, layers first, then domains."""
        experts = {
            name: [
                {domain: values[d, number].tolist() for d, domain in enumerate(self.domains)}
                for number in range(len(self.layers))
            ]
            for name, values in self.measures.items()
        }
        facts = {"format": 1, "model": self.model, "tokens": dict(self.tokens), "layers": self.layers}
        return facts | {"measures": MEASURES, "experts": experts, "examples": self.examples}

    def save(self, folder: str | Path) -> list[Path]:
        """Write `attribution.json`, `attribution.safetensors` (neurons) and `attribution.html`; returns the files.

        Earlier ones are replaced together, when all are written.
        """
        from .page import attribution_page

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        neurons = {domain: part.float().contiguous() for domain, part in zip(self.domains, self.neurons, strict=True)}
        files = [folder / f"attribution.{kind}" for kind in ("json", "safetensors", "html")]
        with ExitStack() as stack:
            facts, tensors, page = (stack.enter_context(replacing(file)) for file in files)
            save_file(neurons, tensors)
            facts.write_text(json_text(self.to_dict()), "utf-8")
            page.write_text(attribution_page(self), "utf-8")
        return files
