"""What `make docs` does beside mkdocs: the README is the first page, and what pages quote from the repository is there.

Pages link to files of the repository the way a reader on a code host needs it (`../benchmarks/results/...`). A site has
no repository around it, so the files that are linked to are copied into it, and the links are turned to them.

Docstrings have their examples as `>>>` on lines of their own. Markdown takes these for quotations; here they become
code.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

try:
    from griffe import Extension
except ImportError:  # the tests' own environment has no mkdocs, and runs the examples below
    Extension = object

ROOT = Path(__file__).parents[1]

FOLDERS = {"benchmarks/results": "results", "examples": "examples"}
"""Folders of the repository that pages link into, and what they are called in the site."""

LANDING = {"benchmarks/results": "results/README.md", "examples": "howto/trainer.md"}
"""Where a link to a whole folder leads."""

PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
"""Pages of the site that stand outside docs/."""

EXAMPLE = re.compile(r"^>>> .*(?:\n(?!$).*)*", re.MULTILINE)
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)")


def on_files(files: Any, config: Any) -> Any:
    """Called by mkdocs once it has listed docs/."""
    from mkdocs.structure.files import File

    for source, name in PAGES.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    for folder, name in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*")):
            inside = path.relative_to(ROOT / folder).as_posix()
            if path.is_file() and "__pycache__" not in inside and "/here/" not in f"/{inside}":
                files.append(File.generated(config, f"{name}/{inside}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs for every page, before it is rendered."""
    here = source_of(page.file.src_uri)
    return LINK.sub(lambda link: turned(link[1], here, page.file.src_uri), markdown)


def source_of(uri: str) -> str:
    """Where a page of the site stands in the repository."""
    for name, source in [*((page, source) for source, page in PAGES.items()), *((n, f) for f, n in FOLDERS.items())]:
        if uri == name or uri.startswith(name + "/"):
            return source + uri[len(name) :]
    return "docs/" + uri


def turned(target: str, here: str, uri: str) -> str:
    """A link as a page of the repository has it, as the page of the site needs it.

    >>> turned("../benchmarks/results/steps.txt", "docs/performance.md", "performance.md")
    'results/steps.txt'
    >>> turned("docs/layout.md", "README.md", "index.md"), turned("../../README.md", "docs/howto/rl.md", "howto/rl.md")
    ('layout.md', '../index.md')
    >>> turned("layout.md", "docs/howto/rl.md", "howto/rl.md")  # the page's own mistake, for mkdocs to find
    'layout.md'
    """
    path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
    for source, name in {**PAGES, **FOLDERS, "docs": ""}.items():
        if path == source or path.startswith(source + "/"):
            inside = LANDING.get(path, (name + path[len(source) :]).lstrip("/"))
            return posixpath.relpath(inside, posixpath.dirname(uri) or ".")
    return target


class Examples(Extension):
    """Called by griffe for everything that has a docstring."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(lambda found: f"```pycon\n{found[0]}\n```", obj.docstring.value)
