"""Rows of questions and answers: the tokens, which of them are learnt, and rows in which they share the space.

Learnt are the answers, each with the token that ends it. Where a chat template marks them (`{% generation %}`), they
are what it marks. Else an answer is what a conversation with it has more than the same one up to it, as a model would
be asked: the tokens of `messages[:k]` with the template's beginning of an answer, against those of `messages[:k + 1]`.
"""

import bisect
import json
import logging
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from apollo_optim.core.errors import InputError
from apollo_optim.data.corpus import Text
from apollo_optim.data.layout import IGNORED, Batch, filled
from apollo_optim.data.tokenizer import encode

log = logging.getLogger(__name__)

MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Sample(NamedTuple):
    """One conversation or pair."""

    ids: "array[int]"
    learnt: bytearray
    """1 for every token that is learnt."""


@dataclass
class AnswerRow:
    """Samples that share a row."""

    samples: list[Sample] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(len(sample.ids) for sample in self.samples)

    def tensors(self, seq_len: int, padding: int) -> list[torch.Tensor]:
        """Token ids, labels and positions, each [seq_len]. Nothing tells a text's first token, so it is not learnt."""
        ids, labels, positions = array("i"), array("i"), array("i")
        for sample in self.samples:
            ids += sample.ids
            learnt = zip(sample.ids[1:], sample.learnt[1:], strict=True)
            labels += array("i", [IGNORED, *(token if counts else IGNORED for token, counts in learnt)])
            positions += array("i", range(len(sample.ids)))
        positions += array("i", range(seq_len - len(ids)))
        return [filled(ids, padding, seq_len), filled(labels, IGNORED, seq_len), torch.tensor(positions)]


@dataclass
class Answers:
    """The layout of questions and answers: `pack`, as many samples in a row as it holds, or one in each."""

    tokenizer: Any
    seq_len: int
    pack: bool
    name: str = ""
    """Of the file, where there is one alone."""
    samples: int = 0
    """Laid out so far."""
    cut: int = 0
    """Of these, how many lost a part of their answers, being longer than a row."""
    unanswered: int = 0
    """How many lost all of them, and are left out."""
    endless: int = 0
    """How many teach no end: nothing that is learnt is the tokenizer's end-of-text."""

    def rows(self, texts: list[Text]) -> list[AnswerRow]:
        kept = []
        examples = [json.loads(text.text) for text in texts]
        for example in examples:
            example["at"] = (self.name if example["at"].startswith(":") else "") + example["at"]
        for sample in tokenized(self.tokenizer, examples):
            self.samples += 1
            taught = zip(sample.ids, sample.learnt, strict=True)
            self.endless += (self.tokenizer.eos_token_id, 1) not in taught
            within = Sample(sample.ids[: self.seq_len], sample.learnt[: self.seq_len])
            if not any(within.learnt[1:]):
                self.unanswered += 1
                continue
            self.cut += sum(within.learnt) < sum(sample.learnt)
            kept.append(within)
        return packed(kept, self.seq_len) if self.pack else [AnswerRow([sample]) for sample in kept]

    def batch(self, rows: Sequence[AnswerRow]) -> Batch:
        parts = [row.tensors(self.seq_len, self.tokenizer.eos_token_id) for row in rows]
        ids, labels, positions = (torch.stack(part) for part in zip(*parts, strict=True))
        return Batch(ids, labels, positions.long() if self.pack else None)


def packed(samples: list[Sample], seq_len: int) -> list[AnswerRow]:
    """Best fit decreasing: the longest first, each where the least space is left behind it."""
    rows: list[AnswerRow] = []
    spaces: list[tuple[int, int]] = []  # what is left of a row, and which: in order
    for sample in sorted(samples, key=lambda sample: -len(sample.ids)):
        at = bisect.bisect_left(spaces, (len(sample.ids), 0))
        space, row = spaces.pop(at) if at < len(spaces) else (seq_len, len(rows))
        if row == len(rows):
            rows.append(AnswerRow())
        rows[row].samples.append(sample)
        bisect.insort(spaces, (space - len(sample.ids), row))
    return rows


def tokenized(tokenizer: Any, examples: list[dict[str, Any]]) -> list[Sample]:
    """The samples of documents as `data.chat` makes them.

    Raises InputError, with the line of the file, where the template is missing, refuses a conversation, or does not say
    the same of a conversation's beginning as of the whole.
    """
    chats = [n for n, example in enumerate(examples) if is_chat(tokenizer, example)]
    pairs = [n for n, example in enumerate(examples) if not is_chat(tokenizer, example)]
    made = dict(zip(pairs, _pairs(tokenizer, [examples[n]["plain"] for n in pairs]), strict=True))
    chosen = _marked if MARKED.search(template_of(tokenizer)) else _by_prefixes
    made |= zip(chats, chosen(tokenizer, [examples[n] for n in chats]), strict=True)
    return [made[n] for n in range(len(examples))]


def is_chat(tokenizer: Any, example: dict[str, Any]) -> bool:
    """Whether a document goes through the chat template. Raises InputError if it must and there is none."""
    if "messages" in example and template_of(tokenizer):
        return True
    if "plain" in example:
        return False
    raise InputError(
        f"{example['at']}: messages need a chat template, and this tokenizer has none: set data.chat_template to a "
        "file with one, or give prompt and completion"
    )


def template_of(tokenizer: Any) -> str:
    """Its chat template; of several the default one; "" if it has none."""
    template = getattr(tokenizer, "chat_template", None) or ""
    return str(template.get("default", "")) if isinstance(template, dict) else template


def check_template(tokenizer: Any, name: str) -> None:
    """Look at a chat template, `name` for short, before any row is.

    Warns where it writes something before an answer that it does not write when it asks for one: that is learnt, too.
    Raises InputError, with the line of the template, where it is no template.
    """
    from jinja2 import TemplateSyntaxError

    if not (template := template_of(tokenizer)):
        return
    asked, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
    try:
        before = tokenizer.apply_chat_template([asked], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([asked, answer], tokenize=False)
    except TemplateSyntaxError as error:
        raise InputError(f"{name}, line {error.lineno}: {error.message}") from error
    except Exception:  # it may refuse this conversation, and take those of the rows: they are asked next
        return
    header, found, _ = whole[len(before) :].partition("answer")
    if found and header.strip() and whole.startswith(before) and not MARKED.search(template):
        log.warning("%s does not heed add_generation_prompt: %r, before an answer, is learnt with it", name, header)


def _pairs(tokenizer: Any, pairs: list[list[str]]) -> list[Sample]:
    """Prompt and completion, tokenised apart, as a model that is asked sees the prompt alone; then end-of-text."""
    if not pairs:
        return []
    end = tokenizer.eos_token_id
    samples = []
    answers = encode(tokenizer, [answer for _, answer in pairs])
    for before, answer in zip(asked_ids(tokenizer, [prompt for prompt, _ in pairs]), answers, strict=True):
        samples.append(Sample(array("i", [*before, *answer, end]), bytearray(len(before)) + b"\1" * (len(answer) + 1)))
    return samples


def asked_ids(tokenizer: Any, prompts: list[str]) -> list[list[int]]:
    """The tokens that an answer follows, of prompts without a template; what begins a document, of an empty one."""
    end = tokenizer.eos_token_id
    asked = encode(tokenizer, prompts, special=True)
    for prompt in asked:
        if len(prompt) > 1 and prompt[-1] == end:  # of a tokenizer that ends whatever it is given
            prompt.pop()
    return [prompt or [end] for prompt in asked]


def _marked(tokenizer: Any, examples: list[dict[str, Any]]) -> list[Sample]:
    samples = []
    for example in examples:
        found = rendered(
            tokenizer,
            example["at"],
            example["messages"],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        learnt = bytearray(found["assistant_masks"])
        samples.append(Sample(array("i", found["input_ids"]), _last(learnt, example)))
    return samples


def _last(learnt: bytearray, example: dict[str, Any]) -> bytearray:
    """Of a prompt that is a conversation, only the answers of the completion."""
    spans = [match.span() for match in re.finditer(rb"\x01+", bytes(learnt))]
    for start, end in spans[: -example["answers"]] if "answers" in example else ():
        learnt[start:end] = bytes(end - start)
    return learnt


def _by_prefixes(tokenizer: Any, examples: list[dict[str, Any]]) -> list[Sample]:
    texts: list[str] = []
    answers: list[list[int]] = []
    for example in examples:
        messages = example["messages"]
        answers.append([k for k, message in enumerate(messages) if message["role"] == "assistant"])
        for k in answers[-1]:
            texts.append(rendered(tokenizer, example["at"], messages[:k], tokenize=False, add_generation_prompt=True))
            texts.append(rendered(tokenizer, example["at"], messages[: k + 1], tokenize=False))
        texts.append(rendered(tokenizer, example["at"], messages, tokenize=False))
    ids = iter(encode(tokenizer, texts, split=False))
    samples = []
    for example, ends in zip(examples, answers, strict=True):
        spans = [(next(ids), next(ids), k) for k in ends]
        whole = next(ids)
        learnt = bytearray(len(whole))
        for asked, answered, k in spans:
            if whole[: len(asked)] != asked or whole[: len(answered)] != answered:
                raise InputError(
                    f"{example['at']}: where answer messages[{k}] begins and ends can't be found: the chat template "
                    "writes a conversation's beginning otherwise than the same of the whole; mark answers in it with "
                    "{% generation %} ... {% endgeneration %} (data.chat_template), or give prompt and completion"
                )
            if "answers" not in example or k >= len(example["messages"]) - example["answers"]:
                learnt[len(asked) : len(answered)] = b"\1" * (len(answered) - len(asked))
        samples.append(Sample(array("i", whole), learnt))
    return samples


def rendered(tokenizer: Any, at: str, messages: list[dict[str, str]], **how: Any) -> Any:
    """What the chat template makes of a conversation. Raises InputError, naming `at`, where it refuses."""
    try:
        return tokenizer.apply_chat_template(messages, **how)
    except Exception as error:  # whatever the template raises of its own, or jinja of it
        why = " ".join(str(error).split())[:200]
        raise InputError(f"{at}: the chat template refuses this conversation: {why}") from error
