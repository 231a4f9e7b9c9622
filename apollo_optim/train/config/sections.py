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
    targets: list[str] | str = field(default_factory=lambda: ["attn", "mlp"])
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
    """A name from `apollo-optim optimizers`, or two rules: muon+adamw, the hidden matrices' and all others'; auto:
    the best by the race (docs/choose.md) whose plan fits in the memory that is free, with its rates."""
    lr: float | None = None
    """Peak learning rate of the matrices that use the rule. None: what is known of the optimizer at the nearest
    number of tokens a step, and so `rest_lr` (docs/rates.md); where nothing is known, the optimizer's own default."""
    rest_lr: float | None = None
    """Peak learning rate of embedding, head and norms; None: the same `lr`, if that is said."""
    embedding_lr: float | None = None
    """Peak learning rate of the embedding (and of a head tied to it) apart; None: `rest_lr`."""
    head_lr: float | None = None
    """Peak learning rate of the head apart; None: `rest_lr`. A tied head has none."""
    norm_lr: float | None = None
    """Peak learning rate of norms, biases and all else that is 1-D apart; None: `rest_lr`."""
    rest: str | None = None
    """What embedding and head use (norms: always AdamW): a rule, such as adafactor, with 8bit or 4bit after it if
    its state is to be stored so (adamw8bit); apollo: the rule of an optimizer with a rank. None: adamw."""
    embedding: str | None = None
    """What the embedding uses; None: `rest`."""
    head: str | None = None
    """What the head uses; None: `rest`."""
    rest_rank: int | str | None = None
    """Rank of embedding and head, if they use a rule with one; None: with `rest: apollo` the same `rank`."""
    weight_decay: float | None = None
    """Decoupled, as in AdamW: taken from the old weight, times the lr."""
    cautious_decay: bool | None = None
    """Decay a weight only where the step takes it towards zero, too (arXiv 2510.12402). Not for low-bit weights."""
    grad_power: float | None = None
    """Step by |g|^p sign(g) in the place of the gradient g, whatever the rule (GradPower, arXiv 2505.24275: 1.2)."""
    state_dtype: str | None = None
    """How the moments are stored: float32, bfloat16, 8bit or 4bit."""
    stochastic_rounding: bool | None = None
    """Round bfloat16 weights stochastically when they are written."""
    seed: int | None = None
    """Seed of the random projections and of the rounding."""
    targets: list[str] | str | None = None
    """Module names (part of a name, glob or regex, or "all-linear") whose matrices use the rule."""
    exclude: list[str] | None = None
    """Module names that do not, whatever `targets` says."""
    no_decay: list[str] | None = None
    """Parameter names without weight decay."""
    compile: bool | None = None
    """torch.compile the step of the optimizer; None: on a CPU and with CUDA, that of parameters of 262,144 entries
    and more."""
    knobs: dict[str, Any] = field(default_factory=dict)
    """The knobs of its rules, by the names of their fields. In a run file and on the command line they are keys beside
    those above: which there are, what each may be and what it means is asked of the rules."""

    def __post_init__(self) -> None:
        given = {key: value for key, value in self.knobs.items() if value is not None}
        self.knobs = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}

    @classmethod
    def of(cls, **keys: Any) -> OptimConfig:
        """From keys that lie side by side, as in a run file: what is no field is a knob."""
        fields = cls.__dataclass_fields__.keys() - {"knobs"}
        own = {key: value for key, value in keys.items() if key in fields}
        return cls(**own, knobs={key: value for key, value in keys.items() if key not in fields})

    def flat(self) -> dict[str, Any]:
        """The keys side by side, as in a run file; the knobs that are set among them."""
        keys = {key: getattr(self, key) for key in self.__dataclass_fields__ if key != "knobs"}
        return {**keys, **{key: list(v) if isinstance(v, tuple) else v for key, v in self.knobs.items()}}

    def changed(self, **keys: Any) -> OptimConfig:
        """The same with other keys, fields or knobs."""
        return OptimConfig.of(**{**self.flat(), **keys})


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
    epochs: float | None = None
    """Fine-tuning: so many passes over the training rows; `steps` is computed from it. None: `steps` is what counts."""
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
    all of them, the same weights, bit-for-bit. Micro-batches are added up in all gradients again."""
    loss: Literal["auto", "full", "chunked"] = "auto"
    """chunked: over a part of the vocabulary at a time, forward and backward, so that the logits (tokens x vocabulary)
    never exist; the head's matmul is computed once more. auto: so if those of a micro-batch have more than 16,777,216
    entries (64 MiB in float32) and the model does nothing else with them (soft caps, scales)."""
    seed: int = 0
    """Seed of the initial weights and of dropout."""
    threads: int | None = None
    """CPU threads of torch; None: its default. Results are bit-for-bit equal only for equal thread counts."""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """torch.set_float32_matmul_precision: of fp32 matmuls. "medium" multiplies in bf16 where the hardware can, which
    is faster on GPUs and on CPUs that have it; weights, sums and the optimizer stay fp32."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; None: the GPU if there is one."""
    deterministic: bool = False
    """On a GPU: deterministic kernels only, which `--resume` needs there to be exact bit-for-bit (a CPU always is)."""


@dataclass
class ParallelConfig:
    """Several processes, as `torchrun --nproc-per-node 2 -m apollo_optim pretrain ...` starts them. With one process
    nothing of this matters: the same run file is for one and for many, and so are its checkpoints."""

    mode: Literal["ddp", "fsdp2", "hsdp", "tp", "tp+fsdp2"] = "ddp"
    """ddp: every process has all weights and learns from its part of each batch. fsdp2: every process also has only
    its part of weights, gradients and optimizer state. hsdp: fsdp2 within each of `replicas` groups of processes (a
    group a machine, say), which have the same parts as one another. tp: every process computes with its part of the
    matrices of attention and MLP, all from the same rows. tp+fsdp2: tp within groups of `tensor` processes (those of a
    machine, say), fsdp2 over the groups."""
    replicas: int = 2
    """Of hsdp: how many groups of processes have all weights between them."""
    tensor: int = 2
    """Of tp+fsdp2: how many processes a group has."""
    timeout: float = 1800.0
    """Seconds that a process waits for the others before the run fails."""


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
    """Checkpoints: all that is needed to go on bit-for-bit. There is always one at the end."""

    every: int | None = 100
    """Save every so many steps; None: only at the end and on Ctrl-C."""
    keep: int = 2
    """Keep this many, the newest ones."""
    best: bool = False
    """Also keep the checkpoint of the lowest validation loss, and export that one; saves at every evaluation."""
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
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    out: str | None = None
    """The run directory; None: out/<model>-<optimizer>."""
