"""For the site: pages link to files outside docs/ as on a code host; these become pages, too.

`../CONTRIBUTING.md` is `repository/CONTRIBUTING.md` on the site. Files that no page links to stay
outside; a folder becomes its README.md, or a list of its files. Dead links are left to `--strict`.
"""

import os
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()(?!\w+:|#|/)([^)#\s]+)")


def linked(markdown, page):
    """The targets of a page's relative links, as paths in the repository."""
    return [_in_repository(match[2], page) for match in LINK.finditer(markdown)]


def on_files(files, config):
    pages = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    seen = set(pages)
    while pages:
        page = pages.pop()
        for target in linked((ROOT / page).read_text(encoding="utf-8"), page):
            if target in seen or target.startswith(("docs/", "..")):
                continue
            seen.add(target)
            if (ROOT / target).is_dir():
                files.append(File.generated(config, _on_site(target), content=_listing(target)))
                continue
            if not (ROOT / target).is_file():
                continue
            path = str(ROOT / target)
            files.append(File.generated(config, _on_site(target), abs_src_path=path))
            if target.endswith(".md"):
                pages.append(target)
    return files


def on_page_markdown(markdown, page, config, files):
    own = page.file.src_uri
    page_path = own.removeprefix("repository/") if own.startswith("repository/") else f"docs/{own}"
    if page_path.endswith("/index.md") and not (ROOT / page_path).exists():
        return markdown  # the list of a folder

    def on_site(match):
        target = _on_site(_in_repository(match[2], page_path))
        return match[1] + posixpath.relpath(target, posixpath.dirname(own))

    return LINK.sub(on_site, markdown)


def _in_repository(link, page):
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    return f"{path}/README.md" if (ROOT / path / "README.md").is_file() else path


def _on_site(path):
    if (ROOT / path).is_dir():
        path += "/index.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"


def _listing(folder):
    names = sorted(name for name in os.listdir(ROOT / folder) if (ROOT / folder / name).is_file())
    return f"# {folder}\n\n" + "".join(f"- `{name}`\n" for name in names)
