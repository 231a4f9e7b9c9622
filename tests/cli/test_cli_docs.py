"""What README and docs show is true: their Python runs, their commands exist, their links lead somewhere."""

import contextlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from apollo_optim.cli import pretrain
from apollo_optim.cli.main import COMMANDS
from apollo_optim.rules import RULES
from apollo_optim.train.config import ModelConfig
from apollo_optim.train.models import skeleton

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
CODE = [
    (page.name, code)
    for page in PAGES
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    if "apollo_optim.integrations" not in code and page.parent.name != "integrations"  # tests/clients/test_pages.py
]


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """A group of processes, as torchrun makes it, of this one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("page", "code"), CODE, ids=[f"{page}-{i}" for i, (page, _) in enumerate(CODE)])
def test_python_in_the_docs_runs(page: str, code: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = skeleton(ModelConfig(name="llama-4m"))
    alone = contextlib.nullcontext() if "torch.distributed" not in code else one_process()
    with mock.patch.dict(RULES), alone:  # a page registers a rule of its own
        exec(code, {"model": model})
    if page == "rest.md" and "llama-7b" in code:  # its table of bytes
        of_group = re.findall(r"^(?:embedding|head) .* ([\d,]+) +\S+$", capsys.readouterr().out, re.MULTILINE)
        assert len(of_group) == 10
        for size in of_group:
            assert f" {int(size.replace(',', '')) / 1e9:.4f} |" in (ROOT / "docs" / page).read_text()
    elif "llama-7b" in code:  # the README's table of bytes
        totals = re.findall(r"^total .* ([\d,]+)$", capsys.readouterr().out, re.MULTILINE)
        sizes = " | ".join(f"{int(total.replace(',', '')) / 1e9:.1f} GB" for total in totals)
        assert f"| optimizer state | {sizes} |" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_docs_exist(page: Path) -> None:
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["apollo-optim"]:
                assert words[1] in (*COMMANDS, "--version"), line
                if words[1] == "pretrain":
                    pretrain.check_words(words[2:])
                    for file in re.findall(r"--config (\S+)", line):
                        assert (ROOT / file).is_file(), line
            if words[:1] == ["make"]:
                targets = [word for word in words[1:] if "=" not in word]
                assert all(
                    re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for target in targets
                )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_in_the_docs_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.is_file(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^a-z0-9 -]", "", text.lower()).replace(" ", "-") for text in headings}, link
