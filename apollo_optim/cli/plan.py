"""`apollo-optim plan`: what a run would take, for every optimizer, before anything is allocated."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import InputError, nearest
from ..core.printing import say
from .choice import print_choice
from .fit import NOTE as FIT_NOTE
from .fit import PACED, fit_rows, pace_of
from .tables import print_below, print_table
from .words import CONSENT, CONSENT_HELP, Parser, memory_of, show

if TYPE_CHECKING:
    from ..plan import Plan, Traces
    from ..train.config import RunConfig

PROG = "apollo-optim plan"
DESCRIPTION = """\
Plan the memory of training, for every optimizer side by side, before anything is allocated: 7B takes seconds.

WHAT is a LLaMA size by name (llama-60m ... llama-13b), a run file (.yaml), or the directory or config.json of any
Hugging Face model. Weights and optimizer state are counted on the tensors that training will make, activations by the
real forward and backward on tensors without memory. The table shows the fullest moment of a step; of several GPUs
(--gpus) there is one of what each sends in a step, too: collectives and bytes, the optimizer's apart."""
EPILOG = """\
examples:
  apollo-optim plan llama-7b --release                        what fits where, as in the paper's Figure 2
  apollo-optim plan llama-7b --release --checkpointing --memory 24GB
  apollo-optim plan llama-7b --release --memory 24GB --device cuda --choose  the best that fits, and its run file
  apollo-optim plan llama-7b --optimizer apollo adamw --rank 256 --optim.state_dtype bfloat16
  apollo-optim plan llama-13b --optimizer apollo-mini --gpus 8 --parallel ddp
  apollo-optim plan llama-7b --gpus 8 --parallel fsdp2         also what a step sends to other GPUs, beside AdamW's
  apollo-optim plan llama-7b --fit 80GB --gpus 8               every optimizer's largest micro-batch, sharded
  apollo-optim plan runs/llama-60m-apollo.yaml --out out/plan  also the picture and the page
  apollo-optim plan ./my-model/config.json --batch 4 --seq 2048

Any key of a run file can be changed, too: --model.config.num_hidden_layers 12, --optim.exclude [gate]"""
BITS = {16: "bfloat16", 32: "float32"}


def run(argv: Sequence[str]) -> int:
    parser = make_parser()
    args, keys = parser.parse_beside_keys(argv)
    check_words(args)
    names = names_of(args)
    cfg, limit = config_of(args, keys), memory_of("--fit" if args.fit else "--memory", args.fit or args.memory)
    models = Models(args.trust_remote_code, args.device)
    if args.choose:
        assert limit is not None  # check_words
        ways = (lambda one: models.plan_of(one, args.batch)), (lambda one, n: title_of(args, one, n))
        print_choice(cfg, limit, *ways, args.device)
        return 0
    from ..plan import Budget, Parallel, Sends, largest_batch
    from ..plan.cuda import advice
    from ..plan.draw import CUDA_NOTE, NOTE, SENDS, SENDS_NOTE, followed_rows, sends_rows, table_rows, write_plan
    from ..train.plan import budget_of, micro_batch, micro_batches, sends_of

    batch = cfg.train.batch_size if args.fit else args.batch or micro_batch(cfg)
    parallel = Parallel(args.parallel, args.gpus, not args.copy_buckets) if args.gpus > 1 else None

    runs = {name: with_optimizer(cfg, name, args.rank) for name in names}

    def budget(run: "RunConfig", model: Any) -> Budget:
        return budget_of(run, model, parallel=parallel, batch=batch, device=args.device)

    note = CUDA_NOTE if args.device == "cuda" else NOTE
    if args.fit:
        assert limit is not None
        pace, shares = pace_of(args.pace), args.parallel == "fsdp2"
        rows = fit_rows(cfg, runs, models.of, budget, limit, args.gpus, pace, shares=shares)
        words = FIT_NOTE + (PACED.format(**pace._asdict()) if pace else "")
        print_table(title_of(args, cfg, None), rows, words + note)
        return 0
    plans, largest, sends = [], [], dict[str, Sends]()
    for name, one in runs.items():
        if limit is not None:  # this takes a while
            say(f"{name}: looking for the largest micro-batch within {args.memory} ...", error=True)
        model, traces = models.of(one)
        plans.append((planned := budget(one, model)).at(traces.at(batch)))
        if limit is not None:
            largest.append(largest_batch(planned, traces, limit))
        if parallel is not None:
            sends[name] = sends_of(one, model, parallel, batch=batch, device=args.device)
    title = title_of(args, cfg, batch)
    print_table(title, table_rows(plans, largest or None), note)
    if args.device == "cuda":
        show(advice(max(plans, key=lambda one: one.total).peak.sizes), style="dim")
    print_below("Rules and state of each group", followed_rows(plans), left=4)
    if sends:
        times = micro_batches(cfg, args.gpus, batch)
        print_below(SENDS + (f" of {times} micro-batches" if times > 1 else ""), sends_rows(sends), left=1)
        show(SENDS_NOTE, style="dim")
    if args.out:
        written = write_plan(plans, title, args.out, largest or None, sends=sends)
        say(f"\npicture: {written.picture}\npage:    {written.page}")
    return 0


class Models:
    """The models to plan and their traces: one for every number of bits."""

    def __init__(self, trust_remote_code: bool = False, device: str = "cpu") -> None:
        self._trust_remote_code, self._device = trust_remote_code, device
        self._made: dict[int | None, tuple[Any, Traces]] = {}

    def of(self, cfg: "RunConfig") -> "tuple[Any, Traces]":
        from ..plan import Traces
        from ..train.models import low_bit
        from ..train.plan import model_of, trace_of

        bits = low_bit(cfg).bits
        if bits not in self._made:
            model = model_of(cfg, trust_remote_code=self._trust_remote_code)
            traces = Traces(lambda batch: trace_of(cfg, model, batch, self._device))
            self._made[bits] = model, traces
        return self._made[bits]

    def plan_of(self, cfg: "RunConfig", batch: int | None = None) -> "Plan":
        """The plan of a run, of one device."""
        from ..train.plan import budget_of, micro_batch

        model, traces = self.of(cfg)
        batch = batch or micro_batch(cfg)
        return budget_of(cfg, model, batch=batch, device=self._device).at(traces.at(batch))


def names_of(args: argparse.Namespace) -> list[str]:
    """The optimizers that are asked for: those that fit the weights."""
    from apollo_optim import list_optimizers

    from ..optim.recipes import find_optimizer

    infos = {info.name: info for info in list_optimizers()}
    for name in args.optimizer or []:
        if "+" in name:
            infos[name] = find_optimizer(name)
        if name not in infos:
            there = ", ".join(infos)
            raise InputError(f"--optimizer {name}: no such optimizer{nearest(name, infos)}; there are {there}")
        if infos[name].bits and args.bits in BITS:
            raise InputError(f"--optimizer {name} is for low-bit weights: give --bits 8 or 4, or none")
    return args.optimizer or [name for name, info in infos.items() if not (info.bits and args.bits in BITS)]


def make_parser() -> Parser:
    parser = Parser(PROG, DESCRIPTION, EPILOG)
    parser.add_argument(
        "what", nargs="?", metavar="WHAT", help="a size, a run file, a model's directory or config.json"
    )
    parser.add_argument("--config", metavar="RUN.yaml", help="a run file, instead of WHAT")
    parser.add_argument(
        "--optimizer", nargs="+", metavar="NAME", help="only these (all that are registered), muon+adamw among them"
    )
    parser.add_argument("--rank", type=int, help="of the optimizers that have no rank of their own (a quarter)")
    parser.add_argument(
        "--bits", type=int, choices=(4, 8, 16, 32), help="of a weight: 4 and 8 are low-bit, 16 bfloat16"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of weights and activations (bfloat16)")
    parser.add_argument("--batch", type=int, help="rows of a micro-batch, on each GPU (1)")
    parser.add_argument("--seq", type=int, help="tokens of a row (256)")
    parser.add_argument("--release", action="store_true", help="step inside the backward, gradients freed at once")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="cuda: with its allocator and context (cpu; with --fit cuda)"
    )
    parser.add_argument("--gpus", type=int, default=1, help="plan the first of so many (1), and what each sends")
    parser.add_argument("--parallel", choices=("ddp", "fsdp2"), help="how they share (ddp; with --fit fsdp2)")
    copies = "ddp without gradient_as_bucket_view: the reducer copies every gradient"
    parser.add_argument("--copy-buckets", action="store_true", help=copies)
    parser.add_argument("--memory", help="find the largest micro-batch that fits: 24GB, 80GiB")
    parser.add_argument(
        "--fit", metavar="80GB", help="the largest micro-batch, and tokens a step, on --gpus such cards"
    )
    timed = "two steps that you have timed: --fit adds tokens/s by them, a fixed cost and one for each token"
    parser.add_argument("--pace", nargs=2, metavar="TOKENS:SECONDS", help=timed)
    parser.add_argument("--choose", action="store_true", help="name the best optimizer that fits in --memory, and why")
    parser.add_argument("--out", metavar="DIR", help="write plan.png and plan.html there")
    parser.add_argument(CONSENT, action="store_true", help=CONSENT_HELP)
    return parser


def check_words(args: argparse.Namespace) -> None:
    """Refuse words that contradict each other, and numbers that make no sense."""
    if (args.what is None) == (args.config is None):
        both = "both WHAT and --config are given" if args.what else "nothing to plan"
        raise InputError(f"{both}: name a size (llama-7b), a run file or a model; see {PROG} --help")
    for name in ("batch", "seq", "gpus", "rank"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value}: at least 1")
    args.device = args.device or ("cuda" if args.fit else "cpu")
    args.parallel = args.parallel or ("fsdp2" if args.fit else "ddp")
    if args.fit and (args.batch or args.memory or args.choose or args.out):
        raise InputError(
            "--fit SIZE finds the micro-batch and prints a table: leave --batch, --memory, --choose, --out out"
        )
    if args.pace and not args.fit:
        raise InputError("--pace is for --fit SIZE, which says how many tokens a step has")
    beside = args.optimizer, args.rank, args.gpus > 1, args.bits in (4, 8), args.out
    if args.choose and not args.memory:
        raise InputError("--choose needs to know how much there is: --memory 24GB")
    if args.choose and any(beside):
        raise InputError(
            "--choose finds optimizer and bits itself, for one device: leave --optimizer, --rank, --bits, --gpus and "
            "--out out"
        )
    if args.bits in BITS and args.dtype not in (None, BITS[args.bits]):
        raise InputError(f"--bits {args.bits} and --dtype {args.dtype} contradict each other: leave one out")


def config_of(args: argparse.Namespace, keys: list[str]) -> "RunConfig":
    """The run that is meant: a run file, or a model with the papers' settings; both changed key by key."""
    from ..train.choose import AUTO
    from ..train.config import check
    from . import pretrain

    file = args.config or (args.what if Path(args.what).suffix in (".yaml", ".yml") else None)
    dtype = args.dtype or BITS.get(args.bits) or (None if file else "bfloat16")
    words = ["--config", file] if file else ["--model.name", args.what, "--train.batch_size", str(args.batch or 1)]
    words += ["--model.dtype", dtype] if dtype else []
    words += ["--data.seq_len", str(args.seq)] if args.seq else []
    words += ["--model.gradient_checkpointing", "true"] if args.checkpointing else []
    words += ["--train.release", "true"] if args.release else []
    words += ["--quant.bits", str(args.bits)] if args.bits in (4, 8) else []
    if not file and args.optimizer and len(args.optimizer) == 1:
        words += ["--optim.name", args.optimizer[0]]  # whose knobs the keys may be
    try:
        cfg = pretrain.parse([*words, *keys]).cfg
    except InputError as error:
        raise InputError(str(error).replace(pretrain.PROG, PROG)) from None
    if not file and not args.batch and (rows := cfg.train.micro_batch or 0) > cfg.train.batch_size:
        cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, batch_size=rows))
    if cfg.optim.name == AUTO:  # chosen where the run starts: here the table has all of them
        cfg = dataclasses.replace(cfg, optim=cfg.optim.changed(name=type(cfg.optim)().name))
        if not args.choose:
            say("optim.name=auto: --memory SIZE --choose names what a run would take in so much memory", error=True)
    check(cfg)
    if "tp" in cfg.parallel.mode:
        raise InputError(
            f"parallel.mode={cfg.parallel.mode}: ddp and fsdp2 are planned (--parallel), tensor parallelism is not yet"
        )
    return cfg


def with_optimizer(cfg: "RunConfig", name: str, rank: int | None) -> "RunConfig":
    """The same run with another optimizer: the keys of its rule are not handed on, those of all parameters are."""
    from ..optim.recipes import find_optimizer

    info = find_optimizer(name)
    kept = ["lr", "targets", "exclude", "no_decay", "state_dtype"]
    kept += [] if "rest" in info.groups else ["rest", "rest_rank", "embedding", "head"]
    optim = cfg.optim
    if name != optim.name:
        optim = type(optim)(name, **{key: getattr(optim, key) for key in kept})
    if rank is not None and info.defaults.get("rank") == "auto":
        optim = optim.changed(rank=rank)
    return dataclasses.replace(cfg, optim=optim)


def title_of(args: argparse.Namespace, cfg: "RunConfig", batch: int | None) -> str:
    words = [f"{args.what or args.config}: {cfg.model.dtype}"]
    words += [f"weights of {cfg.quant.bits} bits"] if cfg.quant.bits else []
    words += [f"micro-batch {batch} x {cfg.data.seq_len} tokens" if batch else f"rows of {cfg.data.seq_len} tokens"]
    words += [f"within {args.fit}"] if args.fit else []
    words += ["step inside backward"] if cfg.train.release else []
    words += ["on a GPU"] if args.device == "cuda" else []
    words += ["activations recomputed"] if cfg.model.gradient_checkpointing else []
    if args.gpus > 1:
        view = (
            "" if args.parallel == "fsdp2" else (" with copied buckets" if args.copy_buckets else " with bucket views")
        )
        words += [f"each of {args.gpus} GPUs by {args.parallel}{view}"]
    return ", ".join(words)
