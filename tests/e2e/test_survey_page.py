"""The page of `aiprod-ds data` in a real browser: nothing is logged as an error or asked of a network, a
phone need not scroll sideways, the table can be searched and sorted, as long as it may become, too."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from aiprod_ds.cli import main
from aiprod_ds.survey.demands import Demands
from aiprod_ds.survey.findings import Finding
from aiprod_ds.survey.page import MAX_ROWS, PageRows, write_survey_page
from aiprod_ds.survey.rows import Row
from aiprod_ds.survey.run import Survey
from aiprod_ds.survey.tally import Tally
from aiprod_ds.testing.awkward_folder import write_awkward_folder
from aiprod_ds.testing.browser import Browser, Page, find_browser, open_browser

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(find_browser() is None, reason="needs chromium"),
]

_TOO_WIDE = """[...document.querySelectorAll("main *")]
  .filter((part) => !part.closest(".scroll, pre, nav"))
  .filter((part) => part.getBoundingClientRect().right > innerWidth + 1)
  .map((part) => part.outerHTML.slice(0, 200))"""
_PICTURES = """Promise.all([...document.images].map(async (image) => {
  image.loading = "eager";
  await image.decode().catch(() => {});
  return image.naturalWidth;
}))"""
_COLORS = """(() => {
  const behind = (part) => {
    const color = getComputedStyle(part).backgroundColor;
    return color.endsWith(", 0)") ? behind(part.parentElement) : color;
  };
  const small = "h1, h2, p, .tag, .effect, th, td, summary, a, .pill, button, figcaption *";
  return [...document.querySelectorAll(small)]
    .filter((part) => part.textContent.trim() && !part.hidden)
    .map((part) => [getComputedStyle(part).color, behind(part)]);
})()"""
_SHOWN = '[...document.querySelectorAll(".files tbody tr")].filter((row) => !row.hidden).length'
_NAMES = '[...document.querySelectorAll(".files tbody tr th")].map((head) => head.dataset.order)'


@pytest.fixture(scope="module")
def awkward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("survey")
    write_awkward_folder(root / "clips")
    assert main(["data", str(root / "clips"), "--output", str(root / "page")]) == 0
    return root / "page" / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as opened:
        yield opened


@pytest.mark.parametrize("is_dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_page_fits_its_window_loads_nothing_and_can_be_read(
    awkward: Path, browser: Browser, width: int, is_dark: bool
) -> None:
    page = browser.open(awkward, width=width, is_dark=is_dark)
    page.evaluate('document.querySelectorAll("details").forEach((part) => { part.open = true; })')
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(_TOO_WIDE) == []
    pictures = page.evaluate(_PICTURES)
    assert len(pictures) > 25
    assert all(pictures)
    assert page.errors == []
    assert page.requests == []
    faint = {tuple(pair) for pair in page.evaluate(_COLORS) if _contrast(*pair) < 4.5}
    assert faint == set()


def test_the_table_is_searched_filtered_and_sorted(awkward: Path, browser: Browser) -> None:
    page = browser.open(awkward)
    count = page.evaluate(_SHOWN)
    assert count > 30
    _type(page, "interlaced")
    assert page.evaluate(_SHOWN) == 1
    _type(page, "no such file")
    assert page.evaluate(_SHOWN) == 0
    _type(page, "")
    assert page.evaluate(_SHOWN) == count
    page.evaluate('document.querySelector(".chips button").click()')
    assert page.evaluate(_SHOWN) == 6, "those that are left out"
    page.evaluate('document.querySelector(".chips button").click()')
    page.evaluate('document.querySelector("button.show[data-kind=hdr]").click()')
    assert page.evaluate(_SHOWN) == 2
    page.evaluate('document.querySelector(".files thead th").click()')
    rising = page.evaluate(_NAMES)
    page.evaluate('document.querySelector(".files thead th").click()')
    falling = page.evaluate(_NAMES)
    assert rising == falling[::-1]
    assert len(rising) == count
    assert page.errors == []


def test_a_page_can_be_read_without_its_script(awkward: Path, browser: Browser, tmp_path: Path) -> None:
    text = awkward.read_text(encoding="utf-8")
    bare = tmp_path / "bare.html"
    bare.write_text(text[: text.rindex("<script>")], encoding="utf-8")
    page = browser.open(bare)
    seen = page.evaluate("document.body.innerText")
    for words in ("What to do", "deinterlaced (bwdif)", "woven.mp4", "Copy or download them again."):
        assert words in seen
    assert page.evaluate('document.querySelector(".tools").hidden')


def test_the_longest_table_shows_the_gravest_and_names_the_rest(browser: Browser, tmp_path: Path) -> None:
    rows, tally = PageRows(), Tally()
    kinds = itertools.cycle([(), ("interlaced",), ("small",)])
    for number in range(3 * MAX_ROWS):
        found = ("empty",) if number == 5_000 else next(kinds)
        row = Row(
            path=f"clips/{number:06d}.mp4",
            kind="film",
            width=1920,
            height=1080,
            aspect="16:9",
            rate_hz=25.0,
            frames=number + 1,
            seconds=(number + 1) / 25,
            findings=tuple(Finding(kind=kind, text=kind) for kind in found),
        )
        rows.row(row)
        tally.add(row)
    found_all = Survey(source=tmp_path, root=tmp_path, demands=Demands(), tally=tally)
    path = write_survey_page(found_all, rows, tmp_path, command="", table="files.csv")
    assert path.stat().st_size < 4 << 20
    page = browser.open(path, width=390)
    assert page.evaluate(_SHOWN) == MAX_ROWS
    assert page.evaluate(_NAMES)[0] == "clips/005000.mp4"
    assert f"The {MAX_ROWS:,} of {3 * MAX_ROWS:,} files" in page.evaluate("document.body.innerText")
    _type(page, "000002")
    assert page.evaluate(_SHOWN) == 1
    assert page.errors == []


def _type(page: Page, words: str) -> None:
    page.evaluate(
        f"""(async () => {{
          const search = document.querySelector("#search");
          search.value = {words!r};
          search.dispatchEvent(new Event("input"));
          await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
        }})()"""
    )


def _contrast(first: str, second: str) -> float:
    bright, dark = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def _luminance(color: str) -> float:
    parts = [int(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
