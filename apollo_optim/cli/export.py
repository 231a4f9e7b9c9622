"""`apollo-optim export`: a checkpoint as a directory that `from_pretrained` opens."""

from collections.abc import Sequence

from ..core.printing import say
from .words import CONSENT, CONSENT_HELP, Parser, home


def run(argv: Sequence[str]) -> int:
    parser = Parser(
        "apollo-optim export",
        "Write a checkpoint of a run as a Hugging Face directory: weights as safetensors, config, tokenizer.\n"
        "(A finished run has one of its last step already: RUN/model.)",
        "examples:\n  apollo-optim export out/demo\n  apollo-optim export out/demo --step 200 --out demo-at-200",
    )
    parser.add_argument("run", metavar="RUN", help="a run directory")
    parser.add_argument("--step", type=int, help="the checkpoint of this step (the latest)")
    parser.add_argument("--out", metavar="DIR", help="where to (RUN/model)")
    parser.add_argument(CONSENT, action="store_true", help=CONSENT_HELP + "; the export names it, too")
    args = parser.parse(argv)
    from ..train.checkpoint import export

    say(
        export(
            home(args.run), step=args.step, out=args.out and home(args.out), trust_remote_code=args.trust_remote_code
        )
    )
    return 0
