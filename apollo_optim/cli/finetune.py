"""`apollo-optim finetune`: a run file as `pretrain` reads it, with other defaults."""

from collections.abc import Sequence

from .pretrain import Story, run_story

DESCRIPTION = """\
Fine-tune a causal language model on questions and answers: all of its weights, or low-bit ones. A run is the same YAML
file as of pretrain, and so are the run directory, Ctrl-C and --resume; only the answers are learnt. Defaults that are
others: model.pretrained true, data.format auto, data.seq_len 512, data.on_bad_line error, train.epochs 3 (unless
train.steps is said), checkpoint.every null, checkpoint.best true; rates and ranks as in docs/fine-tuning.md.

data.source is jsonl or parquet with messages, prompt and completion, instruction, input and output (alpaca), or
conversations (ShareGPT); other names of columns: --data.columns.prompt question."""
EPILOG = """\
examples:
  apollo-optim finetune --model.name out/demo/apollo/model --data.source pairs.jsonl --out out/tuned
  apollo-optim finetune --config runs/finetune-llama-3.2-1b-commonsense.yaml --data.source my.jsonl
  apollo-optim data RUN.yaml                            what is learnt, before anything is
  apollo-optim finetune --out out/tuned --resume        go on after a stop, exactly where it was
  apollo-optim sample out/tuned --prompt "..."

A list is written [a, b]; null asks for the default."""


def story() -> Story:
    """This command's words and defaults."""
    from ..train.finetune import DEFAULTS

    return Story("apollo-optim finetune", DESCRIPTION, EPILOG, DEFAULTS)


def run(argv: Sequence[str]) -> int:
    from ..train.finetune import finetune

    return run_story(finetune, argv, story())
