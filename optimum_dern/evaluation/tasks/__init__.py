"""Evaluation tasks such as multiple choice, scored by the log-likelihoods of the answers."""
