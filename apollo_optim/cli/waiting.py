"""How threads wait for each other. To be said before torch is imported: OpenMP reads it once, when it is loaded."""

import os

SPINS = 10_000
"""Rounds that a thread of libgomp spins before it sleeps, where a user says nothing (libgomp itself: 300,000). In
company, threads that spin take the cores of those they wait for: `apollo-optim bench company` measures both."""
WORDS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""What a user may have said of it."""


def wait_politely() -> None:
    """Let threads sleep soon, unless the environment says anything of how they wait."""
    if not any(word in os.environ for word in WORDS):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
