"""The story of pre-training: look at the directory, build, go back to a checkpoint if asked, train, say how it went."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from apollo_optim import describe
from apollo_optim.core.errors import InputError
from apollo_optim.data.batches import TextEnded
from apollo_optim.optim.optimizer import RuleOptimizer
from apollo_optim.parallel.world import ProcessLost, World, joined
from apollo_optim.train import checkpoint, measure
from apollo_optim.train.build import Job, build
from apollo_optim.train.choose import settled
from apollo_optim.train.config import RunConfig, check, check_processes, load_config, tensor_processes, to_dict
from apollo_optim.train.display import duration
from apollo_optim.train.events import Evaluate, Event, Log, Memory, Save, Tally, best_evaluation
from apollo_optim.train.failures import Interrupted, TrainingFailed
from apollo_optim.train.loop import run_steps
from apollo_optim.train.metrics import check_trackers
from apollo_optim.train.optimizer import peak_rates
from apollo_optim.train.rates import advice, with_known_rates
from apollo_optim.train.record import Record, lost, recording
from apollo_optim.train.run_dir import Earlier, check_continuation, claim, prepare, restore, run_of
from apollo_optim.train.schedule import factor
from apollo_optim.train.signals import stop_signals
from apollo_optim.train.skips import Skips
from apollo_optim.train.step import TrainStep
from apollo_optim.train.traffic import in_words, sends_of_run

if TYPE_CHECKING:
    from apollo_optim.data import Data


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


def pretrain(cfg: RunConfig, *, resume: bool = False, trust_remote_code: bool = False) -> Result:
    """Train as `cfg` says, from the beginning or (with `resume`) from the newest checkpoint in the run directory.

    `trust_remote_code`: a model or tokenizer from the hub may run Python code of its own. Only this call can say so,
    never a file; what is exported names that code again.

    >>> result = pretrain(RunConfig(model=ModelConfig("llama-1m"), out="out/first"))
    >>> result.perplexity

    Rates that `cfg` leaves out are those known of its optimizer at its batch (`train.rates`), and the optimizer `auto`
    is the best that fits in the memory that is free (`train.choose`).
    A resumed run is bit-for-bit equal to one that was never stopped: weights, optimizer, text, random numbers, figures.
    Raises InputError for what the user can put right, TrainingFailed if the run cannot go on, Interrupted after Ctrl-C.
    """
    if cfg.data.format != "text" and not resume:
        raise InputError(f"data.format={cfg.data.format}: questions and answers are for apollo-optim finetune")

    cfg = settled(cfg, resume)

    def story(world: World) -> Result:
        kept = resume and began_without_rates(run_of(cfg))
        return go(cfg if kept else with_known_rates(cfg), world, resume, trust_remote_code)

    return alone(cfg, resume, story)


def alone(cfg: RunConfig, resume: bool, story: Callable[[World], Result]) -> Result:
    """Tell a story in the run directory of a sound config: nobody else is at work there, and all processes are."""
    check(cfg)
    check_trackers(list(cfg.log.to))
    try:
        with joined(cfg.parallel.timeout) as world, claim(run_of(cfg), resume, world):
            check_processes(cfg, world)
            return story(dataclasses.replace(world, tensor=tensor_processes(cfg, world)))
    except ProcessLost as error:
        raise TrainingFailed(lost(error)) from error


def go(cfg: RunConfig, world: World, resume: bool, trust_remote_code: bool, data: Data | None = None) -> Result:
    """Build, go back to a checkpoint if asked, train; `data`: if it is open already."""
    run = run_of(cfg)
    earlier = check_continuation(run, cfg) if resume else Earlier()
    job = build(cfg, run, earlier, trust_remote_code=trust_remote_code, world=world, data=data)
    if earlier.state is not None:
        restore(job.state, earlier.state, run)
    world.wait()  # all have read what is written anew next
    if world.leads:
        tokenizer = None if job.own_tokenizer else job.data.tokenizer
        prepare(run, cfg, job.state.step, tokenizer, resume=resume, keep_code=trust_remote_code)
    return run_job(job, resumed_from=job.state.step if resume else None)


def began_without_rates(run: Path) -> bool:
    """Whether it is a run of old, whose config says no rate: it goes on with its optimizer's own default."""
    return checkpoint.newest(run) is not None and load_config(run / "config.yaml").optim.lr is None


def run_job(job: Job, *, resumed_from: int | None = None, more: Sequence[Event] = ()) -> Result:
    """From where a job is to the end of its run; `more`: events of another story, before the checkpoint is saved."""
    cfg, state, last = job.cfg, job.state, job.cfg.train.steps
    title = f"{cfg.model.name}, {cfg.optim.name}, {last} steps of {cfg.train.batch_size} x {cfg.data.seq_len} tokens"
    config, stopping = to_dict(cfg), stop_signals(several=job.world.size > 1)
    with recording(job.run, state, config, title, last, job.world) as record, stopping as stop:
        introduce(job, record, resumed_from)
        keep, every = cfg.checkpoint.keep, cfg.checkpoint.every
        best, evaluated = cfg.checkpoint.best, cfg.eval.every
        save = Save(state, record, job.run, every, keep, last, config, job.world, best, evaluated)
        schedule = functools.partial(factor, steps=last, cfg=cfg.schedule)
        train_step = TrainStep(state, cfg.train, schedule, job.released, job.data.tokenizer, job.world, job.learner)
        try:
            with job.data.train.ahead((last - state.step) * cfg.train.batch_size):
                events = [*events_of(job, record), *more, save]
                run_steps(state, train_step, events, last=last, stop=stop, world=job.world)
        except Interrupted as asked:
            story = "pretrain" if cfg.data.format == "text" else "finetune"
            again = f"go on with: apollo-optim {story} --out {job.run} --resume"
            raise Interrupted(f"{asked}; {again}") from None
        except TextEnded:  # what was trained so far is saved first
            if state.step not in checkpoint.checkpoints(job.run):
                save.now()
            raise
        if best:
            take_best(job, record)
        return finish(job, record)


def take_best(job: Job, record: Record) -> None:
    """The weights of the lowest validation loss in the place of the last ones, and its figures."""
    best = best_evaluation(job.run)
    there = checkpoint.checkpoints(job.run)
    if best.get("step") not in there:  # (of a log that somebody has cut)
        record.display.note("the best checkpoint can't be told from the log: the last one is taken")
        return
    if best["step"] != job.state.step:
        checkpoint.load_weights(there[best["step"]], job.model)
        job.state.evaluation = {key: best[key] for key in job.state.evaluation}
    record.display.note(f"the lowest validation loss is that of step {best['step']}, {best['loss']:.4f}: it is taken")


def events_of(job: Job, record: Record) -> list[Event]:
    """What every run does around its steps, but for the saving."""
    cfg, state, last = job.cfg, job.state, job.cfg.train.steps
    rows = job.data.validation(cfg.eval.tokens)
    return [
        Memory(state, job.gradients, record),
        Tally(state, record, cfg.quant.tally, job.world),
        Log(state, record, cfg.log.every, last, job.world),
        Evaluate(
            state,
            record,
            rows,
            cfg.eval.batch_size or cfg.train.micro_batch or cfg.train.batch_size,
            job.data.bytes_per_token(rows),
            cfg.eval.every,
            last,
            cfg.train.loss,
            job.world,
            job.learner,
        ),
    ]


def introduce(job: Job, record: Record, resumed_from: int | None) -> None:
    """The first line of the log, and what a reader wants to know before the first step."""
    metrics, display = record.metrics, record.display
    parameters = sum(p.numel() for p in {id(p): p for p in job.model.parameters()}.values())
    processes: dict[str, object] = {}
    sends = None
    if job.world.size > 1:
        processes = {"processes": job.world.size, "parallel": job.cfg.parallel.mode}
        sends = sends_of_run(job)
    if sends is not None:
        processes["sends"] = sends.line()
    metrics.write(
        "start",
        time=time.time(),
        config=to_dict(job.cfg),
        corpus=job.data.identity,
        versions=measure.versions(),
        hardware=measure.hardware(job.state.device),
        params=parameters,
        memory=measure.memory(job.model, job.optimizer),
        baseline=job.baseline,
        advice=(told := advice(job.cfg)),
        peak_lr=dict(zip(("lr", "lr_rest"), peak_rates(job.optimizer), strict=True)),
        left_out=job.data.left_out,
        resumed_from=resumed_from,
        **{name: what for name, what in (("changed", job.changed), ("damaged", job.damaged)) if what},
        **({"notes": job.data.notes} if job.data.notes else {}),
        **processes,
    )
    display.note(f"{parameters:,} parameters in {job.cfg.model.dtype} on {job.state.device}; results in {job.run}")
    for line in job.data.notes:
        display.note(line)
    if processes:
        display.note(f"{job.world.size} processes, {job.cfg.parallel.mode}")
    if sends is not None:
        display.note(in_words(sends, job.cfg.optim.name))
    if isinstance(job.optimizer, RuleOptimizer):
        display.note(describe(job.optimizer))
    for warning in filter(None, (told, measure.advice_on_dtype(job.state.model.dtype, job.state.device))):
        display.note(warning)
    if job.released is not None:
        display.note(job.gradients.cost_of_release())
    for what in job.damaged:
        display.note(f"{what}; that checkpoint is called damaged-... now, and the one before it is gone on from")
    if resumed_from is not None:
        display.note(f"resumed after step {resumed_from}" + ("" if resumed_from else ": no checkpoint was saved yet"))
    if job.ended is not None:
        display.note(
            f"the run has ended at step {resumed_from}: nothing is left to train, and only its model is written"
        )
    if job.changed:
        display.note(f"not bit-for-bit equal to the run so far, for it rounds otherwise: {', '.join(job.changed)}")


def finish(job: Job, record: Record) -> Result:
    """The model for everybody else, and the last line of the log."""
    state, display = job.state, record.display
    exported = job.cfg.checkpoint.export
    if exported and not job.world.leads:
        checkpoint.lend(checkpoint.weights(job.model))
    elif exported:
        try:
            checkpoint.write_model(job.model, job.data.tokenizer, job.run / "model", keep_code=job.trust_remote_code)
        except checkpoint.SaveFailed as error:  # all that was trained is saved: the run has not failed
            if job.world.size > 1:  # the others wait in the middle of it
                raise
            exported = False
            display.note(f"warning: {error}; once that is put right: apollo-optim export {job.run}")
    sizes = measure.memory(job.model, job.optimizer)
    # Gradients are set free after every step; what they take while they live is what counts.
    sizes["gradients"] = job.gradients.most()
    sizes["peak"] = measure.peak_memory()
    peaks = job.world.each(sizes["peak"])
    gpu = measure.peak_gpu_memory(state.device)
    if gpu is not None:
        sizes["peak_gpu"] = gpu
    if job.ended is not None:  # this process is not the one that trained
        sizes = job.ended
    result = Result(
        run=job.run,
        step=state.step,
        tokens=state.tokens,
        seconds=state.seconds,
        memory=sizes,
        skipped=Skips(state.model, state.optimizer, state.step).total,
        left_out=job.data.train.skipped,
        **{key: state.evaluation[key] for key in ("loss", "perplexity", "perplexity_reference", "bits_per_byte")},
    )
    end = {key: value for key, value in dataclasses.asdict(result).items() if key != "run"}
    record.metrics.write("end", **end, **({"peak_by_rank": peaks} if job.world.size > 1 else {}))
    for count, what in (
        (result.skipped, "updates were skipped: their gradients were not finite"),
        (result.left_out, "broken lines or rows without text were left out"),
    ):
        if count:
            display.note(f"{count:,} {what}")
    display.note(
        f"done: {result.tokens:,} tokens in {duration(result.seconds)}, "
        f"perplexity {result.perplexity:.2f}; {job.run / ('model' if exported else 'checkpoints')}"
    )
    display.note(f"next: apollo-optim sample {job.run} --prompt ..., or apollo-optim report {job.run}")
    return result
