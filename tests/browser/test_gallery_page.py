"""Promises of the gallery in a real browser: images load, its own script runs, nothing is fetched."""

import re
import shutil
import subprocess

import numpy as np
import pytest

from cxr_retrieval.report.gallery import Case, Hit, QueryResult, write_gallery

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--window-size=1200,1000",
)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the PATH")

# Runs in a copy of the page whose policy allows it, and leaves what it saw in the document for --dump-dom.
PROBE = """
<script>
addEventListener("load", () => {
  const seen = document.documentElement.dataset;
  const images = () => [...document.querySelectorAll("main img")];
  seen.loaded = images().filter((image) => image.complete && image.naturalWidth === 48).length;
  seen.boxes = document.querySelectorAll("main .look").length;
  seen.fetched = performance.getEntriesByType("resource").filter((entry) => !entry.name.startsWith("data:")).length;
  document.querySelectorAll("button.film")[1].click();
  const viewer = document.getElementById("viewer");
  seen.open = viewer.open;
  seen.beside = viewer.querySelectorAll("img").length;
  viewer.querySelector('[data-do="boxes"]').click();
  seen.hidden = getComputedStyle(document.querySelector("main .look")).display;
});
</script>
"""


def page():
    def case(name):
        pixels = np.random.default_rng(0).integers(0, 255, (48, 48), dtype=np.uint8)
        return Case(name, ("Mass",), "PA", 50, "M", "p1", None, pixels, (8, 8, 64, 32), 96)

    return write_gallery(
        [QueryResult("Query", case("q"), tuple(Hit(case(f"h{i}"), i, 0.1, ("Mass",)) for i in (1, 2)))]
    )


def browse(folder, html, *options):
    file = folder / "gallery.html"
    file.write_text(html, encoding="utf-8")
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={folder / 'profile'}", *options, file.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout


def test_images_load_and_a_hit_opens_beside_its_query(tmp_path):
    html = page()
    probed = re.sub(r"script-src 'sha256-[^']+'", "script-src 'unsafe-inline'", html).replace(
        "</body>", PROBE + "</body>"
    )
    root = re.search(r"<html[^>]*>", browse(tmp_path, probed, "--dump-dom")).group()
    seen = dict(re.findall(r'data-(\w+)="([^"]*)"', root))
    expected = {"loaded": "3", "boxes": "3", "fetched": "0", "open": "true", "beside": "2", "hidden": "none"}
    assert seen == {"viewer": "ready", **expected}


def test_the_pages_own_policy_lets_its_script_run_and_no_other(tmp_path):
    smuggled = page().replace("</main>", "<script>document.documentElement.dataset.smuggled = 1</script></main>")
    dom = browse(tmp_path, smuggled, "--dump-dom")
    assert 'data-viewer="ready"' in dom
    assert "data-smuggled" not in dom


def test_the_page_names_no_address(tmp_path):
    dom = browse(tmp_path, page(), "--dump-dom", f"--screenshot={tmp_path / 'shot.png'}")
    assert not re.search(r"https?://", dom)
    assert (tmp_path / "shot.png").stat().st_size > 10_000
