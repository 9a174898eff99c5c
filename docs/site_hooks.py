"""The documentation as a site: pages that lie elsewhere in the repository are included, and links follow them.

mkdocs calls on_files and on_page_markdown, see mkdocs.yml. Every page is written for the repository, so that its links work
on the forge too.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Files outside docs/ that the site shows -> their place in it; folders end in "/".
INCLUDED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "pretraining/README.md": "pretraining.md",
    "web/docs/": "nodes/",
    "workflows/": "workflows/",
    "docs/": "",
}
SHOWN_SUFFIXES = (".md", ".jpg", ".png", ".svg")
LINK = re.compile(r"(\]\()([^)\s#]*)(#[^)\s]*)?(\))")


def site_path(path: str) -> str | None:
    """Place in the site of a file of the repository; None: it is not part of it."""
    if path in INCLUDED:
        return INCLUDED[path]
    if not path.endswith(SHOWN_SUFFIXES):
        return None
    for source, target in INCLUDED.items():
        inner = path.removeprefix(source)
        # Translations of the help pages lie in folders of their own; the site shows the English ones.
        if source.endswith("/") and inner != path and (source != "web/docs/" or "/" not in inner):
            return target + inner
    return None


def repository_path(path: str) -> str:
    """The file of the repository that a page of the site is made from."""
    for source, target in INCLUDED.items():
        if path == target:
            return source
        if target.endswith("/") and path.startswith(target):
            return source + path.removeprefix(target)
    return f"docs/{path}"


def follow_links(markdown: str, source: str, repository: str) -> str:
    """A page's text with links for the site: to its place there, or to the forge.

    Args:
        source: the page's path in the repository.
        repository: address of the repository on the forge.
    """
    here = PurePosixPath(site_path(source) or source).parent

    def follow(link: re.Match[str]) -> str:
        opening, target, anchor, closing = link.groups()
        if not target or "://" in target or target.startswith("mailto:"):
            return link.group()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        place = site_path(path)
        if place is None:
            kind = "tree" if (ROOT / path).is_dir() else "blob"
            return f"{opening}{repository}/{kind}/main/{path}{anchor or ''}{closing}"
        return f"{opening}{posixpath.relpath(place, str(here))}{anchor or ''}{closing}"

    return LINK.sub(follow, markdown)


def on_files(files: Any, config: Any) -> Any:
    """Add the included files; mkdocs has found those in docs/ itself."""
    from mkdocs.structure.files import File

    names = [name for name in INCLUDED if not name.endswith("/")]
    for folder in (name for name in INCLUDED if name.endswith("/") and name != "docs/"):
        names += [f"{folder}{path.name}" for path in sorted((ROOT / folder).iterdir()) if path.is_file()]
    for name in names:
        place = site_path(name)
        if place is not None:
            files.append(File.generated(config, place, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links of the repository become links of the site."""
    return follow_links(markdown, repository_path(page.file.src_uri), config.repo_url.rstrip("/"))
