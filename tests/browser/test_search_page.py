"""Promises of the search page in a real browser: hits are found, looked at and filtered, errors told in words."""

import asyncio
import base64
import io
import re
import subprocess
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import Response
from fastapi.responses import HTMLResponse
from PIL import ExifTags, Image

from cxr_retrieval.config import ServeSettings
from cxr_retrieval.index import cache
from cxr_retrieval.report.pages import render
from cxr_retrieval.serve.api import create_app
from cxr_retrieval.serve.live import LiveIndex
from tests.browser.test_gallery_page import BROWSER, FLAGS
from tests.indexes import build, films, model_files, published
from tests.servers import serving

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the PATH")

# Stands in a copy of the page whose policy allows it, acts as a person does, and leaves what it saw in the document.
# The page has loaded, and the browser may end, when the probe is done.
PROBE = """
<script>
const seen = document.documentElement.dataset;
const $ = (id) => document.getElementById(id);
const until = async (test) => { while (!test()) await new Promise((done) => setTimeout(done, 20)); };
const key = (target, name, more) =>
  target.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true, ...more }));
const films = () => [...document.querySelectorAll("#hits .film")];
const box = (kind = "drawn") => {
  const drawn = $("picture").querySelector(`.${kind}`);
  return drawn && ["x", "y", "width", "height"].map((name) => Math.round(drawn.getAttribute(name))).join();
};
function draw(left, top, right, bottom) { // in parts of the picture
  const frame = $("picture").getBoundingClientRect();
  const at = (kind, x, y) => $("picture").dispatchEvent(new PointerEvent(kind,
    { bubbles: true, clientX: frame.left + x * frame.width, clientY: frame.top + y * frame.height }));
  $("picture").setPointerCapture = () => {}; // refuses a pointer that no hand moves
  at("pointerdown", left, top); at("pointermove", right, bottom); at("pointerup", right, bottom);
}
const settled = () => until(() => !$("answers").classList.contains("busy"));
async function give(name, bytes) {
  const data = new DataTransfer();
  data.items.add(new File([bytes], name));
  document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
  await until(() => $("answers").classList.contains("busy") || $("problem").textContent);
  await settled();
}
async function act() {
  await until(() => seen.page === "ready");
  await give("film.png", await (await fetch("/film.png")).arrayBuffer());
ACTS
}
act().catch((error) => (seen.failed = error.message)).finally(() => fetch("/done"));
</script>
<img class="hidden" src="/wait" alt="">
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cache.VARIABLE, str(folder / "cache"))
        images = films(60)
        two_findings = next(film for film in images if len(film.facts["findings"]) == 2)
        reference = published(folder, build(folder, images, model_files(folder, images)))
        with LiveIndex(reference, 60) as live:
            app = create_app(live, ServeSettings())
            html = render("search.html.j2", title="Find", facts=[], script="search.js")

            @app.get("/probe")
            def probe(acts: str) -> HTMLResponse:
                relaxed = re.sub(r"script-src 'sha256-[^']+'", "script-src 'unsafe-inline'", html)
                return HTMLResponse(relaxed.replace("</body>", PROBE.replace("ACTS", acts) + "</body>"))

            done = asyncio.Event()

            @app.get("/wait")
            async def wait() -> Response:
                await asyncio.wait_for(done.wait(), 60)
                done.clear()
                return Response(status_code=204)

            @app.get("/done")
            async def tell() -> None:
                done.set()

            @app.get("/film.png")
            def film() -> Response:
                return Response(two_findings.png, media_type="image/png")

            with serving(app) as found:
                yield found


def browse(folder: Path, url: str, *options: str) -> str:
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={folder / 'profile'}", *options, "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def acted(folder: Path, address: str, acts: str, *options: str) -> dict[str, str]:
    """What the probe saw when it had done `acts` on a page that had been given an image."""
    dom = browse(folder, f"{address}/probe?{urllib.parse.urlencode({'acts': acts})}", *options)
    seen = dict(re.findall(r'data-(\w+)="([^"]*)"', re.search(r"<html[^>]*>", dom)[0]))  # type: ignore[index]
    assert seen.pop("page") == "ready", seen
    return seen


def test_a_dropped_image_is_answered_with_its_hits_and_where_the_network_looked(tmp_path: Path, address: str) -> None:
    acts = """
  seen.hits = films().length;
  await until(() => [...document.querySelectorAll("#hits img")].every((image) => image.naturalWidth === 64));
  seen.looks = document.querySelectorAll("#hits .look .crop, #picture .crop").length;
  seen.known = $("known").querySelectorAll(".chip").length;
  const shared = [...document.querySelectorAll("#hits .chip.shared")];
  seen.bold = shared.length > 0 && shared.every((chip) => getComputedStyle(chip).fontWeight === "700");
  $("next").click(); await settled();
  seen.page2 = $("status").textContent.split(" ").slice(0, 3).join(" ");
  seen.elsewhere = performance.getEntriesByType("resource").filter((e) => new URL(e.name).origin !== origin).length;
"""
    seen = acted(tmp_path, address, acts)
    expected = {"hits": "12", "looks": "13", "known": "2", "bold": "true", "page2": "13 to 24"}
    assert seen == {**expected, "elsewhere": "0"}


def test_a_hit_opens_beside_the_query_with_its_reasons_and_can_be_asked_with(tmp_path: Path, address: str) -> None:
    acts = """
  films()[0].focus();
  key(films()[0], "ArrowRight");
  seen.focus = films().indexOf(document.activeElement);
  document.activeElement.click();
  await until(() => document.querySelector("#why table"));
  seen.beside = $("sides").querySelectorAll(".film").length;
  seen.steps = [...document.querySelectorAll("#why th")].map((cell) => cell.textContent).slice(0, 3).join();
  key($("viewer"), "ArrowRight");
  seen.at = $("position").textContent;
  const id = $("sides").querySelectorAll(".id")[1].textContent;
  document.querySelector('[data-do="ask"]').click(); await settled();
  seen.asked = $("hint").textContent === `Indexed image ${id}.`;
  seen.open = $("viewer").open;
"""
    assert acted(tmp_path, address, acts) == {
        "focus": "1",
        "beside": "2",
        "steps": "Step 1,Step 2,Step 3",
        "at": "Query and hit 3",
        "asked": "true",
        "open": "false",
    }


def test_a_box_is_drawn_with_the_mouse_or_by_keys_and_searched_with(tmp_path: Path, address: str) -> None:
    acts = """
  const picture = $("picture");
  draw(0.25, 0.25, 0.75, 0.5);
  seen.drawn = box();
  key(picture, "Escape"); seen.gone = box();
  key(picture, "Enter"); seen.middle = box();
  key(picture, "ArrowLeft"); key(picture, "ArrowDown", { shiftKey: true }); seen.moved = box();
  key(picture, "Enter"); await settled();
  seen.looked = picture.querySelector(".crop").getAttribute("x") === picture.querySelector(".drawn").getAttribute("x");
"""
    assert acted(tmp_path, address, acts) == {
        "drawn": "32,32,64,32",
        "gone": "null",
        "middle": "43,43,43,43",
        "moved": "40,43,43,46",
        "looked": "true",
    }


@pytest.mark.parametrize(
    ("form", "orientation", "size", "place"),
    [("JPEG", 6, "80,120", "40,0,40,40"), ("JPEG", 3, "120,80", "80,40,40,40"), ("PNG", 6, "120,80", "0,0,40,40")],
)
def test_a_box_is_looked_at_where_it_was_drawn_also_on_an_image_that_its_exif_turns(
    tmp_path: Path, address: str, form: str, orientation: int, size: str, place: str
) -> None:
    lying = Image.new("L", (120, 80), 40)
    lying.paste(255, (0, 0, 40, 40))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    lying.save(data := io.BytesIO(), form, exif=exif)
    acts = f"""
  await give("film", Uint8Array.from(atob("{base64.b64encode(data.getvalue()).decode()}"), (c) => c.charCodeAt(0)));
  const [x, y, w, h] = [{place}];
  const {{ width, height }} = $("picture").querySelector("canvas");
  seen.size = [width, height].join();
  seen.frame = $("picture").style.aspectRatio;
  const grey = (x, y) => $("picture").querySelector("canvas").getContext("2d").getImageData(x, y, 1, 1).data[0];
  seen.white = grey(x + w / 2, y + h / 2) > 200;
  draw(x / width, y / height, (x + w) / width, (y + h) / height);
  $("form").requestSubmit(); await settled();
  seen.problem = $("problem").textContent;
  seen.drawn = box();
  const looked = box("crop").split(",");
  seen.looked = [x, y, w, h].every((value, at) => Math.abs(value - looked[at]) <= 2); // a pixel of the network's
  films()[0].click();
  seen.beside = $("sides").querySelector(".film").style.aspectRatio;
"""
    seen = acted(tmp_path, address, acts)
    frame = size.replace(",", " / ")
    expected = {"size": size, "frame": frame, "white": "true", "problem": ""}
    assert seen == {**expected, "drawn": place, "looked": "true", "beside": frame}


def test_other_pages_and_reasons_keep_the_region_of_their_search_whatever_is_drawn_since(
    tmp_path: Path, address: str
) -> None:
    acts = """
  const regions = [], plain = window.fetch;
  window.fetch = (url, options) => {
    if (options?.body) regions.push(options.body.get("region") ?? "whole");
    return plain(url, options);
  };
  const turn = async (way) => { $(way).click(); await settled(); };
  const why = async () => {
    films()[0].click(); await until(() => document.querySelector("#why table"));
    $("viewer").close();
  };
  draw(0.25, 0.25, 0.75, 0.75);
  await turn("next"); await why(); await turn("previous");
  seen.first = regions.splice(0).join(" ");
  $("form").requestSubmit(); await settled();
  draw(0, 0, 0.5, 0.5);
  await turn("next"); await why(); await turn("previous");
  seen.second = regions.splice(0).join(" ");
  key($("picture"), "Enter"); await settled();
  seen.third = regions.join(" ");
"""
    assert acted(tmp_path, address, acts) == {
        "first": "whole whole whole",
        "second": "32,32,64,64 32,32,64,64 32,32,64,64 32,32,64,64",
        "third": "0,0,64,64",
    }


def test_filters_hold_and_what_is_wrong_is_told_in_words(tmp_path: Path, address: str) -> None:
    acts = """
  document.querySelector("#views input").checked = true;
  $("age_from").value = 30;
  $("form").requestSubmit(); await settled();
  const people = [...document.querySelectorAll("#hits .person")].map((p) => p.textContent.split(" \\u00b7 "));
  seen.passed = people.length > 0 && people.every(([view, age]) => view === "AP" && parseInt(age) >= 30);
  $("age_from").value = 90; $("age_to").value = 80;
  $("form").requestSubmit(); await settled();
  seen.problem = $("problem").textContent;
  $("age_to").value = 150; $("age_from").value = 149;
  $("form").requestSubmit(); await settled();
  seen.none = $("warning").textContent;
  await give("notes.txt", new TextEncoder().encode("no image"));
  seen.rotten = $("problem").textContent;
  await give("large.png", new Uint8Array(33 * 2 ** 20));
  seen.large = $("problem").textContent;
"""
    assert acted(tmp_path, address, acts) == {
        "passed": "true",
        "problem": "ages from 90 to 80 hold none: the first is after the last",
        "none": "No image of this index passes the filter: ask for less.",
        "rotten": "the image cannot be searched with: neither PNG, JPEG nor DICOM: 8 bytes that begin with b'no image'",
        "large": "This file is larger than 32 MB, the most that the server takes.",
    }


def test_each_patient_is_shown_once_when_that_is_ticked(tmp_path: Path, address: str) -> None:
    acts = """
  const patients = () => [...document.querySelectorAll("#hits .origin .id")].map((p) => p.textContent);
  seen.often = new Set(patients()).size < patients().length;
  $("one_per_patient").click();
  $("form").requestSubmit(); await settled();
  seen.once = patients().length > 1 && new Set(patients()).size === patients().length;
  seen.status = $("status").textContent.replace(/, nearest.*/, "");
  let all = films().length;
  while (!$("next").disabled) { $("next").click(); await settled(); all += films().length; }
  seen.last = $("page").textContent;
  seen.all = all;
"""
    seen = acted(tmp_path, address, acts)
    assert re.fullmatch(r"1 to 12 of the patients of \d\d images", seen.pop("status"))
    assert seen == {"often": "true", "once": "true", "last": "Page 2", "all": "19"}


def test_the_page_as_it_is_served_runs_under_its_own_policy(tmp_path: Path, address: str) -> None:
    assert 'data-page="ready"' in browse(tmp_path, f"{address}/", "--virtual-time-budget=30000")


@pytest.mark.parametrize("size", ["1300,1000", "380,800"])
def test_nothing_is_wider_than_the_window(tmp_path: Path, address: str, size: str) -> None:
    acts = "seen.fits = document.documentElement.scrollWidth <= innerWidth;"
    shot = f"--screenshot={tmp_path / 'shot.png'}"
    assert acted(tmp_path, address, acts, f"--window-size={size}", shot) == {"fits": "true"}


def test_a_search_that_fails_changes_nothing_and_other_pages_keep_their_filters(tmp_path: Path, address: str) -> None:
    acts = """
  const plain = window.fetch;
  const first = films()[0].dataset.hit + $("status").textContent;
  window.fetch = async () => new Response('{"detail": "ask again"}', { status: 503 });
  $("next").click(); await settled();
  seen.told = $("problem").textContent;
  seen.same = first === films()[0].dataset.hit + $("status").textContent;
  window.fetch = plain;
  $("sex").value = "F";
  $("next").click(); await settled();
  seen.page2 = $("status").textContent.split(" nearest")[0];
  window.fetch = async () => new Response('{"detail": "no image"}', { status: 400 });
  await give("other.png", new ArrayBuffer(8));
  window.fetch = plain;
  seen.left = films().length;
  seen.pager = $("pager").hidden;
"""
    assert acted(tmp_path, address, acts) == {
        "told": "ask again",
        "same": "true",
        "page2": "13 to 24 of 57 images,",
        "left": "0",
        "pager": "true",
    }
