"""Separately trained and signed experts on handwritten digits answer as one mixture."""
