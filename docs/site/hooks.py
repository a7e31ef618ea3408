"""What the site needs beyond docs/: pages from elsewhere in the repository, the command line, figures in the page.

mkdocs calls these by their names (mkdocs.yml, ``hooks``). Links keep the form that is right in the repository: what
they lead to is looked up there, and where that is no page of the site, the words stay without a link.
"""

from __future__ import annotations

import html
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent.parent
ELSEWHERE = {  # page of the site → file of the repository
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "kernels.md": "csrc/README.md",
    "examples/dense.md": "examples/dense/README.md",
    "examples/digits.md": "examples/digits/README.md",
    "examples/idle.md": "examples/idle/README.md",
    "examples/imagenet.md": "examples/imagenet/README.md",
}
COMMANDS = "reference/command-line.md"
PAGE_OF = {source: page for page, source in ELSEWHERE.items()}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
ROLE = re.compile(r":(?:class|func|mod|meth|data|attr):<code>~?([\w.]+)</code>")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    files.append(File.generated(config, COMMANDS, content=command_line()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = page.file.src_uri
    source = ELSEWHERE.get(here, f"docs/{here}")

    def link(match: re.Match[str]) -> str:
        picture, words, target = match.groups()
        if "://" in target or target.startswith(("#", "mailto:")):
            return match[0]
        path, _, anchor = target.partition("#")
        inside = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        uri = PAGE_OF.get(inside) or PAGE_OF.get(f"{inside}/README.md") or inside.removeprefix("docs/")
        if files.get_file_from_path(uri) is None:
            return words
        relative = posixpath.relpath(uri, posixpath.dirname(here) or ".")
        return f"{picture}[{words}]({relative}{'#' if anchor else ''}{anchor})"

    parts = FENCE.split(markdown)  # every second one is code
    return "".join(part if i % 2 else LINK.sub(link, part) for i, part in enumerate(parts))


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Roles of docstrings as links where they lead to something, and figures as part of the page."""
    folder = ROOT / "docs" / Path(page.file.src_uri).parent

    def figure(match: re.Match[str]) -> str:
        words, name = match.groups()
        drawn = re.sub(r"<style>.*?</style>", "", (folder / name.rsplit("/", 1)[-1]).read_text(), flags=re.DOTALL)
        return f'<figure class="drawn" aria-label="{words}">{drawn}</figure>'

    content = ROLE.sub(r'<autoref identifier="\1" optional><code>\1</code></autoref>', content)
    content = content.replace("::</p>", ":</p>")
    return re.sub(r'<p><img alt="([^"]*)" src="([^"]+\.svg)"\s*/?></p>', figure, content)


def command_line() -> str:
    """Every command with its arguments and options, from the commands themselves."""
    import typer

    from repavit_ops.cli import app

    lines = ["# Command line", "", "`repavit-ops COMMAND --help` shows the same.", ""]
    for name, command in commands(typer.main.get_command(app)):
        arguments = " ".join(p.metavar or p.name.upper() for p in command.params if p.param_type_name == "argument")
        lines += [f"## {name}", "", f"`repavit-ops {name} {arguments}`".replace(" `", "`"), "", command.help or "", ""]
        options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
        if options:
            lines += ["| option | default | |", "|---|---|---|"]
        for option in options:
            default = "" if option.default in (None, "", False) or callable(option.default) else str(option.default)
            default = str(getattr(option.default, "value", default))
            words = html.escape(option.help or "").replace("|", "\\|").replace("\n", " ")
            lines.append(f"| `{', '.join(option.opts)}` | {default} | {words} |")
        lines.append("")
    return "\n".join(lines)


def commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every command by its words, those of a group one by one."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command
