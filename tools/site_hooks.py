"""What the site shows besides the files of docs/: a page for each rule, the logs of results/, changelog, mathematics.

mkdocs calls these functions while it builds (`hooks:` in mkdocs.yml). Links are written as they lead somewhere in the
repository (`../results/parity.md`) and are turned here into links of the site, where the logs lie beside the pages.
"""

from __future__ import annotations

import html
import os
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this checkout's rules, whatever is installed

from apollo_optim.rules import RULES  # noqa: E402
from tools.rule_pages import index_page, rule_page  # noqa: E402

MOVED = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
    "SECURITY.md": "security.md",
}
RULE_INDEX = "rules/index.md"
EVIDENCE = (".md", ".jsonl", ".json", ".txt", ".log", ".png")
FIT = '<div id="fit"></div>'
FENCED = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?(\))")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put every rule of the registry into the navigation."""

    def with_rules(items: list[Any]) -> list[Any]:
        return [with_rule(item) for item in items]

    def with_rule(item: Any) -> Any:
        if not isinstance(item, dict):
            return item
        ((title, value),) = item.items()
        if value == RULE_INDEX:
            return {title: [RULE_INDEX, *({rule.title: f"rules/{name}.md"} for name, rule in RULES.items())]}
        return {title: with_rules(value)} if isinstance(value, list) else item

    config.nav = with_rules(config.nav or [])
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are no files of docs/."""

    def add(uri: str, **how: Any) -> None:
        files.append(File.generated(config, uri, **how))

    add(RULE_INDEX, content=index_page(RULES))
    for name, rule in RULES.items():
        add(f"rules/{name}.md", content=rule_page(rule))
    for name, uri in MOVED.items():
        if uri not in files.src_uris:
            add(uri, content=(ROOT / name).read_text())
    for path in sorted((ROOT / "runs").glob("*.yaml")):
        add(f"runs/{path.name}", abs_src_path=str(path))
    for folder, _, names in sorted(os.walk(ROOT / "results")):
        where = Path(folder).relative_to(ROOT).as_posix()
        shown = sorted(name for name in names if name.endswith(EVIDENCE))
        for name in shown:
            path = ROOT / where / name
            if name.endswith(".md"):
                aside = "" if f"{where}/{name}" == "results/README.md" else "---\nsearch:\n  exclude: true\n---\n\n"
                add(f"{where}/{name}", content=aside + path.read_text())
            else:
                add(f"{where}/{name}", abs_src_path=str(path))
        if "README.md" not in shown:
            listed = "\n".join(f"- [{name}]({name})" for name in shown)
            add(f"{where}/index.md", content=f"---\nsearch:\n  exclude: true\n---\n\n# {where}\n\n{listed}\n")
    return files


def site_uri(path: str) -> str:
    """Where a path of the repository lies on the site: "docs/rates.md" -> "rates.md"."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if (ROOT / path).is_dir():
        return f"{path}/README.md" if (ROOT / path / "README.md").is_file() else f"{path}/index.md"
    return MOVED.get(path, path)


def repository_path(uri: str) -> str:
    """The other way round."""
    back = {site: path for path, site in MOVED.items() if site != "index.md"}
    return uri if uri.startswith("results/") else back.get(uri, f"docs/{uri}")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links of the repository into links of the site, and names of rules into links to their pages."""
    here = page.file.src_uri
    folder = posixpath.dirname(repository_path(here))

    def moved(match: re.Match[str]) -> str:
        start, target, anchor, end = match.groups()
        path = posixpath.normpath(posixpath.join(folder, target))
        return f"{start}{posixpath.relpath(site_uri(path), posixpath.dirname(here) or '.')}{anchor or ''}{end}"

    pieces = FENCED.split(markdown)
    pieces[::2] = [LINK.sub(moved, piece) for piece in pieces[::2]]
    markdown = "".join(pieces)
    if here == "optimizers.md":
        markdown = re.sub(
            r"^\| `([\w-]+)` \|",
            lambda m: f"| [`{m[1]}`](rules/{m[1]}.md) |" if m[1] in RULES else m[0],
            markdown,
            flags=re.MULTILINE,
        )
    return markdown


def on_page_content(content: str, **_: Any) -> str:
    """Turn formulas into MathML, which browsers show without a script."""

    def formula(match: re.Match[str]) -> str:
        text = html.unescape(match[2]).strip()
        display = text.startswith(r"\[")
        return convert(text[2:-2].strip(), display="block" if display else "inline")

    return re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', formula, content, flags=re.DOTALL)


def on_post_page(output: str, page: Page, **_: Any) -> str:
    """Put the figures of "Will it fit?" into its page: a page that is opened from a disk may not read another file."""
    return output.replace(FIT, fit_block()) if page.file.src_uri == "will-it-fit.md" else output


def fit_block() -> str:
    """The place of the form, and what it computes from."""
    data = (ROOT / "docs" / "assets" / "fit" / "data.json").read_text().replace("<", "\\u003c")
    return f'{FIT}<script type="application/json" id="fit-data">{data}</script>'
