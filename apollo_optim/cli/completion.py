"""`apollo-optim completion`: a script with which a shell completes commands, options and keys of a run file."""

import contextlib
import functools
import importlib
import io
import re
from collections.abc import Sequence

from ..core.printing import say
from .words import Parser

EPILOG = """\
bash   echo 'eval "$(apollo-optim completion bash)"' >> ~/.bashrc
zsh    echo 'eval "$(apollo-optim completion zsh)"' >> ~/.zshrc     (after compinit)
fish   apollo-optim completion fish > ~/.config/fish/completions/apollo-optim.fish

The script holds the words of this version; printing it takes some seconds, so a shell starts faster from a file."""
BASH = """\
_apollo_optim() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} words=
  COMPREPLY=()
  if [ "$COMP_CWORD" = 1 ]; then
    words="{commands}"
  elif [ "${{word#-}}" != "$word" ]; then
    case ${{COMP_WORDS[1]}} in
{cases}
    esac
  fi
  if [ -n "$words" ]; then COMPREPLY=($(compgen -W "$words" -- "$word")); fi
}}
complete -o default -F _apollo_optim apollo-optim"""
ZSH = "autoload -Uz bashcompinit && bashcompinit\n" + BASH


def run(argv: Sequence[str]) -> int:
    parser = Parser("apollo-optim completion", "Print a script that completes this command's words in a shell.", EPILOG)
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    shell = parser.parse(argv).shell
    from .main import COMMANDS

    words = {name: options(name) for name in COMMANDS}
    if shell == "fish":
        say("\n".join(fish(COMMANDS, words)))
    else:
        cases = "\n".join(f'      {name}) words="{" ".join(found)}" ;;' for name, found in words.items())
        say((ZSH if shell == "zsh" else BASH).format(commands=" ".join(words), cases=cases))
    return 0


@functools.cache
def options(command: str) -> list[str]:
    """What a command's help names, in its order."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        importlib.import_module(f".{command}", __package__).run(["--help"])
    return [*dict.fromkeys(re.findall(r"^ +(?:-\w, )?(--[a-z][\w.-]*)", said.getvalue(), re.MULTILINE))]


def fish(commands: dict[str, str], words: dict[str, list[str]]) -> list[str]:
    """A line for every word."""
    lines = [
        f'complete -c apollo-optim -f -n __fish_use_subcommand -a {name} -d "{summary}"'
        for name, summary in commands.items()
    ]
    return lines + [
        f"complete -c apollo-optim -n '__fish_seen_subcommand_from {name}' -l {option.removeprefix('--')}"
        for name, found in words.items()
        for option in found
    ]
