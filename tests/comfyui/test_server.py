"""The nodes in a real ComfyUI: previews, cancel, caches, memory, errors, and core's own nodes on our models."""

import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import api_graphs
import pytest
import torch
from api_graphs import node
from comfyui_server import ROOT, Server, Socket, cached_nodes, error_of
from PIL import Image
from safetensors.torch import save_file

REFERENCE = "reference"


@pytest.fixture
def watcher(server: Server) -> Iterator[Socket]:
    socket = Socket(server)
    yield socket
    socket.close()


def failure(server: Server, graph: dict[str, Any]) -> str:
    """The message that a graph ends with: of its validation, or of the node that failed."""
    answer = server.post("/prompt", {"prompt": graph})
    if "prompt_id" not in answer or answer["node_errors"]:
        return json.dumps(answer, ensure_ascii=False)
    return error_of(server.wait(answer["prompt_id"]))


def test_the_pack_loads_quickly_and_without_complaint(server: Server):
    log = server.log()
    assert "IMPORT FAILED" not in log and "Error while calling comfy_entrypoint" not in log
    line = next(line for line in log.splitlines() if "seconds" in line and "ComfyUI-BLIP3o" in line)
    seconds = float(line.split("seconds")[0].split()[-1])
    assert seconds <= 0.3


def test_text_to_image_gives_a_picture_of_the_native_size(server: Server):
    outputs = server.run(api_graphs.text_to_image(REFERENCE))
    picture = Image.open(io.BytesIO(server.image(outputs["5"]["images"][0])))
    assert picture.size == (32, 32)


def test_both_stages_send_live_previews(server: Server, watcher: Socket):
    graph = api_graphs.text_to_image(REFERENCE, seed=1001, steps=5, pixel_steps=6)
    prompt_id = server.queue(graph, watcher.client)
    previews = {"3": 0, "4": 0}
    running = None
    for kind, data in watcher.until_done(prompt_id):
        if kind == "json" and data["type"] == "executing":
            running = data["data"]["node"]
        if kind == "preview":
            assert running in previews
            Image.open(io.BytesIO(data[data.index(b"\xff\xd8") :])).load()
            previews[running] += 1
    assert previews == {"3": 5, "4": 6}


def test_a_batch_item_equals_the_picture_of_its_own_seed(server: Server):
    batch = server.run(api_graphs.text_to_image(REFERENCE, seed=40, batch=3))["5"]["images"]
    alone = server.run(api_graphs.text_to_image(REFERENCE, seed=42))["5"]["images"]
    pictures = [
        Image.open(io.BytesIO(server.image(reference))).convert("RGB") for reference in (batch[2], alone[0])
    ]
    first, second = (picture.tobytes() for picture in pictures)
    assert max(abs(a - b) for a, b in zip(first, second, strict=True)) <= 1


def test_two_prompts_that_differ_in_the_seed_share_loader_and_encoder(server: Server):
    server.run(api_graphs.text_to_image(REFERENCE, seed=50))
    entry = server.wait(server.queue(api_graphs.text_to_image(REFERENCE, seed=51)))
    assert {"1", "2"} <= cached_nodes(entry)


def test_answers_are_listed_shown_and_streamed(server: Server, watcher: Socket):
    graph = api_graphs.ask(REFERENCE, max_new_tokens=200, temperature=1.0, seed=7)
    graph["8"] = node("PreviewAny", source=["7", 0])
    prompt_id = server.queue(graph, watcher.client)
    streamed = [data for kind, data in watcher.until_done(prompt_id) if kind == "text"]
    outputs = server.wait(prompt_id)["outputs"]
    assert streamed
    assert outputs["7"]["text"] == outputs["8"]["text"]


def test_a_cached_answer_is_shown_again(server: Server):
    graph = api_graphs.ask(REFERENCE, question="What is this?")
    first = server.run(graph)
    assert server.run(graph)["7"] == first["7"]


def test_one_answer_per_image_or_one_for_all(server: Server):
    graph = api_graphs.ask(REFERENCE)
    graph["6"]["inputs"]["batch_size"] = 3
    graph["8"] = node("PreviewAny", source=["7", 0])
    assert len(server.run(graph)["8"]["text"]) == 3
    graph["7"]["inputs"]["batch"] = "one answer for all images"
    assert len(server.run(graph)["8"]["text"]) == 1


LONG_GRAPHS = {
    "image features": ("3", api_graphs.text_to_image(REFERENCE, seed=9001, steps=1000)),
    "pixels": ("4", api_graphs.text_to_image(REFERENCE, seed=9002, pixel_steps=500)),
    "answer": (
        "7",
        api_graphs.ask(
            REFERENCE, max_new_tokens=4096, temperature=2.0, question="Describe this image in detail"
        ),
    ),
}


@pytest.mark.parametrize("what", LONG_GRAPHS)
def test_cancel_stops_a_long_node_at_once_and_the_next_prompt_works(
    server: Server, watcher: Socket, what: str
):
    slow, graph = LONG_GRAPHS[what]
    prompt_id = server.queue(graph, watcher.client)
    cancelled_at = 0.0
    for kind, data in watcher.until_done(prompt_id):
        if (
            kind == "json"
            and data["type"] == "progress"
            and data["data"]["node"] == slow
            and not cancelled_at
        ):
            cancelled_at = time.monotonic()
            server.post("/interrupt", {})
    assert cancelled_at and time.monotonic() - cancelled_at < 5
    assert server.wait(prompt_id)["status"]["status_str"] == "error"
    server.run(api_graphs.text_to_image(REFERENCE, seed=60))


def stock_graph() -> dict[str, Any]:
    """Both stages through ComfyUI's KSampler: nodes 3 and 11."""
    graph = api_graphs.text_to_image(REFERENCE)
    graph["9"] = node("EmptyLatentImage", width=1024, height=1024, batch_size=1)
    sampling = {"seed": 1, "cfg": 3.0, "sampler_name": "dpmpp_2m", "scheduler": "simple", "denoise": 1.0}
    graph["3"] = node(
        "KSampler",
        model=["1", 1],
        positive=["2", 0],
        negative=["2", 1],
        latent_image=["9", 0],
        steps=4,
        **sampling,
    )
    graph["10"] = node(
        "BLIP3oFeaturesToConditioning", decoder=["1", 2], image_features=["3", 0], width=0, height=0
    )
    graph["11"] = node(
        "KSampler",
        model=["1", 2],
        positive=["10", 0],
        negative=["10", 1],
        latent_image=["10", 2],
        steps=4,
        **sampling,
    )
    graph["4"] = node("VAEDecode", samples=["11", 0], vae=["1", 3])
    return graph


def test_stock_ksamplers_drive_both_stages_and_show_stock_previews(server: Server, watcher: Socket):
    prompt_id = server.queue(stock_graph(), watcher.client, preview_method="latent2rgb")
    previews = {"3": 0, "11": 0}
    running = None
    for kind, data in watcher.until_done(prompt_id):
        if kind == "json" and data["type"] == "executing":
            running = data["data"]["node"]
        if kind == "preview":
            previews[running] += 1
    entry = server.wait(prompt_id)
    assert entry["outputs"]["5"]["images"], error_of(entry)
    assert previews == {"3": 4, "11": 4}


def test_core_trains_a_lora_on_our_model_and_both_loaders_apply_it(server: Server, base: Path):
    graph = {
        "1": node("BLIP3oLoad", checkpoint=REFERENCE, dtype="fp32"),
        "2": node("BLIP3oEncodePrompt", backbone=["1", 0], prompt="a red circle", negative_prompt=""),
        "6": node("EmptyImage", width=112, height=112, batch_size=1, color=16711680),
        "7": node("BLIP3oLoadImageEncoder", checkpoint=REFERENCE, dtype="fp32"),
        "8": node("BLIP3oEncodeImage", image_encoder=["7", 0], images=["6", 0]),
        "9": node(
            "TrainLoraNode",
            model=["1", 1],
            latents=["8", 0],
            positive=["2", 0],
            batch_size=1,
            grad_accumulation_steps=1,
            steps=4,
            learning_rate=0.01,
            rank=4,
            optimizer="AdamW",
            loss_function="MSE",
            seed=0,
            training_dtype="fp32",
            lora_dtype="fp32",
            quantized_backward=False,
            algorithm="LoRA",
            gradient_checkpointing=False,
            checkpoint_depth=1,
            offloading=False,
            existing_lora="[None]",
            bucket_mode=False,
            bypass_mode=False,
        ),
        "10": node("LoraModelLoader", model=["1", 1], lora=["9", 0], strength_model=1.0, bypass=False),
        "11": node("BLIP3oSampleFeatures", **_sampling("10", 0)),
        "12": node("BLIP3oSampleFeatures", **_sampling("1", 1)),
        "13": node("BLIP3oCompareFeatures", first=["11", 0], second=["12", 0]),
        "14": node("PreviewAny", source=["13", 0]),
        "15": node("SaveLoRA", lora=["9", 0], prefix="loras/core", steps=["9", 2]),
    }
    outputs = server.run(graph)
    assert float(outputs["14"]["text"][0]) < 0.9999
    # The file that core saved does the same through our own loader.
    (saved,) = (base / "output" / "loras").glob("core*.safetensors")
    name = saved.name
    ours = {key: graph[key] for key in ("1", "2", "12", "14")}
    ours["10"] = node("BLIP3oLoadLora", lora=name, strength=1.0, backbone_strength=1.0, dit=["1", 1])
    ours["11"] = node("BLIP3oSampleFeatures", **_sampling("10", 0))
    ours["13"] = node("BLIP3oCompareFeatures", first=["11", 0], second=["12", 0])
    ours["16"] = node("PreviewAny", source=["10", 2])
    loaded = server.run(ours)
    assert loaded["14"]["text"] == outputs["14"]["text"]
    assert "weights at strength 1" in loaded["16"]["text"][0]


def _sampling(model: str, output: int) -> dict[str, Any]:
    wires = {"dit": [model, output], "positive": ["2", 0], "negative": ["2", 1]}
    return {**wires, "seed": 1, "steps": 4, "cfg": 3.0, "sampler": "euler", "shift": 1.0, "batch_size": 1}


def lora_graph(name: str, **models: Any) -> dict[str, Any]:
    return {
        "1": node("BLIP3oLoad", checkpoint=REFERENCE, dtype="fp32"),
        "2": node("BLIP3oLoadLora", lora=name, strength=1.0, backbone_strength=1.0, **models),
        "3": node("PreviewAny", source=["2", 2]),
    }


def write_lora(base: Path, name: str, key: str, rows: int, columns: int) -> str:
    """A LoRA file of rank 2 for one weight of the given size."""
    tensors = {
        f"{key}.lora_up.weight": torch.ones(rows, 2),
        f"{key}.lora_down.weight": torch.ones(2, columns),
    }
    save_file({**tensors, f"{key}.alpha": torch.tensor(2.0)}, str(base / "models" / "loras" / name))
    return name


BAD_LORAS = {
    "another size": ("diffusion_model.layers.0.attn1.to_q", 1792, 1792, "was trained for"),
    "another network": (
        "diffusion_model.double_blocks.0.img_attn.qkv",
        48,
        48,
        "is not for the connected model",
    ),
    "the backbone as well": ("backbone.text.layers.0.self_attn.q_proj", 64, 64, "no backbone is connected"),
}


@pytest.mark.parametrize("mistake", BAD_LORAS)
def test_a_lora_that_does_not_fit_is_refused(server: Server, base: Path, mistake: str):
    key, rows, columns, fragment = BAD_LORAS[mistake]
    name = write_lora(base, f"{mistake.replace(' ', '_')}.safetensors", key, rows, columns)
    assert fragment in failure(server, lora_graph(name, dit=["1", 1]))


def test_a_lora_on_the_backbone_changes_the_conditioning_only_behind_it(server: Server, base: Path):
    name = write_lora(base, "backbone.safetensors", "backbone.text.layers.0.self_attn.q_proj", 64, 64)
    graph = lora_graph(name, dit=["1", 1], backbone=["1", 0])
    for number, source in (("4", "1"), ("5", "2")):
        output = 0 if source == "1" else 1
        graph[number] = node(
            "BLIP3oEncodePrompt", backbone=[source, output], prompt="a cat", negative_prompt=""
        )
    sampling = _sampling("1", 1)
    for number, encoder in (("6", "4"), ("7", "5")):
        wires = {"positive": [encoder, 0], "negative": [encoder, 1]}
        graph[number] = node("BLIP3oSampleFeatures", **{**sampling, **wires})
    graph["8"] = node("BLIP3oCompareFeatures", first=["6", 0], second=["7", 0])
    graph["9"] = node("PreviewAny", source=["8", 0])
    outputs = server.run(graph)
    assert "backbone: 1 of 1 weights" in outputs["3"]["text"][0]
    assert float(outputs["9"]["text"][0]) < 0.99999


def test_a_broken_lora_file_is_refused(server: Server, base: Path):
    (base / "models" / "loras" / "broken.safetensors").write_bytes(b"not a file")
    assert "cannot be read" in failure(server, lora_graph("broken.safetensors", dit=["1", 1]))


def test_transparent_and_huge_pictures_are_seen(server: Server):
    graph = {
        "1": node("BLIP3oLoadImageEncoder", checkpoint=REFERENCE, dtype="auto"),
        "2": node("EmptyImage", width=600, height=400, batch_size=1, color=255),
        "3": node("SolidMask", value=0.5, width=600, height=400),
        "4": node("JoinImageWithAlpha", image=["2", 0], alpha=["3", 0]),
        "5": node("BLIP3oEncodeImage", image_encoder=["1", 0], images=["4", 0]),
        "6": node("EmptyImage", width=7100, height=7100, batch_size=1, color=255),
        "7": node("BLIP3oEncodeImage", image_encoder=["1", 0], images=["6", 0]),
        "8": node("BLIP3oCompareFeatures", first=["5", 0], second=["7", 0]),
        "9": node("PreviewImage", images=["8", 1]),
    }
    assert server.run(graph)["9"]["images"]


def test_pages_and_translations_are_served(server: Server):
    for page in ("BLIP3oAsk.md", "BLIP3oAsk/zh.md"):
        assert server.get_bytes(f"/extensions/ComfyUI-BLIP3o/docs/{page}").startswith(b"# ")
    translations = server.get("/i18n")
    for language in ("en", "zh", "ja"):
        assert translations[language]["nodeDefs"]["BLIP3oAsk"]["display_name"]
    assert set(server.get("/workflow_templates")["ComfyUI-BLIP3o"]) == {
        path.stem for path in (ROOT / "workflows").glob("*.json")
    }


KEPT = {
    "a black mask keeps everything": ({"mask": 0.0}, 1.0),
    "strength 0 keeps everything": ({"strength": 0.0}, 1.0),
    "a white mask draws everything anew": ({"mask": 1.0}, 0.5),
    "strength 1 ignores the start": ({"strength": 1.0}, 0.5),
}


@pytest.mark.parametrize("case", KEPT)
def test_start_features_are_kept_as_far_as_asked(server: Server, case: str):
    settings, expected = KEPT[case]
    graph = api_graphs.text_to_image(REFERENCE, seed=7)
    start = {"start_features": ["3", 0], "strength": settings.get("strength", 1.0)}
    graph["6"] = node("BLIP3oSampleFeatures", **{**_sampling("1", 1), **start, "seed": 8})
    if "mask" in settings:
        graph["7"] = node("SolidMask", value=settings["mask"], width=64, height=64)
        graph["6"]["inputs"]["mask"] = ["7", 0]
    graph["8"] = node("BLIP3oCompareFeatures", first=["3", 0], second=["6", 0])
    graph["9"] = node("PreviewAny", source=["8", 0])
    similarity = float(server.run(graph)["9"]["text"][0])
    assert similarity == pytest.approx(1.0, abs=1e-5) if expected == 1.0 else similarity < 0.9999


def test_features_survive_saving_and_loading(server: Server, base: Path):
    graph = api_graphs.text_to_image(REFERENCE, seed=70)
    graph["6"] = node("BLIP3oSaveFeatures", image_features=["3", 0], filename_prefix="features/kept")
    server.run(graph)
    assert (base / "output" / "features" / "kept_00001_.features.safetensors").is_file()
    graph["7"] = node("BLIP3oLoadFeatures", file="features/kept_00001_.features.safetensors [output]")
    graph["8"] = node("BLIP3oCompareFeatures", first=["3", 0], second=["7", 0])
    graph["9"] = node("PreviewAny", source=["8", 0])
    del graph["6"]
    assert float(server.run(graph)["9"]["text"][0]) == pytest.approx(1.0, abs=1e-5)


def changed(identifier: str, **inputs: Any) -> dict[str, Any]:
    graph = api_graphs.text_to_image(REFERENCE)
    graph[identifier]["inputs"].update(inputs)
    return graph


def with_nodes(graph: dict[str, Any], **nodes: dict[str, Any]) -> dict[str, Any]:
    return {**graph, **{name.removeprefix("n"): value for name, value in nodes.items()}}


EMPTY_LATENT = node("EmptyLatentImage", width=64, height=64, batch_size=1)
WRONG_CONDITIONING = node("ConditioningCombine", conditioning_1=["2", 0], conditioning_2=["2", 1])
MISTAKES = {
    "an empty prompt": (changed("2", prompt="  "), "prompt is empty"),
    "a missing checkpoint": (changed("1", checkpoint="nowhere"), "There is no BLIP3-o checkpoint"),
    "a checkpoint outside": (changed("1", checkpoint="../../../etc"), "leads out of"),
    "a half downloaded checkpoint": (changed("1", checkpoint="half"), "not complete"),
    "VAE latents as features": (
        with_nodes(changed("4", image_features=["9", 0]), n9=EMPTY_LATENT),
        "not belong to the loaded model",
    ),
    "the decoder as dit": (changed("3", dit=["1", 2]), "output dit of"),
    "the dit as decoder": (changed("4", decoder=["1", 1]), "output decoder of"),
    "two prompts in one conditioning": (
        with_nodes(changed("3", positive=["9", 0]), n9=WRONG_CONDITIONING),
        "has 2 parts",
    ),
    "a mask without start features": (
        with_nodes(changed("3", mask=["9", 0]), n9=node("SolidMask", value=1.0, width=8, height=8)),
        "mask needs start features",
    ),
    "a size the VAE cannot make": (changed("4", width=33), "multiples of"),
    "a features file outside": (
        {
            "1": node("BLIP3oLoadFeatures", file="../../secret [output]"),
            "2": node("BLIP3oSaveFeatures", image_features=["1", 0], filename_prefix="x"),
        },
        "../../secret",
    ),
    "a save prefix outside": (
        with_nodes(
            api_graphs.text_to_image(REFERENCE),
            n9=node("BLIP3oSaveFeatures", image_features=["3", 0], filename_prefix="../../escaped"),
        ),
        "outside the output folder",
    ),
    "an empty question": (api_graphs.ask(REFERENCE, question=" "), "question is empty"),
    "one choice only": (
        {
            "1": node("BLIP3oLoad", checkpoint=REFERENCE, dtype="auto"),
            "2": node("BLIP3oChoose", backbone=["1", 0], question="Which?", choices="yes"),
        },
        "at least two",
    ),
    "a prompt of another model size in the stock sampler": (
        with_nodes(
            changed("3"),
            **{
                "3": node(
                    "KSampler",
                    model=["1", 1],
                    positive=["10", 0],
                    negative=["2", 1],
                    latent_image=["9", 0],
                    seed=1,
                    steps=2,
                    cfg=3.0,
                    sampler_name="euler",
                    scheduler="simple",
                    denoise=1.0,
                ),
                "9": node("EmptyLatentImage", width=1024, height=1024, batch_size=1),
                "10": node(
                    "BLIP3oFeaturesToConditioning",
                    decoder=["1", 2],
                    image_features=["11", 0],
                    width=0,
                    height=0,
                ),
                "11": node("BLIP3oSampleFeatures", **_sampling("1", 1)),
            },
        ),
        "prompt was encoded by",
    ),
    "text conditioning in the decoder": (
        {
            **api_graphs.text_to_image(REFERENCE),
            "4": node(
                "KSampler",
                model=["1", 2],
                positive=["2", 0],
                negative=["2", 1],
                latent_image=["9", 0],
                seed=1,
                steps=2,
                cfg=3.0,
                sampler_name="euler",
                scheduler="simple",
                denoise=1.0,
            ),
            "9": EMPTY_LATENT,
            "5": node("PreviewAny", source=["4", 0]),
        },
        "draws from image features",
    ),
}


@pytest.fixture(scope="module")
def half_downloaded(base: Path) -> None:
    folder = base / "models" / "blip3o" / "half"
    if not folder.exists():
        folder.mkdir()
        for path in (base / "published" / "checkpoint").iterdir():
            if path.name != "model-00002-of-00002.safetensors":
                (folder / path.name).symlink_to(path)


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.usefixtures("half_downloaded")
def test_a_mistake_is_answered_with_a_remedy_and_leaves_nothing_behind(server: Server, mistake: str):
    graph, fragment = MISTAKES[mistake]
    assert fragment in failure(server, graph)
    server.run(api_graphs.text_to_image(REFERENCE))


def test_free_gives_the_memory_of_models_back(server: Server):
    server.run(api_graphs.text_to_image(REFERENCE, seed=80))
    server.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(1.5)
    entry = server.wait(server.queue(api_graphs.text_to_image(REFERENCE, seed=80)))
    assert "1" not in cached_nodes(entry), "the loader's output was kept"


def test_a_hundred_prompts_do_not_grow_memory(server: Server):
    def run_many(first: int, count: int) -> None:
        for identifier in [
            server.queue(api_graphs.text_to_image(REFERENCE, seed=first + seed, steps=2, pixel_steps=2))
            for seed in range(count)
        ]:
            server.wait(identifier)

    run_many(1000, 30)
    before = server.memory_bytes()
    run_many(2000, 100)
    assert server.memory_bytes() - before < 60 * 2**20


@pytest.mark.parametrize("option", ["--cache-none", "--cache-classic"])
def test_the_other_caches_give_the_same_picture(server: Server, another_base: Path, option: str):
    other = Server(another_base, option)
    try:
        graph = {**api_graphs.text_to_image(REFERENCE, seed=90), **api_graphs.ask(REFERENCE)}
        pictures = []
        for running in (server, other, other):
            outputs = running.run(graph)
            pictures.append(running.image(outputs["5"]["images"][0]))
            assert "text" in outputs["7"]
        decoded = [Image.open(io.BytesIO(picture)).convert("RGB").tobytes() for picture in pictures]
        assert decoded[0] == decoded[1] == decoded[2]
    finally:
        other.stop()
