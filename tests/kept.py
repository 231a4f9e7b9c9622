"""The kept logs, which the repository has and a source distribution has not."""

from pathlib import Path

import pytest

RESULTS = Path(__file__).parent.parent / "results"
needs_results = pytest.mark.skipif(not RESULTS.is_dir(), reason="the kept logs are in the repository alone")
