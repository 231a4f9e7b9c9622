"""For all tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def fp32_products_are_fp32():
    """A CPU with AMX would otherwise round the operands of a step's products (``quick_products``) to bf16."""
    if not (torch.cpu._is_amx_tile_supported() and hasattr(torch.backends.mkldnn, "matmul")):
        yield
        return
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    yield
    torch.backends.mkldnn.matmul.fp32_precision = before
