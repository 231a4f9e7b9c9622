"""Tiny runs of TRL's SFTTrainer and DPOTrainer, with PEFT's LoRA or without; nothing comes from a hub."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from trainer_runs import Run, arguments, make_model
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from apollo_optim.integrations.transformers import apollo

WORDS = [f"w{i}" for i in range(100)]
TARGETS = {"llama": ["q_proj", "v_proj", "up_proj"], "gpt2": ["c_attn", "c_fc"]}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = models.WordLevel({word: i for i, word in enumerate(special + WORDS)}, unk_token="<unk>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def make_rows(what: str) -> Dataset:
    """60 prompts of six words; the right answer goes on counting, the wrong one goes back."""
    rows = []
    for start in range(60):
        prompt, right = (" ".join(WORDS[start + a : start + b]) for a, b in ((0, 6), (6, 12)))
        wrong = " ".join(WORDS[start : start + 6][::-1])
        answers = {"chosen": f" {right}", "rejected": f" {wrong}"} if what == "dpo" else {"completion": f" {right}"}
        rows.append({"prompt": prompt, **answers})
    return Dataset.from_list(rows)


def lora(kind: str) -> LoraConfig:
    """Adapters of rank 8 on attention and MLP."""
    fan = kind == "gpt2"
    return LoraConfig(r=8, target_modules=TARGETS[kind], task_type="CAUSAL_LM", fan_in_fan_out=fan)


def train_trl(
    out: Path | str,
    what: str,
    name: str = "apollo",
    *,
    kind: str = "llama",
    dtype: str = "float32",
    adapters: bool = False,
    callbacks: tuple[Any, ...] = (),
    resume: Path | str | None = None,
    knobs: dict[str, Any] | None = None,
    **own: Any,
) -> Run:
    """One run of SFTTrainer ("sft") or DPOTrainer ("dpo")."""
    model = make_model(kind, dtype)
    config, cls = {"sft": (SFTConfig, SFTTrainer), "dpo": (DPOConfig, DPOTrainer)}[what]
    own = {"max_length": 32, "gradient_checkpointing": False, "bf16": False, **own}
    args = config(**arguments(out, **own))
    reference = {} if what == "sft" or adapters else {"ref_model": make_model(kind, dtype)}  # else it looks in the hub
    trainer = cls(
        model,
        args=args,
        train_dataset=make_rows(what),
        processing_class=make_tokenizer(),
        callbacks=[callback() for callback in callbacks],
        peft_config=lora(kind) if adapters else None,
        **reference,
    )
    trainer.optimizer_cls_and_kwargs = apollo(name, args, trainer.model, **(knobs or {}))  # DPOTrainer has no argument
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return Run(trainer, {name: p.detach().clone() for name, p in trainer.model.named_parameters()})
