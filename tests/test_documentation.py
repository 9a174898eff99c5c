"""What the documentation shows is what the program does; every link leads somewhere. Needs no mkdocs."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
LARGEST_PICTURE = 300_000
LINK = re.compile(r"\]\(([^)\s]+)\)")
# Largest difference of a picture that another processor draws from the same numbers, mean over its pixels, 0 to 255.
SAME_PICTURE = 2.0


@cache
def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    sys.modules[name] = loaded = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(loaded)
    sys.path[:] = path
    return loaded


@pytest.fixture
def figures() -> ModuleType:
    return module("make_figures")


@pytest.fixture
def hooks() -> ModuleType:
    return module("site_hooks")


@pytest.fixture(autouse=True)
def one_thread():
    """The networks are tiny: two threads that wait for each other are slower than one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pages() -> list[Path]:
    """Every Markdown file that git tracks."""
    listing = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in listing.stdout.splitlines() if (ROOT / line).is_file()]


def without_code(markdown: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", markdown, flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Names of a page's headings, as the forge and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


# --- the strip -------------------------------------------------------------------------------------------------------


def test_the_strip_shows_what_the_built_in_model_draws_and_answers(figures: ModuleType):
    rows = figures.ask_the_model()
    with Image.open(figures.STRIP) as strip:
        said = json.loads(strip.text[figures.STRIP_CHUNK])
        shown = strip.convert("RGB")
    assert said["rows"] == [
        {"prompt": row.prompt, "question": row.question, "answer": row.answer} for row in rows
    ]
    again = figures.paint_strip(rows)
    assert again.size == shown.size
    for number in range(len(rows)):
        box = figures.picture_box(number)
        assert difference(again.crop(box), shown.crop(box)) < SAME_PICTURE
    first, second = (again.crop(figures.picture_box(number)) for number in (0, 1))
    assert difference(first, second) > 10 * SAME_PICTURE, (
        "the measure sees no difference between two pictures"
    )


def difference(first: Image.Image, second: Image.Image) -> float:
    """Mean absolute difference of two pictures of one size, 0 to 255."""
    return float(np.abs(np.asarray(first, np.float64) - np.asarray(second, np.float64)).mean())


# --- the figure ------------------------------------------------------------------------------------------------------


def test_the_figure_says_what_the_configurations_say(figures: ModuleType):
    from comfyui_blip3o.blip3o_core.checkpoints.layout import open_checkpoint
    from comfyui_blip3o.blip3o_core.config import BUILT_IN_MODEL, EvaClipConfig, NextDiTConfig

    svg = figures.FIGURE.read_text("utf-8")
    assert svg == figures.paint_figure(figures.published_sizes(), figures.built_in_sizes())
    texts = re.findall(r"<text [^>]*>([^<]*)</text>", svg)
    dit, encoder = NextDiTConfig(), EvaClipConfig()
    queries = encoder.feature_grid**2
    files = open_checkpoint(BUILT_IN_MODEL)
    small = files.component_tensors("backbone")["latent_queries"].shape
    for expected in (
        f"{queries} x {dit.conditioning_dim}",
        f"{queries} x {dit.in_channels}",
        f"{encoder.image_size} x {encoder.image_size}",
        f"{small[1]} x {small[2]}",
        f"{small[1]} x {files.config['gen_hidden_size']}",
    ):
        assert expected in texts
    assert any(text.startswith(f"{dit.layers} layers") for text in texts)
    assert any(text.startswith(f"{encoder.layers} layers") for text in texts)


# --- tree and nodes --------------------------------------------------------------------------------------------------


def test_the_file_tree_is_up_to_date(figures: ModuleType):
    page = figures.ARCHITECTURE.read_text("utf-8")
    assert page == figures.with_tree(page), "run: python docs/make_figures.py --only tree"


def test_the_file_tree_has_a_sentence_for_every_module(figures: ModuleType):
    tree = figures.file_tree()
    for path in (ROOT / "blip3o_core" / "drawing").glob("*.py"):
        sentence = ast.get_docstring(ast.parse(path.read_text("utf-8"))).splitlines()[0]
        assert sentence in tree
    for line in tree.splitlines():
        assert not line.startswith("- ") or len(line.partition("`: ")[2]) > 10, line


def test_the_list_of_nodes_is_up_to_date_and_names_every_help_page(figures: ModuleType):
    page = figures.NODES_PAGE.read_text("utf-8")
    assert page == figures.with_nodes(page), "run: python docs/make_figures.py --only nodes"
    for path in (ROOT / "web" / "docs").glob("*.md"):
        assert f"({path.stem}.md)" in page.replace("../web/docs/", "")


# --- pages -----------------------------------------------------------------------------------------------------------


def test_the_first_screen_of_the_readme_shows_strip_page_and_figure(figures: ModuleType):
    first = "\n".join((ROOT / "README.md").read_text("utf-8").splitlines()[:25])
    for path in (figures.STRIP, figures.PAGE, figures.FIGURE):
        assert f"]({path.relative_to(ROOT).as_posix()})" in first


def test_pictures_of_the_documentation_are_small():
    pictures = [path for path in (DOCS / "images").iterdir() if path.is_file()]
    assert len(pictures) >= 3
    for path in pictures:
        assert path.stat().st_size < LARGEST_PICTURE, path.name


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file_and_a_heading(page: Path):
    for link in LINK.findall(without_code(page.read_text("utf-8"))):
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{link} leads nowhere"
        assert target.is_relative_to(ROOT), f"{link} leads out of the repository"
        if anchor:
            assert anchor in anchors(target), f"{link}: there is no such heading"


def test_a_link_that_leads_nowhere_is_noticed(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("[gone](no_such_file.md)", "utf-8")
    with pytest.raises(AssertionError, match="leads nowhere"):
        test_every_link_leads_to_a_file_and_a_heading(page)


def test_paths_that_pages_name_in_code_exist():
    """`folder/file.py` in a page names a file of the repository, of the core or of the trainer; what a run or a benchmark makes is left out."""
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")]:
        for name in re.findall(
            r"`((?!runs/|\S*NAME)[\w/.]+/[\w/.]*\.(?:py|md|toml|txt))`", page.read_text("utf-8")
        ):
            places = (ROOT / name, ROOT / "blip3o_core" / name, ROOT / "lora_training" / name)
            assert any(place.exists() for place in places), f"{page.name} names {name}"


@cache
def source_strings() -> str:
    """Every string of the program, with … for what an f-string puts in."""
    found = []
    for folder in ("blip3o_core", "nodes", "lora_training", "cli", "pretraining"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                    found.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(found)


def quoted_messages() -> list[str]:
    text = " ".join((DOCS / "troubleshooting.md").read_text("utf-8").split())
    return re.findall(r"(?<= - )\*([^*]+)\*", text)


@pytest.mark.parametrize("message", quoted_messages())
def test_a_message_that_troubleshooting_quotes_is_one_of_the_programs(message: str):
    strings = " ".join(source_strings().split())
    for piece in re.split(r'"?…"?', message):
        assert piece.strip(' ."') in strings, piece


# --- the site --------------------------------------------------------------------------------------------------------


def nav_pages(entries: list) -> list[str]:
    names: list[str] = []
    for entry in entries:
        for value in entry.values():
            names += nav_pages(value) if isinstance(value, list) else [value]
    return names


def test_the_site_has_every_page_in_its_menu(hooks: ModuleType):
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
    names = nav_pages(settings["nav"])
    assert set(names) >= {path.name for path in DOCS.glob("*.md")}
    for name in names:
        assert (ROOT / hooks.repository_path(name)).is_file(), name


def test_links_follow_a_page_to_its_place_in_the_site(hooks: ModuleType):
    forge = "https://forge.example/it"
    cases = {
        ("README.md", "docs/cookbook.md"): "cookbook.md",
        ("README.md", "docs/images/strip.png"): "images/strip.png",
        ("README.md", "examples/draw_and_ask.py"): f"{forge}/blob/main/examples/draw_and_ask.py",
        ("docs/cookbook.md", "../workflows/chat.jpg"): "workflows/chat.jpg",
        ("docs/cookbook.md", "../web/docs/BLIP3oAsk.md"): "nodes/BLIP3oAsk.md",
        ("docs/cookbook.md", "../README.md#the-published-models"): "index.md#the-published-models",
        ("web/docs/BLIP3oAsk.md", "../../docs/training.md"): "../training.md",
        ("docs/nodes.md", "../benchmarks"): f"{forge}/tree/main/benchmarks",
        ("docs/nodes.md", "https://elsewhere.example/a.md"): "https://elsewhere.example/a.md",
    }
    for (source, link), expected in cases.items():
        assert hooks.follow_links(f"a [b]({link}) c", source, forge) == f"a [b]({expected}) c"
    for page in pages():
        source = page.relative_to(ROOT).as_posix()
        place = hooks.site_path(source)
        if place is not None:
            assert hooks.repository_path(place) == source
