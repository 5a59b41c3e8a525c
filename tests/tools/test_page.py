"""The page of `failfast bench`: whole, safe, readable on a phone."""

import base64
import http.server
import json
import re
import shutil
import subprocess
import threading
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest

from failfast_vllm.tools import cli
from failfast_vllm.tools.page import page

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
EVIL = "<script>alert(1)</script> $x_{ \"' <img src=http://a.test/b>"
NO_END_TAG = {"meta", "img"}


class Page(HTMLParser):
    """Tags and texts; an error where tags do not close."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in NO_END_TAG:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def results(name="load_cpu_float32"):
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["copies_smollm2_cpu_bfloat16_many", "load_cpu_float32"])
def test_committed_results_make_a_page_that_loads_nothing(name, tmp_path, capsys):
    """Catches figures that are missing, tags that do not close, and addresses of elsewhere."""
    path = tmp_path / "page.html"
    argv = ["bench", "--from", str(RESULTS / f"{name}.json"), "--html", str(path)]
    assert cli.main(argv) == 0
    text = path.read_text(encoding="utf-8")
    found = Page(text)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in found.tags}
    assert not re.search(r"(?:https?:)?//", re.sub('base64,[^"]*', "", text))
    pictures = [attrs["src"] for tag, attrs in found.tags if tag == "img"]
    assert len(pictures) == 1
    for each in pictures:
        assert b"<svg" in base64.b64decode(each.removeprefix("data:image/svg+xml;base64,"))
    cells = {text.strip() for text in found.texts}
    given = results(name)
    facts = given["provenance"]
    assert {facts[key] for key in ("command", "git", "device", "vllm", "torch", "date")} <= cells
    assert {row["method"] for row in given["rows"]} <= cells
    assert {f"{row['speedup']:.2f}x" for row in given["rows"]} <= cells
    tables = capsys.readouterr().out
    assert facts["command"] in tables


def test_nothing_of_the_results_is_markup():
    """Catches a path or a method that becomes a script, or that matplotlib takes for a formula."""
    given = results()
    given["provenance"] |= {"target": EVIL, "command": EVIL, EVIL: {EVIL: [EVIL]}}
    for row in given["rows"]:
        row["method"] += EVIL
    found = Page(page(given))
    assert EVIL in found.texts
    assert {tag for tag, _ in found.tags} == {tag for tag, _ in Page(page(results())).tags}
    assert all(a["src"].startswith("data:") for tag, a in found.tags if tag == "img")


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium (Debian: apt-get install chromium)")
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_a_phone(width, tmp_path):
    """Catches a page that scrolls sideways, an error in the console, and a request.

    The page is in a frame of the phone's width: Chromium's window cannot be that narrow.
    """
    given = results()
    given["provenance"]["command"] += "x" * 300  # a path may be long
    (tmp_path / "page.html").write_text(page(given), encoding="utf-8")
    measured = (
        "const d = frames[0].document; document.title = JSON.stringify([d.fonts.status, "
        "d.documentElement.scrollWidth, d.documentElement.scrollHeight, "
        "...[...d.images].map(i => i.naturalWidth)])"
    )
    frame = f'<iframe width={width} height=800 style="border:0" src="page.html"></iframe>'
    (tmp_path / "index.html").write_text(f"{frame}<script>onload=()=>{{{measured}}}</script>")
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, _, line, *args):
            asked.append(line.split()[1])

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1", "--no-first-run"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000"]
    address = f"http://127.0.0.1:{server.server_port}/index.html"
    try:
        command = [CHROMIUM, *flags, "--dump-dom", address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    finally:
        server.shutdown()
        server.server_close()
    _, scroll_width, height, *pictures = json.loads(
        re.search("<title>(.*)</title>", done.stdout)[1]
    )
    assert scroll_width <= width
    assert height > 800  # it is there
    assert len(pictures) == 1
    assert all(pictures)
    assert "CONSOLE" not in done.stderr
    assert set(asked) <= {"/index.html", "/page.html", "/favicon.ico"}
