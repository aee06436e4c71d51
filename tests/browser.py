"""Headless Chromium, where there is one: what a page looks like to a script in it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")

WATCH = """<script>
window.wrong = [];
window.onerror = message => { window.wrong.push(message) };
window.onunhandledrejection = event => { window.wrong.push(String(event.reason)) };
for (const kind of ["error", "warn"]) console[kind] = (...told) => { window.wrong.push(told.join(" ")) };
const wait = time => new Promise(done => setTimeout(done, time));
// What stands in the box that the mouse brings up over a place of a plot's axes; nothing if it brings up none.
const under = async (plot, x, y) => {
  const {xaxis, yaxis} = plot._fullLayout, drag = plot.querySelector(".nsewdrag"), box = drag.getBoundingClientRect();
  const place = {clientX: box.left + xaxis.d2p(x), clientY: box.top + yaxis.d2p(y), bubbles: true};
  for (const kind of ["mouseout", "mouseover", "mousemove"]) {
    drag.dispatchEvent(new MouseEvent(kind, place));
    await wait(200);
  }
  return [...plot.querySelectorAll(".hoverlayer text")].map(text => text.textContent).join("|");
};
const choose = async (menu, index) => { menu.selectedIndex = index; menu.dispatchEvent(new Event("change")); await wait(300) };
</script>"""


def in_browser(page: str, script: str, tmp_path: Path, *flags: str) -> tuple[Any, list[str]]:
    """What the body of an async function returns in a page once it is there, and all that went wrong or was warned of."""
    tell = f"""<script>addEventListener("load", async () => {{
      await wait(500);
      const said = await (async () => {{ {script} }})().catch(error => String(error));
      document.body.innerHTML = "<pre id=said></pre>";
      document.getElementById("said").textContent = JSON.stringify([said, window.wrong]) }})</script>"""
    copy = tmp_path / "copy.html"
    copy.write_text(page.replace("<head>", f"<head>{WATCH}", 1).replace("</body>", f"{tell}</body>"), encoding="utf-8")
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    command = [
        str(BROWSER),
        *quiet.split(),
        *flags,
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1200,900",
    ]
    command += ["--virtual-time-budget=60000", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    found = re.search(r'<pre id="said">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, "the script did not end"
    said, wrong = json.loads(html.unescape(found[1]))
    return said, wrong
