"""Is the built site whole, and does it need nothing from elsewhere? Usage: python tools/check_site.py out/site

Looks at every page: what it loads (scripts, styles, fonts, images) lies on the site; its links into the site lead to a
file, and with `#...` to a place that is there. Links for readers may lead elsewhere.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "video": "src"}
ABOUT = {"canonical", "prev", "next", "alternate", "edit"}  # of <link>: said, not loaded


class Links(HTMLParser):
    """What one page loads, where it links to, and the places that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag names."""
        have = dict(attrs)
        self.places |= {value for key in ("id", "name") if (value := have.get(key))}
        target = have.get(LOADED.get(tag, ""))
        if target and not (tag == "link" and set((have.get("rel") or "").split()) & ABOUT):
            self.loads.append(target)
        if tag == "a" and have.get("href"):
            self.links.append(have["href"] or "")


def problems(site: Path) -> list[str]:
    """What is wrong with it, a line each."""
    pages = {page: Links(page.read_text()) for page in sorted(site.rglob("*.html"))}
    found = []
    for page, of_page in pages.items():
        here = page.relative_to(site)
        for target in of_page.loads:
            if urlsplit(target).scheme not in ("", "data") or target.startswith("//"):
                found.append(f"{here} loads {target} from elsewhere")
            elif not target.startswith(("data:", "/")) and not _file(page, target).is_file():
                found.append(f"{here} loads {target}, which is not there")
        for link in of_page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or link.startswith("/"):  # 404.html's links are from a server's root
                continue
            file = _file(page, link) if parts.path else page
            if not file.is_file():
                found.append(f"{here} links to {link}, which is not there")
            elif (
                parts.fragment
                and file in pages
                and not parts.fragment.startswith("__")  # the theme's own
                and unquote(parts.fragment) not in pages[file].places
            ):
                found.append(f"{here} links to {link}: the file has no such place")
    for style in sorted(site.rglob("*.css")):
        for target in re.findall(r"url\(['\"]?(https?:[^)'\"]*|//[^)'\"]*)", style.read_text()):
            found.append(f"{style.relative_to(site)} loads {target} from elsewhere")
    return found


def _file(page: Path, target: str) -> Path:
    return (page.parent / unquote(urlsplit(target).path)).resolve()


def main() -> int:
    """Say what is wrong; 1 if there is something."""
    site = Path(sys.argv[1]).resolve()
    found = problems(site)
    sys.stdout.writelines(f"{line}\n" for line in found)
    pages = len(list(site.rglob("*.html")))
    verdict = f"{len(found)} problems" if found else "nothing from elsewhere, no dead link"
    sys.stdout.write(f"{pages} pages: {verdict}\n")
    return 1 if found or not pages else 0


if __name__ == "__main__":
    sys.exit(main())
