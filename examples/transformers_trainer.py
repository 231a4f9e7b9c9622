"""transformers' Trainer, with the step inside its backward pass: python examples/transformers_trainer.py [STEPS]

A tiny new LLaMA learns the source of this file, byte by byte. A model of yours: `AutoModelForCausalLM.from_pretrained`.
"""

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from apollo_optim.integrations.transformers import ReleaseCallback, apollo

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100
text = torch.tensor(list(Path(__file__).read_bytes()))
rows = [{"input_ids": row, "labels": row} for row in text.unfold(0, 64, 16)]
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=2)
)
args = TrainingArguments(
    "out/examples/trainer",
    max_steps=steps,
    per_device_train_batch_size=8,
    learning_rate=3e-3,
    lr_scheduler_type="cosine",
    warmup_steps=steps // 10,
    max_grad_norm=0.0,  # the total norm is not known inside the backward pass; APOLLO's limiter needs no clipping
    logging_steps=max(1, steps // 10),
    save_strategy="no",
    report_to="none",
    use_cpu=not torch.cuda.is_available(),
)
trainer = Trainer(
    model,
    args,
    train_dataset=rows,
    optimizer_cls_and_kwargs=apollo("apollo-mini", args, model, rest_lr=1e-2),
    callbacks=[ReleaseCallback()],
)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"step 1: loss {losses[0]:.3f}\nstep {steps}: loss {losses[-1]:.3f}")
