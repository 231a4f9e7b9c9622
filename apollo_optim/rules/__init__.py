"""Update rules: a file each. `RULES` is the registry: to be in it is to be tested, planned, benched and documented."""

from apollo_optim.core.errors import InputError
from apollo_optim.rules.adafactor import Adafactor
from apollo_optim.rules.adam_mini import AdamMini
from apollo_optim.rules.adamw import AdamW
from apollo_optim.rules.apollo import Apollo, ApolloMini, ApolloSvd
from apollo_optim.rules.base import Rule
from apollo_optim.rules.dct_adamw import DctAdamW
from apollo_optim.rules.fira import Fira
from apollo_optim.rules.flora import Flora
from apollo_optim.rules.foam import Foam
from apollo_optim.rules.galore import Galore
from apollo_optim.rules.lion import Lion
from apollo_optim.rules.lora_pre import LoraPre
from apollo_optim.rules.muon import Muon
from apollo_optim.rules.normuon import NorMuon
from apollo_optim.rules.q_galore import QGalore
from apollo_optim.rules.racs import Racs
from apollo_optim.rules.rmnp import Rmnp
from apollo_optim.rules.sage import Sage
from apollo_optim.rules.scale import Scale
from apollo_optim.rules.sgd import Sgd
from apollo_optim.rules.sinkgd import SinkGd
from apollo_optim.rules.slimadam import SlimAdam
from apollo_optim.rules.sumo import Sumo
from apollo_optim.rules.swan import Swan

RULES: dict[str, type[Rule]] = {
    rule.name: rule
    for rule in (
        Apollo,
        ApolloMini,
        ApolloSvd,
        AdamW,
        Adafactor,
        Scale,
        Muon,
        Sgd,
        Lion,
        NorMuon,
        Racs,
        SinkGd,
        Rmnp,
        Galore,
        Fira,
        AdamMini,
        Flora,
        Foam,
        SlimAdam,
        Swan,
        QGalore,
        Sumo,
        DctAdamW,
        Sage,
        LoraPre,
    )
}


def register(rule: type[Rule]) -> type[Rule]:
    """Make a rule of your own known by its name: to groups, `build_optimizer`, run files, `plan` and the tests.

    Returns it, so that it can decorate a class. Raises InputError for a name that another rule has.
    """
    other = RULES.setdefault(rule.name, rule)
    if (other.__module__, other.__qualname__) != (rule.__module__, rule.__qualname__):
        raise InputError(f"a rule called {rule.name!r} is there already ({other.__module__}.{other.__qualname__})")
    RULES[rule.name] = rule  # a module that is loaded again brings its rule again
    return rule


__all__ = ["RULES", "Adafactor", "AdamW", "Apollo", "ApolloMini", "ApolloSvd", "Muon", "Rule", "Scale", "register"]
