"""Training in a real ComfyUI: from the example to a file that draws, cancelled, repeated, the same as the command line's."""

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from api_graphs import BUILT_IN, node
from comfyui_server import ROOT, Server, Socket, cached_nodes, error_of
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from training_graphs import DATASET, EXAMPLE, STEPS, training

DRAWING = {"seed": 1, "feature_steps": 2, "feature_cfg": 3.0, "pixel_steps": 2, "pixel_cfg": 3.0}
RUNS = "blip3o_training"
MEMORY_BYTES = 100e6
# Velocities of float32 weights that were added up in another order.
SAME_VELOCITY = 1e-5


def run_folder(base: Path, name: str) -> Path:
    (folder,) = (base / "output" / RUNS).glob(f"{name}-*")
    return folder


def events_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture
def watcher(server: Server) -> Iterator[Socket]:
    socket = Socket(server)
    yield socket
    socket.close()


@pytest.fixture(scope="module")
def trained(server: Server, base: Path) -> dict[str, Any]:
    """A finished training: its outputs, folder, file, what the page was told, and memory before and after."""
    warm_up = {"1": node("BLIP3oDataset", **EXAMPLE, **DATASET)}
    server.run(warm_up)
    before = server.memory_bytes()
    socket = Socket(server)
    prompt_id = server.queue(training("lights"), socket.client)
    told = list(socket.until_done(prompt_id))
    socket.close()
    entry = server.wait(prompt_id)
    assert entry["status"]["status_str"] == "success", error_of(entry)
    return {
        "outputs": entry["outputs"],
        "told": told,
        "folder": run_folder(base, "lights"),
        "file": base / "models" / "loras" / "lights.safetensors",
        "memory": (before, server.memory_bytes()),
    }


def test_a_training_ends_with_a_file_that_the_list_offers_at_once(server: Server, trained: dict[str, Any]):
    assert trained["file"].is_file()
    options = server.get("/object_info/BLIP3oLoadLora")["BLIP3oLoadLora"]["input"]["required"]["lora"][1]
    assert "lights.safetensors" in options["options"]
    with safe_open(str(trained["file"]), framework="pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.trigger_phrase"] == EXAMPLE["trigger"]
    assert json.loads(metadata["blip3o.scorecard"])["steps"] == STEPS


def test_the_page_is_told_of_every_step_with_chart_text_and_pictures(trained: dict[str, Any]):
    told = trained["told"]
    progress = [
        data["data"]
        for kind, data in told
        if kind == "json" and data["type"] == "progress" and data["data"]["node"] == "3"
    ]
    assert {"value": STEPS, "max": STEPS}.items() <= {
        key: progress[-1][key] for key in ("value", "max")
    }.items() or any(item["max"] == STEPS for item in progress)
    charts = [data["data"] for kind, data in told if kind == "json" and data["type"] == "blip3o.training"]
    assert charts and {chart["node"] for chart in charts} == {"3"}
    texts = [data.decode("utf-8", "replace") for kind, data in told if kind == "text"]
    assert any("Training: step" in text and "left" in text for text in texts)
    pictures = [data for kind, data in told if kind == "preview"]
    assert pictures
    Image.open(io.BytesIO(pictures[0][pictures[0].index(b"\xff\xd8") :])).load()


def test_the_node_keeps_chart_and_scorecard(trained: dict[str, Any]):
    (chart,) = trained["outputs"]["3"]["chart"]
    assert [step for step, _ in chart["loss"]] == list(range(1, STEPS + 1)) and chart["total"] == STEPS
    assert chart["scores"][-1]["step"] == STEPS
    assert "gain" in trained["outputs"]["4"]["text"][0]
    assert trained["outputs"]["5"]["images"]


def test_all_memory_of_a_training_comes_back(trained: dict[str, Any]):
    before, after = trained["memory"]
    assert after - before < MEMORY_BYTES


def test_equal_inputs_give_the_finished_lora_at_once_even_without_comfyuis_cache(
    server: Server, trained: dict[str, Any]
):
    told = (trained["folder"] / "events.jsonl").read_bytes()
    assert "3" in cached_nodes(server.wait(server.queue(training("lights"))))
    server.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(1)
    started = time.monotonic()
    entry = server.wait(server.queue(training("lights")))
    assert entry["status"]["status_str"] == "success" and "3" not in cached_nodes(entry)
    assert time.monotonic() - started < 5
    assert entry["outputs"]["3"]["chart"] == trained["outputs"]["3"]["chart"]
    assert (trained["folder"] / "events.jsonl").read_bytes() == told


def test_the_command_line_trains_the_same_weights_bit_for_bit(trained: dict[str, Any], tmp_path: Path):
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); import conftest; from comfyui_blip3o.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(ROOT / "tests"), "lora", "run"]
    command += [str(trained["folder"] / "config.yaml"), "--set", f"run.dir={tmp_path.as_posix()}"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (written,) = (tmp_path / trained["folder"].name / "final").glob("*[0-9a-f].safetensors")
    by_command, by_node = load_file(str(written)), load_file(str(trained["file"]))
    assert set(by_command) == set(by_node)
    for key, tensor in by_node.items():
        assert torch.equal(by_command[key], tensor), key


def features_graph(lora: dict[str, Any] | None) -> dict[str, Any]:
    """One step from noise, so that the features are noise minus velocity; node 6 keeps them."""
    graph = {
        "1": node("BLIP3oLoad", checkpoint=BUILT_IN, dtype="fp32"),
        "2": node(
            "BLIP3oEncodePrompt", backbone=["1", 0], prompt="three red and yellow circles", negative_prompt=""
        ),
        "6": node("BLIP3oSaveFeatures", image_features=["5", 0], filename_prefix="velocity/x"),
    }
    if lora is not None:
        graph["4"] = lora
    sampling = {"seed": 1, "steps": 1, "cfg": 1.0, "sampler": "euler", "shift": 1.0, "batch_size": 1}
    wires = {"dit": ["4" if lora else "1", 0 if lora else 1], "positive": ["2", 0], "negative": ["2", 1]}
    graph["5"] = node("BLIP3oSampleFeatures", **wires, **sampling)
    return graph


def drawn_features(server: Server, base: Path, lora: dict[str, Any] | None) -> torch.Tensor:
    server.run(features_graph(lora))
    newest = max(
        (base / "output" / "velocity").glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns
    )
    return load_file(str(newest))["image_features"]


def test_our_loader_and_comfyuis_own_give_the_same_velocity(
    server: Server, base: Path, trained: dict[str, Any]
):
    plain = drawn_features(server, base, None)
    ours = drawn_features(
        server,
        base,
        node("BLIP3oLoadLora", lora="lights.safetensors", strength=1.0, backbone_strength=1.0, dit=["1", 1]),
    )
    stock = drawn_features(
        server,
        base,
        node("LoraLoaderModelOnly", lora_name="lights.safetensors", strength_model=1.0, model=["1", 1]),
    )
    assert (ours - plain).abs().max() > 1e-3
    assert (ours - stock).abs().max() / plain.std() <= SAME_VELOCITY


def test_cancel_leaves_a_lora_that_loads_and_the_same_inputs_go_on_from_there(
    server: Server, base: Path, watcher: Socket, trained: dict[str, Any]
):
    graph = training("stopped", steps=100_000, sample_every=0)
    steps = []
    for _ in range(2):
        prompt_id = server.queue(graph, watcher.client)
        cancelled_at = 0.0
        for kind, data in watcher.until_done(prompt_id):
            if kind == "text" and b"Training: step" in data and not cancelled_at:
                cancelled_at = time.monotonic()
                server.post("/interrupt", {})
        assert cancelled_at and time.monotonic() - cancelled_at < 30
        entry = server.wait(prompt_id)
        assert [name for name, _ in entry["status"]["messages"]][-1] == "execution_interrupted"
        events = events_of(run_folder(base, "stopped"))
        steps.append([event["step"] for event in events if event["event"] == "step"])
    assert steps[1][: len(steps[0])] == steps[0] and steps[1] == list(range(1, len(steps[1]) + 1))
    assert len(steps[1]) > len(steps[0])
    assert not (base / "models" / "loras" / "stopped_02.safetensors").exists()
    loaded = {
        "1": node("BLIP3oLoad", checkpoint=BUILT_IN, dtype="auto"),
        "2": node(
            "BLIP3oLoadLora", lora="stopped.safetensors", strength=1.0, backbone_strength=1.0, dit=["1", 1]
        ),
        "3": node("PreviewAny", source=["2", 2]),
    }
    assert "weights at strength 1" in server.run(loaded)["3"]["text"][0]


def results_graph(**merging: Any) -> dict[str, Any]:
    """The finished LoRA, opened, merged with itself, compared, saved and converted."""
    return {
        "1": node("BLIP3oLoad", checkpoint=BUILT_IN, dtype="auto"),
        "2": node("BLIP3oOpenLora", lora="lights.safetensors"),
        "3": node(
            "BLIP3oMergeLoras",
            **{"loras.lora_0": ["2", 0], "loras.lora_1": ["2", 0]},
            **{"weights": "0.25, 0.75", "method": "concat", "rank": 0, "checkpoint": BUILT_IN, **merging},
        ),
        "4": node(
            "BLIP3oCompareStrengths",
            **{"backbone": ["1", 0], "dit": ["1", 1], "decoder": ["1", 2], "vae": ["1", 3], "lora": ["3", 0]},
            prompts="three red and yellow circles\na blue square",
            strengths="0, 1",
            **DRAWING,
        ),
        "5": node("PreviewImage", images=["4", 0]),
        "6": node("PreviewImage", images=["4", 1]),
        "7": node("BLIP3oSaveLora", lora=["3", 0], name="merged", dtype="fp32", trigger="two lights"),
        "8": node(
            "BLIP3oConvertLora",
            lora=["2", 0],
            format="kohya",
            rank=2,
            dtype="fp32",
            filename_prefix="loras/kohya",
            checkpoint=BUILT_IN,
        ),
        "9": node("BLIP3oPlotRun", **{"runs.run_0": ["13", 2]}),
        **{f"1{key}": value for key, value in _renumbered(training("lights")).items() if key in "123"},
    }


def _renumbered(graph: dict[str, Any]) -> dict[str, Any]:
    for item in graph.values():
        for name, value in item["inputs"].items():
            if isinstance(value, list):
                item["inputs"][name] = [f"1{value[0]}", value[1]]
    return graph


def picture(server: Server, reference: dict[str, str]) -> Image.Image:
    return Image.open(io.BytesIO(server.image(reference))).convert("RGB")


@pytest.fixture(scope="module")
def results(server: Server, trained: dict[str, Any]) -> dict[str, Any]:
    assert trained
    return server.run(results_graph())


def test_strength_zero_draws_what_the_model_draws_without(server: Server, results: dict[str, Any]):
    pictures = [picture(server, reference) for reference in results["6"]["images"]]
    assert len(pictures) == 4
    graph = {
        "1": node("BLIP3oLoad", checkpoint=BUILT_IN, dtype="auto"),
        "2": node(
            "BLIP3oGenerate",
            **{"backbone": ["1", 0], "dit": ["1", 1], "decoder": ["1", 2], "vae": ["1", 3]},
            prompt="three red and yellow circles",
            negative_prompt="",
            batch_size=1,
            **DRAWING,
        ),
        "3": node("PreviewImage", images=["2", 0]),
    }
    (alone,) = server.run(graph)["3"]["images"]
    assert picture(server, alone).tobytes() == pictures[0].tobytes()
    assert pictures[1].tobytes() != pictures[0].tobytes()


def test_the_grid_holds_all_pictures_with_room_for_their_labels(server: Server, results: dict[str, Any]):
    (shown,) = (picture(server, reference) for reference in results["5"]["images"])
    single = picture(server, results["6"]["images"][0])
    assert shown.width > 2 * single.width and shown.height > 2 * single.height + 40


def test_a_merge_of_shares_that_add_up_to_one_does_what_the_lora_does(
    server: Server, base: Path, results: dict[str, Any]
):
    assert results["7"]["text"] == ["Saved merged.safetensors"]

    def features(name: str) -> torch.Tensor:
        return drawn_features(
            server, base, node("BLIP3oLoadLora", lora=name, strength=1.0, backbone_strength=1.0, dit=["1", 1])
        )

    merged, alone = features("merged.safetensors"), features("lights.safetensors")
    assert (merged - alone).abs().max() / alone.std() <= SAME_VELOCITY


def test_a_saved_lora_tells_its_trigger_and_a_converted_one_its_rank(
    server: Server, base: Path, results: dict[str, Any]
):
    name = Path(results["8"]["text"][0].removeprefix("Saved ")).name
    for file, expected in (("merged.safetensors", "two lights"), (name, "rank 2")):
        (text,) = server.run({"1": node("BLIP3oOpenLora", lora=file)})["1"]["text"]
        assert expected in text
    keys = load_file(str(base / "output" / "loras" / name))
    assert all(key.startswith("lora_unet_") for key in keys)


def test_a_run_is_drawn(server: Server, results: dict[str, Any]):
    assert picture(server, results["9"]["images"][0]).width > 500


# --- datasets --------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures_folder(base: Path) -> Iterator[str]:
    """Name of a folder with two pictures with captions, one without, and one that is none."""
    folder = base / "input" / "mine"
    folder.mkdir(exist_ok=True)
    for index, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (160, 128), colour).save(folder / f"{colour}.png")
        if index < 2:
            (folder / f"{colour}.txt").write_text(f"[trigger] in {colour}", "utf-8")
    (folder / "broken.png").write_bytes(b"not a picture")
    yield "mine [input]"
    for path in folder.iterdir():
        path.unlink()


def dataset(folder: str, **options: Any) -> dict[str, Any]:
    settings = {**DATASET, "folder": folder, "trigger": "ohwx", "class_word": "", **options}
    return {"1": node("BLIP3oDataset", **settings)}


def test_a_dataset_shows_its_pictures_with_red_and_yellow_marks(server: Server, pictures_folder: str):
    shown = server.run(dataset(pictures_folder, bad_pictures="skip"))["1"]
    (report,) = shown["text"]
    assert "broken.png" in report and "blue.png" in report and "missing_captions" in report
    colours = picture(server, shown["images"][0]).getcolors(2**20)
    found = {colour for _, colour in colours}
    assert {(229, 72, 77), (242, 183, 5)} <= found


def test_a_changed_caption_is_seen_and_a_touched_picture_changes_nothing(
    server: Server, base: Path, pictures_folder: str
):
    graph = dataset(pictures_folder)
    assert "missing_captions" in server.run(graph)["1"]["text"][0]
    (base / "input" / "mine" / "red.png").touch()
    assert "1" in cached_nodes(server.wait(server.queue(graph)))
    (base / "input" / "mine" / "blue.txt").write_text("[trigger] in blue", "utf-8")
    (report,) = server.run(graph)["1"]["text"]
    assert "missing_captions" not in report


def test_a_training_refuses_a_dataset_with_errors_and_names_them(server: Server, pictures_folder: str):
    graph = {**training("never"), **dataset(pictures_folder)}
    message = error_of(server.wait(server.queue(graph)))
    assert "The dataset has" in message and "broken.png" in message and "bad_pictures" in message


def test_missing_captions_are_written_beside_the_pictures(server: Server, base: Path, pictures_folder: str):
    graph = {
        **dataset(pictures_folder, bad_pictures="skip"),
        "2": node("BLIP3oLoad", checkpoint=BUILT_IN, dtype="auto"),
        "3": node(
            "BLIP3oCaptionDataset",
            dataset=["1", 0],
            backbone=["2", 0],
            style="short",
            overwrite=False,
            max_new_tokens=16,
        ),
    }
    (text,) = server.run(graph)["3"]["text"]
    assert text.startswith("1 captions written, 2 kept.")
    written = (base / "input" / "mine" / "blue.txt").read_text("utf-8").strip()
    assert written and written in text
    assert (base / "input" / "mine" / "red.txt").read_text("utf-8") == "[trigger] in red"


def test_ceiling_and_trigger_are_told_before_a_training(server: Server):
    graph = {
        "1": node("BLIP3oDataset", **EXAMPLE, **DATASET),
        "2": node("BLIP3oLoad", checkpoint=BUILT_IN, dtype="auto"),
        "3": node("BLIP3oLoadImageEncoder", checkpoint=BUILT_IN, dtype="auto"),
        "4": node(
            "BLIP3oCheckDataset",
            **{"dataset": ["1", 0], "backbone": ["2", 0], "image_encoder": ["3", 0]},
            **{"decoder": ["2", 2], "vae": ["2", 3], "pictures": 2, "steps": 20, "cfg": 3.0, "seed": 0},
        ),
    }
    shown = server.run(graph)["4"]
    assert "Ceiling: the frozen decoder keeps" in shown["text"][0] and "Trigger: it moves" in shown["text"][0]
    assert shown["images"]


def test_core_saves_loads_and_trains_on_our_training_set(server: Server):
    core = {
        "batch_size": 2,
        "grad_accumulation_steps": 1,
        "steps": 2,
        "learning_rate": 0.001,
        "rank": 2,
        "optimizer": "AdamW",
        "loss_function": "MSE",
        "seed": 0,
        "training_dtype": "fp32",
        "lora_dtype": "fp32",
        "quantized_backward": False,
        "algorithm": "LoRA",
        "gradient_checkpointing": False,
        "checkpoint_depth": 1,
        "offloading": False,
        "existing_lora": "[None]",
        "bucket_mode": False,
        "bypass_mode": False,
    }
    models = {
        "1": node("BLIP3oLoad", checkpoint=BUILT_IN, dtype="fp32"),
        "2": node("BLIP3oLoadImageEncoder", checkpoint=BUILT_IN, dtype="fp32"),
    }
    made = {
        **models,
        "3": node("BLIP3oDataset", **EXAMPLE, **{**DATASET, "crop": "views", "views": 2}),
        "4": node("BLIP3oTrainingSet", dataset=["3", 0], backbone=["1", 0], image_encoder=["2", 0]),
        "5": node("PreviewAny", source=["4", 2]),
        "6": node(
            "SaveTrainingDataset",
            latents=["4", 0],
            conditioning=["4", 1],
            folder_name="lights",
            shard_size=1000,
        ),
    }
    captions = server.run(made)["5"]["text"]
    assert len(captions) == 22 and "three red and yellow circles" in captions
    loaded = {
        **models,
        "3": node("LoadTrainingDataset", folder_name="lights"),
        "4": node("TrainLoraNode", model=["1", 1], latents=["3", 0], positive=["3", 1], **core),
        "5": node("PreviewAny", source=["4", 2]),
    }
    assert server.run(loaded)["5"]["text"] == ["2"]


REFUSED = {
    "a folder outside": ("1", "folder", "../secret [input]", "folder"),
    "a name with a folder": ("3", "name", "../../evil", "cannot be the name of a file"),
    "an unknown setting": ("2", "more", "train.stepz=3", 'did you mean "steps"'),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_mistake_is_refused_with_a_remedy(server: Server, what: str):
    number, name, value, fragment = REFUSED[what]
    graph = training("refused")
    graph[number]["inputs"][name] = value
    answer = server.post("/prompt", {"prompt": graph})
    refused = "prompt_id" not in answer or bool(answer["node_errors"])
    message = json.dumps(answer) if refused else error_of(server.wait(answer["prompt_id"]))
    assert fragment in message
