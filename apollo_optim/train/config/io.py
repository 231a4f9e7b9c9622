"""Run files: read, written, and what they cannot say."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from apollo_optim.core import disk
from apollo_optim.core.errors import Damaged, InputError
from apollo_optim.core.reading import read_text
from apollo_optim.train.config.parser import parse
from apollo_optim.train.config.sections import RunConfig

LARGEST, MOST_NODES = 1 << 20, 100_000  # bytes of a run file; values in it, aliases written out
CONSENT, CONSENT_FLAG = "trust_remote_code", "--trust-remote-code"  # a word of the call, never a key of a file


def to_dict(cfg: RunConfig) -> dict[str, Any]:
    """The config as plain data: what YAML and JSON can hold."""
    plain: dict[str, Any] = dataclasses.asdict(cfg)
    plain["optim"] = cfg.optim.flat()
    return plain


def from_dict(data: dict[str, Any]) -> RunConfig:
    """The inverse of `to_dict`; missing keys take their defaults, unknown ones are refused."""
    return parse(without_consent(data))


def without_consent(data: dict[str, Any]) -> dict[str, Any]:
    """The same without `trust_remote_code`, which run files of old hold.

    A run file comes from anywhere, so it cannot say whose code runs here: false is dropped, anything else is refused.
    """
    kept = dict(data)
    for name in ("model", "data"):
        section = data.get(name)
        if isinstance(section, dict) and CONSENT in section:
            if section[CONSENT] is not False:
                raise InputError(
                    f"{name}.{CONSENT}: a run file cannot allow code from elsewhere to run; take the key out and, if "
                    f"you have read that code and trust it, say {CONSENT_FLAG} in the call"
                )
            kept[name] = {key: value for key, value in section.items() if key != CONSENT}
    return kept


def save_config(cfg: RunConfig, path: Path) -> None:
    """Write the resolved config as YAML."""
    import yaml

    disk.write(path, yaml.safe_dump(to_dict(cfg), sort_keys=False, allow_unicode=True))


def load_config(path: Path | str) -> RunConfig:
    """Read a run file."""
    return parse(read_run_file(path), where=str(path))


def _nodes(data: Any, most: int) -> int:
    """How many values there are, counted until there are too many."""
    count, waiting = 0, [data]
    while waiting and count <= most:
        value = waiting.pop()
        count += 1
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            waiting += value
    return count


def read_run_file(path: Path | str) -> dict[str, Any]:
    """A run file as plain data, its keys not yet judged but for `without_consent`."""
    import yaml

    try:
        data = yaml.safe_load(read_text(Path(os.path.expanduser(path)), LARGEST))
    except OSError as error:
        raise InputError(f"cannot read the run file {path}: {error.strerror}") from None
    except Damaged as error:
        raise InputError(f"{path} is not a YAML run file: {error.what}") from None
    except InputError as error:  # a FIFO, a device
        raise InputError(f"cannot read the run file {error}") from None
    except RecursionError:
        raise InputError(f"{path} is not a YAML run file: it is nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        at = error.problem_mark or error.context_mark
        line = f", line {at.line + 1}," if at else ""
        raise InputError(f"{path}{line} is not a YAML run file: {error.problem or error.context}") from None
    except (ValueError, OverflowError, yaml.YAMLError) as error:  # a date of month 13, a number of thousands of digits
        raise InputError(f"{path} is not a YAML run file: {' '.join(str(error).split())}") from None
    if _nodes(data, MOST_NODES) > MOST_NODES:
        raise InputError(f"{path} is not a run file: it holds more than {MOST_NODES:,} values (aliases that multiply?)")
    if data is not None and not isinstance(data, dict):
        raise InputError(f"{path} is not a run file: expected sections such as `model:` and `train:`")
    try:
        return without_consent(data or {})
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
