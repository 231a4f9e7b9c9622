"""What tensor parallelism cannot split is refused by name, before there are weights."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from apollo_optim.core.errors import InputError
from apollo_optim.parallel.tensor import check_split
from apollo_optim.plan.shards import blocks_of

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64}


def llama(**changes: int) -> LlamaForCausalLM:
    sizes = {"intermediate_size": 64, "num_attention_heads": 4, **changes}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**SMALL, **sizes))


def refusal(model: nn.Module, size: int) -> str:
    with pytest.raises(InputError) as refused:
        check_split(blocks_of(model), getattr(model, "config", None), size)
    return str(refused.value)


def test_a_llama_is_split() -> None:
    model = llama(num_key_value_heads=2)
    check_split(blocks_of(model), model.config, 2)
    with torch.device("meta"):
        biased = LlamaForCausalLM(LlamaConfig(**SMALL, num_attention_heads=4, attention_bias=True, mlp_bias=True))
    check_split(blocks_of(biased), biased.config, 2)


@pytest.mark.parametrize(
    ("changes", "size", "said"),
    [
        ({}, 8, "num_attention_heads=4 cannot be cut into 8 equal parts"),
        ({"num_key_value_heads": 1}, 2, "num_key_value_heads=1 cannot be cut into 2"),
        ({"intermediate_size": 65}, 2, "intermediate_size=65 cannot be cut into 2"),
    ],
)
def test_what_cannot_be_cut_equally_is_refused(changes: dict[str, int], size: int, said: str) -> None:
    assert said in refusal(llama(**changes), size)


def test_a_norm_of_heads_is_refused() -> None:
    """Each process would see the gradient of its own heads only, and step the whole norm with it."""
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**SMALL, num_attention_heads=4, num_key_value_heads=4, head_dim=8))
    assert "in Qwen3DecoderLayer it is self_attn.k_norm.weight that differs" in refusal(model, 2)


def test_other_blocks_are_refused() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(4, 4)])
    assert "in Linear it is mlp.down_proj.weight that differs" in refusal(model, 2)
