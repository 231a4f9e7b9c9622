"""Protocols over the package: how fast, how much memory, how equal. Not in the wheel; run them from the checkout."""
