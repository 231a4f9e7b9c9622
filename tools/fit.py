"""The figures of the page "Will it fit?" (docs/assets/fit/data.json), made by the planner.

    python tools/fit.py [MODEL ...]      all models, or these anew; about a minute for each
    python tools/fit.py --new            of all models the optimizers that the page has not yet

`apollo-optim plan` runs a step on tensors without memory, which a page cannot. But a step's memory is made of tensors
whose size is a number times some of: rows, tokens, the width of a part of the logits. Two traces of different rows and
tokens tell for every block of memory which (`monomials`). So each moment of a step is a sum of a few terms, and most
moments can never be the fullest: another one is at least as large in every term (`undominated`). What is left is what
the page looks at. Layers are alike: three are traced, and the others take what the middle one takes (`lengthened`).

The page computes what `plan` computes, to the byte: tests/house/test_fit.py.
"""

from __future__ import annotations

import functools
import json
import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this checkout's planner, whatever is installed

from apollo_optim import list_optimizers  # noqa: E402
from apollo_optim.cli import plan as command  # noqa: E402
from apollo_optim.core import disk  # noqa: E402
from apollo_optim.core.printing import say  # noqa: E402
from apollo_optim.plan import PARTS, Parallel, Trace  # noqa: E402
from apollo_optim.plan.budget import held, resting  # noqa: E402
from apollo_optim.plan.draw import CARDS, COLOURS  # noqa: E402
from apollo_optim.train.chunked import LOGITS  # noqa: E402
from apollo_optim.train.config import RunConfig  # noqa: E402
from apollo_optim.train.models import SIZES  # noqa: E402
from apollo_optim.train.optimizer import make_optimizer  # noqa: E402
from apollo_optim.train.plan import budget_of, model_of, trace_of  # noqa: E402

OUT = ROOT / "docs" / "assets" / "fit" / "data.json"
LLAMA3 = {
    "model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
# The shapes of their publishers' config.json.
CONFIGS: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": {
        **LLAMA3, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True,
    },
    "Llama-3.1-8B": {**LLAMA3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "Qwen2.5-7B": {
        "model_type": "qwen2", "vocab_size": 152064, "max_position_embeddings": 131072, "hidden_size": 3584,
        "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    },
}  # fmt: skip
MODELS = [*(name for name in SIZES if name not in ("llama-1m", "llama-4m", "llama-9m")), *CONFIGS]
BITS = (16, 8)
GPUS = (2, 4, 8)
LAYERS = 3  # traced: the first, one like all, the last
TERMS: dict[str, Callable[[int, int, int, int], int]] = {
    "1": lambda b, t, c, e: 1,
    "T": lambda b, t, c, e: t,
    "BT": lambda b, t, c, e: b * t,
    "c": lambda b, t, c, e: c,
    "BTc": lambda b, t, c, e: b * t * c,
    "e": lambda b, t, c, e: e,
    "BTe": lambda b, t, c, e: b * t * e,
}
"""Of rows, tokens of a row, and the width of the parts in which logits are made: all but the last, and the last."""
KINDS = ("gradients", "activations", "logits", "float copies")
MODES = ("kept", "freed", "sharded")
"""Gradients: all stay until the step; each is freed when it is complete, or has its place already; counted apart."""


def planned(name: str, bits: int, words: Iterable[str] = ()) -> RunConfig:
    """What the command plans: `apollo-optim plan MODEL --bits BITS ...`."""
    what = config_file(name) if name in CONFIGS else name
    return command.config_of(*command.make_parser().parse_beside_keys([what, "--bits", str(bits), *words]))


@functools.cache
def config_file(name: str) -> str:
    """A config.json with the shapes of this model, until the process ends."""
    path = Path(_folder().name) / name / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(CONFIGS[name]))
    return str(path)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def cut_of(rows: int, tokens: int, vocabulary: int) -> tuple[str, int, int]:
    """How the loss cuts the vocabulary (`train.chunked`): in how many parts, their width, and that of the last."""
    if rows * tokens * vocabulary <= LOGITS:
        return "whole", 0, 0
    wide = max(64, LOGITS // (rows * tokens) // 64 * 64)
    parts = -(-vocabulary // wide)
    return "two" if parts == 2 else "many", wide, vocabulary - (parts - 1) * wide


def points(vocabulary: int) -> dict[str, list[tuple[int, int]]]:
    """Rows and tokens of two traces for each cut of the logits."""
    most = LOGITS / vocabulary  # tokens whose logits are made at once
    shares = {"whole": (0.97, 0.61), "two": (1.29, 1.71), "many": (3.2, 3.7)}
    return {
        cut: [(b, round(most * share) // b) for b, share in zip((2, 3), pair, strict=True)]
        for cut, pair in shares.items()
    }


def monomials(one: Trace, other: Trace, at: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Of every block a row: by kind and term, how many of the term it has. Both traces are of one form of step."""
    assert [b[:2] + b[3:] for b in one.blocks] == [b[:2] + b[3:] for b in other.blocks], "not the same form of step"
    terms = {name: (term(*at[0]), term(*at[1])) for name, term in TERMS.items()}
    found = np.zeros((len(one.blocks), len(KINDS), len(TERMS)), dtype=np.int64)
    for i, (a, b) in enumerate(zip(one.blocks, other.blocks, strict=True)):
        fits = [name for name, (x, y) in terms.items() if x and a.size * y == b.size * x and a.size % x == 0]
        assert len(fits) == 1, f"{a}, {b}: {fits}"
        found[i, KINDS.index(a.kind), [*TERMS].index(fits[0])] = a.size // terms[fits[0]][0]
    return found


def lengthened(trace: Trace, sizes: np.ndarray, forward: int, layers: int, mode: str) -> np.ndarray:
    """What is alive at every moment of a step of so many layers, by kind and term.

    `trace` has three layers, with `forward` moments each.
    The moments are those of `trace`: of the layers, the first two or the last one. What those between take at their
    own moments is never more than at the ends, for it grows or shrinks from layer to layer by the same.
    """
    died = np.array([block.died for block in trace.blocks])
    born = np.array([block.born for block in trace.blocks])
    gradient = np.array([block.kind == "gradients" for block in trace.blocks])
    if mode == "kept":
        died[gradient] = trace.end + 2
    elif mode == "sharded":
        sizes = np.where(gradient[:, None, None], 0, sizes)
    changes = np.zeros((trace.end + 3, *sizes.shape[1:]), dtype=np.int64)
    np.add.at(changes, born, sizes)
    np.add.at(changes, died, -sizes)
    alive = changes.cumsum(0)[: trace.end + 1]
    begin = forward + forward // 2  # within the layers, a whole one behind it and another one before it
    last = max(moment for name, moment in trace.complete.items() if f".{LAYERS - 1}." in name)
    saved = sizes[(born >= begin) & (born < begin + forward) & (died > trace.backward)].sum(0)
    alive[begin : last + 1] += (layers - LAYERS) * saved
    middle = [moment for name, moment in trace.complete.items() if ".1." in name]
    if mode == "kept":
        one = sizes[gradient & (born > last) & (born <= max(middle))].sum(0)
        alive[last + 1 :] += (layers - LAYERS) * one
    return alive


def undominated(moments: np.ndarray) -> list[int]:
    """Those of the moments, in order, that can be the largest; of equal ones the latest."""
    totals, kept = moments.sum(1), list[int]()
    for i in reversed(range(len(moments))):
        if not any((totals[k] >= totals[i]).all() for k in kept):
            kept = [k for k in kept if not (totals[i] >= totals[k]).all()] + [i]
    return sorted(kept)


def alike(name: str) -> str:
    """The name that parameters of all layers share."""
    return re.sub(r"\.\d+\.", ".*.", name)


class Vectors:
    """Sums of terms, each written once."""

    def __init__(self) -> None:
        self.lines: list[list[int]] = []
        self._index: dict[bytes, int] = {}

    def add(self, vector: np.ndarray) -> int:
        """The number of this one: kind, term, how many, and so on."""
        if (key := vector.tobytes()) not in self._index:
            self._index[key] = len(self.lines)
            self.lines.append([int(x) for at in np.argwhere(vector) for x in (*at, vector[tuple(at)])])
        return self._index[key]


def traced(name: str, bits: int, recompute: bool, layers: int, vocabulary: int, classes: Sequence[str]) -> Any:
    """By cut and mode: what can be the fullest of forward, backward, and of the moments of each parameter; the end."""
    words = ["--checkpointing"] if recompute else []
    made = {n: planned(name, bits, [*words, "--model.config.num_hidden_layers", str(n)]) for n in (LAYERS, LAYERS - 1)}
    models = {n: model_of(cfg) for n, cfg in made.items()}

    def trace(n: int, rows: int, tokens: int) -> Trace:
        made[n].data.seq_len = tokens
        return trace_of(made[n], models[n], rows)

    vectors, forms = Vectors(), dict[str, Any]()
    shorter = trace(LAYERS - 1, *points(vocabulary)["whole"][0])
    for form, pair in points(vocabulary).items():
        at = [(*point, *cut_of(*point, vocabulary)[1:]) for point in pair]
        one, other = (trace(LAYERS, *point) for point in pair)
        sizes = monomials(one, other, at)
        forms[form] = {}
        if form == "whole":
            forward_of_one = one.backward - shorter.backward
        for mode in MODES:
            alive = lengthened(one, sizes, forward_of_one, layers, mode)
            forward, backward = alive[: one.backward], alive[one.backward : one.end]
            found = [[vectors.add(part[i]) for i in undominated(part)] for part in (forward, backward)]
            complete = {kind: list[int]() for kind in classes} if mode != "kept" else {}
            for key, moment in one.complete.items():
                if mode != "kept":
                    complete[alike(key)].append(moment)
            for moments in complete.values():
                own = alive[sorted(moments)] if moments else alive[one.end :]
                found.append([vectors.add(own[i]) for i in undominated(own)])
            forms[form][mode] = [*found[:2], [vectors.add(alive[one.end])], found[2:]]
    return {"vectors": vectors.lines, "forms": forms}


def budgets(
    name: str, bits: int, layers: int, known: Iterable[str] = ()
) -> tuple[dict[str, int], dict[str, Any], dict[str, Any]]:
    """Rows of the parameters; what is held beside the trace, by GPUs; what each optimizer not known keeps and makes."""
    short = {n: planned(name, bits, ["--model.config.num_hidden_layers", str(n)]) for n in (LAYERS, LAYERS + 1)}
    models = {n: model_of(cfg) for n, cfg in short.items()}
    rows = {alike(key): len(p) for key, p in models[LAYERS].named_parameters()}
    names = [*rows]
    shards = {1: None, **{gpus: Parallel("fsdp2", gpus) for gpus in GPUS}}

    def longer(found: dict[int, dict[str, int]], *parts: str) -> list[int]:
        """These parts for all layers, from what they are for three and for four."""
        few, more = ([found[n].get(part, 0) for part in parts] for n in (LAYERS, LAYERS + 1))
        return [x + (layers - LAYERS) * (y - x) for x, y in zip(few, more, strict=True)]

    beside = dict[str, Any]()
    for gpus, how in shards.items():
        for release in (False, True) if how else (False,):
            # (of one GPU: as with DDP's views, all gradients at all times)
            ways = {n: held(models[n], release, not how, how) for n in models}
            moments = [longer({n: ways[n][i] for n in ways}, "gradients", "parallel") for i in range(3)]
            beside.setdefault(str(gpus), []).append(moments)
    kept, deep = dict[str, Any](), planned(name, bits)
    whole = model_of(deep)  # what a step of all parameters together makes grows by no rule with the layers
    for info in list_optimizers():
        if info.name in known or (info.bits and bits == 16):
            continue
        one = command.with_optimizer(short[LAYERS], info.name, None)
        one.train.release = True
        updates = {alike(key): size for key, size in budget_of(one, models[LAYERS], batch=1).updates.items()}
        kept[info.name] = {
            "all": budget_of(command.with_optimizer(deep, info.name, None), whole, batch=1).updates["all"],
            "updates": [[names.index(key), size] for key, size in updates.items()],
        }
        made = {n: make_optimizer(one.optim, model) for n, model in models.items()}
        for gpus, how in shards.items():
            rest = {n: resting(models[n], made[n], how)[0] for n in models}
            kept[info.name][str(gpus)] = longer(rest, "weights", "state, matrices", "state, rest", "buffers")
    return rows, beside, kept


def figures(name: str) -> dict[str, Any]:
    """All of a model."""
    config = model_of(planned(name, 16)).config
    layers, vocabulary = config.num_hidden_layers, config.vocab_size
    told: dict[str, Any] = {"layers": layers, "vocabulary": vocabulary, "context": config.max_position_embeddings}
    told["bits"] = {}
    for bits in BITS:
        say(f"{name}, weights of {bits} bits ...", error=True)
        rows, beside, kept = budgets(name, bits, layers)
        how = [traced(name, bits, recompute, layers, vocabulary, [*rows]) for recompute in (False, True)]
        told["bits"][str(bits)] = {"parameters": rows, "held": beside, "optimizers": kept, "traces": how}
    return told


def add_new(name: str, told: dict[str, Any]) -> None:
    """The optimizers that `told`, all of a model, has not: what a step is made of is the same for all."""
    for bits, known in told["bits"].items():
        say(f"{name}, weights of {bits} bits: new optimizers ...", error=True)
        rows, _, kept = budgets(name, int(bits), told["layers"], known["optimizers"])
        assert rows == known["parameters"], f"{name} has changed: make it anew"
        both = known["optimizers"] | kept
        known["optimizers"] = {info.name: both[info.name] for info in list_optimizers() if info.name in both}


def main(argv: Sequence[str]) -> int:
    """Make the figures of these models, or of all; with `--new` of the optimizers that are not there."""
    data = json.loads(OUT.read_text()) if OUT.is_file() and argv else {"models": {}}
    data |= {"logits": LOGITS, "cards": CARDS, "gpus": GPUS, "parts": COLOURS, "kinds": KINDS, "terms": [*TERMS]}
    assert [*COLOURS] == [*PARTS]
    OUT.parent.mkdir(parents=True, exist_ok=True)
    new = [*argv] == ["--new"]
    made = data["models"]
    for name in [*made] if new else argv or MODELS:
        if new:
            add_new(name, made[name])
        else:
            made[name] = figures(name)
        data["models"] = {name: made[name] for name in MODELS if name in made}
        disk.write(OUT, json.dumps(data, separators=(",", ":")) + "\n")  # each at once: the next may take minutes
    say(f"{OUT}: {math.ceil(OUT.stat().st_size / 1000)} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
