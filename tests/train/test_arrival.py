"""A pretrained model in few bits: the weights of the float model, quantised, which never exists."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from apollo_optim import InputError, LowBitWeight, quantize_weights
from apollo_optim.core.storage import parts
from apollo_optim.quant import quantize
from apollo_optim.train import arrival
from apollo_optim.train.config import ModelConfig, QuantConfig
from apollo_optim.train.models import build_model

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
EIGHT = QuantConfig(bits=8, group_size=16)


def saved(path: Path, kind: str = "llama", shard: str = "60kB", **changes: Any) -> Path:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SIZES | changes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)  # norms of ones, too
    model.save_pretrained(path, max_shard_size=shard)
    return path


def changed(path: Path, change: Any) -> None:
    file = path / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def quantized_afterwards(path: Path, dtype: torch.dtype, quant: QuantConfig) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    quantize_weights(model, quant.bits, quant.group_size, quant.targets, quant.exclude)
    return model


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {f"{name} {part}": t for name, tensor in named for part, t in parts(tensor).items()}


@pytest.fixture
def on_arrival(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the weights that were quantised as they came."""
    names: list[str] = []
    monkeypatch.setattr(
        arrival, "quantized", lambda p, name, *how: names.append(name) or quantize.quantized(p, name, *how)
    )
    return names


@pytest.mark.parametrize("kind", ["shards", "file", "tied", "prefix", "experts", "old", "head", "four bits"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_weights_are_those_of_the_whole_model_quantised(
    kind: str, dtype: str, tmp_path: Path, on_arrival: list[str]
) -> None:
    quant = EIGHT
    if kind == "experts":  # which transformers puts together from one matrix for each
        saved(tmp_path, "mixtral", num_local_experts=2)
    elif kind == "prefix":  # of a checkpoint of the base model
        from transformers import AutoModelForCausalLM

        saved(tmp_path / "whole", "llama", tie_word_embeddings=True)
        AutoModelForCausalLM.from_pretrained(tmp_path / "whole").model.save_pretrained(tmp_path, max_shard_size="60kB")
    elif kind == "old":  # with a buffer that is no weight any more
        old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
        changed(saved(tmp_path, shard="1GB"), lambda t: t | old)
    else:
        saved(tmp_path, shard="1GB" if kind == "file" else "60kB", tie_word_embeddings=kind == "tied")
        quant = QuantConfig(4 if kind == "four bits" else 8, 16, ["attn", "mlp"] + ["lm_head"] * (kind == "head"))
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or kind not in ("old", "file")
    model = build_model(ModelConfig(str(tmp_path), pretrained=True, dtype=dtype), quant=quant)
    expected = quantized_afterwards(tmp_path, getattr(torch, dtype), quant)
    ours, theirs = tensors(model), tensors(expected)
    assert ours.keys() == theirs.keys()
    for name, t in ours.items():
        assert t.dtype == theirs[name].dtype
        assert torch.equal(t, theirs[name]), name
    low_bit = [name for name, p in model.named_parameters() if isinstance(p, LowBitWeight)]
    assert sorted(on_arrival) == sorted(low_bit)
    assert len(low_bit) == 15 if kind == "head" else 14
    tied = kind in ("tied", "prefix")
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert model.training == expected.training
    ids = torch.arange(8).view(1, 8)
    assert torch.equal(model(ids).logits, expected(ids).logits)


def test_what_does_not_come_by_its_name_is_quantised_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_arrival: list[str]
) -> None:
    saved(tmp_path)
    monkeypatch.setattr(arrival, "getattr", lambda *_: False, raising=False)  # a transformers without its mark
    model = build_model(ModelConfig(str(tmp_path), pretrained=True), quant=EIGHT)
    assert not on_arrival
    assert sum(isinstance(p, LowBitWeight) for p in model.parameters()) == 14


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: {k: v for k, v in t.items() if "layers.1.mlp" not in k},
            "not in the checkpoint: model.layers.1",
        ),
        (lambda t: t | {"model.layers.2.x": torch.ones(1)}, "but not in the model: model.layers.2.x"),
        (
            lambda t: t | {"model.norm.weight": torch.ones(5)},
            "other shapes in the checkpoint.*: model.norm",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path, change: Any, words: str, bits: int | None) -> None:
    changed(saved(tmp_path, shard="1GB"), change)
    with pytest.raises(InputError, match=words) as refusal:
        build_model(ModelConfig(str(tmp_path), pretrained=True), quant=QuantConfig(bits, 16))
    assert "\n" not in str(refusal.value)


def test_other_refusals_leave_nothing_behind(tmp_path: Path) -> None:
    from torch.nn.modules import module
    from transformers import modeling_utils

    opening, hooks = modeling_utils.safe_open, len(module._global_parameter_registration_hooks)
    path = str(saved(tmp_path, shard="1GB", tie_word_embeddings=True))
    with pytest.raises(InputError, match="are one weight, which cannot be low-bit"):
        build_model(ModelConfig(path, pretrained=True), quant=QuantConfig(8, 16, ["lm_head"]))
    changed(tmp_path, lambda t: t | {"model.layers.1.mlp.up_proj.weight": torch.full((64, 32), torch.nan)})
    with pytest.raises(InputError, match=r"layers.1.mlp.up_proj.weight is not finite"):
        build_model(ModelConfig(path, pretrained=True), quant=EIGHT)
    shutil.rmtree(tmp_path)
    saved(tmp_path, shard="1GB")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot build the model"):
        build_model(ModelConfig(path, pretrained=True), quant=EIGHT)
    assert modeling_utils.safe_open is opening
    assert len(module._global_parameter_registration_hooks) == hooks
    assert "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ


@pytest.mark.parametrize("quant", [None, QuantConfig(8, 16, ["c_fc"])])
def test_masks_of_older_transformers_are_dropped_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, quant: QuantConfig | None
) -> None:
    sizes = {"vocab_size": 300, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    saved(tmp_path, "gpt2", shard="1GB", **sizes)
    whole = tensors(build_model(ModelConfig(str(tmp_path), pretrained=True), quant=quant))
    masks = {
        f"transformer.h.{i}.attn.{name}": mask
        for i in range(2)
        for name, mask in (("bias", torch.ones(1, 1, 64, 64).tril()), ("masked_bias", torch.tensor(-1e4)))
    }
    changed(tmp_path, lambda t: t | masks)
    again = tensors(build_model(ModelConfig(str(tmp_path), pretrained=True), quant=quant))
    assert all(torch.equal(again[name], t) for name, t in whole.items())
    lines = [record.getMessage() for record in caplog.records if "dropped" in record.getMessage()]
    assert lines == [
        f"{tmp_path}: dropped buffers of older transformers, no weights: transformer.h.0.attn.masked_bias and 1 more"
    ]


@pytest.mark.parametrize(
    ("key", "refused"),
    [
        ("h.0.attn.bias", False),
        ("layers.0.self_attn.rotary_emb.inv_freq", False),
        ("embeddings.position_ids", False),
        ("attention.masked_bias", False),
        ("h.0.attn.c_attn.bias", True),
        ("h.0.one.attn.bias", True),  # of a layer called attn, which has a weight
        ("lm_head.bias", True),
    ],
)
def test_what_may_be_a_weight_is_no_old_buffer(key: str, refused: bool) -> None:
    parameters = {"h.0.one.attn.weight", "h.0.attn.c_attn.weight", "lm_head.weight"}
    found = {"mismatched_keys": [], "missing_keys": [], "unexpected_keys": {key}}
    with pytest.raises(InputError, match=key) if refused else contextlib.nullcontext():
        arrival.check_loaded("a", found, parameters)


CHILD = """
import json, sys
import transformers.modeling_utils
from apollo_optim.quant import quantize_weights, write
from apollo_optim.train import measure
from apollo_optim.train.config import ModelConfig, QuantConfig
from apollo_optim.train.models import build_model

write.COMPILED_FROM = 1 << 30  # the compiler is not what is measured here
measure.give_back_memory(1 << 20)
def streamed(path):
    return build_model(ModelConfig(path, pretrained=True), quant=QuantConfig(8))
def afterwards(path):
    model = build_model(ModelConfig(path, pretrained=True))
    quantize_weights(model, 8)
    return model
def peak(build, path):
    before = measure.resident_memory()
    model = build(path)
    return measure.peak_memory() - before, measure.tensor_bytes(model.parameters())
streamed(sys.argv[1])  # whatever is loaded on a first use
print(json.dumps([peak(streamed, sys.argv[2]), peak(afterwards, sys.argv[2])]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is Linux's own account of it")
def test_the_float_model_never_exists(tmp_path: Path) -> None:
    saved(tmp_path / "small")
    sizes = {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 4, "num_attention_heads": 12}
    saved(tmp_path / "large", shard="30MB", **sizes, num_key_value_heads=12)
    assert len(list((tmp_path / "large").glob("*.safetensors"))) > 3
    words = [sys.executable, "-c", CHILD, str(tmp_path / "small"), str(tmp_path / "large")]
    child = subprocess.run(words, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    (peak, weights), (other, _) = json.loads(child.stdout.splitlines()[-1])
    one, a_block = 768 * 2304 * 4, 4 << 20  # some four temporaries of a block are made to quantise it
    assert peak < weights + one + 7 * a_block, (peak, weights)
    assert other > 2 * weights + one + 7 * a_block, "a float model would be seen"
