"""Every shipped graph fits the schemas, and its API form is what the page would queue."""

import copy
import json
from pathlib import Path

import pytest
from graphs import PAGE_NODES, links_of, problems, to_api
from schema_snapshot import PREFIX, WORKFLOWS, load_snapshot, load_workflows

API = Path(__file__).parent / "api"
GRAPHS = load_workflows()
SCHEMAS = load_snapshot()
EXPECTED = {
    *(
        "text_to_image",
        "text_to_image_ksampler",
        "batch_and_seeds",
        "ask_about_image",
        "caption_folder",
        "chat",
    ),
    *("image_variation", "blend_two_images", "instruction_edit", "best_of_n", "prompt_rewrite", "hires_fix"),
    *("lora_generate", "lora_train_with_core_nodes", "train_lora", "compare_strengths", "merge_loras"),
}


def test_every_promised_graph_is_there():
    assert set(GRAPHS) >= EXPECTED


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_fits_the_schemas(name: str):
    assert problems(GRAPHS[name], SCHEMAS) == []


@pytest.mark.parametrize("name", GRAPHS)
def test_the_api_copy_is_what_the_page_queues(name: str):
    assert json.loads((API / f"{name}.json").read_text("utf-8")) == to_api(GRAPHS[name], SCHEMAS)


def test_there_is_an_api_copy_of_nothing_else():
    assert {path.stem for path in API.glob("*.json")} == set(GRAPHS)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_explains_itself_and_has_a_thumbnail(name: str):
    notes = [node for node in GRAPHS[name]["nodes"] if node["type"] in PAGE_NODES]
    assert notes and notes[0]["widgets_values"][0].startswith("## ")
    assert (WORKFLOWS / f"{name}.jpg").read_bytes()[:2] == b"\xff\xd8"


@pytest.mark.parametrize("name", GRAPHS)
def test_a_loader_names_where_its_models_come_from(name: str):
    loaders = [node for node in GRAPHS[name]["nodes"] if node["type"] == "BLIP3oLoad"]
    assert loaders
    for node in loaders:
        assert {entry["directory"] for entry in node["properties"]["models"]} == {"blip3o"}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_runs_with_nothing_downloaded(name: str):
    for node in to_api(GRAPHS[name], SCHEMAS).values():
        assert node["inputs"].get("checkpoint", "built-in: tiny") == "built-in: tiny"
        assert node["class_type"] not in ("LoadImage", "BLIP3oLoadFeatures", "BLIP3oDownload")


def test_all_our_nodes_but_the_file_ones_appear_in_a_graph():
    shown = {node["type"] for graph in GRAPHS.values() for node in graph["nodes"]}
    ours = {name for name in SCHEMAS if name.startswith(PREFIX)}
    files = {"BLIP3oDownload", "BLIP3oSaveFeatures", "BLIP3oLoadFeatures", "BLIP3oOpenLora", "BLIP3oDoctor"}
    assert ours - shown <= files


def damaged(name: str = "text_to_image") -> dict:
    return copy.deepcopy(GRAPHS[name])


def test_the_checker_notices_a_missing_widget_value():
    graph = damaged()
    next(node for node in graph["nodes"] if node["type"] == "BLIP3oSampleFeatures")["widgets_values"].pop(2)
    assert any("widget values" in problem for problem in problems(graph, SCHEMAS))


def test_the_checker_notices_a_link_to_the_wrong_output():
    graph = damaged()
    link = next(link for link in graph["links"] if link[5] == "VAE")
    link[2] = 0
    assert problems(graph, SCHEMAS)


def test_the_checker_notices_a_node_that_does_not_exist():
    graph = damaged()
    graph["nodes"][1]["type"] = "BLIP3oNoSuchNode"
    graph["links"] = [link for link in graph["links"] if graph["nodes"][1]["id"] not in (link[1], link[3])]
    assert any("no node type" in problem for problem in problems(graph, SCHEMAS))


def test_link_ids_are_unique():
    for name, graph in GRAPHS.items():
        assert len(links_of(graph)) == len(graph["links"]), name


def test_no_other_folder_hides_the_graphs_from_comfyui():
    """It serves a pack's templates from the first of these folders that is there, and lists those of all."""
    served = ("example_workflows", "example", "examples", "workflow", "workflows")
    root = Path(__file__).resolve().parents[2]
    assert next(name for name in served if (root / name).exists()) == "workflows"
