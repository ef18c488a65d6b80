"""Compression of one MoE layer from E to N experts: measure it, make candidates, fit and judge them, write one."""
