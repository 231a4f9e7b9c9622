"""`apollo-optim eval`: what a model is worth on a text, on answers, and on lm-eval's tasks."""

import json
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..core import disk
from ..core.errors import InputError, nearest
from ..core.printing import lines, say
from .sample import generate, opened
from .words import CONSENT, CONSENT_HELP, Parser, home

if TYPE_CHECKING:
    from ..data import Batch

SPARE = 8  # tokens that an answer may take beyond those of the right one: the same text in other pieces


def run(argv: Sequence[str]) -> int:
    parser = Parser(
        "apollo-optim eval",
        "Score a model: its perplexity on a text, the share of answers that it gives exactly, tasks of lm-eval. DIR\n"
        "is a run directory or any Hugging Face directory of a causal language model.",
        "examples:\n  apollo-optim eval out/first --text notes.txt\n"
        "  apollo-optim eval out/tuned --answers held-out.jsonl --show 5\n"
        "  apollo-optim eval out/tuned --tasks boolq,piqa,hellaswag --limit 200 --out scores.json",
    )
    parser.add_argument("dir", metavar="DIR", help="a run directory or a Hugging Face directory")
    parser.add_argument("--text", metavar="SOURCE", help="a file, directory or glob as data.source: perplexity")
    parser.add_argument("--answers", metavar="SOURCE", help="questions and answers as finetune reads them: exact match")
    parser.add_argument("--tasks", metavar="NAMES", help="tasks of lm-eval, by commas (extra: apollo-optim[eval])")
    parser.add_argument("--include", metavar="DIR", help="a directory with tasks of your own, as lm-eval's YAML")
    parser.add_argument("--limit", type=int, help="at most so many answers, and questions of a task")
    parser.add_argument("--show", type=int, default=0, help="print so many of the wrong answers (0)")
    parser.add_argument("--seq-len", type=int, help="tokens in a row of the text (the model's context, at most 1024)")
    parser.add_argument("--batch-size", type=int, default=4, help="rows, and questions of tasks, at a time (4)")
    parser.add_argument("--out", metavar="FILE", help="write the figures there, too, as JSON")
    parser.add_argument(CONSENT, action="store_true", help=CONSENT_HELP)
    args = parser.parse(argv)
    if not (args.text or args.answers or args.tasks):
        raise InputError("nothing to score: say --text FILE, --answers FILE or --tasks NAMES")
    least = {"limit": 1, "seq-len": 2, "batch-size": 1, "show": 0}
    for flag, least_of_it in least.items():
        value = getattr(args, flag.replace("-", "_"))
        if value is not None and value < least_of_it:
            raise InputError(f"--{flag} {value}: at least {least_of_it}")
    tasks = find_tasks(args.tasks, args.include) if args.tasks else None  # what is missing, before the model is opened
    found: dict[str, Any] = {}
    with opened(args) as (directory, model, tokenizer):
        if args.text:
            found["text"] = score_text(model, tokenizer, args.text, args.seq_len, args.batch_size)
        if args.answers:
            found["answers"] = score_answers(model, tokenizer, args.answers, args.limit, args.show)
        if tasks:
            found["tasks"] = score_tasks(model, tokenizer, *tasks, args.limit, args.batch_size)
    if args.out:
        disk.write(home(args.out), json.dumps({"model": str(directory), **found}, indent=1) + "\n")
    return 0


# --- a text ---


def score_text(model: Any, tokenizer: Any, source: str, seq_len: int | None, batch_size: int) -> dict[str, Any]:
    from ..data.files import is_local, local_documents
    from ..data.foreign import context_of, explained
    from ..data.readers import Reading
    from ..train.evaluate import evaluate

    if not is_local(source):
        raise InputError(f"--text {source}: no such file or directory")
    texts = [document.text.decode() for document in local_documents(source, Reading(on_bad_line="error"))]
    context = context_of(model.config) or 1024
    length = seq_len or min(context, 1024)
    if length > context:
        raise InputError(f"--seq-len {length}: the model's context is {context} tokens")
    rows = text_rows(tokenizer, texts, length)
    predicted = sum(len(row.labels[1:][row.labels[1:] >= 0]) for row in rows)
    if not predicted:
        raise InputError(f"--text {source}: it has no two tokens, so nothing is predicted")
    with explained("the model can't be run"):
        result = evaluate(model, rows, batch_size, sum(len(text.encode()) for text in texts) / predicted)
    if not math.isfinite(result.loss):
        raise InputError("the model's loss is not a number: its weights are damaged")
    say(
        f"text: perplexity {result.perplexity:.2f}, {result.loss:.4f} nats a token, {result.bits_per_byte:.4f} bits a "
        f"byte ({result.predictions:,} tokens predicted, rows of {length})"
    )
    return {
        "source": source, "perplexity": result.perplexity, "loss": result.loss, "bits_per_byte": result.bits_per_byte,
        "predictions": result.predictions, "seq_len": length,
    }  # fmt: skip


def text_rows(tokenizer: Any, texts: list[str], length: int) -> "list[Batch]":
    """The texts one after another, an end token after each, in rows; the last one may be shorter, and is padded."""
    from array import array

    from ..data.layout import padded
    from ..data.tokenizer import encode

    tokens = array("i")
    for ids in encode(tokenizer, texts):
        tokens.extend([*ids, tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else ids)
    rows = [tokens[start : start + length] for start in range(0, len(tokens), length)]
    return [padded([row], length).row(0) for row in rows if len(row) > 1]


# --- answers ---


def score_answers(model: Any, tokenizer: Any, source: str, limit: int | None, wrong_shown: int) -> dict[str, Any]:
    from ..data.foreign import context_of, explained

    right, wrong = 0, 0
    context = context_of(model.config) or math.inf
    for at, prompt, answer in questions(tokenizer, source):
        most = len(tokenizer(answer, add_special_tokens=False)["input_ids"]) + SPARE
        if len(prompt) + most > context:
            raise InputError(
                f"{at}: question and answer have {len(prompt) + most} tokens, the model's context {context}"
            )
        with explained("the model can't be run"):
            said = "".join(generate(model, tokenizer, prompt, max_tokens=most, temperature=0, seed=0)).strip()
        if said == answer.strip():
            right += 1
        else:
            wrong += 1
            if wrong <= wrong_shown:
                say(f"{at}: {lines(said)!r} instead of {lines(answer.strip())!r}")
        if right + wrong == limit:
            break
    total = right + wrong
    if not total:
        raise InputError(f"--answers {source}: it holds no answer")
    say(f"answers: {right} of {total} exact, {right / total:.1%}")
    return {"source": source, "exact": right / total, "right": right, "answers": total}


def questions(tokenizer: Any, source: str) -> "Iterator[tuple[str, list[int], str]]":
    """Where a row is, the tokens that its last answer is asked with, and the answer.

    Raises InputError as `finetune` does of such a file.
    """
    from ..data.answers import asked_ids, is_chat, rendered
    from ..data.chat import ChatReading
    from ..data.files import is_local, local_documents
    from ..data.tokenizer import encode

    if not is_local(source):
        raise InputError(f"--answers {source}: no such file or directory")
    for document in local_documents(source, ChatReading(on_bad_line="error"), alone=True):
        row = json.loads(document.text)
        if is_chat(tokenizer, row):
            last = max(n for n, message in enumerate(row["messages"]) if message["role"] == "assistant")
            before, answer = row["messages"][:last], row["messages"][last]["content"]
            text = rendered(tokenizer, row["at"], before, tokenize=False, add_generation_prompt=True)
            yield row["at"], encode(tokenizer, [text], split=False)[0], answer
        else:
            prompt, answer = row["plain"]
            yield row["at"], asked_ids(tokenizer, [prompt])[0], answer


# --- tasks ---


def find_tasks(words: str, include: str | None) -> tuple[Any, list[str]]:
    """lm-eval's catalogue of tasks, with those of the directory `include`, and the names that `words` lists.

    Raises InputError without lm-eval, and for a task that it does not know, naming the nearest.
    """
    try:
        import lm_eval  # noqa: F401 - what is missing has the package's name, not its part's
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise InputError(
            f"--tasks needs {error.name}, which is not installed: pip install 'apollo-optim[eval]' (in a "
            "checkout: '.[eval]'); --text and --answers work without"
        ) from error
    names = [name.strip() for name in words.split(",") if name.strip()]
    if not names:
        raise InputError("--tasks: name at least one")
    own = None if include is None else home(include)
    if own is not None and not own.is_dir():
        raise InputError(f"--include {include}: there is no such directory")
    if own is not None:  # alone, first: to read lm-eval's own 14,000 takes a minute
        alone = TaskManager(include_path=str(own), include_defaults=False)
        if all(alone.match_tasks([name]) for name in names):
            return alone, names
    everything = TaskManager(include_path=None if own is None else str(own))
    for name in names:
        if not everything.match_tasks([name]):
            raise InputError(
                f"--tasks {name}: lm-eval has no such task{nearest(name, everything.all_tasks)}; `lm-eval ls tasks` "
                "lists them, and --include DIR adds your own"
            )
    return everything, names


def score_tasks(
    model: Any, tokenizer: Any, catalogue: Any, names: list[str], limit: int | None, batch_size: int
) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from ..data.foreign import explained

    with explained(
        f"--tasks {','.join(names)}: lm-eval could not run them (a task fetches its data set at its first use, "
        "and offline it has to be in the hub's cache)"
    ):
        results = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=names,
            limit=limit,
            task_manager=catalogue,
            log_samples=False,
        )["results"]
    figures = {name: {key: value for key, value in of.items() if key != "alias"} for name, of in results.items()}
    for name, of in figures.items():
        for key, value in of.items():
            metric, _, filtered = key.partition(",")
            if isinstance(value, float) and not metric.endswith("_stderr"):
                error = of.get(f"{metric}_stderr,{filtered}")
                give = f" +- {error:.4f}" if isinstance(error, float) else ""
                say(f"{name}: {metric} {value:.4f}{give}")
    return figures
