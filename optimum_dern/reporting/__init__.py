"""Presentation of a compression report: HTML page, picture, model card, and tables of a comparison."""
