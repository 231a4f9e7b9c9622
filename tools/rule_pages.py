"""A page for each rule of the registry, made of the rule itself: its docstring, its knobs, the slots it asks for.

A class's docstring is prose; of its last paragraphs one may begin with "When: " and one with "Evidence: ". These
become sections of the page (tests/house/test_site.py wants them of the rules that ship). A rule without them has a page
all the same.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Mapping
from math import prod

import torch

from apollo_optim.optim.describe import state_bytes
from apollo_optim.optim.optimizer import RuleOptimizer
from apollo_optim.optim.recipes import RECIPES
from apollo_optim.rules import Rule

SECTIONS = {"When": "When to use it", "Evidence": "Evidence"}
OUT, IN = 4096, 11008  # the down projection of LLaMA-7B
SMALL = min(OUT, IN)
RANK = 256
CODED = {
    "mean": "`state_dtype` (fp32)",
    "square": "`state_dtype` (fp32), never negative",
    "exact": "fp32",
    "drawn": "fp32, drawn from the seed",
}


def paper_link(text: str) -> str:
    """ "arXiv 2412.05270, section 5" as a link, and what is no arXiv number as it is."""
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def docstring(rule: type[Rule]) -> tuple[str, dict[str, str]]:
    """Its prose, and the paragraphs that are sections of their own."""
    prose, sections = [], {}
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(rule.__doc__ or "")):
        word, _, text = paragraph.partition(": ")
        if word in SECTIONS:
            sections[word] = text
        else:
            prose.append(paragraph)
    return "\n\n".join(prose), sections


def paper(rule: type[Rule]) -> str:
    """What the file says on top: title, names, venue, number. (What it says of the step is on the page already.)"""
    said = inspect.cleandoc(getattr(sys.modules.get(rule.__module__), "__doc__", None) or rule.paper)
    first, _, more = said.partition("\n\n")
    return paper_link(more if more and '"' not in first else said)


def linked(text: str) -> str:
    """Names of pages and logs as links; the pages lie in the folder `rules` of the site."""
    return re.sub(r"`(?:docs/|(?=results/))([\w./-]+\.md)`", r"[\1](../\1)", text)


def as_code(value: object) -> str:
    return f'`"{value}"`' if isinstance(value, str) else f"`{value}`"


def cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")


def knob_table(rule: type[Rule]) -> str:
    """Every field of the rule."""
    lines = ["| knob | default | may be | |", "|---|---|---|---|"]
    for field in dataclasses.fields(rule):
        missing = field.default is dataclasses.MISSING
        default = '`"auto"`, a quarter of the small side' if missing else as_code(field.default)
        meta = field.metadata
        lines.append(f"| `{field.name}` | {default} | {cell(meta['kind'].wanted)} | {cell(meta['doc'])} |")
    return "\n".join(lines)


def example(rule: type[Rule]) -> Rule:
    """The rule with its defaults, at the papers' rank for 7B where it needs one."""
    return rule(**{"rank": RANK}) if "rank" in rule.knobs() and "rank" not in rule.defaults() else rule()


def state_table(rule: type[Rule]) -> str:
    """The slots of one matrix of LLaMA-7B, and their bytes by the code that makes them."""
    of = example(rule)
    shape = (max(OUT, IN), SMALL) if rule.view == "channels" else (OUT, IN)
    slots = of.slots(shape)
    weight = torch.nn.Parameter(torch.empty(OUT, IN, device="meta"))
    optimizer = RuleOptimizer([weight], rule.name, rule.lr, **dataclasses.asdict(of))
    total = state_bytes(weight, optimizer.param_groups[0])
    if not slots:
        return f"None: of a matrix of {OUT:,} x {IN:,} nothing is kept but the number of its step ({total} bytes)."
    lines = ["| tensor | shape | numbers | stored in |", "|---|---|---:|---|"]
    for name, slot in slots.items():
        size = " x ".join(f"{n:,}" for n in slot.shape) or "one number"
        lines.append(f"| `{name}` | {size} | {prod(slot.shape):,} | {CODED[slot.kind]} |")
    rank = getattr(of, "rank", None)
    ranked = f", rank {rank}" if isinstance(rank, int) else ""
    adamw = 8 * OUT * IN
    beside = "as AdamW keeps" if total >= adamw else f"{100 * total / adamw:.2g} % of the {adamw / 1e6:.1f} MB of AdamW"
    of_what = f"Of one matrix of {OUT:,} x {IN:,} (an MLP's of LLaMA-7B){ranked}, in fp32"
    return "\n".join([*lines, "", f"{of_what}: {total / 1e6:,.2f} MB, {beside}."])


def use(rule: type[Rule]) -> str:
    """The same in Python and as keys of a run file."""
    knobs = ", rank=64" if "rank" in rule.knobs() and "rank" not in rule.defaults() else ""
    key = "\n  rank: 64" if knobs else ""
    return f"""```python
from apollo_optim import build_optimizer

optimizer = build_optimizer("{rule.name}", model, lr={rule.lr:g}{knobs})
```

```yaml
optim:
  name: {rule.name}
  lr: {rule.lr:g}{key}
```

{rule.lr:g} is where a search may begin, no more: [which rates are known, and of which batch](../rates.md)."""


def rule_page(rule: type[Rule]) -> str:
    """The whole page, in Markdown."""
    prose, sections = docstring(rule)
    said = "\n\n".join(f"## {SECTIONS[word]}\n\n{linked(text)}" for word, text in sections.items())
    built_on = [r for r in RECIPES if r.rule == rule.name]
    recipes = "".join(f"\n\nRecipe `{r.name}`: {paper_link(r.summary)}" for r in built_on)
    step = "" if rule.blockwise else " It sees all of a matrix at once."
    kinds = {
        "any": "Of every tensor, whatever its shape." + step,
        "matrix": "Of matrices, convolutions (outputs x the rest) and stacks of matrices; what is 1-D uses AdamW."
        + step,
        "channels": "Of matrices, convolutions and stacks of matrices whose small side is above the rank; "
        "everything else uses AdamW." + step,
    }
    return f"""# {rule.title}

{rule.summary}

{paper(rule)}

## What it does

{prose}

{kinds[rule.view]}

## State

{state_table(rule)}

## Use

{use(rule)}{recipes}

{said}

## Knobs

{knob_table(rule) if dataclasses.fields(rule) else "None of its own: `lr` and `weight_decay`, as every group."}

`{rule.__module__}.{rule.__name__}` in [the Python API](../api/rules.md).
"""


def index_page(rules: Mapping[str, type[Rule]]) -> str:
    """All of them in one table."""
    rows = "\n".join(
        f"| [{rule.title}]({name}.md) | `{name}` | {cell(rule.summary)} | {paper_link(rule.paper)} |"
        for name, rule in rules.items()
    )
    return f"""# A page for each rule

Every rule is a file of its own (`apollo_optim/rules/`), and each of these pages is made from that file: its paper, its
step, what it keeps, its knobs, when to use it, and what has been seen. [How they are combined](../optimizers.md),
[which learning rates](../rates.md), [what fits into which memory](../plan.md). [Your own](../own-rule.md) is one file,
too.

| | `name` | the step, and its state for a matrix with small side d, large side n, rank r | paper |
|---|---|---|---|
{rows}
"""
