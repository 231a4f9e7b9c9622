"""apollo-optim in the place of apollo-torch: this folder's parent on PYTHONPATH (`apollo-optim shim` prints it)."""

from apollo_optim.integrations.apollo_torch import APOLLOAdamW, QAPOLLOAdamW

__all__ = ["APOLLOAdamW", "QAPOLLOAdamW"]
__version__ = "1.0.3"  # whose names these are
