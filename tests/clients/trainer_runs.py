"""Tiny runs of transformers' Trainer with an optimizer of ours or torch's, from nothing on disk but a checkpoint."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from apollo_optim.integrations.low_bit import LowBitConfig, quantize
from apollo_optim.integrations.transformers import ReleaseCallback, apollo

TORCH_ADAMW = "torch.optim.AdamW"
KINDS = ("llama", "gpt2")
ROWS = [{"input_ids": row, "labels": row} for row in (torch.arange(16) + torch.arange(60)[:, None]) % 120 + 3]


@dataclass
class Run:
    """What a run ends with; its trainer knows the rest."""

    trainer: Trainer
    weights: dict[str, Tensor]

    @property
    def optimizer(self) -> Any:
        return self.trainer.optimizer.optimizer  # accelerate's wrapper has it inside

    @property
    def state(self) -> dict[str, Any]:
        saved = self.trainer.optimizer.state_dict()["state"]
        return {f"{number}.{key}": value for number, state in saved.items() for key, value in state.items()}

    @property
    def log(self) -> list[dict[str, float]]:
        """Loss, gradient norm and rate of every step that was logged."""
        keys = ("step", "loss", "grad_norm", "learning_rate")
        history = self.trainer.state.log_history
        return [{key: entry[key] for key in keys if key in entry} for entry in history if "loss" in entry]


def make_model(kind: str = "llama", dtype: str = "float32") -> PreTrainedModel:
    """A tiny random model, the same one every time. GPT-2's has dropout: a resumed run needs its random numbers."""
    torch.manual_seed(0)
    if kind == "llama":
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=128, max_position_embeddings=64, **sizes))
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=64, n_embd=64, n_layer=2, n_head=4))
    return model.to(getattr(torch, dtype))


def arguments(out: Path | str, **own: Any) -> dict[str, Any]:
    """Arguments of a run of 2 epochs, each of 8 steps of 4 micro-batches, the last of 2; checkpoints at 4, 8, ..."""
    return {
        "output_dir": str(out), "num_train_epochs": 2, "save_steps": 4, "logging_steps": 1, "learning_rate": 1e-2,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_grad_norm": 0.0, "weight_decay": 0.1,
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, **own,
    }  # fmt: skip


def train(
    out: Path | str,
    name: str | None = "apollo-mini",
    *,
    kind: str = "llama",
    dtype: str = "float32",
    callbacks: tuple[Any, ...] = (),
    resume: Path | str | None = None,
    knobs: dict[str, Any] | None = None,
    bits: int | None = None,
    **own: Any,
) -> Run:
    """One run of Trainer, from its start or from a checkpoint.

    `name`: of `build_optimizer`, or torch's AdamW; None: Trainer makes its optimizer itself, by `optim`. `bits`: of the
    weights; what it ends with are then codes and scales.
    """
    model = make_model(kind, dtype)
    if bits:
        quantize(model, LowBitConfig(bits, group_size=32))
    args = TrainingArguments(**arguments(out, **own))
    made: Any = torch_adamw(args) if name == TORCH_ADAMW else name and apollo(name, args, model, **(knobs or {}))
    trainer = Trainer(
        model, args, train_dataset=ROWS, optimizer_cls_and_kwargs=made, callbacks=[callback() for callback in callbacks]
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    plain = stored(model) if bits else dict(model.named_parameters())
    return Run(trainer, {name: p.detach().clone() for name, p in plain.items()})


def stored(model: PreTrainedModel) -> dict[str, Tensor]:
    """What the files of a low-bit model hold: codes, scales, and floats."""
    plain: dict[str, Tensor] = model.hf_quantizer.get_state_dict_and_metadata(model)[0]
    return plain


def torch_adamw(args: TrainingArguments) -> tuple[type, dict[str, Any]]:
    """The same client with torch's own optimizer: what it cannot resume, no optimizer can."""
    return torch.optim.AdamW, {"lr": args.learning_rate, "weight_decay": args.weight_decay}


RELEASED = (ReleaseCallback,)
