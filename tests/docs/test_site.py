"""The documentation: it builds strictly, loads nothing from elsewhere, and no link is dead."""

import html.parser
import os
import re
import subprocess
import sys
from functools import cache

import pytest

from messages import ROOT

IGNORED = {".venv", ".venv-next", ".gpu", "build", "dist", "node_modules"}
MARKDOWN = sorted(
    path for path in ROOT.rglob("*.md") if not IGNORED & set(path.relative_to(ROOT).parts)
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
LOADING = {"src", "srcset", "poster", "data"}  # and href of <link>


def build(config, folder):
    """As `make docs` does it; no --quiet, which forgives warnings."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(config)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(
        [*command, "--site-dir", str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    built = build(ROOT / "mkdocs.yml", folder)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[a page](nowhere.md)", "'nowhere.md'"),
        ("[a heading](#nowhere)", "'#nowhere'"),
        ("[from the root](/index.md)", "absolute link"),
    ],
)
def test_the_build_is_strict(text, complaint, tmp_path):
    """Catches settings under which a dead link passes; then the site's build proves nothing."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Title\n\n{text}\n")
    config = tmp_path / "mkdocs.yml"
    config.write_text(
        f"INHERIT: {ROOT / 'mkdocs.yml'}\ndocs_dir: docs\nhooks: []\nplugins: [search]\n"
        "nav: [index.md]\n"
    )
    built = build(config, tmp_path / "site")
    assert built.returncode == 1
    assert complaint in built.stderr


class Resources(html.parser.HTMLParser):
    """What a page loads, and list markers that ended up in running text."""

    def __init__(self):
        super().__init__()
        self.loaded, self.in_paragraph, self.swallowed = [], False, []

    def handle_starttag(self, tag, attrs):
        self.in_paragraph = tag == "p" or (self.in_paragraph and tag in ("a", "code", "em"))
        for name, value in attrs:
            if name in LOADING or (tag == "link" and name == "href"):
                self.loaded.append(value)

    def handle_data(self, data):
        if self.in_paragraph and re.search(r"^([-*]|\d+\.) ", data.lstrip(), re.M):
            self.swallowed.append(data)


@cache
def parsed(page):
    found = Resources()
    found.feed(page.read_text(encoding="utf-8"))
    return found


def test_nothing_is_loaded_from_elsewhere(site):
    """Catches fonts, scripts and images of other hosts, which track readers and need a network."""
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        loaded = parsed(page).loaded
        assert any(name.endswith(".css") for name in loaded)
        assert not [name for name in loaded if "//" in name], page
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import\s*)[\"']?(https?:)?//", style.read_text("utf-8")), (
            style
        )


def test_lists_are_lists(site):
    """Catches a list without an empty line before it, which only code hosts show as a list."""
    for page in site.rglob("*.html"):
        assert not parsed(page).swallowed, page


def test_the_reference_shows_signatures_and_docstrings(site):
    """Catches an API page that is empty, since nothing was found to document."""
    text = (site / "api.html").read_text(encoding="utf-8")
    for name in ("config.FailFastConfig", "drafting.interfaces.Policy"):
        assert f'id="failfast_vllm.{name}"' in text
    assert 'id="failfast_kernels.reference.block_diffusion_attention"' in text
    assert "raises ValueError" in text


@cache
def anchors(path):
    """Of a page's headings, as code hosts and the site make them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    """Catches a dead link or anchor in any Markdown file, as a code host shows it."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for link in LINK.findall(text):
        if re.match(r"\w+:", link):
            assert link.startswith("https://"), link
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link
