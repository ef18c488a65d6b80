"""Methods that merge groups of experts into one expert each."""

from . import hc_smoe, m_smoe, mergemoe, ream, sub_moe, uncurl


__all__ = ["hc_smoe", "m_smoe", "mergemoe", "ream", "sub_moe", "uncurl"]
