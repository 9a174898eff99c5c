"""The real page in headless Chromium: every shipped graph opens from the template browser, and one is run by a click.

Screenshots go to the folder named by COMFYUI_SCREENSHOTS, else to pytest's temporary folder.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_graphs import QUICK_TRAINING
from comfyui_server import ROOT, Server
from template_page import BROWSER_FLAGS, CHROMIUM, open_template, past_the_first_start

playwright = pytest.importorskip(
    "playwright.sync_api", reason="PAGE TESTS DID NOT RUN: pip install playwright"
)

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="PAGE TESTS DID NOT RUN: no Chromium found (set CHROMIUM)"
)
WORKFLOWS = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
# What the page itself complains about in a fresh base folder, with no pack installed at all.
PAGE_NOISE = ("404 (Not Found)", "ComfyApp graph accessed before initialization")
STATE = """() => app.graph._nodes.map((node) => ({
    id: node.id, type: node.type, missing: !!node.has_errors || !LiteGraph.registered_node_types[node.type],
    values: Object.fromEntries((node.widgets ?? []).map((widget) => [widget.name, widget.value])),
    linked: (node.inputs ?? []).filter((input) => input.link != null).map((input) => input.name),
    images: (node.imgs ?? []).length,
}))"""


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("COMFYUI_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=BROWSER_FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="module")
def page(browser: Any, server: Server) -> Iterator[Any]:
    """The page, past its first start; errors that the console shows from then on are in page.complaints."""
    page = browser.new_page(viewport={"width": 1900, "height": 1100})
    # Two busy cores draw a large graph slowly.
    page.set_default_timeout(180_000)
    page.complaints = []
    past_the_first_start(page, server.url)
    page.on(
        "console", lambda message: page.complaints.append(message.text) if message.type == "error" else None
    )
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    yield page
    page.close()


def complaints(page: Any) -> list[str]:
    return [text for text in page.complaints if not any(noise in text for noise in PAGE_NOISE)]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_opens_from_the_template_browser_whole_and_quiet(page: Any, shots: Path, name: str):
    page.complaints.clear()
    open_template(page, name)
    page.screenshot(path=shots / f"{name}.png")
    saved = json.loads((ROOT / "workflows" / f"{name}.json").read_text("utf-8"))
    shown = {str(node["id"]): node for node in page.evaluate(STATE)}
    for node in saved["nodes"]:
        found = shown[str(node["id"])]
        assert not found["missing"], f"{node['type']} is missing"
        linked = [entry["name"] for entry in node["inputs"] if entry["link"] is not None]
        assert sorted(found["linked"]) == sorted(linked)
        values = [value for value in found["values"].values() if not isinstance(value, dict)]
        for value in node["widgets_values"]:
            assert value in values or value == "image", f"{node['type']} lost the value {value!r}"
    assert not page.get_by_text("errors found").is_visible(), "the page reports errors in the graph"
    assert not page.get_by_text("error found").is_visible(), "the page reports an error in the graph"
    assert complaints(page) == []


def test_a_click_on_run_shows_picture_and_answer(page: Any, shots: Path, checkpoint: str):
    open_template(page, "ask_about_image")
    page.evaluate(
        """(name) => { for (const node of app.graph._nodes) for (const widget of node.widgets ?? []) {
            if (widget.name === "checkpoint") widget.value = name;
            if (widget.name === "max_new_tokens") widget.value = 12; } }""",
        checkpoint,
    )
    page.complaints.clear()
    page.get_by_role("button", name="Run").first.click()
    page.wait_for_function("() => app.graph._nodes.some((node) => (node.imgs ?? []).length)", timeout=120_000)
    page.wait_for_function(
        """() => app.graph._nodes.filter((node) => node.type === "BLIP3oChoose")
            .every((node) => node.properties.blip3o_answer)""",
        timeout=120_000,
    )
    page.wait_for_timeout(1500)
    page.screenshot(path=shots / "run_by_click.png")
    assert complaints(page) == []
    answers = page.evaluate(
        """() => app.graph._nodes.map((node) => node.widgets?.find((widget) => widget.name === "answer_on_node")?.value)
            .filter((value) => value !== undefined)"""
    )
    assert len(answers) == 2 and any("%" in answer for answer in answers)
    saved = page.evaluate("() => JSON.parse(JSON.stringify(app.graph.serialize()))")
    page.evaluate("(graph) => app.loadGraphData(graph)", saved)
    page.wait_for_timeout(1000)
    again = page.evaluate(
        """() => app.graph._nodes.map((node) => node.widgets?.find((widget) => widget.name === "answer_on_node")?.value)
            .filter((value) => value !== undefined)"""
    )
    assert again == answers, "answers are gone when the graph is opened again"


def test_a_training_draws_its_chart_while_it_runs_and_keeps_it(page: Any, shots: Path, checkpoint: str):
    open_template(page, "compare_strengths")
    page.evaluate(
        """(values) => {
            for (const node of app.graph._nodes) for (const widget of node.widgets ?? [])
                if (widget.name in values) widget.value = values[widget.name];
            window.charts = [];
            app.api.addEventListener("blip3o.training", ({detail}) => window.charts.push(detail.chart.loss.length));
        }""",
        {
            **{"checkpoint": checkpoint, "name": "page", "steps": 6, "rank": 4, "sample_every": 3},
            **{"more": QUICK_TRAINING, "feature_steps": 2, "pixel_steps": 2, "strengths": "1"},
        },
    )
    page.complaints.clear()
    page.get_by_role("button", name="Run").first.click()
    trainer = "app.graph._nodes.find((node) => node.type === 'BLIP3oTrainLora')"
    page.wait_for_function(f"() => {trainer}.properties.blip3o_chart?.loss.length > 0", timeout=400_000)
    page.screenshot(path=shots / "training.png")
    page.wait_for_function(f"() => {trainer}.properties.blip3o_answer", timeout=400_000)
    page.wait_for_function(
        "() => app.graph._nodes.some((node) => node.type === 'SaveImage' && (node.imgs ?? []).length)",
        timeout=120_000,
    )
    assert complaints(page) == []
    assert page.evaluate("() => window.charts.some((count) => count > 0)"), "nothing was drawn while it ran"
    saved = page.evaluate("() => JSON.parse(JSON.stringify(app.graph.serialize()))")
    page.evaluate("(graph) => app.loadGraphData(graph)", saved)
    page.wait_for_timeout(1000)
    assert page.evaluate(f"() => {trainer}.properties.blip3o_chart.loss.length") == 6
    canvas = f"{trainer}.widgets.find((widget) => widget.name === 'training_chart').canvas"
    colours = page.evaluate(
        f"""() => {{ const {{data}} = {canvas}.getContext("2d").getImageData(0, 0, {canvas}.width, {canvas}.height);
            return new Set(new Uint32Array(data.buffer)).size; }}"""
    )
    assert colours > 5, "the chart is empty when the graph is opened again"


def test_a_malformed_saved_chart_or_answer_breaks_nothing(page: Any):
    open_template(page, "compare_strengths")
    saved = page.evaluate("() => JSON.parse(JSON.stringify(app.graph.serialize()))")
    page.complaints.clear()
    many = [[step, 0.5] for step in range(200_000)]
    charts = [
        {"loss": [[1, 0.5]]},
        {"loss": [[1, 0.5]], "scores": 5, "total": "x"},
        {
            "loss": [[1, 0.5], "x", None, [1], [1, None]],
            "scores": [None, 5, {"step": 1}, {"step": 1, "gain": "x"}],
        },
        {"loss": "abc"},
        {"loss": many, "scores": [], "total": 1e308},
        {"loss": {"length": 3}},
        "x",
        5,
        [],
    ]
    for chart in charts:
        for node in saved["nodes"]:
            if node["type"] == "BLIP3oTrainLora":
                node["properties"] |= {"blip3o_chart": chart, "blip3o_answer": chart}
        page.evaluate("(graph) => app.loadGraphData(graph)", saved)
        page.wait_for_timeout(300)
        assert complaints(page) == [], chart
        assert page.evaluate("() => app.graph._nodes.length") == len(saved["nodes"])
        # The observer draws once more with whatever the node holds.
        page.evaluate(
            "() => app.graph._nodes.forEach((node) => node.setSize([node.size[0] + 10, node.size[1]]))"
        )
