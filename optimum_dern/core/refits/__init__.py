"""Refits of the retained experts and their router to the original layer's output."""
