"""One training loop in plain functions.

`pretrain(cfg)` reads like the story of a run: look at the directory, build everything, go back to a checkpoint if
asked, then step by step: train, record, evaluate, save. A `Job` is passed around; whatever in it changes is saved.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from apollo_optim import Released, build_optimizer, describe, release
from apollo_optim.core.compile import can_compile
from apollo_optim.core.errors import InputError
from apollo_optim.core.storage import is_finite
from apollo_optim.data.foreign import drop_code
from apollo_optim.data.tokenizer import fingerprint, load_tokenizer
from apollo_optim.optim.base import MatrixOptimizer
from apollo_optim.optim.fast import Graphs
from apollo_optim.optim.warm import warm_up
from apollo_optim.quant import tallied
from apollo_optim.train import checkpoint, disk, measure
from apollo_optim.train.config import (
    OptimConfig,
    RunConfig,
    check,
    differences,
    load_config,
    may_change,
    only_rounds,
    save_config,
    to_dict,
)
from apollo_optim.train.display import Display, duration, in_bytes, open_display
from apollo_optim.train.evaluate import IGNORED, evaluate, summed_loss, targets
from apollo_optim.train.metrics import Metrics, check_trackers, cut_back, open_trackers
from apollo_optim.train.models import DTYPES, build_model, low_bit, usable_vocabulary
from apollo_optim.train.schedule import factor, set_lr
from apollo_optim.train.skips import PATIENCE, Skips, total_norm

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from apollo_optim.data import Batch, Data


class TrainingFailed(RuntimeError):
    """The run cannot go on; the message says at which step, and what is left of it."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: everything is saved, the message says how to go on."""


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    run: Path
    """The run directory."""
    step: int
    tokens: int
    loss: float
    """Of the last evaluation, as the three below."""
    perplexity: float
    perplexity_reference: float
    bits_per_byte: float
    seconds: float
    """Spent training: without evaluations and checkpoints."""
    memory: dict[str, int]
    """Bytes of weights, gradients, optimizer state, and the peak of the whole process."""
    skipped: int = 0
    """Updates that were not made, one for each matrix and step whose gradient was not finite."""
    left_out: int = 0
    """Broken lines, and rows without text, of the training text that was read."""


@dataclass
class Job:
    """A run while it runs."""

    cfg: RunConfig
    run: Path
    device: torch.device
    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    data: Data
    released: Released | None = None
    """The step inside the backward pass, if `train.release`."""
    baseline: dict[str, int] = field(default_factory=dict)
    """Bytes resident before there was a model: after the imports, and with the text open."""
    trust_remote_code: bool = False
    """Said by the call: models and tokenizers may run code of their own."""
    own_tokenizer: bool = False
    """It was read from the run directory."""
    changed: list[str] = field(default_factory=list)
    """Keys that round otherwise than before the run was resumed, in words."""
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Training time so far, up to the last time that the clock was stopped."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """The last one."""


def pretrain(cfg: RunConfig, *, resume: bool = False, trust_remote_code: bool = False) -> Result:
    """Train as `cfg` says, from the beginning or (with `resume`) from the newest checkpoint in the run directory.

    `trust_remote_code`: a model or tokenizer from the hub may run Python code of its own. Only this call can say so,
    never a file; what is exported names that code again.

    >>> result = pretrain(RunConfig(model=ModelConfig("llama-1m"), out="out/first"))
    >>> result.perplexity

    A resumed run is equal to the bit to one that was never stopped: weights, optimizer, text, random numbers, figures.
    Raises InputError for what the user can put right, TrainingFailed if the run cannot go on, Interrupted after Ctrl-C.
    """
    check(cfg)
    check_trackers(list(cfg.log.to))
    run = Path(os.path.expanduser(cfg.out or default_run(cfg)))
    with claim(run, resume):
        earlier = check_continuation(run, cfg) if resume else Earlier()
        job = build(cfg, run, earlier, trust_remote_code=trust_remote_code)
        if earlier.state is not None:
            restore(job, earlier.state)
        prepare(run, cfg, job, resume)
        return train(job, resumed_from=job.step if resume else None)


# --- the run directory ---


def default_run(cfg: RunConfig) -> str:
    """out/<model>-<optimizer>."""
    return f"out/{Path(cfg.model.name).name}-{cfg.optim.name}"


@contextlib.contextmanager
def claim(run: Path, resume: bool) -> Iterator[None]:
    """Refuse a directory that holds another run, or (to resume) none, or one in which a process is at work."""
    if run.exists() and not run.is_dir():
        raise InputError(f"out={run}: that is a file, not a run directory")
    there = max(checkpoint.checkpoints(run), default=None)
    if there is not None and not resume:
        raise InputError(
            f"{run} already holds a run (step {there} is saved): add --resume to go on with it, or choose another --out"
        )
    started = (run / "config.yaml").exists() or (run / "metrics.jsonl").exists()
    if resume and not (run / "config.yaml").exists():
        raise InputError(f"{run} holds no run to resume: leave --resume out to start one")
    with disk.locked(run) as alone:
        if started and not resume and not alone:  # a start that saved nothing may be made again, if it is over
            raise InputError(
                f"{run} holds a run that has saved nothing, and it can't be known whether it is still going on: add "
                "--resume to start it again, or choose another --out"
            )
        yield


@dataclass
class Earlier:
    """What a run goes on from."""

    state: dict[str, Any] | None = None
    """None: there is no checkpoint."""
    changed: list[str] = field(default_factory=list)
    """What rounds otherwise from here on, in words."""


def check_continuation(run: Path, cfg: RunConfig) -> Earlier:
    """What to go on from, if the config is the one it was made with. Before the first checkpoint it may be any."""
    old = load_config(run / "config.yaml")
    newest = checkpoint.newest(run)
    if newest is None:
        return Earlier()
    was, now = to_dict(old), to_dict(cfg)

    def told(keys: list[str]) -> list[str]:
        return [f"{key} (was {_at(was, key)}, is {_at(now, key)})" for key in keys]

    different = [key for key in differences(was, now) if not may_change(key)]
    if refused := told([key for key in different if not only_rounds(key)]):
        raise InputError(
            f"{run} was started with another config: {', '.join(refused)}; put it back, or choose another --out"
        )
    state = checkpoint.load_state(newest)
    state["checkpoint"] = newest
    done = state["step"]
    if done > cfg.train.steps:
        raise InputError(f"{run} has {done} steps already, more than train.steps={cfg.train.steps}")
    for step in range(1, done + 1):
        if factor(step, old.train.steps, old.schedule) != factor(step, cfg.train.steps, cfg.schedule):
            raise InputError(
                f"train.steps cannot go from {old.train.steps} to {cfg.train.steps}: with schedule {cfg.schedule.kind} "
                "the steps already made would have had other learning rates (constant can, and wsd before its decay)"
            )
    return Earlier(state, told(different))


def _at(plain: dict[str, Any], key: str) -> Any:
    value: Any = plain
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def prepare(run: Path, cfg: RunConfig, job: Job, resume: bool) -> None:
    """What lies beside the results. Written when everything is built: a typing error leaves no run behind."""
    try:
        checkpoint.sweep(run)
        if resume:
            cut_back(run / "metrics.jsonl", job.step)
        else:
            (run / "metrics.jsonl").unlink(missing_ok=True)  # of a start that saved nothing
        temporary = run / ".tmp-config.yaml"
        save_config(dataclasses.replace(cfg, out=str(run)), temporary)
        disk.replace(temporary, run / "config.yaml")
        if not job.own_tokenizer:
            job.data.tokenizer.save_pretrained(run / "tokenizer")
            if not job.trust_remote_code:
                drop_code(run / "tokenizer")
    except OSError as error:
        raise InputError(f"cannot write to the run directory {run}: {error.strerror}") from None


# --- building ---


def build(cfg: RunConfig, run: Path, earlier: Earlier | None = None, *, trust_remote_code: bool = False) -> Job:
    """Data, model and optimizer at step 0.

    What goes on has all that it needs in its own directory: `earlier` brings the config of the model and the tokenizer,
    and weights to start from are not read again.
    """
    from apollo_optim.data import open_data

    earlier = earlier or Earlier()
    config = tokenizer = None
    if earlier.state is not None:
        config = checkpoint.saved_config(earlier.state["checkpoint"], trust_remote_code=trust_remote_code)
        tokenizer = own_tokenizer(run, earlier.state, trust_remote_code)

    device = choose_device(cfg)
    if cfg.train.release and device.type == "cpu":
        measure.give_back_memory()
    importlib.import_module("transformers.modeling_utils")  # what the model would import, to be counted without it
    baseline = {"imports": measure.resident_memory()}
    data = open_data(cfg.data, tokenizer, trust_remote_code=trust_remote_code)
    baseline["data"] = measure.resident_memory()
    vocabulary = usable_vocabulary(data.tokenizer)
    graphs = compiled_beforehand(cfg, device, vocabulary, config, trust_remote_code=trust_remote_code)
    torch.manual_seed(cfg.train.seed)
    random.seed(cfg.train.seed)
    model = build_model(
        cfg.model,
        vocabulary,
        cfg.data.seq_len,
        data.tokenizer,
        low_bit(cfg),
        config,
        trust_remote_code=trust_remote_code,
    )
    torch.nn.Module.to(model, device)
    model.train()
    if cfg.model.compile and can_compile(device.type):
        # In place: the names of the parameters stay. Without the head: its loss may be made in parts.
        model.base_model.compile()
    optimizer = make_optimizer(cfg.optim, model, graphs)
    released = release(model, optimizer, clip=cfg.train.clip_tensor) if cfg.train.release else None
    return Job(
        cfg,
        run,
        device,
        model,
        optimizer,
        data,
        released,
        baseline,
        trust_remote_code,
        own_tokenizer=tokenizer is not None,
        changed=earlier.changed,
    )


def own_tokenizer(run: Path, state: dict[str, Any], trust_remote_code: bool) -> Any:
    """The run's copy of its tokenizer; None where it is not there or not the same any more: then the original."""
    if not (run / "tokenizer").is_dir():
        return None
    try:
        tokenizer = load_tokenizer(str(run / "tokenizer"), trust_remote_code=trust_remote_code)
    except InputError:
        return None
    return tokenizer if fingerprint(tokenizer) == state["identity"]["tokenizer"]["sha256"] else None


def compiled_beforehand(
    cfg: RunConfig,
    device: torch.device,
    vocabulary: int | None = None,
    config: PretrainedConfig | None = None,
    *,
    trust_remote_code: bool = False,
) -> Graphs:
    """The compiled steps of the run's optimizer, while nothing else is in memory. (A GPU's weights are elsewhere.)"""
    from apollo_optim.train.plan import model_of

    if device.type != "cpu" or cfg.optim.compile is False:
        return {}
    model = model_of(cfg, vocabulary, config, trust_remote_code=trust_remote_code)
    return warm_up(make_optimizer(cfg.optim, model), device)


def choose_device(cfg: RunConfig) -> torch.device:
    """As configured, else the GPU if there is one; sets threads and determinism."""
    if cfg.train.threads is not None:
        torch.set_num_threads(cfg.train.threads)
    torch.set_float32_matmul_precision(cfg.train.matmul_precision)
    try:
        device = torch.device(cfg.train.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"train.device={cfg.train.device}: {str(error).splitlines()[0]}") from None
    if cfg.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return device


def make_optimizer(cfg: OptimConfig, model: torch.nn.Module, graphs: Graphs | None = None) -> MatrixOptimizer:
    """By its name in the registry; keys that are None are left to its defaults. `graphs`: steps compiled already."""
    knobs = {key: value for key, value in dataclasses.asdict(cfg).items() if value is not None and key != "name"}
    if cfg.state_dtype is not None:
        knobs["state_dtype"] = DTYPES[cfg.state_dtype]
    optimizer = build_optimizer(cfg.name, model, **knobs)
    optimizer._compiled.update(graphs or {})
    return optimizer


# --- the state of a run ---


def snapshot(job: Job) -> dict[str, Any]:
    """Everything that changes while a run runs, but for the weights."""
    return {
        "step": job.step,
        "tokens": job.tokens,
        "seconds": job.seconds,
        "evaluation": job.evaluation,
        "identity": job.data.identity,
        "data": job.data.train.state_dict(),
        "optimizer": job.optimizer.state_dict(),
        "random": {
            "python": random.getstate(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(job.device) if job.device.type == "cuda" else None,
        },
    }


def restore(job: Job, state: dict[str, Any]) -> None:
    """Go back to a snapshot."""
    was, now = state["identity"], job.data.identity
    hashed = was.get("sha256") is not None  # then its name says nothing: it may lie elsewhere now
    if changed := [key for key in differences(was, now) if not (hashed and key == "name")]:
        listed = ", ".join(f"{key} (was {_at(was, key)}, is {_at(now, key)})" for key in changed)
        raise InputError(f"the text is not the one that {job.run} was trained on: {listed}")
    checkpoint.load_weights(state["checkpoint"], job.model)
    checkpoint.restore_generation(state["checkpoint"], job.model)
    checkpoint.restore_optimizer(job.optimizer, state["optimizer"])
    job.data.train.load_state_dict(state["data"])
    job.step, job.tokens, job.seconds, job.evaluation = (
        state[key] for key in ("step", "tokens", "seconds", "evaluation")
    )
    random.setstate(state["random"]["python"])
    torch.set_rng_state(state["random"]["torch"])
    if state["random"]["cuda"] is not None and job.device.type == "cuda":
        torch.cuda.set_rng_state(state["random"]["cuda"], job.device)


# --- the loop ---


def train(job: Job, resumed_from: int | None) -> Result:
    """From where the job is to the end of the run."""
    cfg = job.cfg
    rows = f"{cfg.train.batch_size} x {cfg.data.seq_len} tokens"
    title = f"{cfg.model.name}, {cfg.optim.name}, {cfg.train.steps} steps of {rows}"
    display = open_display(cfg.log.display, title, cfg.train.steps)
    trackers = open_trackers(list(cfg.log.to), job.run, to_dict(cfg), job.step)
    metrics = Metrics(job.run / "metrics.jsonl", trackers)
    try:
        introduce(job, metrics, display, resumed_from)
        with stop_signals() as stop:
            run_steps(job, metrics, display, stop)
            return finish(job, metrics, display)
    except TrainingFailed as error:
        with contextlib.suppress(OSError):  # what failed first is what is told
            metrics.write("failed", step=job.step, reason=str(error))
        raise
    except checkpoint.SaveFailed as error:
        raise TrainingFailed(f"step {job.step}: {error}; {last_good(job.run)}") from error
    except OSError as error:
        raise TrainingFailed(
            f"step {job.step}: cannot write to {job.run}: {error.strerror or error}; {last_good(job.run)}"
        ) from error
    finally:
        display.close()
        metrics.close()


def introduce(job: Job, metrics: Metrics, display: Display, resumed_from: int | None) -> None:
    """The first line of the log, and what a reader wants to know before the first step."""
    parameters = sum(p.numel() for p in {id(p): p for p in job.model.parameters()}.values())
    metrics.write(
        "start",
        time=time.time(),
        config=to_dict(job.cfg),
        corpus=job.data.identity,
        versions=measure.versions(),
        hardware=measure.hardware(job.device),
        params=parameters,
        memory=measure.memory(job.model, job.optimizer),
        baseline=job.baseline,
        left_out=job.data.left_out,
        resumed_from=resumed_from,
        **({"changed": job.changed} if job.changed else {}),
    )
    display.note(f"{parameters:,} parameters in {job.cfg.model.dtype} on {job.device}; results in {job.run}")
    if isinstance(job.optimizer, MatrixOptimizer):
        display.note(describe(job.optimizer))
    if job.released is not None:
        display.note(cost_of_release(job))
    if resumed_from is not None:
        display.note(f"resumed after step {resumed_from}" + ("" if resumed_from else ": no checkpoint was saved yet"))
    if job.changed:
        display.note(f"not equal to the bit to the run so far, for it rounds otherwise: {', '.join(job.changed)}")


def run_steps(job: Job, metrics: Metrics, display: Display, stop: Stop) -> None:
    """Train, record, evaluate, save; until the last step or a signal."""
    cfg, last = job.cfg, job.cfg.train.steps
    rows = job.data.validation(cfg.eval.tokens)
    bytes_per_token = job.data.bytes_per_token(rows)
    first, watch, skips = job.step + 1, Watch(job), Skips(job.model, job.optimizer, job.step)
    for job.step in range(first, last + 1):
        set_lr(job.optimizer, factor(job.step, last, cfg.schedule))
        logged = due(job.step, cfg.log.every, last) or job.step == 1
        batch = next_batch(job, metrics)
        with counted(job, metrics):
            loss, norm = one_step(job, batch, logged)
        if job.step == first:
            sizes = measure.memory(job.model, job.optimizer)
            if job.released is not None:  # they are gone already
                sizes["gradients"] = gradient_bytes(job)[bool(together(job))]
            metrics.write("memory", step=job.step, **sizes)
            display.memory(sizes)
        job.optimizer.zero_grad(set_to_none=True)
        evaluated = due(job.step, cfg.eval.every, last)
        saved = due(job.step, cfg.checkpoint.every, last)
        if not (logged or evaluated or saved or stop.requested):
            continue
        watch.stop()
        if logged and norm is not None:
            say_skipped(job, display, skips)
            record_step(job, metrics, display, watch, loss, norm.get(), skips.total)
            check_progress(job, skips, first)
        if evaluated:
            record_evaluation(job, metrics, display, rows, bytes_per_token)
        stopping = stop.requested  # read once: what is asked for from here on is done one step later
        if saved or stopping:
            save(job, metrics)
        if stopping and job.step < last:
            goodbye = (
                f"{stopping}: saved after step {job.step}; go on with: apollo-optim pretrain --out {job.run} --resume"
            )
            raise Interrupted(goodbye)
        watch.start()


@contextlib.contextmanager
def counted(job: Job, metrics: Metrics) -> Iterator[None]:
    """Every `quant.tally` steps: one line of the log on what rounding made of this one."""
    every = job.cfg.quant.tally
    if every is None or job.step % every:
        yield
        return
    with tallied(job.model) as tallies:
        yield
    figures = {name: {"changed": tally.changed, "realised": tally.realised} for name, tally in tallies.items()}
    metrics.write("tally", step=job.step, weights=figures)


def due(step: int, every: int | None, last: int) -> bool:
    """Every so many steps, and at the last one."""
    return step == last or (every is not None and step % every == 0)


def next_batch(job: Job, metrics: Metrics) -> Batch:
    """The rows of this step; if the text has come to an end, what was trained so far is saved first."""
    try:
        return job.data.train.next(job.cfg.train.batch_size)
    except InputError:
        job.step -= 1
        if job.step not in checkpoint.checkpoints(job.run):
            save(job, metrics)
        raise


def one_step(job: Job, batch: Batch, want_norm: bool) -> tuple[float, Reading | None]:
    """One optimizer step: the loss of the whole batch before it, and the norm of the gradient (if wanted or clipped).

    Every prediction of the batch weighs the same, however the batch is cut into micro-batches. A loss that is not
    finite stops the run before the weights are touched.
    """
    from apollo_optim.data import check_vocabulary

    cfg = job.cfg.train
    check_vocabulary(batch, job.model.config.get_text_config().vocab_size, job.data.tokenizer)
    predictions = max(targets(batch.labels), 1)
    size = cfg.micro_batch or cfg.batch_size
    summed = torch.zeros((), device=job.device)
    pieces = list(zip(torch.split(batch.input_ids, size), torch.split(batch.labels, size), strict=True))
    for number, (input_ids, labels) in enumerate(pieces, 1):
        loss = summed_loss(
            job.model,
            input_ids.to(job.device, non_blocking=True),
            labels.to(job.device, non_blocking=True),
            cfg.loss,
        )
        loss = loss / predictions
        summed += loss.detach()
        if number < len(pieces):
            with job.released.accumulate() if job.released else contextlib.nullcontext():
                loss.backward()  # type: ignore[no-untyped-call]
    reading = Reading(summed)  # set out before the last backward: it has arrived when the step needs it
    if job.released is not None:
        norm = step_inside_backward(job, job.released, loss, reading, want_norm)
    else:
        loss.backward()  # type: ignore[no-untyped-call]
        norm = clip_gradients(job, want_norm)
        check_loss(job, reading)
        job.optimizer.step()
    job.tokens += int((batch.labels != IGNORED).sum())
    return reading.get(), norm


def step_inside_backward(
    job: Job, released: Released, loss: torch.Tensor, reading: Reading, want_norm: bool
) -> Reading | None:
    """The last backward pass of a step, which changes the weights: so the loss is waited for before it."""
    check_loss(job, reading)
    released.track_norm = want_norm
    loss.backward()  # type: ignore[no-untyped-call]
    job.optimizer.step()  # what took part in an earlier micro-batch, but not in the last
    return Reading(released.grad_norm()) if want_norm else None


def clip_gradients(job: Job, want_norm: bool) -> Reading | None:
    """Clip them as configured. The total norm is the one before, of all gradients that are finite."""
    cfg, parameters = job.cfg.train, [p for p in job.model.parameters() if p.grad is not None]
    norm = None
    if want_norm or cfg.clip is not None:
        total = total_norm([p.grad for p in parameters if p.grad is not None])
        norm = Reading(total)
        if cfg.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, cfg.clip, total)
    if cfg.clip_tensor is not None:
        for p in parameters:
            torch.nn.utils.clip_grad_norm_([p], cfg.clip_tensor)
    return norm


def check_loss(job: Job, reading: Reading) -> None:
    """Stop the run if the loss is not finite; the weights are not touched yet."""
    value = reading.get()
    if not math.isfinite(value):
        raise TrainingFailed(f"the loss is {value} at step {job.step}: stopped before its update; {last_good(job.run)}")


def gradient_bytes(job: Job) -> tuple[int, int]:
    """Of the largest gradient, and of all of them. (A low-bit weight's gradient has the size of its float weight.)"""
    sizes = [p.numel() * p.element_size() for p in job.model.parameters() if p.requires_grad]
    return max(sizes), sum(sizes)


def together(job: Job) -> str:
    """Why all gradients are in memory at a time; empty if one after the other is set free, by `train.release`."""
    cfg = job.cfg
    count = math.ceil(cfg.train.batch_size / (cfg.train.micro_batch or cfg.train.batch_size))
    if job.released is None:
        return "they wait for the step"
    if count > 1:
        return f"{count} micro-batches are added up in them (one, without train.micro_batch, would not be)"
    return "torch.compile hands them over at once (without model.compile they come one by one)" * cfg.model.compile


def cost_of_release(job: Job) -> str:
    """One line: what the gradients take, and what accumulation makes of that."""
    largest, everything = map(in_bytes, gradient_bytes(job))
    if why := together(job):
        return f"step inside backward: still all gradients at a time, {everything} instead of {largest}: {why}"
    return f"step inside backward: one gradient at a time, {largest} at most instead of {everything}"


class Reading:
    """A number on its way from the device: it sets out at once and is waited for when it is read."""

    def __init__(self, value: torch.Tensor) -> None:
        self._value = value.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if value.is_cuda else None  # type: ignore[no-untyped-call]
        if self._arrived is not None:
            self._arrived.record()

    def get(self) -> float:
        """The number."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._value)


class Watch:
    """Counts the seconds of training into the job; evaluations and checkpoints are made while it stands still."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._mark = (job.step, job.tokens, job.seconds)
        self.start()

    def start(self) -> None:
        """Go on."""
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Wait for the device, so that all the time it took is counted, and stand still."""
        if self._job.device.type == "cuda":
            torch.cuda.synchronize(self._job.device)
        self._job.seconds += time.perf_counter() - self._since

    def pace(self) -> tuple[float, float]:
        """Tokens per second since the last call, and the seconds that are left if it goes on like that."""
        job, now = self._job, (self._job.step, self._job.tokens, self._job.seconds)
        steps, tokens, seconds = (a - b for a, b in zip(now, self._mark, strict=True))
        self._mark = now
        return tokens / seconds, seconds / steps * (job.cfg.train.steps - job.step)


def say_skipped(job: Job, display: Display, skips: Skips) -> None:
    """One line where a parameter's gradient is not finite for the first time."""
    if new := skips.look(job.step):
        more = f" and {len(new) - 3} more" if len(new) > 3 else ""
        display.note(
            f"by step {job.step}: the gradient of {', '.join(new[:3])}{more} was not finite; "
            "such updates are skipped and counted"
        )


def check_progress(job: Job, skips: Skips, first: int) -> None:
    """Stop a run that only looks like one: no gradient is finite, so no weight has changed for a while."""
    if skips.streak >= min(PATIENCE, job.cfg.train.steps - first + 1):
        raise TrainingFailed(
            f"no gradient was finite in the last {skips.streak} steps, up to step {job.step}: every update was "
            f"skipped, and no weight has changed. Look for what overflows (dtype, attention, learning rate); "
            f"{last_good(job.run)}"
        )


def record_step(
    job: Job, metrics: Metrics, display: Display, watch: Watch, loss: float, grad_norm: float, skipped: int
) -> None:
    """One line of the log."""
    tokens_per_s, left = watch.pace()
    lr, lr_rest = learning_rates(job.optimizer)
    record = metrics.write(
        "step",
        step=job.step,
        tokens=job.tokens,
        loss=loss,
        lr=lr,
        lr_rest=lr_rest,
        grad_norm=grad_norm,
        tokens_per_s=tokens_per_s,
        seconds=job.seconds,
        skipped=skipped,
    )
    display.step(record | {"peak_gpu": measure.peak_gpu_memory(job.device)}, left)


def record_evaluation(job: Job, metrics: Metrics, display: Display, rows: list[Batch], bytes_per_token: float) -> None:
    """Evaluate, and one line of the log. A loss that is not finite means that the weights are spoilt."""
    size = job.cfg.eval.batch_size or job.cfg.train.micro_batch or job.cfg.train.batch_size
    figures = evaluate(job.model, rows, size, bytes_per_token, job.cfg.train.loss)
    if not math.isfinite(figures.loss):
        raise TrainingFailed(f"the validation loss is {figures.loss} after step {job.step}; {last_good(job.run)}")
    job.evaluation = dataclasses.asdict(figures)
    record = metrics.write("eval", step=job.step, tokens=job.tokens, **job.evaluation, seconds=job.seconds)
    display.evaluation(record)


def learning_rates(optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """Of the matrices, and of the rest (the same where all parameters are in one group)."""
    groups = optimizer.param_groups
    matrices = next((g for g in groups if g.get("name") == "matrices"), groups[0])
    rest = next((g for g in groups if g is not matrices), matrices)
    return float(matrices["lr"]), float(rest["lr"])


def save(job: Job, metrics: Metrics) -> None:
    """A checkpoint, unless the weights are already spoilt: the last one saved must be a good one."""
    if not all(is_finite(p) for p in job.model.parameters()):
        raise TrainingFailed(f"the weights are not finite any more after step {job.step}; {last_good(job.run)}")
    metrics.flush()
    checkpoint.save(job.run, job.step, job.model, snapshot(job), job.cfg.checkpoint.keep)


def last_good(run: Path) -> str:
    """What is left, for an error message."""
    newest = checkpoint.newest(run)
    return f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"


def finish(job: Job, metrics: Metrics, display: Display) -> Result:
    """The model for everybody else, and the last line of the log."""
    if job.cfg.checkpoint.export:
        checkpoint.write_model(job.model, job.data.tokenizer, job.run / "model", keep_code=job.trust_remote_code)
    sizes = measure.memory(job.model, job.optimizer)
    # Gradients are set free after every step; what they take while they live is what counts.
    sizes["gradients"] = gradient_bytes(job)[bool(together(job))]
    sizes["peak"] = measure.peak_memory()
    gpu = measure.peak_gpu_memory(job.device)
    if gpu is not None:
        sizes["peak_gpu"] = gpu
    result = Result(
        run=job.run,
        step=job.step,
        tokens=job.tokens,
        seconds=job.seconds,
        memory=sizes,
        skipped=Skips(job.model, job.optimizer, job.step).total,
        left_out=job.data.train.skipped,
        **{key: job.evaluation[key] for key in ("loss", "perplexity", "perplexity_reference", "bits_per_byte")},
    )
    metrics.write("end", **{key: value for key, value in dataclasses.asdict(result).items() if key != "run"})
    for count, what in (
        (result.skipped, "updates were skipped: their gradients were not finite"),
        (result.left_out, "broken lines or rows without text were left out"),
    ):
        if count:
            display.note(f"{count:,} {what}")
    display.note(
        f"done: {result.tokens:,} tokens in {duration(result.seconds)}, "
        f"perplexity {result.perplexity:.2f}; {job.run / ('model' if job.cfg.checkpoint.export else 'checkpoints')}"
    )
    return result


# --- signals ---


@dataclass
class Stop:
    """Whether somebody asked to stop, and how."""

    requested: str = ""


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """The first Ctrl-C or SIGTERM only asks: the step is finished and saved. A second one acts as it always does."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may listen
        return
    names = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
    before = {number: signal.getsignal(number) for number in names}

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: Any) -> None:
        stop.requested = names[signal.Signals(number)]
        put_back()

    for number in names:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        put_back()
