"""What a person with a GPU runs before anything else: `python -m benchmarks.gpu` (see `__main__`)."""
