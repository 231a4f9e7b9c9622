"""A run is a file: every section of it is a dataclass, every key has its explanation under it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from apollo_optim.data.config import DataConfig

Sink = Literal["tensorboard", "wandb", "trackio"]


@dataclass
class ModelConfig:
    """Which model is trained, and in which arithmetic."""

    name: str = "llama-4m"
    """A LLaMA size by name (llama-1m, llama-4m, llama-9m, llama-60m ... llama-13b), or any transformers causal LM:
    a directory or a hub name. The architecture is taken from it, the weights are new (see `pretrained`)."""
    pretrained: bool = False
    """Start from the weights of `name` instead of new ones (continued pre-training; not for sizes by name)."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of the transformers config to change, as {tie_word_embeddings: true, max_position_embeddings: 4096}."""
    vocab_size: int | None = None
    """None: as many entries as the tokenizer can produce on plain text (for T5's that is the papers' 32000); a model
    that is not a size by name keeps its own."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 is pure bfloat16: no float32 copy of the weights; the optimizer rounds stochastically when it writes."""
    attention: str | None = None
    """attn_implementation of transformers ("sdpa", "eager", "flash_attention_2", ...); None: its default."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """torch.compile the model."""


@dataclass
class QuantConfig:
    """Weights of 8 or 4 bits, without a float copy (Q-APOLLO)."""

    bits: Literal[4, 8] | None = None
    """Bits of a weight; None: those of the optimizer (8 for q-apollo and q-apollo-mini), float weights for others."""
    group_size: int = 128
    """So many neighbours in a row share a bfloat16 scale."""
    targets: list[str] = field(default_factory=lambda: ["attn", "mlp"])
    """Module names (part of a name, glob, re:regex) whose matrices are stored so; embedding and head must be named."""
    exclude: list[str] = field(default_factory=list)
    """Parameter names that are left in float, whatever `targets` says."""
    tally: int | None = None
    """Every so many steps, record for each low-bit weight the fraction of its codes that the step changed, and the
    realised over the intended update."""


@dataclass
class OptimConfig:
    """The optimizer and its knobs. None is the optimizer's own default (`apollo-optim optimizers` prints them)."""

    name: str = "apollo-mini"
    """A name from `apollo-optim optimizers`."""
    lr: float | None = None
    """Peak learning rate of the matrices that follow the rule."""
    rest_lr: float | None = None
    """Peak learning rate of embedding, head and norms; None: the same `lr`."""
    embedding_lr: float | None = None
    """Peak learning rate of the embedding (and of a head tied to it) apart; None: `rest_lr`."""
    head_lr: float | None = None
    """Peak learning rate of the head apart; None: `rest_lr`. A tied head has none."""
    norm_lr: float | None = None
    """Peak learning rate of norms, biases and all else that is 1-D apart; None: `rest_lr`."""
    rest: Literal["adamw", "adamw8bit", "adafactor", "scale", "apollo"] | None = None
    """What embedding and head follow (norms: always AdamW); None: adamw. scale normalises the gradient (the head's
    with a momentum), apollo is the rule of an optimizer with a rank, for them too."""
    rest_rank: int | None = None
    """Rank of embedding and head with `rest: apollo`; None: the same `rank`."""
    rank: int | str | None = None
    """Size of the compressed side, or "auto" (a quarter of it, as in the paper). APOLLO-Mini: 1."""
    scale: float | str | None = None
    """A number, or "auto" (small side / rank). Its square root multiplies the step."""
    scale_type: Literal["channel", "tensor"] | None = None
    """One factor per channel (APOLLO) or per matrix (APOLLO-Mini)."""
    scale_front: bool | None = None
    """Apply sqrt(scale) before the norm-growth limiter instead of after it."""
    proj: str | None = None
    """sketch (APOLLO's default), gaussian (= random; the paper's, and Mini's default), rademacher or svd."""
    update_proj_gap: int | None = None
    """A new projection every so many steps."""
    keep_proj: bool | None = None
    """Keep a random projection in between instead of drawing it again each step: memory for time."""
    betas: tuple[float, float] | None = None
    """Decay of the two moments."""
    eps: float | None = None
    """Added to the root of the second moment."""
    weight_decay: float | None = None
    """Decoupled, as in AdamW: taken from the old weight, times the lr."""
    norm_growth: float | None = None
    """A step's norm may grow by at most this factor from one step to the next."""
    state_dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the moments."""
    stochastic_rounding: bool | None = None
    """Round bfloat16 weights stochastically when they are written."""
    seed: int | None = None
    """Seed of the random projections and of the rounding."""
    targets: list[str] | None = None
    """Module names (part of a name, glob or regex, or "all-linear") whose matrices follow the rule."""
    exclude: list[str] | None = None
    """Module names that do not, whatever `targets` says."""
    no_decay: list[str] | None = None
    """Parameter names without weight decay."""
    compile: bool | None = None
    """torch.compile the step of the optimizer; None: on a CPU, that of parameters of 262,144 entries and more."""


@dataclass
class ScheduleConfig:
    """The learning rate over the run, as a factor of the peak."""

    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """After the warm-up: half a cosine, a straight line, nothing, or nothing and then a straight line (wsd: warm-up,
    stable, decay)."""
    warmup: float = 0.1
    """Linear warm-up: below 1 a fraction of the run, else a number of steps."""
    min_lr: float = 0.1
    """Where cosine, linear and wsd end, as a fraction of the peak."""
    decay: float = 0.2
    """wsd only: the last part of the run in which the rate falls, as a fraction."""


@dataclass
class TrainConfig:
    """The loop."""

    steps: int = 700
    """Optimizer steps of the whole run."""
    batch_size: int = 16
    """Sequences per optimizer step."""
    micro_batch: int | None = None
    """Sequences per forward pass (gradients are accumulated); None: all of them at once."""
    clip: float | None = None
    """Clip the gradients to this total norm; None: no clipping (the norm is logged either way)."""
    clip_tensor: float | None = None
    """Clip the gradient of each parameter to this norm of its own; unlike `clip`, `release` can do this."""
    release: bool = False
    """Step every weight inside the backward pass and set its gradient free at once: one gradient in memory instead of
    all of them, the same weights to the bit. Micro-batches are added up in all gradients again."""
    loss: Literal["auto", "full", "chunked"] = "auto"
    """chunked: over a part of the vocabulary at a time, forward and backward, so that the logits (tokens x vocabulary)
    never exist; the head's product is computed once more. auto: so if those of a micro-batch have more than 16,777,216
    entries (64 MiB in float32) and the model does nothing else with them (soft caps, scales)."""
    seed: int = 0
    """Seed of the initial weights and of dropout."""
    threads: int | None = None
    """CPU threads of torch; None: its default. Results are equal to the bit only for equal thread counts."""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """torch.set_float32_matmul_precision: of fp32 products. "medium" multiplies in bf16 where the hardware can, which
    is faster on GPUs and on CPUs that have it; weights, sums and the optimizer stay fp32."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; None: the GPU if there is one."""
    deterministic: bool = False
    """On a GPU: deterministic kernels only, which `--resume` needs to be exact to the bit there (a CPU always is)."""


@dataclass
class EvalConfig:
    """Evaluation on the validation split; there is always one at the end."""

    every: int | None = 100
    """Evaluate every so many steps; None: only at the end."""
    tokens: int | None = 65536
    """How many tokens of the validation split, from its beginning; None: all of it."""
    batch_size: int | None = None
    """Sequences per forward pass; None: as in training."""


@dataclass
class CheckpointConfig:
    """Checkpoints: all that is needed to go on, exact to the bit. There is always one at the end."""

    every: int | None = 100
    """Save every so many steps; None: only at the end and on Ctrl-C."""
    keep: int = 2
    """Keep this many, the newest ones."""
    export: bool = True
    """At the end, write the model for everybody else to RUN/model (float weights; `apollo-optim export` can, too)."""


@dataclass
class LogConfig:
    """What is shown and recorded. `metrics.jsonl` in the run directory is always written."""

    every: int = 10
    """Record and show every so many steps."""
    to: list[Sink] = field(default_factory=list)
    """Also send the figures to tensorboard, wandb or trackio."""
    display: Literal["auto", "rich", "plain", "none"] = "auto"
    """auto: a live panel on a terminal, plain lines elsewhere."""


@dataclass
class RunConfig:
    """Everything about one training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    out: str | None = None
    """The run directory; None: out/<model>-<optimizer>."""
