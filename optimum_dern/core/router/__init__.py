"""Routers: rows of the retained experts, and rules recognised from what a router does."""
