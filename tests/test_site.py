"""The built documentation in a browser: `make docs` comes first, and without it or without Chromium these tests are skipped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import in_browser, needs_browser

SITE = Path(__file__).resolve().parents[1] / "docs/_build/html"
pytestmark = [needs_browser, pytest.mark.skipif(not SITE.exists(), reason="needs `make docs`")]

# Calls a function on the document of each page, which stands in a frame of a width of its own.
FRAMES = """
const on_each = async (pages, width, look) => {
  const found = [];
  for (const page of pages) {
    const frame = document.createElement("iframe");
    Object.assign(frame.style, {width: width + "px", height: "900px", border: "0"});
    const loaded = new Promise(done => frame.onload = done);
    frame.src = page;
    document.body.append(frame);
    await loaded;
    found.push(await look(frame.contentDocument));
    frame.remove();
  }
  return found;
};
"""


def on_each(pages: list[str], width: int, look: str, tmp_path: Path) -> Iterator[tuple[str, Any]]:
    urls = json.dumps([f"{SITE.as_uri()}/{page}" for page in pages])
    script = f"{FRAMES} return await on_each({urls}, {width}, async page => {{ {look} }});"
    said, _ = in_browser("<html><head></head><body></body></html>", script, tmp_path, "--allow-file-access-from-files")
    yield from zip(pages, said, strict=True)


@pytest.mark.parametrize("width", [1400, 800])
def test_no_page_is_wider_than_its_window(width: int, tmp_path: Path) -> None:
    pages = [path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html")]
    pages = sorted(page for page in pages if not page.startswith("_modules"))
    look = f"""const text = page.querySelector(".content");
      return page.documentElement.scrollWidth <= {width} && text.scrollWidth <= text.clientWidth;"""
    assert [page for page, fits in on_each(pages, width, look, tmp_path) if not fits] == []


def test_what_people_search_for_is_found(tmp_path: Path) -> None:
    searches = [f"search.html?q={words}" for words in ("steering", "own+prompts", "run_with_cache", "SAE", "top_edges")]
    look = """for (let tries = 0; tries < 50 && !page.querySelector(".search li a"); tries++) await wait(100);
      return page.querySelectorAll(".search li a").length;"""
    assert [search for search, found in on_each(searches, 1400, look, tmp_path) if not found] == []
