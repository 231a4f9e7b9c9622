"""ms-swift: every rule and recipe by `--optimizer apollo_optim`, registered by a file for its `--external_plugins`.

echo 'import apollo_optim.integrations.ms_swift' > plugin.py
swift sft --external_plugins plugin.py --optimizer apollo_optim --optim_args name=apollo-mini,rest_lr=1e-5 ...
"""

import ast
from typing import Any

from swift.optimizers import OptimizerCallback, optimizers_map
from torch import nn
from torch.optim import Optimizer

from apollo_optim.core.errors import InputError
from apollo_optim.integrations.transformers import apollo

__all__ = ["NAME", "ApolloCallback"]

NAME = "apollo_optim"  # of `--optimizer`


class ApolloCallback(OptimizerCallback):
    """Makes the optimizer that `--optim_args` names, by `integrations.transformers.apollo` and Trainer's arguments.

    `--optim_args`: `knob=value` with commas between. `name` is the optimizer (by default apollo-mini), all else are
    knobs of `build_optimizer` that are one word or number: `rank`, `rest`, `rest_lr`, `state_dtype`, `targets`, ...
    Learning rate, weight decay and betas are those of the arguments.

    Raises InputError when training begins, for a knob without a value, and as `apollo` and `build_optimizer` do.
    """

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Of the model that is trained: the given one, or the trainer's."""
        model = self.trainer.model if model is None else model
        knobs = parsed(self.args.optim_args or "")
        factory, settings = apollo(knobs.pop("name", "apollo-mini"), self.args, model, **knobs)
        optimizer: Optimizer = factory(model, **settings)
        return optimizer


def parsed(words: str) -> dict[str, Any]:
    """`rank=4,rest=adamw8bit` -> {"rank": 4, "rest": "adamw8bit"}. Raises InputError for a word without `=`."""
    knobs = dict[str, Any]()
    for word in filter(None, words.replace(" ", "").split(",")):
        key, equals, value = word.partition("=")
        if not (key and equals and value):
            raise InputError(f"--optim_args {words}: {word!r} is not knob=value, as in name=apollo-mini,rank=1")
        try:
            knobs[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):  # a word
            knobs[key] = value
    return knobs


optimizers_map[NAME] = ApolloCallback
