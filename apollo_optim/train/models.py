"""Models are transformers'; only a table of LLaMA sizes is ours (2302.13971; below 7B GaLore's, 2403.03507)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from apollo_optim.core.errors import InputError, nearest
from apollo_optim.core.place import local
from apollo_optim.data.foreign import check_size, context_of, explained
from apollo_optim.optim.recipes import find_optimizer
from apollo_optim.quant.quantize import Chosen, choose_weights, quantize_module, quantize_weights
from apollo_optim.quant.write import precompile
from apollo_optim.train.arrival import check_loaded, quantized_on_arrival
from apollo_optim.train.config import ModelConfig, QuantConfig, RunConfig
from apollo_optim.train.draw import draw_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Size:
    """A LLaMA by its numbers; the head is not tied to the embedding."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    vocab: int = 32000
    context: int = 2048


SIZES: dict[str, Size] = {
    "llama-1m": Size(128, 352, 2, 2, vocab=4096),
    "llama-4m": Size(192, 512, 4, 4, vocab=4096),
    "llama-9m": Size(256, 688, 8, 4, vocab=4096),
    "llama-60m": Size(512, 1376, 8, 8),
    "llama-130m": Size(768, 2048, 12, 12),
    "llama-350m": Size(1024, 2736, 24, 16),
    "llama-1b": Size(2048, 5461, 24, 32),
    "llama-7b": Size(4096, 11008, 32, 32),
    "llama-13b": Size(5120, 13824, 40, 40),
}


def build_model(
    cfg: ModelConfig,
    vocab_size: int | None = None,
    seq_len: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    quant: QuantConfig | None = None,
    config: PretrainedConfig | None = None,
    *,
    trust_remote_code: bool = False,
    spread: Callable[[PreTrainedModel], None] | None = None,
) -> PreTrainedModel:
    """A causal language model with new weights from torch's global generator, or, if `pretrained`, those of `cfg.name`.

    A size by name takes its vocabulary from `cfg.vocab_size`, else `vocab_size`, else the table; its special tokens
    from the tokenizer. A sequence longer than the model's context is refused here, before anything is computed.

    With `quant.bits`, weights are quantised as they are drawn or read, one by one: the float model never exists.
    `config`: that of a checkpoint, whose weights will replace these: nothing is looked up elsewhere, nothing is read.
    `trust_remote_code`: a model that is not transformers' own may run the Python code of its repository.
    `spread`: called with a model that gets new weights before it has them, to make its parameters DTensors.
    """
    read = cfg.pretrained and config is None
    if config is None:
        config = model_config(cfg, vocab_size, tokenizer, trust_remote_code=trust_remote_code)
    check_context(cfg, config, seq_len)
    quant = quant or QuantConfig()
    if read:
        model = load_pretrained(cfg, config, quant, trust_remote_code=trust_remote_code)
    else:
        model = with_new_weights(cfg, config, quant, to_train=True, trust_remote_code=trust_remote_code, spread=spread)
    if cfg.gradient_checkpointing:
        recompute(model)
    return model


def check_context(cfg: ModelConfig, config: PretrainedConfig, seq_len: int | None) -> None:
    """Refuse rows that are longer than the model's context."""
    context = context_of(config)
    if seq_len is not None and context is not None and seq_len > context:
        raise InputError(
            f"data.seq_len={seq_len} is longer than the context of {cfg.name}, {context} tokens: shorten it, or, "
            f"for new weights, set model.config.max_position_embeddings={seq_len}"
        )


def recompute(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass, layer by layer."""
    # Its name until transformers 5.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def skeleton(
    cfg: ModelConfig, config: PretrainedConfig | None = None, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model without memory, on the meta device: its shapes and dtypes are those of the model that will run."""
    from transformers import AutoModelForCausalLM

    config = config or model_config(cfg, trust_remote_code=trust_remote_code)
    with torch.device("meta"), _explained(cfg):
        # Not `.to(bfloat16)` afterwards: that would round the rotary frequencies too.
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, trust_remote_code=trust_remote_code, **_options(cfg)
        )
    return model


def with_new_weights(
    cfg: ModelConfig,
    config: PretrainedConfig,
    quant: QuantConfig,
    *,
    to_train: bool = False,
    trust_remote_code: bool = False,
    spread: Callable[[PreTrainedModel], None] | None = None,
) -> PreTrainedModel:
    """The model on the CPU, its weights drawn and, if `quant.bits`, quantised one module at a time.

    `to_train`: the step of low-bit weights is compiled before they take memory. `spread`: see `build_model`.
    """
    model = skeleton(cfg, config, trust_remote_code=trust_remote_code)
    finish = None
    if quant.bits is not None:
        chosen = choose_weights(model, quant.targets, quant.exclude)
        finish = functools.partial(quantize_module, chosen=chosen, bits=quant.bits, group_size=quant.group_size)
        for module in chosen if spread is not None else ():  # what will be gathered has to be known when it is cut
            finish(module)
    if spread is not None:
        spread(model)
    if quant.bits is not None and to_train:
        precompile_steps(cfg, quant, chosen)
    draw_weights(model, finish)
    return model


def precompile_steps(cfg: ModelConfig, quant: QuantConfig, chosen: Chosen) -> None:
    """Compile the step of low-bit weights of these shapes, before they take memory."""
    assert quant.bits is not None
    weights = (module.get_parameter(own).detach() for module, names in chosen.items() for own in names)
    for shape in sorted({tuple(local(weight).shape) for weight in weights}):  # the same order in every process
        precompile(shape, DTYPES[cfg.dtype], quant.bits, quant.group_size, torch.device("cpu"))


def load_pretrained(
    cfg: ModelConfig, config: PretrainedConfig, quant: QuantConfig, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The weights of a directory or a hub name, quantised as they are read if `quant.bits`.

    Raises InputError if the checkpoint's weights are not exactly the model's.
    """
    from transformers import AutoModelForCausalLM

    arrival: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if quant.bits is not None:
        like = skeleton(cfg, config, trust_remote_code=trust_remote_code)
        chosen = choose_weights(like, quant.targets, quant.exclude)
        precompile_steps(cfg, quant, chosen)
        arrival = quantized_on_arrival({name for names in chosen.values() for name in names.values()}, quant)
    with _explained(cfg), arrival:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            os.path.expanduser(cfg.name),
            config=config,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **_options(cfg),
        )
    model: PreTrainedModel = loaded[0]
    check_loaded(cfg.name, loaded[1], {name for name, _ in model.named_parameters()})
    if quant.bits is not None:  # what did not come in by its own name
        quantize_weights(model, quant.bits, quant.group_size, quant.targets, quant.exclude)
    return model


def _options(cfg: ModelConfig) -> dict[str, Any]:
    options: dict[str, Any] = {"dtype": DTYPES[cfg.dtype]}
    return options if cfg.attention is None else options | {"attn_implementation": cfg.attention}


def _explained(cfg: ModelConfig) -> contextlib.AbstractContextManager[None]:
    return explained(f"cannot build the model {cfg.name}")


def model_config(
    cfg: ModelConfig,
    vocab_size: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    trust_remote_code: bool = False,
) -> PretrainedConfig:
    """The transformers config that `cfg` means."""
    from transformers import AutoConfig, LlamaConfig

    config: PretrainedConfig
    name = os.path.expanduser(cfg.name)
    if "/" in (cfg.attention or "") and not trust_remote_code:
        raise InputError(
            f"model.attention={cfg.attention}: a kernel from the hub is code from elsewhere; if you trust it, say "
            "--trust-remote-code"
        )
    if cfg.name in SIZES:
        if cfg.pretrained:
            raise InputError(
                f"model.pretrained: {cfg.name} is a size, it has no weights; give a directory or a hub name"
            )
        size = SIZES[cfg.name]
        fields: dict[str, Any] = {
            "vocab_size": cfg.vocab_size or vocab_size or size.vocab,
            "hidden_size": size.hidden,
            "intermediate_size": size.ffn,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "max_position_embeddings": size.context,
            "tie_word_embeddings": False,
            **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad")},
        }
        _check_fields(LlamaConfig(), cfg.config)
        with _explained(cfg):
            config = LlamaConfig(**fields | cfg.config)
        check_size(config, cfg.name)
        return config
    if not Path(name).exists() and name.lower().startswith("llama") and "/" not in name:  # the hub has none so called
        raise InputError(f"model.name={cfg.name}: no such size{nearest(name, SIZES)}; there are {', '.join(SIZES)}")
    with explained(f"model.name={cfg.name}: neither a size ({', '.join(SIZES)}) nor a readable model"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    if cfg.vocab_size is not None:
        config.get_text_config().vocab_size = cfg.vocab_size
    _check_fields(config, cfg.config)
    with _explained(cfg):
        for key, value in cfg.config.items():
            setattr(config, key, value)
    check_size(config, cfg.name)
    return config


def _check_fields(config: PretrainedConfig, changes: dict[str, Any]) -> None:
    for key in changes:
        if not hasattr(config, key):
            raise InputError(f"model.config.{key}: {type(config).__name__} has no such field")


def low_bit(cfg: RunConfig) -> QuantConfig:
    """What the run file says of the weights' bits, else what its optimizer is for."""
    bits = find_optimizer(cfg.optim.name).bits if cfg.quant.bits is None else cfg.quant.bits
    return dataclasses.replace(cfg.quant, bits=bits)  # type: ignore[arg-type]


def usable_vocabulary(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many entries plain text can reach: without special tokens at the end that only a task would use.

    T5's tokenizer has 32,100 entries, the last 100 of which are sentinels: the papers' models have 32,000.
    """
    named = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    unused = set(tokenizer.all_special_ids) - named
    size = len(tokenizer)
    while size - 1 in unused:
        size -= 1
    return size
