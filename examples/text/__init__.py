"""Text experts on a base of random weights: everything but the meaning is real."""
