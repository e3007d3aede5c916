"""Bring files outside of docs/ into the site, where its pages link to them.

The README is the first page. A Markdown file that some page links to becomes a page at its own path, any other file is
copied, and a link to a folder, which only a code host can show, becomes plain text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
DOCS = "docs"
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_config(config: Any) -> Any:
    """List the pages of the methods and of the gallery in the navigation."""
    for title, folder in (("Methods", "methods"), ("Gallery", "gallery")):
        names = sorted(path.name for path in (ROOT / DOCS / folder).glob("*.md") if path.name != "index.md")
        for entry in config["nav"]:
            if title in entry:
                entry[title] = [f"{folder}/index.md", *(f"{folder}/{name}" for name in names)]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the README and every file that a page links to, those of added pages included."""
    waiting = ["README.md", "SECURITY.md", *(f"{DOCS}/{file.src_uri}" for file in files.documentation_pages())]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        if not path.startswith(f"{DOCS}/"):
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
        if path.endswith(".md"):
            linked = {_target(path, link) for _, _, link in _links((ROOT / path).read_text(encoding="utf-8"))}
            new = sorted(name for name in linked - seen - {""} if (ROOT / name).is_file())
            waiting += [name for name in new if not name.startswith(f"{DOCS}/")]
            seen |= set(new)
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Point links at the places that files have in the site."""
    uri = page.file.src_uri
    source = uri if not (ROOT / DOCS / uri).is_file() else f"{DOCS}/{uri}"

    def moved(found: re.Match[str]) -> str:
        image, text, link = found.groups()
        target = _target(source, link)
        if not target:
            return found[0]
        if (ROOT / target).is_dir():
            return text
        place = posixpath.relpath(target.removeprefix(f"{DOCS}/"), posixpath.dirname(uri) or ".")
        anchor = f"#{link.partition('#')[2]}" if "#" in link else ""
        return f"{image}[{text}]({place}{anchor})"

    parts = _FENCE.split(markdown)
    return "".join(part if part.startswith("```") else _LINK.sub(moved, part) for part in parts)


def _links(text: str) -> list[tuple[str, str, str]]:
    return [found for part in _FENCE.split(text) if not part.startswith("```") for found in _LINK.findall(part)]


def _target(source: str, link: str) -> str:
    """Path of a linked file or folder, relative to the root of the repository; "" for any other link."""
    path = link.partition("#")[0]
    if not path or "://" in link or link.startswith("mailto:"):
        return ""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
