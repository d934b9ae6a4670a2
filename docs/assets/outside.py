"""Files of the site that lie outside docs/, where GitHub wants them: one link to each works in both places."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
OUTSIDE = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LICENSE": "LICENSE.txt",
    "configs/fsdp2.yaml": "configs/fsdp2.yaml",
    "configs/zero3.yaml": "configs/zero3.yaml",
}
"""Paths in the repository, and in the site's sources."""

_LINK = re.compile(r"\]\((?P<target>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files from outside docs/."""
    for path, name in OUTSIDE.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links that leave docs/, and those of pages from outside, to where the site has them."""
    place = {name: path for path, name in OUTSIDE.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    folder = (ROOT / place).parent
    up = "../" * page.file.src_uri.count("/")

    def rewritten(link: re.Match) -> str:
        path = (folder / link["target"]).resolve()
        if not path.is_relative_to(ROOT):
            return link[0]
        path = path.relative_to(ROOT).as_posix()
        name = OUTSIDE.get(path) or path.removeprefix("docs/")
        return f"]({up}{name}{link['anchor'] or ''})"

    return _LINK.sub(rewritten, markdown)
