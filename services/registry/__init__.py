"""Keeps packages and mixtures, decides what is admitted, and tells everyone what has changed."""
