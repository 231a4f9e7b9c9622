"""What is loaded from elsewhere (transformers' models and tokenizers), and what must not come along: code.

Every call of a loader says `trust_remote_code` itself. Left out, transformers asks on stdin, and takes a `y` of a pipe.
"""

import json
from pathlib import Path

from apollo_optim.core import disk

CODE = "auto_map"  # where a config names the Python files that a loader is to run


def reason(error: BaseException) -> str:
    """Why a loader failed, in one line; where it wants to run code from elsewhere, what to say if it may."""
    if CODE in str(error) or "trust_remote_code" in str(error):
        return "it brings Python code of its own: if you have read that code and trust it, say --trust-remote-code"
    return " ".join(str(error).split())[:300] or type(error).__name__


def drop_code(directory: Path) -> None:
    """Take out of what `save_pretrained` wrote the names of code: whoever opens it is not asked to run any."""
    for path in directory.glob("*.json"):
        text = path.read_text(encoding="utf-8")
        if f'"{CODE}"' not in text:
            continue
        content = json.loads(text)
        if isinstance(content, dict) and content.pop(CODE, None) is not None:
            disk.write(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
