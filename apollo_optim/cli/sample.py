"""`apollo-optim sample`: a trained model writes text."""

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
        '  apollo-optim sample out/demo --prompt "class Reader:" --temperature 0 --max-tokens 200',
    )
    parser.add_argument("dir", metavar="DIR", help="a run directory or a Hugging Face directory")
    parser.add_argument("--prompt", default="", help="what the text begins with (nothing: the beginning of a document)")
    parser.add_argument("--max-tokens", type=int, default=100, help="at most so many tokens (100)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token (0.8)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another text (0)")
    parser.add_argument(CONSENT, action="store_true", help=CONSENT_HELP)
    args = parser.parse(argv)
    from ..data.foreign import explained

    trust = args.trust_remote_code
    if args.max_tokens < 1:
        raise InputError(f"--max-tokens {args.max_tokens}: at least 1")
    if args.temperature < 0:
        raise InputError(f"--temperature {args.temperature}: 0 or more")
    with tempfile.TemporaryDirectory() as scratch:
        directory = model_directory(home(args.dir), Path(scratch), trust_remote_code=trust)
        model, tokenizer = load(directory, trust_remote_code=trust)
        say_on(args.prompt)
        settings = {"max_tokens": args.max_tokens, "temperature": args.temperature, "seed": args.seed}
        with explained(f"{directory}: the model can't be run"):
            for piece in generate(model, tokenizer, args.prompt, **settings):
                say_on(piece)
    say()
    return 0


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
        model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
    model.train(False)
    return model, tokenizer


def generate(
    model: Any, tokenizer: Any, prompt: str, *, max_tokens: int, temperature: float, seed: int
) -> "Iterator[str]":
    """The text after the prompt, piece by piece; it ends with the document or with the model's context."""
    import torch

    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
    end = tokenizer.eos_token_id
    tokens = ids or [end if end is not None else 0]  # documents are divided by the end token: a new one begins after it
    context = getattr(model.config, "max_position_embeddings", None) or len(tokens) + max_tokens
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
            if token == end:
                return
            new.append(token)
            text = tokenizer.decode(new)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character may take several tokens
                yield text[len(shown) :]
                shown = text
            feed = torch.tensor([[token]])
