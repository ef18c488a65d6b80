"""Compression of one measured MoE layer: make candidates, fit and judge them, write one."""
