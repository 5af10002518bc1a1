"""Requests of different complexity go to experts of different size: one `.apr` mixture, 768 features, top-2."""
