"""ComfyUI's page in a browser: past its first start, and a template opened the way a person does."""

import json
import os
import shutil
from typing import Any

from comfyui_server import ROOT

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
BROWSER_FLAGS = (
    "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync "
    "--no-first-run --disable-quic"
).split()
PACK = "ComfyUI-BLIP3o"


def past_the_first_start(page: Any, url: str) -> None:
    """Open the page and close what it offers to somebody who sees it for the first time."""
    page.goto(url)
    page.wait_for_function("() => window.app?.graph && window.app.vueAppReady", timeout=180_000)
    # The first start offers templates, sooner or later.
    for _ in range(4):
        page.wait_for_timeout(1500)
        page.keyboard.press("Escape")


def open_template(page: Any, name: str) -> None:
    """Open a graph the way a person does: Templates, our pack, the card."""
    page.locator("[aria-label*=emplates]").first.click()
    dialog = page.locator("[role=dialog]").first
    dialog.get_by_text(PACK, exact=True).first.click()
    dialog.get_by_text(name, exact=True).first.click()
    count = len(json.loads((ROOT / "workflows" / f"{name}.json").read_text("utf-8"))["nodes"])
    page.wait_for_function(f"() => app.graph._nodes.length === {count}", timeout=60_000)
    page.wait_for_timeout(1200)
    page.evaluate("() => app.canvas.fitViewToSelectionAnimated?.() ?? app.canvas.ds.reset()")
