"""The shell our optimizers share: a rule for the matrices that ask for it, AdamW for the rest."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from apollo_optim.core import layout
from apollo_optim.core.compile import can_compile
from apollo_optim.core.errors import InputError
from apollo_optim.core.project import channel_view, quick_products
from apollo_optim.core.random import mix_seed
from apollo_optim.optim.fast import Graphs, is_compiled, prepare_compiled
from apollo_optim.optim.knobs import Group, check_group, decide_rank
from apollo_optim.optim.rest import RULES, advance_rest
from apollo_optim.optim.step import Numbers, Spec, State, Step, advance, as_matrix, numbers_of, spec_of


class MatrixOptimizer(torch.optim.Optimizer):
    """A matrix in a group with a ``rank`` follows the rule; every other parameter, AdamW.

    A subclass writes ``init_rule``, which makes its state (shapes alone decide it, so it runs on the meta device too),
    and ``direction``, a pure function from a gradient and that state to a ``Step``.
    """

    knobs: ClassVar[frozenset[str]]
    compile: bool | None = None

    def __init__(self, params: Iterable[Any], defaults: Group, *, compile: bool | None = None) -> None:
        self.compile = compile
        self._compiled: Graphs = {}
        super().__init__(*decide_rank(params, defaults, type(self).__name__))

    @classmethod
    def init_rule(cls, view_ck: Tensor, group: Group) -> State:
        raise NotImplementedError

    @classmethod
    def direction(cls, grad_ck: Tensor, state: State, n: Numbers, spec: Spec) -> Step:
        raise NotImplementedError

    def add_param_group(self, param_group: Group) -> None:
        check_group(param_group, self.defaults, self.knobs, type(self).__name__)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient. Returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._take([(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None])
        return loss

    @torch.no_grad()
    def step_one(self, p: Tensor, group: Group) -> None:
        """One parameter's step: what a backward hook calls."""
        self._take([(p, group)])

    def _take(self, pairs: list[tuple[Tensor, Group]]) -> None:
        """Step them, all of them prepared first: a large matrix leaves nothing of Python in a core's cache."""
        for p, _ in pairs:
            if p.grad is None or p.grad.is_sparse:
                shape = tuple(p.shape)
                raise InputError(f"no dense gradient of the parameter {shape}; nn.Embedding(sparse=False) gives one")
        prepared = [self._prepared(p, p.grad, group) for p, group in pairs]
        with quick_products():
            for advance_one in prepared:
                advance_one()

    def _prepared(self, p: Tensor, grad: Any, group: Group) -> Callable[[], None]:
        """One parameter's step, all but what is done to its tensors."""
        state = self.state[p]
        if not state:
            state.update(self.init_state(p, group, self._position(p)))
        state["step"] += 1
        step = int(state["step"].item())  # on the CPU: no device waits for it
        spec = spec_of(p, group, step)
        numbers = numbers_of(p, group, step, state["seed"], spec)
        rule: Any = self.direction if spec.rule else RULES[spec.rest]
        tensors = {name: t for name, t in state.items() if isinstance(t, Tensor) and name != "step"}
        asked = is_compiled(self.compile, p, p.device.type)
        if asked and not layout.is_sharded(p) and can_compile(p.device.type):
            return prepare_compiled(self._compiled, rule, p, grad, tensors, numbers, spec)
        return partial(advance if spec.rule else advance_rest, rule, p, grad, tensors, numbers, spec)

    def init_state(self, p: Tensor, group: Group, position: int = 0) -> State:
        """All this parameter will ever keep: later steps add no key and change no shape.

        Runs on the meta device too, so that plans and tables count the bytes of the code that will run.
        """
        spec = spec_of(p, group, 1)
        view_ck, stack = as_matrix(p.detach(), spec.conv), tuple[int, ...]()
        if spec.rule:
            view_ck = channel_view(view_ck)
            rule_state, stack = self.init_rule(view_ck, group), tuple(view_ck.shape[:-2])
        else:
            rule_state = RULES[spec.rest].init(view_ck, group)
        return {
            "step": torch.zeros((), dtype=torch.float32, device="cpu"),
            "seed": mix_seed(group["seed"], position),
            "skipped": layout.zeros(stack, view_ck, torch.int32),
            **rule_state,
        }

    def _position(self, p: Tensor) -> int:
        everything = (q for group in self.param_groups for q in group["params"])
        return next(i for i, q in enumerate(everything) if q is p)

    def load_state_dict(self, state_dict: State) -> None:
        """As torch's, but every tensor keeps the dtype it was saved in, and a foreign state is refused.

        torch casts all of them except ``step`` to their parameter's dtype, which rounds the fp32 moments of a bf16
        weight. Raises InputError, before anything is changed, where a state is not this optimizer's.
        """
        pairs = [
            (i, p, saved)
            for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=False)
            for i, p in zip(saved["params"], group["params"], strict=False)
        ]
        states = {i: (p, saved, state_dict["state"][i]) for i, p, saved in pairs if i in state_dict["state"]}
        expected = {i: self._check_saved(i, state, p, saved) for i, (p, saved, state) in states.items()}
        super().load_state_dict(state_dict)
        for i, (p, _, state) in states.items():
            for name, value in state.items():
                if isinstance(value, Tensor) and name != "step":
                    self.state[p][name] = layout.copied(value.detach(), expected[i][name], p.device)

    def _check_saved(self, i: Any, saved: State, p: Tensor, group: Group) -> State:
        """The state that is expected, on the meta device."""
        # torch adds keys of its own to the defaults when a state is loaded (``differentiable``): they are not asked for
        missing = [key for key in self.defaults if key in self.knobs and key not in group]
        if missing:
            raise InputError(f"this state is not {type(self).__name__}'s: its param_groups lack {', '.join(missing)}")
        expected = self.init_state(torch.empty(p.shape, dtype=p.dtype, device="meta"), group)
        ours, theirs = ({k: tuple(getattr(v, "shape", ())) for k, v in s.items()} for s in (expected, saved))
        if ours != theirs:
            raise InputError(
                f"the saved state of parameter {i}, {tuple(p.shape)}, does not fit {type(self).__name__}: expected "
                f"{ours}, found {theirs}. Build the model and its param_groups as they were when it was saved."
            )
        return expected

    def __getstate__(self) -> State:
        return {**super().__getstate__(), "compile": self.compile, "_compiled": {}}
