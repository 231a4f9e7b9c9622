"""SGD: "On the importance of initialization and momentum in deep learning", Sutskever et al., ICML 2013."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from apollo_optim.rules.base import Rule, Scalars, Slot, State, Update, knob
from apollo_optim.rules.knobs import BETA, SWITCH


@dataclass(frozen=True)
class Sgd(Rule):
    """torch.optim.SGD's arithmetic, but for the weight decay, which is decoupled as every rule's here.

    `M <- momentum M + G`, a sum and no average: a step is up to 1 / (1 - momentum) gradients long. `W <- W - lr M`, or
    with Nesterov's `W <- W - lr (G + momentum M)`. Without a momentum it is the gradient and keeps nothing.

    When: A lower bound of what state can buy, and models that train without adaptive steps.

    Evidence: torch.optim.SGD's step, but for the decoupled decay (`tests/rules/test_rivals.py`). No quality run of
    it is in the logs yet; the race (`docs/race.md`) has it in its queue.
    """

    name: ClassVar[str] = "sgd"
    title: ClassVar[str] = "SGD"
    paper: ClassVar[str] = "Sutskever et al., ICML 2013"
    summary: ClassVar[str] = "torch.optim.SGD's arithmetic; state 0, or dn with a momentum."
    lr: ClassVar[float] = 0.1

    momentum: float = knob(BETA, "Decay of the sum of the gradients, which is stepped along; 0: none.", 0.0)
    nesterov: bool = knob(SWITCH, "Mix this gradient in once more. Without a momentum it changes nothing.", False)

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        return {"momentum_buffer": Slot(shape, "mean")} if self.momentum else {}

    def update(self, grad: Tensor, state: State, s: Scalars) -> Update:
        if not self.momentum:
            return Update(grad)
        total = grad.float() + state["momentum_buffer"] * self.momentum
        direction = grad.float() + total * self.momentum if self.nesterov else total
        return Update(direction, 1.0, {"momentum_buffer": total})

    def describe(self) -> str:
        return f"SGD, {'Nesterov ' if self.nesterov else ''}momentum {self.momentum:g}" if self.momentum else "SGD"
