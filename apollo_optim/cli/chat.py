"""`apollo-optim chat`: a conversation with a tuned model."""

import sys
from collections.abc import Sequence
from typing import Any

from ..core.errors import InputError
from ..core.printing import say, say_on
from .sample import add_generation, asked, check_generation, generate, messages, opened, settings
from .words import Parser

NEW = "/new"
ASK = "> "


def run(argv: Sequence[str]) -> int:
    parser = Parser(
        "apollo-optim chat",
        "Talk to a model by its chat template: a line is a question, and the model sees what was said before. DIR is\n"
        f"a run directory or any Hugging Face directory of a causal language model. {NEW} begins anew, Ctrl-D ends.",
        'examples:\n  apollo-optim chat out/tuned\n  apollo-optim chat out/tuned --system "Answer in one word."\n'
        "  apollo-optim chat out/tuned --temperature 0 < questions.txt",
    )
    parser.add_argument("dir", metavar="DIR", help="a run directory or a Hugging Face directory")
    add_generation(parser)
    args = parser.parse(argv)
    check_generation(args)
    with opened(args) as (directory, model, tokenizer):
        asked(tokenizer, messages(args.system, "?"), str(directory))  # a template that is missing is said at once
        talk(model, tokenizer, args, str(directory))
    return 0


def talk(model: Any, tokenizer: Any, args: Any, name: str) -> None:
    """Questions from the standard input until it ends."""
    from ..data.foreign import explained

    said: list[dict[str, str]] = []
    say_on(ASK)
    while line := sys.stdin.readline():
        question = line.strip()
        if question == NEW:
            said = []
        elif question:
            said = [*said, *messages(None if said else args.system, question)]
            said, prompt = fitting(model, tokenizer, said, name)
            pieces = []
            with explained(f"{name}: the model can't be run"):
                for piece in generate(model, tokenizer, prompt, **settings(args)):
                    say_on(piece)
                    pieces.append(piece)
            say()
            said = [*said, {"role": "assistant", "content": "".join(pieces).strip()}]
        say_on(ASK)
    say()


def fitting(model: Any, tokenizer: Any, said: list[dict[str, str]], name: str) -> tuple[list[dict[str, str]], str]:
    """The conversation and its text, without its oldest turns if the model's context has no room for them.

    Raises InputError where the last question alone is too long.
    """
    from ..data.foreign import context_of

    context = context_of(model.config)
    system = [message for message in said[:1] if message["role"] == "system"]
    turns = said[len(system) :]
    while True:
        prompt = asked(tokenizer, [*system, *turns], name)
        size = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        if context is None or size < context:
            return [*system, *turns], prompt
        if len(turns) == 1:
            raise InputError(f"the question has {size} tokens, the model's context only {context}: ask a shorter one")
        turns = turns[2:]
        say("note: the model's context is full: it no longer sees the oldest question and its answer", error=True)
