"""What targets find in well-known architectures: the table in docs/optimizers.md is what this counts.

The rows of diffusers are counted where it is installed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers as t
from torch import nn

from apollo_optim import InputError, LowBitWeight, param_groups, quantize_weights

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "optimizers.md").read_text()
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
TEXT = {"vocab_size": 64, "intermediate_size": 64, **SMALL}


def diffused(name: str, **sizes: object) -> nn.Module:
    import diffusers

    model: nn.Module = getattr(diffusers, name)(**sizes)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "Llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**TEXT)),
    "GPT-2": lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=64)),
    "T5": lambda: t.T5ForConditionalGeneration(
        t.T5Config(vocab_size=64, d_model=32, d_ff=64, num_layers=1, num_heads=4, d_kv=8)
    ),
    "BERT": lambda: t.BertForSequenceClassification(t.BertConfig(**TEXT)),
    "GPT-NeoX": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**TEXT)),
    "OPT": lambda: t.OPTForCausalLM(t.OPTConfig(vocab_size=64, ffn_dim=64, word_embed_proj_dim=32, **SMALL)),
    "BLOOM": lambda: t.BloomForCausalLM(t.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4)),
    "Mamba": lambda: t.MambaForCausalLM(t.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1)),
    "ViT": lambda: t.ViTForImageClassification(t.ViTConfig(image_size=16, patch_size=8, intermediate_size=64, **SMALL)),
    "Whisper": lambda: t.WhisperForConditionalGeneration(
        t.WhisperConfig(
            vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, pad_token_id=0, num_mel_bins=8,
            max_source_positions=32, max_target_positions=32,
        )
    ),
    "Qwen3-MoE": lambda: t.Qwen3MoeForCausalLM(
        t.Qwen3MoeConfig(
            moe_intermediate_size=64, num_experts=8, num_experts_per_tok=2, head_dim=8, num_key_value_heads=2, **TEXT
        )
    ),
    "UNet": lambda: diffused(
        "UNet2DConditionModel", sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
        attention_head_dim=8, norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ),
    "DiT": lambda: diffused(
        "DiTTransformer2DModel", num_attention_heads=4, attention_head_dim=8, num_layers=1, sample_size=8,
        in_channels=4, norm_num_groups=4,
    ),
    "Flux": lambda: diffused(
        "FluxTransformer2DModel", num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, in_channels=4, axes_dims_rope=(4, 4, 8),
    ),
}  # fmt: skip
OF_DIFFUSERS = ("UNet", "DiT", "Flux")


def shares(model: nn.Module, **how: object) -> tuple[str, list[str]]:
    """Of the matrices, without embeddings and the head, what share of the entries uses the rule; what does not."""
    groups = {name: [] for name in ("matrices", "others")}
    for group in param_groups(model, rank=1, **how):
        kind = group["name"].partition("_")[0]
        if kind in groups:
            groups[kind] += zip(group["param_names"], group["params"], strict=True)
    own, others = (sum(p.numel() for _, p in groups[kind]) for kind in ("matrices", "others"))
    left = {re.sub(r"\.\d+(?=\.)", ".*", name).removesuffix(".weight") for name, _ in groups["others"]}
    return f"{own / (own + others):.0%}".replace("%", " %"), sorted(left)


def row(name: str) -> str:
    with torch.device("meta"):
        model = MODELS[name]()
    try:
        default = shares(model)[0]
    except InputError as error:
        default = "refused" if 'targets="all-linear"' in str(error) else str(error)
    linear, left = shares(model, targets="all-linear")
    return f"| {name} | {default} | {linear} | {', '.join(f'`{n}`' for n in left)} |"


@pytest.mark.parametrize("name", MODELS)
def test_the_table_of_architectures(name):
    if name in OF_DIFFUSERS and not find_spec("diffusers"):
        pytest.skip("diffusers is not installed")
    made = row(name)
    assert made in PAGE.splitlines(), f"docs/optimizers.md should say:\n{made}"


def test_decay_is_decided_by_what_a_tensor_is():
    """adaLN's linear layers are nearly half of a DiT, and lie in a module that is called a norm."""
    model = nn.ModuleDict(
        {
            "norm1": nn.ModuleDict({"linear": nn.Linear(8, 48)}),
            "attn": nn.Linear(8, 8),
            "wide": nn.LayerNorm((4, 8)),
            "debias": nn.Linear(8, 8),
            "marked": nn.Linear(8, 8, bias=False),
        }
    )
    model["marked"].weight._no_weight_decay = True  # as Mamba does with A_log
    groups = param_groups(model, rank=1, targets="all-linear", weight_decay=0.1)
    still = {name for group in groups if not group.get("weight_decay") for name in group["param_names"]}
    assert still == {"marked.weight", "norm1.linear.bias", "attn.bias", "debias.bias", "wide.weight", "wide.bias"}
    groups = param_groups(model, rank=1, targets="all-linear", no_decay="debias", weight_decay=0.1)
    assert {n for g in groups if not g.get("weight_decay") for n in g["param_names"]} == still | {"debias.weight"}


def test_low_bit_weights_know_the_word():
    model = MODELS["GPT-NeoX"]()
    names = quantize_weights(model, targets="all-linear")
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in names} == {
        "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"
    }  # fmt: skip
    assert not isinstance(model.get_output_embeddings().weight, LowBitWeight)
    with pytest.raises(InputError, match=r"'attn' matches nothing .*targets=\"all-linear\" finds what is linear"):
        quantize_weights(nn.ModuleDict({"up": nn.Linear(4, 4)}))
    with pytest.raises(InputError, match="'all-linear' matches nothing"):
        quantize_weights(nn.ModuleDict({"rnn": nn.LSTM(4, 4), "table": nn.Embedding(4, 4)}), targets="all-linear")
