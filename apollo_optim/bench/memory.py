"""Peak memory of training: a fresh process for every optimizer, each beside its plan.

    apollo-optim bench memory --sizes llama-60m llama-130m
    apollo-optim bench memory --sizes llama-350m --cases adamw apollo-mini-release --table
    apollo-optim bench memory --run out/llama-7b/metrics.jsonl

The protocol:

1. Every case is a process of its own. It imports everything, notes what it has resident (the import baseline), builds
   the model and the optimizer, and trains some steps on random tokens: no corpus, no checkpoint, no evaluation. Model,
   loss, gradients and step are those of `pretrain`; a peer's optimizer takes the place of ours, on the same matrices.
2. The peak is the most that the process ever had resident (VmHWM), from its start to the end of its last step, less
   the baseline. Weights, gradients and optimizer state are counted tensor by tensor.
3. The plan of the same run, which is made without any of that, is held against it. What is left is named by what was
   measured: pages of the libraries that are loaded on first use (RssFile), blocks that are free and that glibc keeps
   (mallinfo2), the compiler of the step, what else the process keeps between steps beyond weights and
   state (scratch and caches of the libraries), and what was there at the peak alone. They add up to the difference;
   nothing is fitted.
4. glibc is told to give blocks of 128 KiB and more back at once, for all cases alike: what is measured is what training
   takes, not what an allocator has learnt to keep. `--malloc pretrain` leaves it as `pretrain` does: blocks of
   2 MB and more with `release`, glibc's own rule (up to 32 MiB are kept) without.

A peer that is not installed, or that crashes, is a row that says so. Rows are added to `OUT/memory.jsonl`; of the same
measurement the last one counts. The exit code is 1 if a case of ours has other weights or another state than planned.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from apollo_optim import param_groups
from apollo_optim.core.compile import can_compile
from apollo_optim.core.errors import InputError
from apollo_optim.data.config import DataConfig
from apollo_optim.plan import Plan
from apollo_optim.train import measure
from apollo_optim.train.build import choose_device, compiled_beforehand
from apollo_optim.train.config import (
    LogConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    check,
    from_dict,
    to_dict,
)
from apollo_optim.train.loss import summed_loss, targets
from apollo_optim.train.models import SIZES, build_model, low_bit
from apollo_optim.train.optimizer import make_optimizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
Peer = Callable[[nn.Module], torch.optim.Optimizer]

CHILD = "import sys; from apollo_optim.bench.memory import child; child(*sys.argv[1:])"


@dataclass(frozen=True)
class Case:
    """What is measured: an optimizer of ours, or a peer's in its place."""

    optim: str = "adamw"
    """Of ours; for a peer only the form of the weights."""
    release: bool = False
    package: str = ""
    """A peer's, as it is imported."""
    peer: Peer | None = None


def _matrices(model: nn.Module, **rule: Any) -> list[dict[str, Any]]:
    """Groups as the peers of the low-rank family want them: the matrices that follow the rule, and the rest."""
    groups = param_groups(model, rank=rule["rank"])
    follows = [p for group in groups if "rank" in group for p in group["params"]]
    others = [p for group in groups if "rank" not in group for p in group["params"]]
    return [{"params": follows, **rule}, {"params": others}]


def _quarter(model: nn.Module) -> int:
    """The papers' rank, a quarter of the hidden size, as `rank: auto` here."""
    return int(model.config.hidden_size) // 4  # type: ignore[union-attr, arg-type]


def _peer(package: str, name: str) -> Any:
    return getattr(importlib.import_module(package), name)


def _apollo_torch(model: nn.Module, rank: int, scale: float, scale_type: str) -> torch.optim.Optimizer:
    rule = {"scale": scale, "scale_type": scale_type, "proj": "random", "proj_type": "std", "update_proj_gap": 200}
    made: torch.optim.Optimizer = _peer("apollo_torch", "APOLLOAdamW")(_matrices(model, rank=rank, **rule), lr=1e-3)
    return made


def _galore_torch(model: nn.Module) -> torch.optim.Optimizer:
    groups = _matrices(model, rank=_quarter(model), scale=0.25, proj_type="std", update_proj_gap=200)
    made: torch.optim.Optimizer = _peer("galore_torch", "GaLoreAdamW")(groups, lr=1e-3)
    return made


CASES = {
    "torch-adamw": Case(package="torch", peer=lambda model: torch.optim.AdamW(model.parameters())),
    "bitsandbytes-adamw8bit": Case(
        package="bitsandbytes", peer=lambda model: _peer("bitsandbytes.optim", "AdamW8bit")(model.parameters())
    ),
    "torchao-adamw8bit": Case(
        package="torchao", peer=lambda model: _peer("torchao.optim", "AdamW8bit")(model.parameters())
    ),
    "galore-torch": Case(package="galore_torch", peer=_galore_torch),
    "apollo-torch": Case(
        package="apollo_torch", peer=lambda model: _apollo_torch(model, _quarter(model), 1.0, "channel")
    ),
    "apollo-torch-mini": Case(package="apollo_torch", peer=lambda model: _apollo_torch(model, 1, 128.0, "tensor")),
    **{
        name + tail: Case(name, release)
        for name in ("adamw", "apollo", "apollo-mini")
        for tail, release in (("", False), ("-release", True))
    },
    "q-apollo-mini-release": Case("q-apollo-mini", True),
}
TRIMMED = 1 << 17
KEY = ("case", "size", "dtype", "batch", "seq", "steps", "checkpointing", "malloc")
"""What makes a measurement the same one."""


def config_of(
    case: Case,
    size: str,
    *,
    dtype: str = "bfloat16",
    batch: int = 1,
    seq: int = 256,
    steps: int = 2,
    checkpointing: bool = False,
    threads: int | None = None,
    config: Mapping[str, Any] | None = None,
) -> RunConfig:
    """The run that is measured, and planned."""
    return RunConfig(
        model=ModelConfig(size, dtype=dtype, gradient_checkpointing=checkpointing, config=dict(config or {})),  # type: ignore[arg-type]
        data=DataConfig(seq_len=seq),
        optim=OptimConfig(case.optim, lr=1e-4),
        train=TrainConfig(steps=steps, batch_size=batch, release=case.release, threads=threads, device="cpu"),
        log=LogConfig(display="none"),
    )


# --- the process of a case ---


def child(name: str, malloc: str, question: str, answer: str) -> None:
    """Measure one case: the whole life of a process."""
    case, cfg = CASES[name], from_dict(json.loads(Path(question).read_text(encoding="utf-8")))
    if malloc == "trimmed" or cfg.train.release:
        measure.give_back_memory(*[TRIMMED] * (malloc == "trimmed"))
    try:
        importlib.import_module(case.package or "apollo_optim")
    except Exception as error:  # a peer may be broken in any way; that is what its row says
        row: Row = {"status": "missing", "reason": f"{type(error).__name__}: {_one_line(error)}"}
    else:
        row = measured(case, cfg)
    Path(answer).write_text(json.dumps(row), encoding="utf-8")


def measured(case: Case, cfg: RunConfig) -> Row:
    """Train, and say what was resident when."""
    for module in ("transformers.modeling_utils", "transformers.models.llama.modeling_llama"):
        importlib.import_module(module)  # else they would come with the model
    device = choose_device(cfg)
    baseline, before = measure.resident_memory(), kept()
    graphs = {} if case.peer else compiled_beforehand(cfg, device)
    if low_bit(cfg).bits is not None:
        can_compile("cpu")  # the compiler's modules and its first product, which the weights' step brings anyway
    compiler = measure.resident_memory() - baseline - sum(kept().values()) + sum(before.values())
    torch.manual_seed(cfg.train.seed)
    model = build_model(cfg.model, seq_len=cfg.data.seq_len, quant=low_bit(cfg))
    model.train()
    most = count_gradients(model)
    optimizer = case.peer(model) if case.peer else make_optimizer(cfg.optim, model, graphs)
    if cfg.train.release:
        from apollo_optim import release

        handle = release(model, optimizer)
    vocabulary = int(model.config.vocab_size)
    for _ in range(cfg.train.steps):
        rows = torch.randint(vocabulary, (cfg.train.batch_size, cfg.data.seq_len))
        loss = summed_loss(model, rows, rows, cfg.train.loss) / targets(rows)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        last = float(loss.detach())
        del loss
    sizes = {**measure.memory(model, optimizer), "gradients": most[0], "optimizer": state_bytes(optimizer)}
    if cfg.train.release:
        handle.remove()
    return {
        "status": "ok",
        "loss": last,
        **sizes,
        "buffers": measure.tensor_bytes(model.buffers()),
        "baseline": baseline,
        "rest": measure.resident_memory(),
        "kept": {key: size - before[key] for key, size in kept().items()} | {"compiler": compiler},
        "peak": measure.peak_memory(),
        "package": _version(case.package),
        "versions": measure.versions(),
        "hardware": measure.hardware(device),
    }


def count_gradients(model: nn.Module) -> list[int]:
    """[the most bytes of gradients that were there together]; to be called before `release`, which frees them."""
    parameters, most = [p for p in model.parameters() if p.requires_grad], [0]

    def look(_: torch.Tensor) -> None:
        most[0] = max(most[0], measure.tensor_bytes(p.grad for p in parameters if p.grad is not None))

    for p in parameters:
        p.register_post_accumulate_grad_hook(look)  # type: ignore[no-untyped-call]
    return most


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of its state, that of torchao's wrapped tensors as they are stored."""
    return measure.tensor_bytes(measure.inner_tensors(list(optimizer.state.values())))


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package.replace("_", "-")) if package else None
    except PackageNotFoundError:
        return None


def kept() -> dict[str, int]:
    """Bytes resident that no tensor has, where the system tells."""
    sizes = {"pages": measure.process_status("RssFile"), "heap": measure.free_heap()}
    return {key: size for key, size in sizes.items() if size is not None}


# --- a row ---


def run_case(name: str, cfg: RunConfig, malloc: str = "trimmed", timeout: float | None = None) -> Row:
    """One line of the log: what a fresh process measured, and the plan of the same run."""
    case, started = CASES[name], time.monotonic()
    row: Row = {
        "case": name,
        "size": cfg.model.name,
        "dtype": cfg.model.dtype,
        "batch": cfg.train.batch_size,
        "seq": cfg.data.seq_len,
        "steps": cfg.train.steps,
        "checkpointing": cfg.model.gradient_checkpointing,
        "malloc": malloc,
        "config": to_dict(cfg),
    }
    row |= in_fresh_process(name, cfg, malloc, timeout)
    row["seconds"] = round(time.monotonic() - started, 1)
    if case.peer is None and row["status"] == "ok":
        from apollo_optim.train.plan import planned

        row |= beside(row, planned(cfg))
    return row


def in_fresh_process(name: str, cfg: RunConfig, malloc: str, timeout: float | None) -> Row:
    """What the case's own process answers, or what became of it."""
    with tempfile.TemporaryDirectory(prefix="memory-") as directory:
        question, answer = Path(directory, "question.json"), Path(directory, "answer.json")
        question.write_text(json.dumps(to_dict(cfg)), encoding="utf-8")
        words = [sys.executable, "-c", CHILD, name, malloc, str(question), str(answer)]
        try:
            done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return {"status": "failed", "reason": f"not ready after {timeout:g} s"}
        if answer.exists():
            row: Row = json.loads(answer.read_text(encoding="utf-8"))
            return row
    if done.returncode < 0:
        why = " (out of memory?)" * (done.returncode == -9)
        return {"status": "failed", "reason": f"killed by signal {-done.returncode}{why}"}
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return {"status": "failed", "reason": _one_line(lines[-1] if lines else f"exit code {done.returncode}")}


def beside(row: Row, plan: Plan) -> Row:
    """The plan, and what a measured peak has more, by what was measured of it."""
    state = plan.rows["state, matrices"] + plan.rows["state, rest"]
    found: Row = {
        "plan": {"total": plan.total, "when": plan.peak.when, "rows": plan.rows},
        "equal": (row["weights"], row["optimizer"]) == (plan.rows["weights"], state),
        "difference": row["peak"] - row["baseline"] - plan.total,
    }
    stays = row["rest"] - row["baseline"] - row["weights"] - row["optimizer"] - row["buffers"]
    others = {"rest": stays - sum(row["kept"].values()), "peak": found["difference"] - stays}
    return found | {"residual": row["kept"] | others}


# --- a run that was made by `pretrain` ---


def of_run(log: Path, peak: int | None = None, baseline: int | None = None) -> str:
    """The table of a run's peak beside its plan, from its log.

    `peak`, `baseline`: bytes of those that the log lacks (the run was stopped; it is older than the figure).
    """
    from apollo_optim.report import read_run
    from apollo_optim.train.plan import planned

    run = read_run(log)
    cfg = from_dict(run.start["config"])
    plan = planned(cfg, vocab_size=run.start["corpus"]["tokenizer"]["entries"])
    there = run.start.get("baseline") or {}
    peak, baseline = peak or run.memory.get("peak"), baseline or there.get("imports")
    sizes = {
        "weights": (run.memory["weights"], plan.rows["weights"]),
        "optimizer state": (run.memory["optimizer"], plan.rows["state, matrices"] + plan.rows["state, rest"]),
    }
    lines = [f"{cfg.model.name}, {cfg.optim.name}: {log}, beside the plan of its configuration (GB)", ""]
    lines += ["| | measured | planned | difference |", "|---|---:|---:|---:|"]
    lines += [f"| {what} | {gb(a)} | {gb(b)} | {a - b:+,} bytes |" for what, (a, b) in sizes.items()]
    if peak is None:
        return "\n".join([*lines, "", "No peak in the log, the run did not end: --peak 8.06GB gives what it printed."])
    if baseline is None:
        lines += [f"| peak of the process | {gb(peak)} | {gb(plan.total)} | |", ""]
        return "\n".join([*lines, "No import baseline in the log, it is an older one: --baseline 0.35GB gives it."])
    above = f"{(peak - baseline) / plan.total - 1:+.1%}"
    lines.append(f"| peak less imports, {gb(baseline)} | {gb(peak - baseline)} | {gb(plan.total)} | {above} |")
    if "data" in there:
        lines.append(f"| of it the text and its tokenizer | {gb(there['data'] - there['imports'])} | | |")
    return "\n".join(lines)


def gb(size: int) -> str:
    return f"{size / 1e9:.3f}"


# --- tables and the picture ---


def newest(rows: Sequence[Row]) -> list[Row]:
    """Of the same measurement the last one, in the order of sizes and cases."""
    kept = {tuple(row[key] for key in KEY): row for row in rows}
    order, sizes = list(CASES), list(SIZES)
    return sorted(kept.values(), key=lambda row: (sizes.index(row["size"]), row["dtype"], order.index(row["case"])))


def table(rows: Sequence[Row]) -> str:
    """Markdown, a table for each model."""
    text = []
    for title, group in grouped(rows).items():
        text += [f"## {title}", "", HEAD, *(line(row) for row in group), ""]
    return "\n".join([*text, NOTE, ""])


COLUMNS = (
    *("case", "weights", "gradients", "state", "peak", "planned", "difference"),
    *("library pages", "free heap", "compiler", "other, at rest", "at the peak"),
)
RESIDUAL = ("pages", "heap", "compiler", "rest", "peak")
HEAD = f"| {' | '.join(COLUMNS)} |\n|---{'|---:' * (len(COLUMNS) - 1)}|"
NOTE = (
    "MB (1e6 bytes). Weights, gradients (the most that were there together) and state: bytes of tensors. Peak: VmHWM "
    "of the process over its whole life, less what it had resident after its imports. Planned: as `apollo-optim plan` "
    "for the same run; peers have no plan. The last five columns are what the difference is made of, as measured: "
    "pages of libraries that were loaded on first use, blocks that are free and kept by glibc, the compiler (of the "
    "step), what else the process keeps between steps beyond weights and state, and what was there "
    "at the peak alone."
)


def grouped(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each model and shape, with their heading."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        title = f"{row['size']}, {row['dtype']}, {row['batch']} x {row['seq']} tokens, {row['steps']} steps"
        title += ", activations recomputed" * row["checkpointing"] + ", malloc as pretrain" * (
            row["malloc"] == "pretrain"
        )
        groups.setdefault(title, []).append(row)
    return groups


def line(row: Row) -> str:
    """A row of the table."""
    name = row["case"] + (f" ({row['package']})" if row.get("package") else "")
    if row["status"] != "ok":
        what = "cannot be imported" if row["status"] == "missing" else row["status"]
        return f"| {name} | {what}: {row['reason'].replace('|', '/')} |" + " |" * (len(COLUMNS) - 2)
    cells = [mb(row["weights"]), mb(row["gradients"]), mb(row["optimizer"]), mb(row["peak"] - row["baseline"])]
    if "plan" in row:
        total = row["plan"]["total"]
        cells += [mb(total), f"{row['difference'] / total:+.1%}" + " (other bytes than planned!)" * (not row["equal"])]
        cells += [f"{row['residual'][part] / 1e6:+.1f}" if part in row["residual"] else "-" for part in RESIDUAL]
    cells += ["-"] * (len(COLUMNS) - 1 - len(cells))
    return f"| {name} | {' | '.join(cells)} |"


def mb(size: int) -> str:
    return f"{size / 1e6:,.1f}"


def draw(rows: Sequence[Row]) -> Figure:
    """A stacked bar for each case that was measured, and a mark where its plan is."""
    from matplotlib.figure import Figure

    from apollo_optim.plan.draw import COLOURS

    groups = {
        title: ok for title, group in grouped(rows).items() if (ok := [row for row in group if row["status"] == "ok"])
    }
    heights = [len(group) + 1.5 for group in groups.values()]
    figure = Figure(figsize=(9, 1 + 0.33 * sum(heights)), layout="constrained", dpi=140)
    panels = figure.subplots(len(groups), squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    parts = (("weights", "weights"), ("gradients", "gradients"), ("optimizer", "state, matrices"))
    for axes, (title, group) in zip(panels, groups.items(), strict=True):
        peaks = [(row["peak"] - row["baseline"]) / 1e6 for row in group]
        axes.barh(range(len(group)), peaks, height=0.7, color="0.85", label="peak less imports")
        lefts = [0.0] * len(group)
        for key, colour in parts:
            # The gradients of a step inside backward are there at another moment than the peak, maybe.
            sizes = [min(row[key] / 1e6, peak - left) for row, peak, left in zip(group, peaks, lefts, strict=True)]
            label = "optimizer state" if key == "optimizer" else key
            axes.barh(range(len(group)), sizes, left=lefts, height=0.7, color=COLOURS[colour], label=label)
            lefts = [left + size for left, size in zip(lefts, sizes, strict=True)]
        marks = [(row["plan"]["total"] / 1e6, i) for i, row in enumerate(group) if "plan" in row]
        xs, ys = [x for x, _ in marks], [y for _, y in marks]
        axes.scatter(xs, ys, marker="|", s=160, color="black", label="planned")
        for i, peak in enumerate(peaks):
            axes.text(peak, i, f"  {peak:,.0f}", va="center", fontsize=8)
        axes.set_yticks(range(len(group)), [row["case"] for row in group], fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.set(xlabel="MB", xlim=(0, 1.12 * max(peaks)))
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=8
    )
    return figure


def write(rows: Sequence[Row], out: Path) -> str:
    """`table.md` and `memory.png` of the log."""
    text = table(rows)
    (out / "table.md").write_text(text, encoding="utf-8")
    if any(row["status"] == "ok" for row in rows):
        draw(rows).savefig(out / "memory.png")
    return text


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:200]


def read(log: Path) -> list[Row]:
    return [json.loads(text) for text in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []


def in_bytes(text: str) -> int:
    """8.06GB, 350MB, or a number of bytes."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("", 1)):
        if text.endswith(unit):
            try:
                return int(float(text.removesuffix(unit)) * factor)
            except ValueError:
                break
    raise argparse.ArgumentTypeError(f"{text}: give a size such as 8.06GB")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "apollo-optim bench memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["llama-60m", "llama-130m"], choices=list(SIZES), metavar="SIZE")
    parser.add_argument(
        "--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE", help=f"of {', '.join(CASES)}"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2, help="everything is there from the second on")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument("--malloc", choices=["trimmed", "pretrain"], default="trimmed", help="see the protocol")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds that a case may take")
    parser.add_argument("--out", type=Path, default=Path("results/memory"), help="where results are kept")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the table of what there is")
    parser.add_argument("--run", type=Path, metavar="LOG", help="measure nothing: hold a pretrain run against its plan")
    parser.add_argument("--peak", type=in_bytes, metavar="SIZE", help="of --run, where it was stopped before its end")
    parser.add_argument("--baseline", type=in_bytes, metavar="SIZE", help="of --run, where the log has none")
    args = parser.parse_args(argv)
    if args.run:
        print(of_run(args.run, args.peak, args.baseline))
        return 0
    shape = {key: getattr(args, key) for key in ("dtype", "batch", "seq", "steps", "checkpointing", "threads")}
    configs = [(name, config_of(CASES[name], size, **shape)) for size in args.sizes for name in args.cases]
    for _, cfg in configs:
        check(cfg)
    log = args.out / "memory.jsonl"
    if args.table:
        if not log.exists():
            raise InputError(f"{log} is not there yet: measure first, without --table")
        print(table(newest(read(log))))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, cfg in configs:
        rows.append(run_case(name, cfg, args.malloc, args.timeout))
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(line(rows[-1]), flush=True)
    print("\n" + write(newest(read(log)), args.out))
    return 0 if all(row.get("equal", True) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
