"""The one optimizer: every group follows its rule. Groups, state, loading and saving; the step is `apply.py`'s."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from apollo_optim.core.blocks import is_cpu
from apollo_optim.core.compile import can_compile
from apollo_optim.core.errors import InputError
from apollo_optim.core.names import unwrapped
from apollo_optim.core.random import mix_seed, name_word
from apollo_optim.optim.compiled import Graphs, Memo, is_compiled, prepare_compiled
from apollo_optim.optim.describe import warn_of_others
from apollo_optim.optim.knobs import GENERAL, PASSED, PER_STEP, Group, check_group, find_rule, known_keys, refuse_flat
from apollo_optim.optim.loading import fit_groups, fit_state
from apollo_optim.optim.parameter import Known, Shared, chosen_rule, init_state, listed, static_of
from apollo_optim.optim.together import Given, Prepared, alike, take_steps, together


class RuleOptimizer(torch.optim.Optimizer):
    """Every parameter uses the rule that its group names.

    >>> RuleOptimizer([{"params": matrices, "rule": "muon"}, {"params": others, "rule": "adamw", "lr": 1e-3}], lr=2e-3)

    `param_groups(model, ...)` and `build_optimizer(name, model)` make such groups by what the parameters are.

    Args:
        params: Groups, or parameters (with their names, if you like) for one group of `rule`.
        rule: Of groups that name none; `apollo-optim optimizers` lists them. None: every group must name one.
        lr: Of groups that name none; None: the rule's own.
        weight_decay: Decoupled, and applied to the weight before the step, as in torch.optim.AdamW.
        otherwise: The rule for parameters of a group that its rule does not apply to: 0-D and 1-D ones, and for a rule
            with a rank matrices whose small side is no larger.
        state_dtype: How means and squares among the state are stored: "float32", "bfloat16" (halves them; rounded
            stochastically, or 0.999 v rounds back to v), "8bit" or "4bit", for all slots or in a dict by slot. A tensor
            that is too small or too odd for a format with codes stays in fp32.
        stochastic_rounding: Of bf16 weights and bf16 state at their one write per step. fp32 is not affected.
        seed: Every parameter draws its own from this and its name, or its place, at its first step, and keeps it.
        maximize: Step up the gradient, as in torch.optim.
        grad_power: Rules see |g|^p sign(g) in the place of the gradient g, a copy of it (arXiv 2505.24275: 1.2).
        cautious_decay: Decay only where the step goes towards zero, too (arXiv 2510.12402); not of low-bit weights.
        compile: Step a parameter by one compiled function, made once for each shape; None: on a CPU and with CUDA,
            those of 262,144 entries and more; on a CPU they take a quarter to a tenth of the time then.
        **knobs: The rule's own, for groups that do not name them.

    Raises InputError (a ValueError) for unknown rules, keys and wrong values, naming the key.
    """

    compile: bool | None = None

    def __init__(
        self,
        params: Iterable[Any],
        rule: str | None = None,
        lr: float | Tensor | None = None,
        weight_decay: float = 0.0,
        *,
        otherwise: str = "adamw",
        state_dtype: Any = "float32",
        stochastic_rounding: bool = True,
        seed: int = 0,
        view: str | None = None,
        maximize: bool = False,
        grad_power: float = 1.0,
        cautious_decay: bool = False,
        compile: bool | None = None,
        **knobs: Any,
    ) -> None:
        self.compile = compile
        self._rule, self._otherwise, self._knobs = rule, otherwise, knobs
        self._incoming: dict[Tensor, Any] | None = None
        self._had_matrices: list[bool] = []  # by group, when it was made
        self.graphs: Graphs = {}
        self._forget()
        if rule is not None:
            lr = find_rule(rule).lr if lr is None else lr
            self._check_knobs()
        defaults = {
            "lr": 1e-3 if lr is None else lr, "weight_decay": weight_decay, "state_dtype": state_dtype,
            "stochastic_rounding": stochastic_rounding, "seed": seed, "view": view, "maximize": maximize,
            "grad_power": grad_power, "cautious_decay": cautious_decay,
        }  # fmt: skip
        entries = params if isinstance(params, (dict, set)) else listed(params, self.name)
        self._some_rank = any(isinstance(entry, dict) and "rank" in entry for entry in entries)
        super().__init__(entries, defaults)
        if rule is not None:  # torch's schedulers look there for betas or a momentum to cycle
            cls = find_rule(rule)
            self.defaults |= cls.defaults() | {key: knobs[key] for key in cls.knobs() if key in knobs}
        warn_of_others(self.name, rule, self.param_groups)

    def _check_knobs(self) -> None:
        known = known_keys([find_rule(name) for name in (self._rule, self._otherwise) if name is not None])
        for key in self._knobs:
            if key not in known and key != "proj_type":
                check_group({"params": [], "rule": self._rule, "otherwise": self._otherwise, key: None}, self.name)

    @property
    def name(self) -> str:
        """What messages call it."""
        return type(self).__name__

    def add_param_group(self, param_group: Group) -> None:
        """As torch's. Raises InputError where the group says what its rule does not know."""
        params = param_group["params"]
        if not isinstance(params, set):  # torch refuses it: a set has no order
            param_group["params"] = [params] if isinstance(params, Tensor) else list(params)
        self._complete(param_group)
        if not isinstance(params, set):
            check_group(param_group, self.name)
        self._forget()
        self._name(param_group)
        known = known_keys([find_rule(param_group[key]) for key in ("rule", "otherwise")]).keys() | PASSED
        super().add_param_group(param_group)
        self._had_matrices.append(any(p.ndim > 1 for p in param_group["params"]))
        for key in self.defaults.keys() - known:  # torch fills in what another rule knows
            param_group.pop(key)

    def _name(self, group: Group) -> None:
        """torch wants names in all groups or in none: what is added later goes along."""
        if not self.param_groups:
            return
        named = any(isinstance(entry, tuple) for entry in group["params"]) or "param_names" in group
        if "param_names" in self.param_groups[0] and not named:
            first = sum(len(other["params"]) for other in self.param_groups)
            group["param_names"] = [f"unnamed.{first + i}" for i in range(len(group["params"]))]
        elif "param_names" not in self.param_groups[0] and named:
            group.pop("param_names", None)
            group["params"] = [entry[1] if isinstance(entry, tuple) else entry for entry in group["params"]]

    def _complete(self, group: Group) -> None:
        """Give it its rule and the rule's knobs: those of the constructor, then the rule's own defaults."""
        rule, ranked = self._rule, self._rule is not None and "rank" in find_rule(self._rule).knobs()
        given = None if self._some_rank else self._knobs.get("rank")
        if "rule" not in group and ranked and group.get("rank", given) is None:
            group.pop("rank", None)
            rule = self._otherwise if self._some_rank else None
            if rule is None:
                raise InputError(
                    f"{self.name} has no rank: no parameter group names one, so every parameter would use "
                    f"{self._otherwise}. Use {self.name}(apollo_optim.param_groups(model, rank=...)), or pass rank= to "
                    "compress every matrix, embeddings included"
                )
        if group.setdefault("rule", rule) is None:
            raise InputError(
                f"{self.name}: a group names no rule, and the optimizer has none: say rule=... in each, or make them "
                "by apollo_optim.param_groups(model, rule=..., ...)"
            )
        group.setdefault("otherwise", self._otherwise)
        cls = find_rule(group["rule"])
        if "rank" not in cls.knobs() and group.get("rank", 0) is None:  # as groups without a rank have always said it
            del group["rank"]
        own = self._knobs if cls.name in (self._rule, self._otherwise) else {}
        for key, value in {**cls.defaults(), **{key: own[key] for key in cls.knobs() if key in own}}.items():
            group.setdefault(key, value)
        for key in [*find_rule(group["otherwise"]).knobs(), "proj_type"]:
            if key in own:
                group.setdefault(key, own[key])
        for key in (key for key in GENERAL if key in self.defaults):
            group.setdefault(key, self.defaults[key])

    # --- the step ---

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient. Returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        take = self._take
        if torch.compiler.is_compiling():  # `torch.compile(optimizer.step)`: parameters have graphs of their own
            take = torch.compiler.disable(take)  # type: ignore[no-untyped-call]
        take([(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups])
        return loss

    @torch.no_grad()
    def step_one(self, p: Tensor, group: Group) -> None:
        """One parameter's step: what a backward hook calls."""
        self._take([(group, [p])])

    def _take(self, pairs: list[tuple[Group, list[Tensor]]]) -> None:
        """Step them, on a CPU all of them prepared first: a large matrix leaves nothing of Python in a core's cache.

        What steps without a compiler does so together with what is like it.
        """
        for _, params in pairs:
            for p in params:
                if p.grad is None or p.grad.is_sparse:
                    raise InputError(
                        f"no dense gradient of the parameter {tuple(p.shape)}; nn.Embedding(sparse=False) gives one"
                    )
        steps: list[Prepared] = []
        eager: defaultdict[Any, list[Given]] = defaultdict(list)
        memo: Memo = {}
        for group, params in pairs:
            knobs = [value for key, value in group.items() if key not in PER_STEP]
            for p in params:
                known, state = self._known.get(p), self.state[p]
                if known is None or not known.fits(group, knobs, state):
                    known = self._learn(p, group, knobs, state)
                given = known.next_step(p)
                if is_compiled(self.compile, p, p.device.type) and can_compile(p.device.type):
                    take = prepare_compiled(self.graphs, known.shared.graphs, memo, *given)
                    if is_cpu(p.device) or given.static.place.mesh is not None:
                        steps.append((given, take))
                    else:
                        take()  # it goes on there while the next one is prepared here
                else:
                    eager[alike(given)].append(given)
        for some in eager.values():
            steps += together(some)
        take_steps(steps)

    def _learn(self, p: Tensor, group: Group, knobs: list[Any], state: dict[str, Any]) -> Known:
        """What stays of a parameter from step to step; its state, where there is none yet."""
        if any(other is group and had for other, had in zip(self.param_groups, self._had_matrices, strict=True)):
            refuse_flat(p, group, self.name)
        if not state:
            state.update(init_state(p, group, self._seed(p, group)))
        rule = chosen_rule(p, group)
        static = static_of(p, group, rule)
        of_group = id(group), rule, static
        if of_group not in self._shared:
            self._shared[of_group] = Shared(group, rule, static)
        known = self._known[p] = Known(p, group, knobs, state, self._shared[of_group])
        return known

    # --- state ---

    def _forget(self) -> None:
        """What is known of parameters, between steps."""
        self._known: dict[Tensor, Known] = {}
        self._shared: dict[Any, Shared] = {}
        self._where: dict[Tensor, tuple[int, int, int]] = {}

    def locate(self, p: Tensor) -> tuple[Group, int]:
        """The group of a parameter, and its position among all parameters. Raises KeyError if it is in none."""
        for _ in range(2):
            group, index, position = self._where.get(p, (-1, 0, 0))
            if 0 <= group < len(self.param_groups):
                params = self.param_groups[group]["params"]
                if index < len(params) and params[index] is p:
                    return self.param_groups[group], position
            places = ((g, i) for g, group in enumerate(self.param_groups) for i in range(len(group["params"])))
            self._where = {
                self.param_groups[g]["params"][i]: (g, i, position) for position, (g, i) in enumerate(places)
            }
        raise KeyError(p)

    def _seed(self, p: Tensor, group: Group) -> int:
        """Of a parameter's random numbers: from its name where there are names, otherwise from its position."""
        _, position = self.locate(p)
        if "param_names" not in group:
            return mix_seed(group["seed"], position)
        return mix_seed(group["seed"], name_word(unwrapped(group["param_names"][self._where[p][1]])))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but every tensor keeps the dtype it was saved in, and a foreign state is refused.

        torch casts all of them except `step` to their parameter's dtype, which rounds the fp32 moments of a bf16
        weight. What is saved is judged after the hooks that were registered have seen it. Groups and states are matched
        by name where both sides have names, otherwise by position.

        Raises InputError, before anything is changed, where a state is not this optimizer's.
        """
        incoming: dict[Tensor, Any] = {}

        def fit(_: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            groups = fit_groups(self.param_groups, saved.get("param_groups"), self.name)
            for mine, theirs in zip(self.param_groups, groups, strict=True):
                for p, number in zip(mine["params"], theirs["params"], strict=True):
                    if saved["state"].get(number):
                        incoming[p] = fit_state(p, theirs, saved["state"][number], number, self.name)
            self._incoming = incoming
            return {**saved, "param_groups": groups, "state": {}}

        last = self.register_load_state_dict_pre_hook(fit)
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
            self._incoming = None

    def __getstate__(self) -> dict[str, Any]:
        own = ("compile", "_rule", "_otherwise", "_knobs", "_some_rank", "_had_matrices")
        return {**super().__getstate__(), **{key: getattr(self, key) for key in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        incoming: dict[Tensor, Any] | None = getattr(self, "_incoming", None)
        if incoming is not None:  # within `load_state_dict`, before its hooks
            state = {**state, "state": defaultdict(dict, incoming)}
        super().__setstate__(state)
        self._forget()
        self.__dict__.setdefault("graphs", {})
        self.__dict__.setdefault("_incoming", None)
