"""What a search holds: partial answers, what they cost, and the result."""

from dataclasses import dataclass, field


__all__ = ["Candidate", "Cost", "SearchResult"]


@dataclass(frozen=True)
class Candidate:
    """An answer, written in part or to its end, with the number of active experts that writes it."""

    count: int  # experts a token; what continues an answer inherits it
    tree: int  # which of the independent searches it belongs to
    tokens: tuple[int, ...] = ()  # written so far
    text: str = ""
    done: bool = False  # the model has ended it
    score: float = 0.0


@dataclass
class Cost:
    """Tokens that a search has run the model on; its scorer's own computation is not among them."""

    written: int = 0  # tokens generated
    written_experts: int = 0  # experts run to generate them: tokens times experts a token, in each MoE layer
    read: int = 0  # tokens of the prompt and of partial answers, read at the beginning of every step
    read_experts: int = 0
    scored: int = 0  # tokens of prompts and answers given to the scorer

    def add(self, count: int, written: int, read: int) -> None:
        """Add tokens for each of which `count` experts ran."""
        self.written += written
        self.written_experts += count * written
        self.read += read
        self.read_experts += count * read


@dataclass(frozen=True)
class SearchResult:
    """The answer that a search has found, all others, and what they cost."""

    text: str
    score: float
    count: int  # experts a token that wrote it
    answers: tuple[Candidate, ...]  # all that were written to their end (or, if none, as far as they came), best first
    kept: tuple[tuple[int, ...], ...]  # by round: the numbers of experts of the candidates that were kept
    strategy: str
    seed: int
    cost: Cost = field(default_factory=Cost)
