"""What is measured: the parts in order of worth, their times, and every number of their cases.

Without torch, so that the parent needs none: the modules that a case names are loaded by the process that runs it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.cases import Case
from benchmarks.kit import ROOT, Line

RATES = {"adamw": 2e-3, "apollo": 1e-2, "apollo-mini": 1e-2}
"""Learning rates of the part `train`: nobody's is tuned here."""
OPTIONAL = ["pytest", "rich", "matplotlib", "tokenizers", "safetensors", "pyyaml"]
PEERS = ["apollo-torch", "bitsandbytes", "hakuli", "flashoptim", "torchao", "adafactor8bit"]


@dataclass(frozen=True)
class Setup:
    """Where it runs, and how large."""

    device: str
    """cuda, cuda:1, cpu, mps, xpu."""
    tiny: bool
    """A tiny model in every part: whether it runs, not how fast."""

    @property
    def compile(self) -> bool:
        """Of the steps whose compiling is not what is asked: on a GPU; a CPU's compiler takes a minute for them."""
        return self.device.startswith("cuda")


@dataclass(frozen=True)
class Part:
    """Some cases and how long they may take together."""

    name: str
    says: str
    """What it measures."""
    seconds: int
    cases: Callable[[Setup], list[Case]]
    by_default: bool = True
    together: bool = False
    """Its cases share a process, and so the seconds that it takes to start one."""
    background: bool = False
    """Needs no device: beside the others, where there are cores for it."""


def environment(setup: Setup) -> list[Case]:
    """What is there."""
    size: Line = {"copy_bytes": 1 << 24, "matmul": 256} if setup.tiny else {"copy_bytes": 1 << 30, "matmul": 8192}
    config = {"device": setup.device, "packages": OPTIONAL, "compiler": setup.device != "cpu", **size}
    return [Case("env", "machine", "benchmarks.gpu.environment:measure", config)]


def step(setup: Setup) -> list[Case]:
    """One for each size."""
    run, shared = "benchmarks.gpu.steps:measure", {"device": setup.device, "packages": PEERS, "dtype": "bfloat16"}
    if setup.tiny:
        tiny = {"size": "llama-1m", "blocks_only": True, "layers": 1, "rank": 8, "rounds": 3, "copy_bytes": 1 << 22}
        return [Case("step", "tiny", run, {**shared, **tiny, "compile": setup.compile, "registry": True})]
    whole = {**shared, "rank": 256, "rounds": 20, "compile": True, "copy_bytes": 1 << 30, "layers": None}
    one_b = {**whole, "size": "llama-1b", "blocks_only": False, "registry": False}
    seven_b = {**whole, "size": "llama-7b", "blocks_only": True, "registry": False, "layers": 8}
    small = {**whole, "size": "llama-350m", "blocks_only": False, "registry": True}
    shares = {"1b": (one_b, 1.2), "7b": (seven_b, 1.2), "350m": (small, 1.0)}
    return [Case("step", name, run, config, share) for name, (config, share) in shares.items()]


def large_configs(setup: Setup) -> dict[str, Line]:
    """Of the part `7b`, by the name of the case."""
    size, dtype = ("llama-1m", "float32") if setup.tiny else ("llama-7b", "bfloat16")
    shapes = [[2, 32]] if setup.tiny else [[1, 256], [4, 1024]]
    shared = {"device": setup.device, "size": size, "dtype": dtype, "shapes": shapes, "compile": setup.compile}
    names = {"8-bit": 8, "float": None, "4-bit": 4}
    return {
        name: {**shared, "bits": bits, "optimizer": "q-apollo-mini" if bits else "apollo-mini", "rest": "adafactor"}
        for name, bits in names.items()
    }


def large(setup: Setup) -> list[Case]:
    """One for each kind of weights."""
    run = "benchmarks.gpu.large:measure"
    shares = {"8-bit": 1.4}  # what it compiles, the others need, too
    return [Case("7b", name, run, config, shares.get(name, 1.0)) for name, config in large_configs(setup).items()]


def plan(setup: Setup) -> list[Case]:
    """The plans of the same steps."""
    return [Case("plan", "7b", "benchmarks.gpu.large:predict", {"device": "cpu", "of": large_configs(setup)})]


def contract(setup: Setup) -> list[Case]:
    """The goldens, and every optimizer."""
    config = {"device": setup.device, "steps": 2 if setup.tiny else 5, "width": 16 if setup.tiny else 96}
    golden = Case("contract", "golden", "benchmarks.gpu.contract:golden", {"device": setup.device}, 0.4)
    return [golden, Case("contract", "eager", "benchmarks.gpu.contract:eager", config)]


def suite(setup: Setup) -> list[Case]:
    """The tests that are marked."""
    config = {"device": setup.device, "packages": ["pytest"]}
    return [Case("contract-full", "pytest", "benchmarks.gpu.contract:full", config)]


def compiled(setup: Setup) -> list[Case]:
    """Every rule, in the order of these kinds of weights."""
    config: Line = {"device": setup.device, "steps": 4}
    if setup.tiny:  # a CPU's compiler takes ten seconds for each
        config |= {"shape": [48, 96], "kinds": ["float32"], "only": ["apollo-mini"]}
    else:
        config |= {"shape": [1376, 512], "kinds": ["low-bit", "bfloat16", "float32"], "only": None}
    return [Case("compiled", "rules", "benchmarks.gpu.compiled:measure", config)]


def tools(setup: Setup) -> list[Case]:
    """`pretrain` and Trainer, resumed; FSDP2."""
    run, shared = "benchmarks.gpu.tools", {"device": setup.device}
    width = 16 if setup.tiny else 192
    return [
        Case("tools", "fsdp2", f"{run}:sharded", {**shared, "width": width}),
        Case("tools", "pretrain", f"{run}:command", {**shared, "size": "llama-1m" if setup.tiny else "llama-60m"}, 2.0),
        Case("tools", "trainer", f"{run}:trainer", {**shared, "packages": ["accelerate"]}),
    ]


def run_configs(setup: Setup) -> Line:
    """What all runs of `train` and `race` have in common."""
    shared = {"device": setup.device, "compile": setup.compile}
    if setup.tiny:
        text = {"source": str(ROOT / "apollo_optim"), "tokens": 300, "seq": 32, "batch": 2, "evaluated": 512}
        model = {"size": "llama-1m", "vocabulary": None, "dtype": "float32", "most": 8, "warmup": 2}
        return {**shared, **text, **model}
    text = {"source": "packages", "tokens": 4096, "seq": 256, "batch": 128, "evaluated": 65536}
    model = {"size": "llama-60m", "vocabulary": 32000, "dtype": "bfloat16", "most": None, "warmup": 50}
    return {**shared, **text, **model}


def train(setup: Setup) -> list[Case]:
    """One for each optimizer; a constant rate, so that runs of any length can be compared at equal tokens."""
    shared = {**run_configs(setup), "schedule": "constant", "rates": RATES}
    return [Case("train", name, "benchmarks.gpu.training:train", {**shared, "optimizer": name}) for name in RATES]


def graph(setup: Setup) -> list[Case]:
    """Of one size; on a CPU it says that there are none."""
    size: Line = {"size": "llama-1m" if setup.tiny else "llama-350m", "layers": 1 if setup.tiny else None}
    shared = {"device": setup.device, "dtype": "bfloat16", "blocks_only": False, "rounds": 3 if setup.tiny else 10}
    config = {**shared, **size, "optimizers": ["apollo-mini", "adamw"]}
    return [Case("graph", "step", "benchmarks.gpu.graph:measure", config)]


def race(setup: Setup) -> list[Case]:
    """The same tokens for all, each with its whole schedule and the rates that docs/rates.md knows."""
    config = {**run_configs(setup), "schedule": "cosine", "rates": {}, "optimizers": ["adamw", "apollo-mini", "full"]}
    return [Case("race", "adamw-mini-full", "benchmarks.gpu.training:race", config)]


PARTS = [
    Part("env", "the machine, its two ceilings, a compiler", 15, environment),
    Part("step", "the step beside fused AdamW and the peers", 90, step, together=True),
    Part("7b", "LLaMA-7B: forward, backward and step; memory, tokens/s", 140, large),
    Part("contract", "every optimizer beside the CPU's numbers", 50, contract, together=True),
    Part("compiled", "every rule compiled beside itself eager", 60, compiled),
    Part("train", "llama-60m with AdamW, APOLLO and APOLLO-Mini", 115, train, together=True),
    Part("plan", "what apollo_optim.plan says of the part 7b", 60, plan, background=True),
    Part("race", "llama-60m, AdamW, APOLLO-Mini and `full` at equal tokens", 360, race, by_default=False),
    Part("tools", "pretrain and Trainer, resumed to the bit; FSDP2", 180, tools, by_default=False),
    Part("graph", "a whole step as one CUDA graph", 60, graph, by_default=False),
    Part("contract-full", "the test suite's -m gpu", 600, suite, by_default=False),
]
