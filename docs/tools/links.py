"""Checks a built site: every href and src inside it leads somewhere, anchors too, and nothing is loaded from outside.

    python docs/tools/links.py site

Links to other sites are listed, not fetched. Exit code 1 where something is broken.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "src"), ("video", "src")}
"""(tag, attribute) that a browser fetches by itself; a link of these to another site is an error."""
MET = {("link", "canonical"), ("link", "prev"), ("link", "next")}


@dataclass
class Page(HTMLParser):
    """Links and anchors of one page."""

    anchors: set[str] = field(default_factory=set)
    links: list[tuple[str, str, str]] = field(default_factory=list)  # tag, attribute, where to

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collects ids, names, href, src and srcset."""
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "link" and ("link", given.get("rel", "")) in MET:
            return
        self.links += [(tag, name, given[name]) for name in ("href", "src") if name in given]
        for part in given.get("srcset", "").split(","):
            if part.strip():
                self.links.append((tag, "src", part.split()[0]))


def read(path: Path) -> Page:
    """The links and anchors of an HTML file."""
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def check(site: Path) -> tuple[list[str], set[str], int]:
    """(what is broken, links to other sites, links looked at) of a built site."""
    pages = {path.resolve(): read(path) for path in sorted(site.rglob("*.html"))}
    broken, outside, looked = list[str](), set[str](), 0
    for path, page in pages.items():
        for tag, attribute, link in page.links:
            looked += 1
            parts = urlsplit(link)
            where = f"{path.relative_to(site.resolve())}: <{tag} {attribute}={link!r}>"
            if parts.scheme in ("http", "https") or parts.netloc:
                outside.add(link)
                if (tag, attribute) in LOADED:
                    broken.append(f"{where} is loaded from outside")
            elif parts.scheme not in ("data", "mailto", "javascript"):
                fault = _fault(path, unquote(parts.path), unquote(parts.fragment), pages, site.resolve())
                broken += [f"{where} {fault}"] if fault else []
    for path in sorted(site.rglob("*.css")):
        found = re.findall(r"url\(\s*['\"]?(https?:[^)'\"]+)|@import\s+['\"]?(https?:\S+)", path.read_text("utf-8"))
        broken += [f"{path.relative_to(site)}: loads {' '.join(urls).strip()}" for urls in found]
    return broken, outside, looked


def _fault(path: Path, link: str, anchor: str, pages: dict[Path, Page], site: Path) -> str:
    """What is wrong with a link inside the site; nothing where it leads somewhere."""
    if link.startswith("/"):
        return "is absolute: it breaks where the site does not lie at the root"
    target = (path.parent / link).resolve() if link else path
    target = target / "index.html" if target.is_dir() else target
    if not target.is_relative_to(site) or not target.is_file():
        return "leads nowhere"
    if anchor and target.suffix == ".html" and anchor not in pages[target].anchors:
        return "leads to an anchor that is not there"
    return ""


def main() -> int:
    """Prints what is broken and which other sites are linked to."""
    site = Path(sys.argv[1])
    broken, outside, looked = check(site)
    print(*broken, sep="\n", file=sys.stderr, end="\n" if broken else "")
    print(f"{looked} links, {len(broken)} broken; {len(outside)} lead to other sites and were not followed:")
    print(*sorted(f"  {link}" for link in outside), sep="\n")
    return int(bool(broken) or looked == 0)


if __name__ == "__main__":
    sys.exit(main())
