"""Which parameters use the rule: targets, exclusions, tied heads, experts, and the printed table."""

import warnings

import pytest
import torch
from low_bit import prepare
from torch import nn

from apollo_optim import (
    AdamW,
    Apollo,
    ApolloMini,
    InputError,
    Recipe,
    RuleOptimizer,
    build_optimizer,
    describe,
    list_optimizers,
    param_groups,
    quantize_weights,
    rule_of,
)
from apollo_optim.optim.recipes import find_optimizer

transformers = pytest.importorskip("transformers")


def llama(**config) -> nn.Module:
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1} | config
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**sizes))


def by_name(model: nn.Module, **kwargs) -> dict[str, set[str]]:
    """Group name -> names of its parameters; every parameter in exactly one."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = param_groups(model, **{"rank": 2, **kwargs})
    members = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(members) == sorted(names.values())
    return {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}


def test_a_llama_falls_into_four_groups():
    groups = by_name(llama())
    assert set(groups) == {"matrices", "embedding", "head", "norms"}
    assert groups["embedding"] == {"model.embed_tokens.weight"}
    assert groups["head"] == {"lm_head.weight"}
    assert all("proj" in name for name in groups["matrices"])
    assert len(groups["matrices"]) == 14
    assert len(groups["norms"]) == 5


def test_a_tied_head_is_an_embedding_once():
    groups = by_name(llama(tie_word_embeddings=True))
    assert "head" not in groups
    assert groups["embedding"] == {"model.embed_tokens.weight"}


def gpt2() -> nn.Module:
    sizes = {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    with torch.device("meta"):
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


def test_what_is_1d_never_decays():
    """GPT-2's `ln_1` has no "norm" in its name."""
    model = gpt2()
    optimizer = build_optimizer("apollo-mini", model, weight_decay=0.1)
    decayed = {p for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {p for p in model.parameters() if p.ndim > 1}


class Gate(nn.Module):
    """A mixture as transformers 5 has it: a router, stacks of experts and their biases."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 4, bias=False)
        self.experts = nn.ParameterDict({"up": torch.randn(4, 24, 16), "up_bias": torch.randn(4, 24)})


def test_parameters_are_sorted_by_what_they_are():
    model = nn.ModuleDict({"mlp": Gate(), "rnn": nn.LSTM(16, 16), "attention": nn.MultiheadAttention(16, 2)})
    model["weighed"] = nn.utils.parametrizations.weight_norm(nn.Linear(16, 24))
    groups = by_name(model, targets="all-linear")
    assert groups["norms"] >= {"mlp.experts.up_bias", "rnn.bias_ih_l0", "weighed.bias"}
    assert groups["matrices"] >= {"mlp.experts.up", "rnn.weight_ih_l0", "attention.in_proj_weight"}
    assert "weighed.parametrizations.weight.original1" in groups["matrices"]
    assert "mlp.gate.weight" in groups["others"]
    assert "mlp.gate.weight" in by_name(model, targets="mlp")["others"], "a plain word does not take a router"
    assert "mlp.gate.weight" in by_name(model, targets=["*.gate", "mlp"])["matrices"]
    assert quantize_weights(nn.ModuleDict({"mlp": Gate()}), targets="mlp") == ["mlp.experts.up"]


def test_adapters_follow_the_rule():
    """rank "auto" is a quarter of what is trained, and what is frozen has no state to be counted."""
    model = nn.ModuleDict({"attn": nn.Linear(64, 64, bias=False)})
    model.requires_grad_(False)
    model["attn"].lora_A, model["attn"].lora_B = nn.Linear(64, 8, bias=False), nn.Linear(8, 64, bias=False)
    optimizer = build_optimizer("apollo", model, targets="attn")
    assert optimizer.param_groups[0]["rank"] == 2
    assert "64 x 64" not in describe(optimizer)
    with pytest.raises(InputError, match="no matrix uses the rule at rank 8"):
        build_optimizer("apollo", model, targets="attn", rank=8)


def test_a_seed_is_the_names_whatever_else_is_there():
    params = [(f"layers.{i}.weight", nn.Parameter(torch.ones(8, 16))) for i in range(3)]
    alone = [ApolloMini([pair], rank=1) for pair in params]
    wrapped = [(name.replace("layers.", "module.layers._orig_mod."), p) for name, p in params]
    seeds = []
    for optimizers in (alone, [ApolloMini(params, rank=1)], [ApolloMini(wrapped[::-1], rank=1)]):
        for _, p in params:
            p.grad = torch.randn(p.shape)
        for optimizer in optimizers:
            optimizer.step()
        seeds.append([s[p]["seed"] for _, p in params for s in (o.state for o in optimizers) if p in s])
    assert seeds[0] == seeds[1] == seeds[2]
    assert len(set(seeds[0])) == 3


def test_most_weights_on_another_rule_are_said():
    with pytest.warns(UserWarning, match="of the hidden weights use another rule"):
        build_optimizer("apollo-mini", llama(), targets="k_proj")


def test_most_weights_on_another_rule_are_said_by_every_way_in():
    """A rank that is too large, targets that are too few, groups written by hand: nothing uses AdamW in silence."""
    model, said = llama(), "of the hidden weights use another rule"
    weights = [p for p in model.parameters() if p.ndim > 1]
    for make in (
        lambda: Apollo(weights, rank=64),
        lambda: Apollo([{"params": weights, "rank": 64}, {"params": [nn.Parameter(torch.ones(2))]}]),
        lambda: ApolloMini(param_groups(model, rank=1, targets="k_proj")),
        lambda: RuleOptimizer([{"params": weights, "rule": "apollo", "rank": 64}]),
        lambda: RuleOptimizer(param_groups(model, rank=1, rule="apollo-mini", targets="k_proj")),
    ):
        with pytest.warns(UserWarning, match=said):
            make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ApolloMini(param_groups(model, rank=1))
        Apollo([{"params": weights[:1]}, {"params": weights[1:], "rank": 2}])
        AdamW(model.parameters())


def test_rule_of_names_the_rule_of_a_parameter():
    model = llama(num_key_value_heads=1)  # k and v: 16 x 8
    optimizer = build_optimizer("apollo", model, rank=8, rest="adafactor")
    names = {id(p): name for name, p in model.named_parameters()}
    rules = {names[id(p)]: rule_of(p, group) for group in optimizer.param_groups for p in group["params"]}
    first = "model.layers.0.self_attn."
    assert (rules[first + "q_proj.weight"], rules[first + "k_proj.weight"]) == ("apollo", "adamw")
    assert (rules["lm_head.weight"], rules["model.norm.weight"]) == ("adafactor", "adamw")
    group = param_groups(model, rank=8)[0]
    with pytest.raises(InputError, match=r"give one of optimizer\.param_groups"):
        rule_of(group["params"][0], group)


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("mlp", 6),
        (["mlp", "attn"], 14),
        ("*.q_proj", 2),
        ("model.layers.0.*", 7),
        (r"re:layers\.[01]\.self_attn\.[qk]_proj$", 4),
        ("all-linear", 14),
        (["q_proj", "attn"], 8),
        (["attn", "q_proj"], 8),  # the second is no typo: the first took all of it
    ],
)
def test_targets(targets, count):
    groups = by_name(llama(), targets=targets)
    assert len(groups["matrices"]) == count
    assert ("others" in groups) == (count < 14)
    assert "lm_head.weight" in groups["head"], "all-linear leaves the head out"


def test_a_head_can_be_a_target_by_name():
    assert "lm_head.weight" in by_name(llama(), targets=["lm_head", "mlp"])["matrices"]


def test_exclusions():
    groups = by_name(llama(), exclude="v_proj")
    assert groups["others"] == {f"model.layers.{i}.self_attn.v_proj.weight" for i in (0, 1)}


@pytest.mark.parametrize("kwargs", [{"targets": "atn"}, {"targets": ["attn", "mpl"]}, {"exclude": "v_porj"}])
def test_what_matches_nothing_is_an_error_that_lists_what_exists(kwargs):
    with pytest.raises(InputError, match="matches nothing") as error:
        param_groups(llama(), rank=2, **kwargs)
    assert "model.layers.*.self_attn.v_proj" in str(error.value)
    assert "lm_head" in str(error.value)


def test_knobs_go_where_they_mean_something():
    groups = {
        g["name"]: g
        for g in param_groups(llama(), rank=2, rest_lr=3e-3, lr=1e-2, scale=4.0, weight_decay=0.1, betas=(0.9, 0.95))
    }
    assert groups["matrices"]["scale"] == 4.0
    assert groups["matrices"]["rank"] == 2
    assert all("scale" not in g and "rank" not in g for name, g in groups.items() if name != "matrices")
    assert groups["matrices"]["lr"] == 1e-2
    assert groups["head"]["lr"] == groups["embedding"]["lr"] == groups["norms"]["lr"] == 3e-3
    assert groups["norms"]["weight_decay"] == 0.0
    assert groups["head"]["weight_decay"] == 0.1
    assert all(g["betas"] == (0.9, 0.95) for g in groups.values())


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({}, (1e-2, 1e-2, 1e-2)),
        ({"rest_lr": 2e-3}, (2e-3, 2e-3, 2e-3)),
        ({"embedding_lr": 3e-2}, (3e-2, 1e-2, 1e-2)),
        ({"rest_lr": 2e-3, "head_lr": 5e-3}, (2e-3, 5e-3, 2e-3)),
        ({"embedding_lr": 3e-2, "head_lr": 5e-3, "norm_lr": 0.0}, (3e-2, 5e-3, 0.0)),
    ],
)
@pytest.mark.parametrize("name", ["adamw", "apollo-mini"])
def test_embedding_head_and_norms_have_rates_of_their_own(name, rates, expected):
    """Each falls back to rest_lr, and that to lr; the matrices have lr whatever the others say."""
    groups = build_optimizer(name, llama(), lr=1e-2, exclude="v_proj", **rates).param_groups
    found = {group["name"]: group["lr"] for group in groups}
    assert (found["embedding"], found["head"], found["norms"]) == expected
    assert found["matrices"] == 1e-2
    assert found["others"] == rates.get("rest_lr", 1e-2)


def test_both_groups_of_what_decays_and_what_does_not_have_the_rate():
    groups = param_groups(llama(), rank=2, lr=1e-2, rest_lr=5e-3, targets="mlp", no_decay="q_proj")
    named = {g["name"]: g for g in groups}
    assert named["others"]["lr"] == named["others_no_decay"]["lr"] == 5e-3
    assert named["norms"]["weight_decay"] == 0.0, "what is 1-D never decays"


def test_the_rate_of_a_group_that_is_not_there_is_an_error_that_says_what_to_name_instead():
    bare = nn.Sequential(nn.Linear(8, 8, bias=False))
    tied = llama(tie_word_embeddings=True)
    for model, kwargs, message in [
        (tied, {"head_lr": 1e-2}, "head_lr=0.01: .*tied to the embedding goes with it .embedding_lr"),
        (llama(), {"head_lr": 1e-2, "targets": ["lm_head", "mlp"]}, "one that is a target with the matrices .lr"),
        (bare, {"embedding_lr": 1e-2, "targets": "0"}, "embedding_lr=0.01: this model has no such group"),
        (bare, {"norm_lr": 1e-2, "targets": "0"}, "norm_lr=0.01: this model has no such group"),
    ]:
        with pytest.raises(InputError, match=message):
            param_groups(model, rank=2, **kwargs)


def test_biases_do_not_decay_and_no_decay_can_be_told():
    gpt2 = transformers.AutoModelForCausalLM.from_config(
        transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, n_positions=32)
    )
    groups = by_name(gpt2)
    assert len(groups["matrices"]) == 4, "Conv1D of GPT-2, too"
    assert groups["embedding"] == {"transformer.wte.weight", "transformer.wpe.weight"}
    named = {g["name"]: g for g in param_groups(llama(), rank=2, weight_decay=0.1, no_decay=("norm", "down_proj"))}
    assert named["matrices_no_decay"]["weight_decay"] == 0.0
    assert len(named["matrices_no_decay"]["params"]) == 2
    assert named["matrices"]["weight_decay"] == 0.1


def test_experts_kept_as_one_parameter_follow_the_rule():
    """transformers 5 stores the experts of a layer as one 3-D parameter: nearly all of such a model."""
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    stacks = [name for name, p in model.named_parameters() if p.ndim == 3]
    assert stacks
    assert set(stacks) <= by_name(model)["matrices"]
    assert "4 x" in describe(build_optimizer("apollo", model, rank=2))


def test_convolutions_are_seen_as_matrices():
    model = nn.ModuleDict({"attn": nn.Conv1d(8, 8, 3), "mlp": nn.Linear(8, 8)})
    groups = {g["name"]: g for g in param_groups(model, rank=2)}
    assert groups["matrices_conv"]["view"] == "conv"
    assert groups["matrices_conv"]["rank"] == groups["matrices"]["rank"] == 2


@pytest.mark.parametrize("info", list_optimizers(), ids=lambda info: info.name)
def test_every_registered_optimizer_is_built_by_name(info):
    model = llama()
    prepare(info.name, model, targets=("attn", "mlp"))
    optimizer = build_optimizer(info.name, model, lr=5e-3, rest_lr=1e-3)
    assert optimizer.param_groups[0]["rule"] == info.rule
    assert {g["name"]: g["lr"] for g in optimizer.param_groups} == {
        "matrices": 5e-3, "embedding": 1e-3, "head": 1e-3, "norms": 1e-3,
    }  # fmt: skip
    assert info.summary
    assert info.paper
    table = describe(optimizer)
    assert "matrices" in table
    assert "total" in table


def test_a_matrix_too_small_for_its_rank_is_said_to_follow_adamw():
    model = llama(num_key_value_heads=1)  # k and v: 16 x 8
    assert "AdamW (not apollo: too small)" in describe(build_optimizer("apollo", model, rank=8))
    with pytest.raises(InputError, match="no matrix uses the rule at rank 16"):
        build_optimizer("apollo", model, rank=16)


def rules_of(optimizer: torch.optim.Optimizer) -> dict[str, set[str]]:
    """Group -> the rules that its parameters follow."""
    return {g["name"]: {rule_of(p, g) for p in g["params"]} for g in optimizer.param_groups}


@pytest.mark.parametrize("first", ["apollo", "apollo-mini", "adamw", "muon", "adafactor"])
@pytest.mark.parametrize("second", ["adamw", "adamw8bit", "adafactor", "scale", "muon", "apollo"])
def test_two_rules_share_a_model(first, second):
    """a+b: hidden matrices follow a, embedding and head b, and what is 1-D AdamW."""
    optimizer = build_optimizer(f"{first}+{second}", llama(hidden_size=32), rest_lr=1e-3)
    b = second.removesuffix("8bit")
    assert rules_of(optimizer) == {"matrices": {first}, "embedding": {b}, "head": {b}, "norms": {"adamw"}}
    assert optimizer.param_groups[0]["lr"] == find_optimizer(first).cls.lr
    assert all(group["lr"] == 1e-3 for group in optimizer.param_groups[1:])
    assert ("8bit" in describe(optimizer)) == (second == "adamw8bit")


def test_what_the_first_rule_is_not_for_follows_the_second():
    """Where neither is one for it, AdamW; each rule with its own knobs, wherever they have one name."""
    model = llama(num_key_value_heads=1)  # k and v: 16 x 8
    optimizer = build_optimizer("apollo+muon", model, rank=8, eps=1e-5, nesterov=False, rest_lr=0.5)
    assert rules_of(optimizer)["others"] == {"muon"}
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert (groups["others"]["nesterov"], groups["others"]["lr"]) == (False, 0.5)
    assert groups["matrices"]["eps"] == 1e-5
    optimizer = build_optimizer("apollo+apollo-svd", model, rank=8, rest_rank=12)
    assert rules_of(optimizer)["others"] == {"adamw"}, "16 x 8 is too small for both"
    assert rules_of(optimizer)["embedding"] == {"apollo-svd"}
    ranks = {group["name"]: group.get("rank") for group in optimizer.param_groups}
    assert (ranks["matrices"], ranks["embedding"]) == (8, 12)
    optimizer = build_optimizer("muon+apollo", model, rank=2, momentum=0.5, betas=(0.5, 0.6))
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert (groups["matrices"]["momentum"], groups["head"]["rank"], groups["head"]["betas"]) == (0.5, 2, (0.5, 0.6))


def test_scale_of_everything_is_its_papers():
    """The head after a momentum, the embedding along its vocabulary; what is said by hand stays as it is said."""
    groups = {group["name"]: group for group in build_optimizer("scale+scale", llama(), lr=1e-3).param_groups}
    said = {name: (group.get("normalize"), group.get("momentum")) for name, group in groups.items()}
    assert said == {
        "matrices": ("rows", 0.0),
        "embedding": ("columns", 0.0),
        "head": ("rows", 0.9),
        "norms": (None, None),
    }
    groups = {group["name"]: group for group in build_optimizer("scale+scale", llama(), momentum=0.5).param_groups}
    assert (groups["head"]["momentum"], groups["embedding"]["normalize"]) == (0.5, "columns")


def test_a_recipe_of_ones_own_is_data():
    lone = nn.ModuleDict({"mlp": nn.Linear(32, 16)})
    rules = rules_of(build_optimizer("muon+adamw", lone, targets="mlp"))
    assert rules == {"matrices": {"muon"}, "norms": {"adamw"}}
    recipe = Recipe("mine", "muon", groups={"embedding": "scale", "head": "adamw8bit", "nesterov": False})
    optimizer = build_optimizer(recipe, llama())
    assert rules_of(optimizer) == {"matrices": {"muon"}, "embedding": {"scale"}, "head": {"adamw"}, "norms": {"adamw"}}
    assert optimizer.param_groups[0]["nesterov"] is False
    assert build_optimizer(recipe, llama(), nesterov=True).param_groups[0]["nesterov"] is True


def test_two_rules_are_refused_where_they_make_no_sense():
    lone = nn.ModuleDict({"mlp": nn.Linear(32, 16)})
    for call, message in [
        (lambda: build_optimizer("mouon+adamw", llama()), "'mouon' (in 'mouon+adamw'). Did you mean 'muon'?"),
        (lambda: build_optimizer("muon+adamv", llama()), "'muon+adamv': no rule is called 'adamv'. Did you mean 'ad"),
        (lambda: build_optimizer("muon+adamw+scale", llama()), "a+b is of two rules"),
        (lambda: build_optimizer("muon+", llama()), "a+b is of two rules"),
        (lambda: build_optimizer("muon+scale", llama(), rest="adamw"), "leave rest='adamw' out"),
        (lambda: build_optimizer("muon+scale", llama(), rank=2), "has no rank"),
        (lambda: build_optimizer("muon+scale", llama(), proj="svd"), "It is a key of apollo, apollo-mini, apollo-svd"),
        (
            lambda: build_optimizer("muon+scale", lone, targets="mlp"),
            "nothing uses scale: there is no embedding, head or other",
        ),
        (lambda: build_optimizer("apollo+muon", llama(), rank=16), "no matrix uses the rule at rank 16"),
        (lambda: param_groups(llama(), rank=16, rule="apollo"), "apollo: no matrix uses the rule at rank 16"),
        (lambda: build_optimizer("muon", llama(), rule="adamw"), "has its rule: leave rule='adamw' out"),
    ]:
        with pytest.raises(InputError) as error:
            call()
        assert message in str(error.value)


@pytest.mark.parametrize("name", ["full", "lite", "nano"])
def test_a_recipe_without_a_rate_has_those_of_the_race(name):
    """All of them together, or none: they belong to one another."""
    rates = find_optimizer(name).rates

    def built(model=None, **said):
        groups = build_optimizer(name, model or llama(), exclude="v_proj", **said).param_groups
        average = {key: group[key] for group in groups for key in ("momentum", "betas") if key in rates.keys() & group}
        return {group["name"]: group["lr"] for group in groups}, average

    matrices, rest = rates["lr"], rates["rest_lr"]
    raced = {"matrices": matrices, "embedding": rates["embedding_lr"], "head": rest, "norms": 0.02, "others": rest}
    found, average = built()
    assert found == raced
    assert average == {key: rates[key] for key in average}
    assert built(head_lr=0.5)[0] == {**raced, "head": 0.5}
    assert built(rest_lr=0.5)[0] == {**dict.fromkeys(raced, 0.5), "matrices": matrices}
    assert built(embedding="scale")[0] == {**raced, "embedding": matrices}, "the raced one is another rule's"
    found, average = built(lr=1e-4)
    assert set(found.values()) == {1e-4}
    assert average in ({"momentum": 0.95}, {"betas": (0.9, 0.999)})
    del raced["head"]
    assert built(llama(tie_word_embeddings=True))[0] == raced
    bare = nn.Sequential(nn.Linear(8, 8, bias=False))
    assert build_optimizer(name, bare, targets="0").param_groups[0]["lr"] == matrices


@pytest.mark.parametrize("name", ["full", "lite", "nano"])
def test_a_group_that_is_added_to_a_recipe_is_one_of_it(name):
    optimizer = build_optimizer(name, llama())
    optimizer.add_param_group({"params": [nn.Parameter(torch.empty(8, 8, device="meta"))]})
    matrices, *_, added = optimizer.param_groups
    assert {key for key in added if added[key] != matrices.get(key)} <= {"params", "param_names"}


def test_the_state_of_another_recipe_is_refused():
    """`lite` and `nano` are one rule, of which one keeps a momentum."""
    made = {name: build_optimizer(name, llama().to_empty(device="cpu")) for name in ("lite", "nano")}
    for mine, theirs, here, there in (("lite", "nano", "exp_avg", "nothing"), ("nano", "lite", "nothing", "exp_avg")):
        before = made[mine].state_dict()["param_groups"]
        with pytest.raises(InputError, match=f"keeps {here} of a matrix here and {there} in the saved state"):
            made[mine].load_state_dict(made[theirs].state_dict())
        assert made[mine].state_dict()["param_groups"] == before
    with pytest.raises(InputError, match=r"no state of an optimizer: it has no param_groups"):
        made["nano"].load_state_dict({})


def test_building_refuses_what_it_does_not_know():
    for call, message in [
        (lambda: build_optimizer("full", llama().parameters()), "the whole model comes second"),
        (lambda: build_optimizer(3, llama()), 'a string, such as "lite", or a Recipe: 3 is neither'),
        (lambda: ApolloMini(llama()), "ApolloMini takes parameters or groups, not a LlamaForCausalLM"),
        (lambda: build_optimizer("apolo", llama()), "Did you mean 'apollo'"),
        (lambda: build_optimizer("apollo", llama(), scael=2), "Did you mean 'scale'"),
        (lambda: build_optimizer("apollo", llama(), target=["attn"]), "unknown key 'target'. Did you mean 'targets'"),
        (lambda: build_optimizer("adamw", llama(), heads="scale"), "unknown key 'heads'. Did you mean 'head'"),
        (lambda: param_groups(llama(), rank=4, target=["attn"]), "unknown key 'target'. Did you mean 'targets'"),
        (lambda: build_optimizer("adamw", llama(), rank=4), "has no rank"),
        (lambda: build_optimizer("adamw", llama(), proj="svd"), "unknown key 'proj'. It is a key of apollo, "),
        (lambda: build_optimizer("apollo", llama(), rank=0), "rank=0"),
        (lambda: build_optimizer("apollo", llama(), rank="half"), "rank='half'"),
    ]:
        with pytest.raises(InputError) as error:
            call()
        assert message in str(error.value)
