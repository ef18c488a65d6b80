"""Evaluation of a model: loss on text, accuracy on tasks, agreement with the original, speed and memory."""
