"""APOLLO: AdamW-level training at SGD-level memory (arXiv 2412.05270)."""
