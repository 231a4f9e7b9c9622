"""The command `apollo-optim`: finds the subcommand, and turns what went wrong into one line and an exit code.

Only the subcommand that is asked for is imported, so that `--help` answers at once.

Exit codes: 0 done; 1 the run failed (a loss that is not a number, a full disk); 2 the input is wrong; 130 interrupted.
"""

import importlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from ..core.errors import InputError, nearest
from ..core.printing import Notes, is_unicode, say
from .waiting import wait_politely
from .words import complain

DEBUG = "--debug"
COMMANDS = {
    "pretrain": "train a causal language model from a run file",
    "finetune": "fine-tune a model on questions and answers",
    "data": "what rows of a run file look like, and what is learnt of them",
    "plan": "what a run would take of memory, for every optimizer",
    "optimizers": "list the optimizers, their defaults and their papers",
    "sample": "let a trained model write text",
    "chat": "talk to a tuned model",
    "eval": "score a model on a text, on answers, on lm-eval's tasks",
    "report": "draw loss and memory of one run or several, and print the table",
    "bench": "measure speed, memory and quality against other optimizers",
    "export": "write a checkpoint as a Hugging Face directory",
    "completion": "print a script that completes these words in bash, zsh or fish",
    "env": "print what a bug report needs: versions, processor, GPU",
    "shim": "print a folder for PYTHONPATH that stands in for apollo-torch",
}

HELP = f"""usage: apollo-optim COMMAND [...]

Train language models with a small part of AdamW's memory: with APOLLO, or recipes of Muon.

commands:
{"".join(f"  {name:<12}{summary}{chr(10)}" for name, summary in COMMANDS.items())}
  apollo-optim COMMAND --help says more; --debug shows all of what went wrong.
  It ends with 0 when done, 1 when a run failed, 2 when its input is wrong, 130 when interrupted. NO_COLOR is respected.

examples:
  apollo-optim pretrain --out out/first                     a small LLaMA on Python source, nothing to download
  apollo-optim pretrain --out out/first --resume            go on after a stop
  apollo-optim pretrain --config runs/llama-60m-apollo.yaml a run of the papers: C4 from the hub, for a GPU
  apollo-optim finetune --model.name out/first/model --data.source pairs.jsonl
  apollo-optim plan llama-7b --release --memory 24GB        what would fit
  apollo-optim sample out/first --prompt "def main("
  apollo-optim report out/first out/adamw                   side by side
"""


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    debug = DEBUG in words
    words = [word for word in words if word != DEBUG]
    # Before torch is imported: large tensors of a CPU come in pages of 2 MB, which the system hands out much faster.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if words[:1] != ["bench"]:  # which measures the same as by python -m benchmarks.NAME
        wait_politely()
    logger, notes = logging.getLogger("apollo_optim"), Notes()
    level = logger.level
    logger.addHandler(notes)
    logger.setLevel(logging.INFO)
    try:
        return guarded(lambda: run(words), debug=debug)
    finally:
        logger.removeHandler(notes)
        logger.setLevel(level)


def guarded(work: Callable[[], int], *, debug: bool = False) -> int:
    """Do it; what goes wrong is said in one line (`debug`: all of it). Returns the exit code."""
    try:
        return work()
    except InputError as error:
        if debug:
            say("".join(traceback.format_exception(error)), error=True)
        return complain(error, 2)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("apollo_optim"):
            raise
        install = "pip install 'apollo-optim[train]' (in a checkout: '.[train]')"
        return complain(f"this needs {error.name}, which is not installed: {install}", 2)
    except KeyboardInterrupt as stop:
        # The loop has saved, and says how to go on; elsewhere there is nothing to say.
        say(*stop.args, error=True)
        return 130
    except BrokenPipeError:
        # `apollo-optim optimizers | head`: the reader has seen enough. Python would complain at exit when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return complain(f"{error.filename}: {error.strerror}" if error.filename else error, 1)


def run(words: list[str]) -> int:
    for number, word in enumerate(words, 1):
        if not is_unicode(word):
            raise InputError(f"word {number} of the command, {word}, is not UTF-8: give the file another name")
    if not words or words[0] in ("-h", "--help", "help"):
        say(HELP.rstrip())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        from .. import __version__

        say(f"apollo-optim {__version__}")
        return 0
    name, *rest = words
    if name not in COMMANDS:
        raise InputError(f"unknown command {name}{nearest(name, COMMANDS)}; there are {', '.join(COMMANDS)}")
    module = importlib.import_module(f".{name}", __package__)
    code: int = module.run(rest)
    return code
