"""Makes the pictures and the file tree of the documentation from their sources, so that they stay true.

    python docs/make_figures.py                     all of it
    python docs/make_figures.py --only strip,tree   some of it

strip   docs/images/strip.png: two prompts, what the built-in model draws of them, and what it answers about its pictures
figure  docs/images/networks.svg: the four networks and the shapes between them, read from the configurations
tree    the list of files in docs/architecture.md, from the first line of every module
nodes   the list of nodes in docs/nodes.md, from the schema that the tests keep
page    docs/images/comfyui.png: a template opened and run in a real ComfyUI; needs one at COMFYUI_PATH (default
        ~/ComfyUI) and Chromium, see CONTRIBUTING.md
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "support")]

import conftest  # noqa: E402, F401  the checkout as the package comfyui_blip3o, without an installation
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin  # noqa: E402

IMAGES = ROOT / "docs" / "images"
STRIP, FIGURE, PAGE = IMAGES / "strip.png", IMAGES / "networks.svg", IMAGES / "comfyui.png"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
INK, PALE, ACCENT = "#1c2733", "#5b6b7b", "#0b7a75"

# --- strip -----------------------------------------------------------------------------------------------------------

STRIP_ROWS = (
    ("a red circle left of a blue square", "What is in the picture?"),
    ("two green stars on a black background", "How many stars are there?"),
)
STRIP_SEED = 7
STRIP_CHUNK = "strip"
# Left edge and width of a row's columns, pixels; a picture is a square of the row's height.
COLUMNS = {"prompt": (24, 300), "picture": (364, 192), "question": (596, 264), "answer": (900, 300)}
ROW, GAP, TOP = 192, 24, 48
STRIP_SIZE = (1224, TOP + len(STRIP_ROWS) * (ROW + GAP))


@dataclass(frozen=True)
class StripRow:
    """One line of the strip: what was asked for, what was drawn, and what the model says about it."""

    prompt: str
    picture: Image.Image
    question: str
    answer: str


def ask_the_model() -> list[StripRow]:
    """The strip's rows, drawn and answered by the built-in model in float32 on the CPU."""
    from comfyui_blip3o import load_pipeline
    from comfyui_blip3o.blip3o_core.config import BUILT_IN_MODEL

    pipeline = load_pipeline(BUILT_IN_MODEL, device="cpu", dtype="fp32")
    drawn = pipeline.generate([prompt for prompt, _ in STRIP_ROWS], seed=STRIP_SEED)
    answers = pipeline.ask(
        [question for _, question in STRIP_ROWS], [[picture] for picture in drawn.pictures]
    )
    return [
        StripRow(prompt, picture, question, answer)
        for (prompt, question), picture, answer in zip(STRIP_ROWS, drawn.pictures, answers, strict=True)
    ]


def picture_box(row: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a row's picture in the strip."""
    left, side = COLUMNS["picture"]
    top = TOP + row * (ROW + GAP)
    return left, top, left + side, top + side


def paint_strip(rows: list[StripRow]) -> Image.Image:
    strip = Image.new("RGB", STRIP_SIZE, "white")
    draw = ImageDraw.Draw(strip)
    for name, (left, width) in COLUMNS.items():
        draw.text((left + width / 2, TOP / 2), name, PALE, ImageFont.load_default(18), anchor="mm")
    for number, row in enumerate(rows):
        left, top, right, bottom = picture_box(number)
        side = right - left
        strip.paste(row.picture.resize((side, side), Image.Resampling.LANCZOS), (left, top))
        draw.rectangle((left, top, right - 1, bottom - 1), outline="#c4ccd4")
        middle = top + ROW / 2
        for name, text, colour in (
            ("prompt", row.prompt, INK),
            ("question", row.question, INK),
            ("answer", row.answer, ACCENT),
        ):
            start, width = COLUMNS[name]
            draw.rounded_rectangle((start, top + 36, start + width, bottom - 36), 14, "#f2f5f7")
            _write(draw, text, (start + width / 2, middle), width - 32, colour)
        for before, after in (("prompt", "picture"), ("picture", "question"), ("question", "answer")):
            _arrow(draw, sum(COLUMNS[before]) + 6, COLUMNS[after][0] - 6, middle)
    return strip


def _write(
    draw: ImageDraw.ImageDraw, text: str, centre: tuple[float, float], width: int, colour: str
) -> None:
    """Text in the middle of a card, in as many lines as it needs."""
    font = ImageFont.load_default(23)
    lines: list[str] = []
    for word in text.split():
        if lines and draw.textlength(f"{lines[-1]} {word}", font) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    draw.multiline_text(centre, "\n".join(lines), colour, font, anchor="mm", align="center", spacing=7)


def _arrow(draw: ImageDraw.ImageDraw, start: float, end: float, y: float) -> None:
    draw.line((start, y, end - 8, y), PALE, 3)
    draw.polygon(((end, y), (end - 11, y - 7), (end - 11, y + 7)), PALE)


def make_strip() -> None:
    rows = ask_the_model()
    note = PngImagePlugin.PngInfo()
    words = [{"prompt": row.prompt, "question": row.question, "answer": row.answer} for row in rows]
    note.add_text(STRIP_CHUNK, json.dumps({"seed": STRIP_SEED, "rows": words}))
    paint_strip(rows).save(STRIP, pnginfo=note, optimize=True)


# --- figure ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """What the figure says about one checkpoint: shapes at the arrows, and parameters of each network."""

    name: str
    queries: int
    conditioning: int
    features: int
    channels: int
    encoder_side: int
    latents: tuple[int, int, int]
    picture_side: int
    layers: dict[str, int]
    parameters: dict[str, int]


def published_sizes() -> Sizes:
    """Of the published 8B checkpoint: its networks are built without weights and counted."""
    from published_shapes import published_networks

    return _sizes("published 8B", published_networks())


def built_in_sizes() -> Sizes:
    """Of the checkpoint that comes with the project."""
    from comfyui_blip3o import load_pipeline
    from comfyui_blip3o.blip3o_core.config import BUILT_IN_MODEL

    pipeline = load_pipeline(BUILT_IN_MODEL, device="cpu")
    names = ("backbone", "dit", "image_encoder", "decoder")
    return _sizes("built-in", {name: getattr(pipeline, name) for name in names})


def _sizes(name: str, networks: dict[str, Any]) -> Sizes:
    backbone, dit = networks["backbone"], networks["dit"]
    encoder, decoder = networks["image_encoder"], networks["decoder"]
    _, queries, width = backbone.latent_queries.shape
    side = decoder.unet.config.sample_size
    assert queries == encoder.config.feature_grid**2
    assert width == dit.config.conditioning_dim
    assert dit.config.in_channels == encoder.config.width == decoder.unet.config.cross_attention_dim
    return Sizes(
        name,
        queries=queries,
        conditioning=width,
        features=queries,
        channels=dit.config.in_channels,
        encoder_side=encoder.config.image_size,
        latents=(decoder.latent_channels, side, side),
        picture_side=side * decoder.vae_scale,
        layers={
            "backbone": len(backbone.text.layers),
            "dit": dit.config.layers,
            "image_encoder": encoder.config.layers,
        },
        parameters={
            part: sum(parameter.numel() for parameter in network.parameters())
            for part, network in networks.items()
        },
    )


def count_text(parameters: int) -> str:
    """A number of parameters as people say it."""
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.2f} M"


def figure_texts(sizes: Sizes) -> dict[str, str]:
    """What the figure says about a checkpoint, by place."""
    latents = " x ".join(map(str, sizes.latents))
    return {
        "backbone": f"{sizes.layers['backbone']} layers, {count_text(sizes.parameters['backbone'])}",
        "conditioning": f"{sizes.queries} x {sizes.conditioning}",
        "dit": f"{sizes.layers['dit']} layers, {count_text(sizes.parameters['dit'])}",
        "features": f"{sizes.features} x {sizes.channels}",
        "decoder": f"latents {latents}, {count_text(sizes.parameters['decoder'])}",
        "picture": f"{sizes.picture_side} x {sizes.picture_side}",
        "encoder": f"{sizes.layers['image_encoder']} layers, {count_text(sizes.parameters['image_encoder'])}",
        "seen": f"{sizes.encoder_side} x {sizes.encoder_side}",
    }


BOX_W, BOX_H, BOX_TOP, LOW_TOP = 214, 122, 70, 268
BOX_LEFT = {"backbone": 24, "dit": 362, "decoder": 700}


def paint_figure(published: Sizes, built_in: Sizes) -> str:
    """The figure as SVG; numbers of the published checkpoint first, those of the built-in one below them."""
    large, small = figure_texts(published), figure_texts(built_in)
    parts: list[str] = []

    def text(x: float, y: float, words: str, kind: str = "", anchor: str = "middle") -> None:
        parts.append(f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{words}</text>')

    def box(left: int, top: int, title: str, about: str, place: str) -> None:
        parts.append(f'<rect x="{left}" y="{top}" width="{BOX_W}" height="{BOX_H}" rx="10" class="box"/>')
        middle = left + BOX_W / 2
        text(middle, top + 28, title, "title")
        text(middle, top + 50, about)
        text(middle, top + 80, large[place], "large")
        text(middle, top + 103, small[place], "small")

    def shape(x: float, y: float, name: str, place: str) -> None:
        text(x, y - 58, name)
        text(x, y - 34, large[place], "large")
        text(x, y - 12, small[place], "small")

    def arrow(*points: tuple[float, float]) -> None:
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        parts.append(f'<polyline points="{path}" class="arrow" marker-end="url(#head)"/>')

    row = BOX_TOP + BOX_H / 2
    right = {name: left + BOX_W for name, left in BOX_LEFT.items()}
    box(
        BOX_LEFT["backbone"],
        BOX_TOP,
        "Backbone",
        f"Qwen2.5-VL, {published.queries} latent queries",
        "backbone",
    )
    box(BOX_LEFT["dit"], BOX_TOP, "DiT", "NextDiT, flow matching", "dit")
    box(BOX_LEFT["decoder"], BOX_TOP, "Decoder", "SDXL-shaped UNet, VAE", "decoder")
    box(BOX_LEFT["dit"], LOW_TOP, "Image encoder", "EVA-CLIP", "encoder")
    text(BOX_LEFT["backbone"] + BOX_W / 2, 26, "prompt, pictures")
    arrow((BOX_LEFT["backbone"] + BOX_W / 2, 36), (BOX_LEFT["backbone"] + BOX_W / 2, BOX_TOP - 4))
    arrow((right["backbone"], row), (BOX_LEFT["dit"] - 4, row))
    shape((right["backbone"] + BOX_LEFT["dit"]) / 2, row, "conditioning", "conditioning")
    arrow((right["dit"], row), (BOX_LEFT["decoder"] - 4, row))
    shape((right["dit"] + BOX_LEFT["decoder"]) / 2, row, "image features", "features")
    arrow((right["decoder"], row), (right["decoder"] + 132, row))
    shape(right["decoder"] + 66, row, "picture", "picture")
    # Below: answers, noise, and pictures on their way in.
    middle = BOX_LEFT["backbone"] + BOX_W / 2
    arrow((middle, BOX_TOP + BOX_H), (middle, LOW_TOP - 24))
    text(middle, LOW_TOP - 4, "answers, captions, chat, choices")
    middle = BOX_LEFT["dit"] + BOX_W / 2
    text(middle, 26, f"noise, {large['features']} ({small['features']})")
    arrow((middle, 36), (middle, BOX_TOP - 4))
    low = LOW_TOP + BOX_H / 2
    corner = (right["dit"] + BOX_LEFT["decoder"]) / 2 + 40
    arrow((right["dit"], low), (corner, low), (corner, row + 8))
    text(corner + 12, low - 22, "image features of a picture:", anchor="start")
    text(corner + 12, low, "vary, blend, compose, edit, train", anchor="start")
    arrow((BOX_LEFT["dit"] - 132, low), (BOX_LEFT["dit"] - 4, low))
    shape(BOX_LEFT["dit"] - 68, low, "picture", "seen")
    text(1064, LOW_TOP + BOX_H - 18, published.name, "large", "end")
    text(1064, LOW_TOP + BOX_H + 4, built_in.name, "small", "end")
    style = (
        f"text{{font:14px Helvetica,Arial,sans-serif;fill:{PALE}}}.title{{font-size:19px;font-weight:bold;fill:{INK}}}"
        f".large{{fill:{INK};font-weight:bold}}.small{{fill:{ACCENT}}}.box{{fill:#f2f5f7;stroke:#c4ccd4}}"
        f".arrow{{fill:none;stroke:{PALE};stroke-width:2}}"
    )
    head = (
        '<marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0,0 L10,5 L0,10 z" fill="{PALE}"/></marker>'
    )
    body = "\n".join(parts)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1080 412" role="img">\n'
        "<title>The four networks of BLIP3-o and the shapes between them</title>\n"
        f"<style>{style}</style>\n<defs>{head}</defs>\n"
        f'<rect width="1080" height="412" rx="12" fill="white"/>\n{body}\n</svg>\n'
    )


def make_figure() -> None:
    _write_page(FIGURE, paint_figure(published_sizes(), built_in_sizes()))


# --- tree ------------------------------------------------------------------------------------------------------------

TREE_START, TREE_END = (
    "<!-- the tree: python docs/make_figures.py --only tree -->",
    "<!-- end of the tree -->",
)
TREE_FOLDERS = (
    "blip3o_core",
    "nodes",
    "lora_training",
    "pretraining",
    "cli",
    "benchmarks",
    "docs",
)


def module_sentence(path: Path) -> str:
    """First line of a module's docstring."""
    described = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return described.partition("\n")[0]


def file_tree() -> str:
    """Every module with the sentence that it begins with, folder by folder, as Markdown."""
    listing = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = sorted(
        set(listing.stdout.splitlines())
    )  # while a merge is open, git names a file up to three times
    tracked = [Path(name) for name in names if (ROOT / name).is_file()]
    folders: dict[Path, list[Path]] = {Path(): []}
    for name in TREE_FOLDERS:
        for path in tracked:
            if path.parts[0] == name:
                folders.setdefault(path.parent, []).append(path)
    folders[Path()] = [path for path in tracked if len(path.parts) == 1]
    lines: list[str] = []
    for folder, paths in sorted(folders.items(), key=lambda item: _place(item[0])):
        title = f"{folder.as_posix()}/" if folder.parts else "the root"
        package = folder / "__init__.py"
        about = f": {module_sentence(ROOT / package)}" if folder.parts and package in paths else ""
        lines += [f"**{title}**{about}", ""]
        for path in sorted(paths):
            if path.name != "__init__.py" or not folder.parts:
                lines.append(f"- `{path.name}`: {module_sentence(ROOT / path)}")
        lines.append("")
    return "\n".join(lines).rstrip("\n")


def _place(folder: Path) -> tuple[int, str]:
    return (TREE_FOLDERS.index(folder.parts[0]) if folder.parts else -1, folder.as_posix())


def with_block(page: str, start: str, end: str, block: str) -> str:
    """A page with what lies between two of its lines made again."""
    before, found, rest = page.partition(start)
    _, closed, after = rest.partition(end)
    assert found and closed, f"the page has no {start} ... {end}"
    return f"{before}{start}\n\n{block}\n\n{end}{after}"


def with_tree(page: str) -> str:
    """The architecture page with the tree of today."""
    return with_block(page, TREE_START, TREE_END, file_tree())


def make_tree() -> None:
    _write_page(ARCHITECTURE, with_tree(ARCHITECTURE.read_text("utf-8")))


def _write_page(path: Path, text: str) -> None:
    path.write_text(text, "utf-8", newline="\n")


# --- nodes -----------------------------------------------------------------------------------------------------------

NODES_PAGE = ROOT / "docs" / "nodes.md"
SCHEMA = ROOT / "tests" / "data" / "object_info.json"
NODES_START = "<!-- the nodes: python docs/make_figures.py --only nodes -->"
NODES_END = "<!-- end of the nodes -->"


def node_list() -> str:
    """Every node of ours with its description and a link to its help page, category by category, as Markdown."""
    categories: dict[str, list[str]] = {}
    for name, schema in json.loads(SCHEMA.read_text("utf-8")).items():
        help_page = ROOT / "web" / "docs" / f"{name}.md"
        if help_page.is_file():
            title = schema["display_name"].removesuffix(" (BLIP3-o)")
            line = f"- [{title}](../web/docs/{name}.md): {schema['description']}"
            categories.setdefault(schema["category"], []).append(line)
    parts = [
        f"## {category}\n\n" + "\n".join(sorted(lines)) for category, lines in sorted(categories.items())
    ]
    return "\n\n".join(parts)


def with_nodes(page: str) -> str:
    """The page of nodes with the nodes of today."""
    return with_block(page, NODES_START, NODES_END, node_list())


def make_nodes() -> None:
    _write_page(NODES_PAGE, with_nodes(NODES_PAGE.read_text("utf-8")))


# --- page ------------------------------------------------------------------------------------------------------------

PAGE_TEMPLATE = "ask_about_image"
PAGE_VIEW = {"width": 1360, "height": 800}
PAGE_SHARPNESS = 1.5
PAGE_COLOURS = 128


def make_page() -> None:
    """Opens a template in the real page, runs it by a click and takes a picture of what a person sees then."""
    from comfyui_server import COMFYUI, Server, make_base_folder
    from playwright.sync_api import sync_playwright
    from template_page import BROWSER_FLAGS, CHROMIUM, open_template, past_the_first_start

    if not (COMFYUI / "main.py").is_file() or CHROMIUM is None:
        raise SystemExit(f"The page needs a ComfyUI (looked in {COMFYUI}) and Chromium; see CONTRIBUTING.md.")
    with tempfile.TemporaryDirectory() as folder:
        server = Server(make_base_folder(Path(folder)))
        try:
            with sync_playwright() as driver:
                browser = driver.chromium.launch(executable_path=CHROMIUM, args=BROWSER_FLAGS)
                page = browser.new_page(viewport=PAGE_VIEW, device_scale_factor=PAGE_SHARPNESS)
                page.set_default_timeout(180_000)
                past_the_first_start(page, server.url)
                open_template(page, PAGE_TEMPLATE)
                page.get_by_role("button", name="Run").first.click()
                page.wait_for_function(
                    """() => app.graph._nodes.some((node) => (node.imgs ?? []).length) && app.graph._nodes
                        .filter((node) => node.type === "BLIP3oChoose" || node.type === "BLIP3oAsk")
                        .every((node) => node.properties.blip3o_answer)"""
                )
                page.wait_for_timeout(6000)  # notices fade
                shot = Path(folder) / "page.png"
                page.screenshot(path=shot)
                browser.close()
        finally:
            server.stop()
        with Image.open(shot) as picture:
            picture.convert("RGB").quantize(PAGE_COLOURS).save(PAGE, optimize=True)


MAKERS = {
    "strip": make_strip,
    "figure": make_figure,
    "tree": make_tree,
    "nodes": make_nodes,
    "page": make_page,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", metavar="NAMES", help=f"some of {','.join(MAKERS)}, with commas between them"
    )
    chosen = parser.parse_args(arguments).only
    names = chosen.split(",") if chosen else list(MAKERS)
    if unknown := [name for name in names if name not in MAKERS]:
        parser.error(f'there is no "{unknown[0]}"; choose from {", ".join(MAKERS)}')
    for name in names:
        print(f"{name} ...", flush=True)
        MAKERS[name]()
    return 0


if __name__ == "__main__":
    sys.exit(main())
