"""Search at inference over how many experts work on a token (Dynamic Experts Search, arXiv 2509.22572)."""

from .active import active_experts
from .driver import SearchResult, expert_search
from .scorers import likelihood_scorer, reward_scorer


__all__ = ["SearchResult", "active_experts", "expert_search", "likelihood_scorer", "reward_scorer"]
