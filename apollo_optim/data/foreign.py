"""What is loaded from elsewhere (transformers' models and tokenizers), and what must not come along: code.

Every call of a loader says `trust_remote_code` itself. Left out, transformers asks on stdin, and takes a `y` of a pipe.
"""

import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import getproxies

from apollo_optim.core import disk
from apollo_optim.core.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MOST_LAYERS, MOST_MODULES = 10_000, 200_000
CODE = "auto_map"  # where a config names the Python files that a loader is to run


def reason(error: BaseException) -> str:
    """Why a loader failed, in one line; where it wants to run code from elsewhere, what to say if it may."""
    if CODE in str(error) or "trust_remote_code" in str(error):
        return "it brings Python code of its own: if you have read that code and trust it, say --trust-remote-code"
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Whatever other people's code stumbles over becomes one line, `what` and the reason; `--debug` shows the rest."""
    try:
        yield
    except (InputError, BrokenPipeError):
        raise
    except Exception as error:
        raise InputError(f"{what}: {reason(error)}") from error


def unreachable() -> str | None:
    """Why the hub cannot be reached, where its name leads nowhere; None: it may be there (behind a proxy, who knows).

    Its client would try for the better part of a minute.
    """
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT).hostname
    if constants.HF_HUB_OFFLINE or getproxies() or host is None:
        return None
    try:
        socket.getaddrinfo(host, 443)
    except OSError as error:
        return f"{host} cannot be reached ({error.strerror})"
    return None


def context_of(config: "PretrainedConfig") -> int | None:
    """Most tokens of a row, where the model has a limit."""
    context: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return context


def check_size(config: "PretrainedConfig", name: str) -> None:
    """Refuse a model that would take for ever, or all memory, to be described: a layer is an object of Python."""
    text = config.get_text_config()

    def number(*keys: str) -> int:
        found = [getattr(text, key, None) for key in keys]
        return max([value for value in found if isinstance(value, int)], default=1)

    layers = number("num_hidden_layers", "n_layer", "num_layers", "n_layers")
    experts = number("num_experts", "num_local_experts", "n_routed_experts")
    if layers > MOST_LAYERS or layers * experts > MOST_MODULES:
        per_layer = f" with {experts:,} experts each" if experts > 1 else ""
        raise InputError(
            f"model.name={name}: {layers:,} layers{per_layer}: at most {MOST_LAYERS:,}, or {MOST_MODULES:,} experts"
        )
    for key, value in vars(text).items():
        if isinstance(value, int) and abs(value) >= 1 << 40:
            raise InputError(f"model.name={name}: its {key} is {value:,}, which no model is made of")


def drop_code(directory: Path) -> None:
    """Take out of what `save_pretrained` wrote the names of code: whoever opens it is not asked to run any."""
    for path in directory.glob("*.json"):
        text = path.read_text(encoding="utf-8")
        if f'"{CODE}"' not in text:
            continue
        content = json.loads(text)
        if isinstance(content, dict) and content.pop(CODE, None) is not None:
            disk.write(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
