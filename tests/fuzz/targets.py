"""What is spoilt and how the program reads it. Each target spoils files in a folder, then reads them as a person's command would."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import lora_files
import torch
import yaml
from comfyui_blip3o.blip3o_core.checkpoints.info import describe_checkpoint
from comfyui_blip3o.blip3o_core.checkpoints.layout import open_checkpoint
from comfyui_blip3o.blip3o_core.checkpoints.load import (
    load_backbone,
    load_decoder,
    load_dit,
    load_image_encoder,
)
from comfyui_blip3o.blip3o_core.checkpoints.pickles import read_pickle
from comfyui_blip3o.blip3o_core.config import BUILT_IN_MODEL
from comfyui_blip3o.blip3o_core.drawing.request import DrawRequest
from comfyui_blip3o.blip3o_core.hub.download import plan_download
from comfyui_blip3o.blip3o_core.lora.files import read_lora
from comfyui_blip3o.blip3o_core.picture_files import PNG_KEY, loras_of_note, read_note
from comfyui_blip3o.lora_training.config import parse_config, read_config, to_tree
from comfyui_blip3o.lora_training.data.dataset import scan_dataset
from comfyui_blip3o.lora_training.files.write import lora_tensors
from comfyui_blip3o.lora_training.fit.state import State, newest_state, save_state
from fake_hub import published_repo, running_hub
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file
from training_sets import config_of, write_set

from .mutators import NASTY, spoil_bytes, spoil_json, spoil_safetensors, spoil_tree

LAYERS = ("layers.0.attn1.to_q", "layers.1.feed_forward.linear_1", "layers.0.attn2.to_out.0")
CONFIGS = (
    "config.json",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "diffusion-decoder/unet/config.json",
    "diffusion-decoder/vae/config.json",
    "diffusion-decoder/scheduler/scheduler_config.json",
)


@dataclass(frozen=True)
class Target:
    """A kind of file.

    Attributes:
        prepare: makes sound originals in a folder, once.
        spoil: spoils a copy of them.
        read: reads it; ends well, or with an error of the program's own.
    """

    prepare: Callable[[Path], Any]
    spoil: Callable[[Path, Random], None]
    read: Callable[[Path], Any]


def change(path: Path, spoil: Callable[[bytes, Random], bytes], random: Random) -> None:
    """Spoil one file."""
    put(path, spoil(path.read_bytes(), random))


def put(path: Path, data: bytes) -> None:
    """Write a file in the place of what may be a link to the original, which stays."""
    path.unlink()
    path.write_bytes(data)


def copy_of_the_built_in_model(folder: Path) -> None:
    shutil.copytree(BUILT_IN_MODEL, folder, dirs_exist_ok=True)


def spoil_configuration(folder: Path, random: Random) -> None:
    change(folder / random.choice(CONFIGS), spoil_json, random)


def spoil_weights(folder: Path, random: Random) -> None:
    change(random.choice(sorted(folder.rglob("*.safetensors"))), spoil_safetensors, random)


def read_checkpoint(folder: Path) -> None:
    files = open_checkpoint(folder)
    describe_checkpoint(files)
    for load in (load_dit, load_backbone, load_image_encoder, load_decoder):
        load(files)


def sound_lora(folder: Path) -> None:
    pipeline = lora_files.open_pipeline(BUILT_IN_MODEL)
    base = pipeline.dit.state_dict()
    adapter = lora_files.random_adapter(lora_files.open_pipeline(BUILT_IN_MODEL), "lora")
    metadata = {"trigger": "ohwx", "ss_output_name": "x", "blip3o": json.dumps({"rank": 4, "hidden": [1, 2]})}
    save_file(lora_tensors(adapter.state_dict(), base), folder / "lora.safetensors", metadata)
    save_file(
        {f"base_model.model.{layer}.lora_A.weight": torch.ones(2, 8) for layer in LAYERS},
        folder / "peft.safetensors",
    )


def spoil_lora(folder: Path, random: Random) -> None:
    if random.random() < 0.5:
        return change(folder / "lora.safetensors", spoil_safetensors, random)
    shapes: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (4, 0), (3, 5), (2, 3, 4), (1, 1, 1, 1), (64, 64))
    kinds = (
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.bool,
        torch.float8_e4m3fn,
        torch.uint8,
        torch.complex64,
    )
    ends = ("lora_A.weight", "lora_B.weight", "alpha", "lora_up.weight", "lora_down.weight", "dora_scale", "lokr_w1", "lokr_w2",
            "diff", "diff_b", "lora_magnitude_vector", "hada_w1_a", "weight", "")  # fmt: skip
    heads = ("diffusion_model.", "transformer.", "lora_unet_", "base_model.model.", "lycoris_", "")
    tensors = {}
    for _ in range(random.randint(1, 8)):
        key = f"{random.choice(heads)}{random.choice((*LAYERS, 'latent_queries', 'x', '[', '(a+)+$'))}.{random.choice(ends)}"
        tensors[key] = torch.full(random.choice(shapes), random.choice((0.0, 1.0, -3.0))).to(
            random.choice(kinds)
        )
    note = {
        "lora_adapter_metadata": json.dumps(
            {"r": random.choice(NASTY), "rank_pattern": {"(a+)+$": random.choice(NASTY)}}
        )
    }
    (folder / "lora.safetensors").unlink()
    save_file(tensors, folder / "lora.safetensors", random.choice((note, {}, {"x": "y"})))


def read_and_use_lora(folder: Path) -> None:
    file = read_lora(folder / "lora.safetensors")
    lora_files.open_pipeline(BUILT_IN_MODEL).load_lora(file)


def sound_configuration(folder: Path) -> None:
    text = yaml.safe_dump(to_tree(config_of(write_set(folder / "set", 2))))
    (folder / "run.yaml").write_text(text, "utf-8")


def spoil_yaml(folder: Path, random: Random) -> None:
    path = folder / "run.yaml"
    text = path.read_text("utf-8")
    what = random.randrange(5)
    if what == 0:
        data = spoil_bytes(text.encode(), random)
    elif what == 1:
        data = random.choice((
            "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "[" * 9999, "a: " * 9999, "run: 2026-13-45", "? [a]\n: 1", "!!python/object:os.system x",
            "x: 0x" + "f" * 9999, "run: !!binary x", "<<: {a: 1}", "- &a\n- *a", "%YAML 9.9\n---\na: 1", "a: 1\n---\nb: 2",
        )).encode()  # fmt: skip
    else:
        data = yaml.safe_dump(spoil_tree(yaml.safe_load(text), random), allow_unicode=True).encode()
    put(path, data)


def read_configuration(folder: Path) -> None:
    read_config(folder / "run.yaml")


def sound_settings(folder: Path) -> None:
    (folder / "settings.txt").write_text("train.ema=0.9\ntrain.steps=5\nadapter.rank=4", "utf-8")


def spoil_settings(folder: Path, random: Random) -> None:
    names = (
        "train.ema",
        "train.steps",
        "adapter.rank",
        "adapter.rank_pattern",
        "validate.sigmas",
        "train.optimizer.betas",
        "save.formats",
        "train",
    )
    values = [json.dumps(value) for value in NASTY] + [
        "[1",
        "*a",
        "&a [*a]",
        "2026-13-45",
        "!!python/name:os",
        "{a: 1",
        "0x" + "f" * 9999,
        "a: b: c",
    ]
    lines = [f"{random.choice(names)}={random.choice(values)}" for _ in range(random.randint(1, 3))]
    data = "\n".join(lines).encode()
    put(folder / "settings.txt", spoil_bytes(data, random) if random.random() < 0.3 else data)


def read_settings(folder: Path) -> None:
    lines = (folder / "settings.txt").read_text("utf-8", "replace").splitlines()
    parse_config({"run": {"name": "x"}, "data": {"path": "x"}}, lines)


def sound_picture(folder: Path) -> None:
    request = DrawRequest(("a red circle",))
    note = {
        "version": 1,
        **request.note((256, 256), [{"file": "a.safetensors", "sha256": "0" * 64, "strength": 1.0}]),
    }
    (folder / "note.json").write_text(json.dumps(note), "utf-8")
    _write_picture(folder, json.dumps(note))


def _write_picture(folder: Path, text: str) -> None:
    info = PngInfo()
    info.add_itxt(PNG_KEY, text)
    Image.new("RGB", (8, 8)).save(folder / "picture.png", pnginfo=info)


def spoil_picture(folder: Path, random: Random) -> None:
    if random.random() < 0.3:
        return change(folder / "picture.png", spoil_bytes, random)
    note = spoil_json((folder / "note.json").read_bytes(), random)
    (folder / "picture.png").unlink()
    _write_picture(folder, note.decode("utf-8", "replace"))


def read_picture(folder: Path) -> None:
    note = read_note(folder / "picture.png")
    loras_of_note(folder / "picture.png", note)
    DrawRequest(**{"prompts": ("x",), **DrawRequest.options_of_note(note)})


def sound_set(folder: Path) -> None:
    rows = [
        {"file_name": f"p0{n}.png", "text": "a disc", "weight": 0.5, "split": "train", "mask": "p00.png"}
        for n in range(3)
    ]
    (write_set(folder, 3) / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")


def spoil_set(folder: Path, random: Random) -> None:
    path = random.choice(sorted(folder.iterdir()))
    if path.name != "metadata.jsonl":
        if random.random() < 0.2:
            path.unlink()
            path.symlink_to(random.choice(("/dev/zero", "/etc/passwd", "..", path.name, "missing")))
            return None
        return change(path, spoil_bytes, random)
    return put(path, b"\n".join(spoil_json(line, random) for line in path.read_bytes().splitlines()))


def read_set(folder: Path) -> None:
    for problem in scan_dataset(config_of(folder, mask="files").data).problems:
        str(problem)


def sound_tar(folder: Path) -> None:
    write_set(folder / "set", 2)
    with tarfile.open(folder / "set.tar", "w") as tar:
        for path in sorted((folder / "set").iterdir()):
            tar.add(path, path.name)


def spoil_tar(folder: Path, random: Random) -> None:
    if random.random() < 0.5:
        return change(folder / "set.tar", spoil_bytes, random)
    (folder / "set.tar").unlink()
    with (folder / "set.tar").open("wb") as file:
        for _ in range(random.randint(1, 4)):
            member = tarfile.TarInfo(
                random.choice(("a.png", "a.txt", "../a.png", "/etc/a.txt", "a" * 300 + ".png", ".png", "a"))
            )
            member.size = random.choice((0, 5, 512, 2**33, 2**40))
            member.type = random.choice(
                (
                    tarfile.REGTYPE,
                    tarfile.SYMTYPE,
                    tarfile.CHRTYPE,
                    tarfile.FIFOTYPE,
                    tarfile.GNUTYPE_LONGNAME,
                )
            )
            member.linkname = random.choice(("/dev/zero", "../x", ""))
            file.write(member.tobuf() + random.randbytes(512))
    return None


def read_tar(folder: Path) -> None:
    for problem in scan_dataset(config_of(folder / "set.tar").data).problems:
        str(problem)


def sound_state(folder: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    save_state(
        folder,
        State(3, {"x": weight.detach()}, {"y": torch.ones(2)}, optimizer.state_dict(), {"a": [1]}),
        keep=2,
    )


def spoil_state(folder: Path, random: Random) -> None:
    path = random.choice(sorted((folder / "step_000003").iterdir()))
    change(path, spoil_json if path.suffix == ".json" else spoil_safetensors, random)


def sound_pickle(folder: Path) -> None:
    tensors = {"blocks.0.attn.proj.weight": torch.ones(4, 4), "cls_token": torch.ones(1, 1, 4)}
    torch.save(tensors, folder / "new.bin")
    torch.save(tensors, folder / "old.bin", _use_new_zipfile_serialization=False)


class Executed:
    """Pickled, it makes a file where it is opened by a reader that runs code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch EXECUTED",)


def spoil_pickle(folder: Path, random: Random) -> None:
    path = folder / random.choice(("new.bin", "old.bin"))
    what = random.randrange(4)
    if what == 0:
        put(path, pickle.dumps({"a": Executed(), "b": torch.ones(2)}, random.randrange(2, 5)))
    elif what == 1:
        path.unlink()
        odd = (
            torch.zeros(1).expand(2**30),
            torch.zeros(3, 3).to_sparse(),
            torch.zeros(3, device="meta"),
            5,
            [],
            None,
            {},
        )
        nest = random.choice((None, "state_dict", "model"))
        tensors = {random.choice(("a", 5, None, ("a",))): random.choice(odd) for _ in range(3)}
        torch.save({nest: tensors} if nest else tensors, path)
    else:
        change(path, spoil_bytes, random)


def read_pickles(folder: Path) -> None:
    from comfyui_blip3o.blip3o_core.checkpoints.convert import convert_pickle

    for name in ("new.bin", "old.bin"):
        read_pickle(folder / name)
        convert_pickle(folder / name, folder / f"{name}.safetensors")


def sound_answer(folder: Path) -> None:
    (folder / "answer.json").write_text(
        json.dumps({"sha": "c0ffee" * 6 + "0001", "siblings": 1, "entry": {"size": 5}}), "utf-8"
    )
    (folder / "index.json").write_bytes(published_repo().files["model.safetensors.index.json"])


def spoil_answer(folder: Path, random: Random) -> None:
    if random.random() < 0.4:
        return change(folder / "index.json", spoil_json, random)
    keys = (
        "sha",
        "siblings",
        "lastModified",
        "createdAt",
        "tags",
        "id",
        "modelId",
        "cardData",
        "gated",
        "private",
        "safetensors",
    )
    entries = ("size", "blobId", "lfs", "rfilename")
    answer: dict[str, Any] = {random.choice(keys): random.choice(NASTY)}
    if random.random() < 0.6:
        answer = {"entry": {random.choice(entries): random.choice(NASTY)}}
    return put(folder / "answer.json", json.dumps(answer).encode())


def read_answer(folder: Path) -> None:
    os.environ["HF_HUB_OFFLINE"] = "0"
    answer = json.loads((folder / "answer.json").read_bytes())
    with running_hub() as hub:
        hub.repos["artist/model"] = published_repo()
        hub.repos["artist/model"].files["model.safetensors.index.json"] = (folder / "index.json").read_bytes()
        hub.info = {} if answer.get("siblings") == 1 else answer
        plan_download("artist/model", folder / "target", endpoint=hub.endpoint)


TARGETS = {
    "configuration of a checkpoint": Target(copy_of_the_built_in_model, spoil_configuration, read_checkpoint),
    "weights of a checkpoint": Target(copy_of_the_built_in_model, spoil_weights, read_checkpoint),
    "LoRA": Target(sound_lora, spoil_lora, read_and_use_lora),
    "run.yaml": Target(sound_configuration, spoil_yaml, read_configuration),
    "settings text": Target(sound_settings, spoil_settings, read_settings),
    "note of a picture": Target(sound_picture, spoil_picture, read_picture),
    "training set": Target(sound_set, spoil_set, read_set),
    "tar": Target(sound_tar, spoil_tar, read_tar),
    "state of a training": Target(sound_state, spoil_state, newest_state),
    "pickle": Target(sound_pickle, spoil_pickle, read_pickles),
    "answer of a hub": Target(sound_answer, spoil_answer, read_answer),
}
