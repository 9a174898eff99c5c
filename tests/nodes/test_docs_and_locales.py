"""Help pages and translations name every node, every input and every output, and nothing that does not exist."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from functools import cache
from importlib.abc import InspectLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from schema_snapshot import load_snapshot

ROOT = Path(__file__).resolve().parents[2]
NODES = ROOT / "nodes"
DOCS = ROOT / "web" / "docs"
LOCALES = ROOT / "locales"
LANGUAGES = ("en", "zh", "ja")
# ComfyUI's own words and examples that the help pages mention and no source file of ours does.
FOREIGN_WORDS = {
    "karras",
    "ddim_uniform",
    "HF_ENDPOINT",
    "(word:1.2)",
    "1, 0.5",
    "2, 1",
    "features_0",
    "features_1",
    "run_0",
    "lora_0",
}


# --- what the schemas say, read without ComfyUI ----------------------------------------------------------------------


@dataclass(frozen=True)
class Socket:
    name: str
    tooltip: str | None
    grows_as: tuple[str, ...] = ()
    socket_tooltip: str | None = None


@dataclass(frozen=True)
class Schema:
    node_id: str
    display_name: str
    category: str
    description: str
    inputs: tuple[Socket, ...]
    outputs: tuple[Socket, ...]


class Recorder:
    """Stands for everything that a node file imports; keeps what is said to io.*.Input, io.*.Output and io.Schema."""

    def __getattr__(self, name: str) -> Recorder:
        return self

    def __call__(self, *args: Any, **options: Any) -> Recorder:
        return self

    def __iter__(self) -> Any:
        return iter(())

    def Input(self, name: str, **options: Any) -> Socket:
        template = options.get("template")
        if template is None:
            return Socket(name, options.get("tooltip"))
        return Socket(name, options.get("tooltip"), template["names"], template["tooltip"])

    def Output(self, name: str, **options: Any) -> Socket:
        return Socket(name, options.get("tooltip"))

    def TemplatePrefix(self, socket: Socket, prefix: str, min: int, max: int) -> dict[str, Any]:
        return {"names": tuple(f"{prefix}{index}" for index in range(max)), "tooltip": socket.tooltip}

    def Schema(self, **said: Any) -> Schema:
        sockets = [*said["inputs"], *said["outputs"]]
        assert all(isinstance(socket, Socket) for socket in sockets), said["node_id"]
        words = {key: said[key] for key in ("node_id", "display_name", "category", "description")}
        return Schema(**words, inputs=tuple(said["inputs"]), outputs=tuple(said["outputs"]))


class KeptStatements(InspectLoader):
    """Runs some statements of a file as a module."""

    def __init__(self, statements: list[ast.stmt]) -> None:
        self.statements = statements

    def get_source(self, fullname: str) -> str:
        return ast.unparse(ast.Module(self.statements, []))


def is_node_class(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.ClassDef) and any(
        isinstance(part, ast.FunctionDef) and part.name == "define_schema" for part in statement.body
    )


def schemas_of(path: Path) -> list[Schema]:
    """Run only the define_schema methods of a file, and the constants and functions around them."""
    tree = ast.parse(path.read_text("utf-8"))
    classes = [statement for statement in tree.body if is_node_class(statement)]
    kept: list[ast.stmt] = []
    namespace: dict[str, Any] = {}
    for statement in tree.body:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            if isinstance(statement, ast.ImportFrom) and statement.module == "__future__":
                kept.append(statement)
                continue
            for alias in statement.names:
                namespace[alias.asname or alias.name.split(".")[0]] = Recorder()
        elif isinstance(statement, ast.FunctionDef):
            statement.decorator_list = []
            kept.append(statement)
        elif statement in classes:
            statement.bases = []
            statement.body = [part for part in statement.body if getattr(part, "name", "") == "define_schema"]
            kept.append(statement)
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            kept.append(statement)
    module = ModuleType(path.stem)
    vars(module).update(namespace)
    KeptStatements(kept).exec_module(module)
    return [getattr(module, statement.name).define_schema() for statement in classes]


@cache
def schemas() -> dict[str, Schema]:
    files = [path for path in sorted(NODES.glob("*.py")) if "define_schema" in path.read_text("utf-8")]
    return {schema.node_id: schema for path in files for schema in schemas_of(path)}


@cache
def string_literals() -> tuple[str, ...]:
    """Every string of nodes/, blip3o_core/ and lora_training/; an f-string counts as its pieces."""
    found = []
    packages = [ROOT / name for name in ("nodes", "blip3o_core", "lora_training")]
    for path in (path for package in packages for path in package.rglob("*.py")):
        for part in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                found.append(part.value)
    return tuple(found)


def is_in_source(words: str) -> bool:
    return any(words in literal for literal in string_literals())


# --- help pages ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PageForm:
    """How a help page is written in one language."""

    sections: tuple[str, ...]
    item: str

    def path(self, node_id: str) -> Path:
        # ComfyUI asks for docs/<id>/<locale>.md, then for docs/<id>.md: English there serves every other language too.
        return DOCS / f"{node_id}.md" if self is ENGLISH else DOCS / node_id / "zh.md"


ENGLISH = PageForm(("Connect", "Inputs", "Outputs", "Tips", "Errors"), r"- `(?P<id>[^`]+)`: \S")
CHINESE = PageForm(("连接", "输入", "输出", "提示", "常见错误"), r"- (?P<name>[^（]+)（`(?P<id>[^`]+)`）：\S")
FORMS = pytest.mark.parametrize("form", [ENGLISH, CHINESE], ids=["en", "zh"])


def sections_of(page: str) -> dict[str, list[str]]:
    """Heading -> its lines."""
    found: dict[str, list[str]] = {}
    for line in page.splitlines():
        if line.startswith("## "):
            found[line[3:]] = []
        elif found and line.strip():
            found[list(found)[-1]].append(line)
    return found


def pages(form: PageForm) -> dict[str, str]:
    return {node_id: form.path(node_id).read_text("utf-8") for node_id in schemas()}


def locale(language: str) -> dict[str, Any]:
    return json.loads((LOCALES / language / "nodeDefs.json").read_text("utf-8"))


def plain_name(display_name: str) -> str:
    """A node's name without the addition that tells it from other packs' nodes."""
    return re.sub(r"\s*[(（]BLIP3-o[)）]$", "", display_name)


def test_every_node_id_literal_is_among_the_schemas_read():
    literals = set()
    for path in NODES.glob("*.py"):
        for part in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(part, ast.Call) and getattr(part.func, "attr", "") == "Schema":
                node_id = next(keyword.value for keyword in part.keywords if keyword.arg == "node_id")
                assert isinstance(node_id, ast.Constant), f"{path.name}: node_id is no literal"
                literals.add(node_id.value)
    assert literals
    assert set(schemas()) == literals


def test_the_schemas_read_here_are_those_that_a_real_server_reported():
    for node_id, schema in schemas().items():
        reported = load_snapshot()[node_id]
        groups = [reported["input"].get(group, {}) for group in ("required", "optional")]
        tooltips = {name: definition[1]["tooltip"] for group in groups for name, definition in group.items()}
        assert {socket.name: socket.tooltip for socket in schema.inputs} == tooltips, node_id
        assert [socket.name for socket in schema.outputs] == reported["output_name"], node_id
        assert (schema.display_name, schema.category) == (reported["display_name"], reported["category"])


def test_every_node_has_an_english_and_a_chinese_page_and_no_page_is_left_over():
    wanted = {form.path(node_id) for node_id in schemas() for form in (ENGLISH, CHINESE)}
    assert {path for path in DOCS.rglob("*") if path.is_file()} == wanted


@FORMS
def test_a_page_has_its_sections_in_order(form: PageForm):
    for node_id, page in pages(form).items():
        wanted = [
            section for section in form.sections if schemas()[node_id].outputs or section != form.sections[2]
        ]
        assert list(sections_of(page)) == wanted, node_id
        assert all(sections_of(page).values()), node_id


@FORMS
def test_a_page_explains_every_input_and_output_and_no_other(form: PageForm):
    for node_id, page in pages(form).items():
        for section, sockets in zip(
            form.sections[1:3], (schemas()[node_id].inputs, schemas()[node_id].outputs), strict=True
        ):
            lines = sections_of(page).get(section, [])
            matches = [re.match(form.item, line) for line in lines]
            assert all(matches), f"{node_id}: {lines}"
            assert [match["id"] for match in matches] == [socket.name for socket in sockets], node_id


def test_an_english_page_is_titled_with_the_nodes_name():
    for node_id, page in pages(ENGLISH).items():
        assert page.splitlines()[0] == f"# {schemas()[node_id].display_name}"


def test_a_chinese_page_uses_the_names_that_the_chinese_page_of_comfyui_shows():
    for node_id, page in pages(CHINESE).items():
        words = locale("zh")[node_id]
        assert page.splitlines()[0] == f"# {words['display_name']}"
        shown = {section: sections_of(page).get(section, []) for section in CHINESE.sections[1:3]}
        names = [
            [words["inputs"][socket.name]["name"] for socket in schemas()[node_id].inputs],
            [words["outputs"][str(index)]["name"] for index in range(len(schemas()[node_id].outputs))],
        ]
        for lines, expected in zip(shown.values(), names, strict=True):
            assert [re.match(CHINESE.item, line)["name"] for line in lines] == expected, node_id


@FORMS
def test_names_in_bold_are_nodes(form: PageForm):
    words = locale("en" if form is ENGLISH else "zh")
    names = {plain_name(entry["display_name"]) for entry in words.values()}
    for node_id, page in pages(form).items():
        assert set(re.findall(r"\*\*(.+?)\*\*", page)) <= names, node_id


def test_names_in_corner_brackets_are_labels_of_the_chinese_page():
    labels = {
        entry["name"]
        for words in locale("zh").values()
        for entry in (*words["inputs"].values(), *words["outputs"].values())
    }
    for node_id, page in pages(CHINESE).items():
        assert set(re.findall("「(.+?)」", page)) <= labels, node_id


@FORMS
def test_words_in_code_font_exist(form: PageForm):
    names = {socket.name for schema in schemas().values() for socket in (*schema.inputs, *schema.outputs)}
    names |= {path.stem for path in (ROOT / "workflows").glob("*.json")} | FOREIGN_WORDS
    for node_id, page in pages(form).items():
        words = set(re.findall(r"`([^`]+)`", page)) - names
        unknown = {word for word in words if not is_in_source(word)}
        assert not unknown, f"{node_id}: {unknown}"


@FORMS
def test_quoted_errors_are_messages_of_the_source(form: PageForm):
    for node_id, page in pages(form).items():
        for line in sections_of(page)[form.sections[4]]:
            quoted = re.match(r"- \*([^*]+)\* \S", line)
            assert quoted, f"{node_id}: {line}"
            for piece in quoted[1].split("…"):
                assert is_in_source(piece.strip()), f"{node_id}: {piece}"


# --- translations ----------------------------------------------------------------------------------------------------


def english_texts(schema: Schema) -> dict[str, Any]:
    """The entry of the English nodeDefs.json that a schema asks for."""
    inputs = {}
    for socket in schema.inputs:
        inputs[socket.name] = {"name": socket.name, "tooltip": socket.tooltip}
        for name in socket.grows_as:
            # ComfyUI's name is "group.socket", and a dot becomes an underscore in a key.
            inputs[f"{socket.name}_{name}"] = {"name": name, "tooltip": socket.socket_tooltip}
    outputs = {
        str(index): {"name": socket.name, "tooltip": socket.tooltip}
        for index, socket in enumerate(schema.outputs)
    }
    texts = {"display_name": schema.display_name, "description": schema.description}
    return {**texts, "inputs": inputs, "outputs": outputs}


def leaves(tree: dict[str, Any], path: str = "") -> dict[str, str]:
    """Every text of a tree by its path."""
    found = {}
    for key, value in tree.items():
        here = f"{path}/{key}"
        found |= leaves(value, here) if isinstance(value, dict) else {here: value}
    return found


def test_the_english_locale_repeats_the_schemas():
    for node_id, schema in schemas().items():
        assert locale("en").get(node_id) == english_texts(schema), node_id
    assert set(locale("en")) == set(schemas())


@pytest.mark.parametrize("language", LANGUAGES[1:])
def test_a_translation_has_a_text_for_every_english_one_and_no_other(language: str):
    translated, english = leaves(locale(language)), leaves(locale("en"))
    assert set(translated) == set(english)
    assert all(isinstance(text, str) and text.strip() == text and text for text in translated.values())


@pytest.mark.parametrize(("language", "script"), [("zh", "[\u4e00-\u9fff]"), ("ja", "[\u3040-\u30ff]")])
def test_sentences_are_written_in_their_language(language: str, script: str):
    for path, text in leaves(locale(language)).items():
        if path.endswith(("/description", "/tooltip")):
            assert re.search(script, text), f"{path}: {text}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_names_and_descriptions_hold_no_character_that_comfyui_reads_as_a_placeholder(language: str):
    for path, text in leaves(locale(language)).items():
        # Tooltips are shown as they are; everything else goes through the page's message compiler.
        if not path.endswith("/tooltip"):
            assert not set("@{}|") & set(text), path


@pytest.mark.parametrize("language", LANGUAGES[1:])
def test_category_names_are_translated(language: str):
    names = json.loads((LOCALES / language / "main.json").read_text("utf-8"))
    parts = {part for schema in schemas().values() for part in schema.category.split("/")} - {"BLIP3-o"}
    assert set(names) == {"nodeCategories"}
    assert set(names["nodeCategories"]) == parts
