"""Examples that run: `make demo`, or `python -m examples.digits.demo` and `python -m examples.complexity.demo`."""
