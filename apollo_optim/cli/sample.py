"""`apollo-optim sample`: a trained model writes text."""

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import InputError
from ..core.printing import say, say_on
from .words import CONSENT, CONSENT_HELP, Parser, home

if TYPE_CHECKING:
    from collections.abc import Iterator


def run(argv: Sequence[str]) -> int:
    parser = Parser(
        "apollo-optim sample",
        "Let a model write on from a prompt. DIR is a run directory (a run that has not ended: its last checkpoint)\n"
        "or any Hugging Face directory of a causal language model.",
        'examples:\n  apollo-optim sample out/demo --prompt "def main("\n'
        '  apollo-optim sample out/demo --prompt "class Reader:" --temperature 0 --max-tokens 200\n'
        '  apollo-optim sample out/tuned --question "What is 2 + 2?" --system "Answer in one word."',
    )
    parser.add_argument("dir", metavar="DIR", help="a run directory or a Hugging Face directory")
    parser.add_argument("--prompt", help="what the text begins with (nothing: the beginning of a document)")
    parser.add_argument("--question", help="ask by the tokenizer's chat template; the answer alone is printed")
    add_generation(parser)
    args = parser.parse(argv)
    check_generation(args)
    if args.question is not None and args.prompt is not None:
        raise InputError(
            "--question and --prompt: a question is put by the chat template, a prompt is the text as it is"
        )
    if args.question is None and args.system is not None:
        raise InputError("--system: it goes with a --question, or with apollo-optim chat")
    from ..data.foreign import explained

    with opened(args) as (directory, model, tokenizer):
        prompt = args.prompt or ""
        if args.question is None:
            say_on(prompt)
        else:
            prompt = asked(tokenizer, messages(args.system, args.question), str(directory))
        with explained(f"{directory}: the model can't be run"):
            for piece in generate(model, tokenizer, prompt, **settings(args)):
                say_on(piece)
    say()
    return 0


def add_generation(parser: Parser) -> None:
    """The words about how text is drawn, and about the model's code."""
    parser.add_argument("--system", help="what the model is told before the first question")
    parser.add_argument("--max-tokens", type=int, default=100, help="at most so many tokens (100)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token (0.8)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another text (0)")
    parser.add_argument(CONSENT, action="store_true", help=CONSENT_HELP)


def check_generation(args: Any) -> None:
    """Raise InputError for numbers by which nothing can be drawn."""
    if args.max_tokens < 1:
        raise InputError(f"--max-tokens {args.max_tokens}: at least 1")
    if args.temperature < 0:
        raise InputError(f"--temperature {args.temperature}: 0 or more")


def settings(args: Any) -> dict[str, Any]:
    return {"max_tokens": args.max_tokens, "temperature": args.temperature, "seed": args.seed}


@contextlib.contextmanager
def opened(args: Any) -> "Iterator[tuple[Path, Any, Any]]":
    """Where the model is that `args` names, itself, and its tokenizer."""
    with tempfile.TemporaryDirectory() as scratch:
        trust = args.trust_remote_code
        directory = model_directory(home(args.dir), Path(scratch), trust_remote_code=trust)
        yield directory, *load(directory, trust_remote_code=trust)


def messages(system: str | None, question: str) -> list[dict[str, str]]:
    """The beginning of a conversation."""
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": question}]


def asked(tokenizer: Any, conversation: list[dict[str, str]], name: str) -> str:
    """A conversation as the chat template puts it, up to where the answer begins.

    Raises InputError without a template, and with what a template says that refuses it.
    """
    from ..data.answers import rendered, template_of

    if not template_of(tokenizer):
        raise InputError(
            f"{name}: its tokenizer has no chat template, so there is no way to put a question: write --prompt as it "
            "was tuned on (apollo-optim data shows rows), or tune with data.chat_template"
        )
    text: str = rendered(tokenizer, name, conversation, tokenize=False, add_generation_prompt=True)
    return text


def model_directory(path: Path, scratch: Path, *, trust_remote_code: bool = False) -> Path:
    """The Hugging Face directory to read: `path`, its `model/`, or, of a run that goes on, an export into `scratch`."""
    for candidate in (path, path / "model"):
        if (candidate / "config.json").is_file():
            from ..train.checkpoint import check_export

            check_export(candidate)
            return candidate
    if (path / "checkpoints").is_dir():
        from ..train.checkpoint import export

        return Path(export(path, out=scratch / "model", trust_remote_code=trust_remote_code))
    what = "it holds neither a model nor a checkpoint yet" if path.is_dir() else "there is no such directory"
    raise InputError(f"{path}: {what}; name a run directory or a Hugging Face directory")


def load(path: Path, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from ..data.foreign import check_size, explained

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # the text is what one wants to see
    with explained(f"{path}: can't be opened as a language model"):
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
        check_size(config, str(path))
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, local_files_only=True, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):  # transformers warns, and draws them anew
        raise InputError(
            f"{path}: it lacks {missing[0]} ({len(missing)} weights in all): no whole model, or "
            "one whose weights another library stores (low-bit weights: model.dequantize(), then save it)"
        )
    model.train(False)
    return model, tokenizer


def generate(
    model: Any, tokenizer: Any, prompt: str | list[int], *, max_tokens: int, temperature: float, seed: int
) -> "Iterator[str]":
    """The text after the prompt (or its tokens), piece by piece; it ends with the document or the model's context."""
    import torch

    from ..data.foreign import context_of

    ends = end_tokens(model, tokenizer)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] if isinstance(prompt, str) and prompt else prompt
    end = tokenizer.eos_token_id
    tokens = ids or [end if end is not None else 0]  # documents are divided by the end token: a new one begins after it
    context = context_of(model.config) or len(tokens) + max_tokens
    if len(tokens) >= context:
        raise InputError(f"the prompt has {len(tokens)} tokens, the model's context only {context}: shorten the prompt")
    if len(tokens) + max_tokens > context:
        say(f"note: the model's context of {context} tokens ends before --max-tokens", error=True)
    random = torch.Generator().manual_seed(seed)
    cache, feed, new, shown = None, torch.tensor([tokens]), list[int](), ""
    with torch.inference_mode():
        for _ in range(min(max_tokens, context - len(tokens))):
            output = model(feed, past_key_values=cache, use_cache=True)
            logits, cache = output.logits[0, -1].float(), output.past_key_values
            if not torch.isfinite(logits).all():
                raise InputError("the model's logits are not numbers: its weights are damaged")
            logits[len(tokenizer) :] = -torch.inf  # a model may have more entries than its tokenizer: they mean nothing
            if temperature == 0:
                token = int(logits.argmax())
            else:
                token = int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=random))
            if token in ends:
                return
            new.append(token)
            text = tokenizer.decode(new)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character may take several tokens
                yield text[len(shown) :]
                shown = text
            feed = torch.tensor([[token]])


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end a text: the tokenizer's, and those of the model's generation config (of a turn, too)."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = named if isinstance(named, list) else [named]
    return {token for token in (tokenizer.eos_token_id, *listed) if token is not None}
