"""Which files make a checkpoint folder, and what an artist is told when some are missing or foreign."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import MissingFilesError, WrongCheckpointError
from .keys import IMAGE_ENCODER_PREFIX, to_component_key
from .safetensor_files import TensorInfo, read_header

MODEL_TYPES = ("blip3o_qwen", "blip3o_qwen_inference")
INDEX_NAME = "model.safetensors.index.json"
SINGLE_FILE_NAME = "model.safetensors"
DECODER_FOLDER = "diffusion-decoder"
DECODER_NETWORKS = ("unet", "vae")
DECODER_WEIGHTS = ("diffusion_pytorch_model.bf16.safetensors", "diffusion_pytorch_model.safetensors")
# Where a separately downloaded EVA-CLIP is looked for, relative to the checkpoint folder.
IMAGE_ENCODER_FOLDERS = ("eva_clip_vision_tower", "../eva_clip_vision_tower")
IMAGE_ENCODER_FILES = ("model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin")
DOWNLOAD_HINT = 'Download a checkpoint with "blip3o download 8b" (or 4b).'


@dataclass(frozen=True)
class CheckpointFiles:
    """An opened checkpoint folder: configuration and the headers of its weight files; no weight is read yet.

    Attributes:
        folder: the folder.
        config: config.json.
        tensors: name in the file -> where it lies, of all shards that are present.
        missing_shards: shard file name -> tensor names that the index expects in it.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    missing_shards: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.folder.name

    def component_tensors(self, component: str, *, allow_unknown: bool = False) -> dict[str, TensorInfo]:
        """Our key -> where it lies, for one of backbone, dit, image_encoder.

        Raises:
            MissingFilesError: a shard that holds some of them is missing.
            WrongCheckpointError: the files hold a tensor of unknown name, or none of the component's.
        """
        found: dict[str, TensorInfo] = {}
        unknown = []
        for file_key, info in self.tensors.items():
            mapped = to_component_key(file_key)
            if mapped is None:
                unknown.append(file_key)
            elif mapped[0] == component:
                found[mapped[1]] = info
        if unknown and not allow_unknown:
            raise WrongCheckpointError(
                f'Checkpoint "{self.name}" holds {len(unknown)} tensor(s) that BLIP3-o does not have, e.g. '
                f'"{unknown[0]}" in {self.tensors[unknown[0]].path.name}.\n'
                "Use an unmodified BLIP3o-Model-8B or -4B folder, or pass allow_unknown=True to leave such tensors out."
            )
        self._require_shards(component)
        if not found:
            raise WrongCheckpointError(
                f'Checkpoint "{self.name}" has no {COMPONENT_WORDS[component]}.\n'
                f"We looked for it in {len({info.path for info in self.tensors.values()})} weight file(s) of {self.folder}. "
                f"{COMPONENT_REMEDIES[component]}"
            )
        return found

    def has_component(self, component: str) -> bool:
        """Whether the shards present or expected hold any tensor of a component."""
        if component == "decoder":
            return (self.folder / DECODER_FOLDER / "unet" / "config.json").is_file()
        names = list(self.tensors) + [key for keys in self.missing_shards.values() for key in keys]
        return any((mapped := to_component_key(key)) and mapped[0] == component for key in names)

    def _require_shards(self, component: str) -> None:
        needed = [
            shard
            for shard, keys in self.missing_shards.items()
            if any((mapped := to_component_key(key)) and mapped[0] == component for key in keys)
        ]
        if needed:
            present = len({info.path for info in self.tensors.values()})
            raise MissingFilesError(
                f'BLIP3-o checkpoint "{self.name}" is not complete: {len(needed)} of '
                f"{present + len(self.missing_shards)} weight files are missing ({', '.join(sorted(needed))}).\n"
                f'Download them into "{self.folder}" (run the download again; it fetches only what is missing).'
            )

    def decoder_file(self, network: str) -> Path:
        """Weight file of the decoder's `unet` or `vae`.

        Raises:
            MissingFilesError: the folder or the file is missing.
        """
        folder = self.folder / DECODER_FOLDER / network
        for name in DECODER_WEIGHTS:
            if (folder / name).is_file():
                return folder / name
        raise MissingFilesError(
            f'BLIP3-o checkpoint "{self.name}" has no decoder {network}: "{DECODER_WEIGHTS[0]}" is missing in '
            f'"{folder}".\nDownload the folder "{DECODER_FOLDER}" of the same checkpoint into "{self.folder}".'
        )

    def decoder_config(self, part: str) -> dict[str, Any]:
        """Configuration of the decoder's `unet`, `vae` or `scheduler`."""
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        path = self.folder / DECODER_FOLDER / part / name
        if not path.is_file():
            raise MissingFilesError(
                f'BLIP3-o checkpoint "{self.name}" has no decoder {part}: "{name}" is missing in "{path.parent}".\n'
                f'Download the folder "{DECODER_FOLDER}" of the same checkpoint into "{self.folder}".'
            )
        return read_json(path)

    def image_encoder_file(self, override: Path | None = None) -> Path | None:
        """A separate EVA-CLIP file, or None when the tower is inside the shards.

        Raises:
            MissingFilesError: it is neither inside the shards nor beside the checkpoint.
        """
        if override is not None:
            candidates = (
                [override] if override.is_file() else [override / name for name in IMAGE_ENCODER_FILES]
            )
        elif self.has_component("image_encoder"):
            return None
        else:
            candidates = [
                self.folder / sub / name for sub in IMAGE_ENCODER_FOLDERS for name in IMAGE_ENCODER_FILES
            ]
        for path in candidates:
            if path.is_file():
                return path
        if override is not None:
            raise MissingFilesError(
                f'There is no image encoder at "{override}".\n'
                f"Name a file, or a folder that holds one of {', '.join(IMAGE_ENCODER_FILES)}."
            )
        raise MissingFilesError(
            f'Checkpoint "{self.name}" comes without the EVA-CLIP image encoder, and none lies beside it.\n'
            f'Put "pytorch_model.bin" of the hub repository jiuhai/eva_clip_vision_tower into '
            f'"{self.folder / IMAGE_ENCODER_FOLDERS[0]}" (blip3o download with --use encode does that), '
            "or give its path as image encoder."
        )

    @cached_property
    def component_bytes(self) -> dict[str, int]:
        """Bytes on disk of each component that is present."""
        sizes: dict[str, int] = {}
        for key, info in self.tensors.items():
            mapped = to_component_key(key)
            if mapped and mapped[0]:
                sizes[mapped[0]] = sizes.get(mapped[0], 0) + info.nbytes
        for network in DECODER_NETWORKS:
            for name in DECODER_WEIGHTS:
                path = self.folder / DECODER_FOLDER / network / name
                if path.is_file():
                    sizes["decoder"] = sizes.get("decoder", 0) + path.stat().st_size
                    break
        return sizes


COMPONENT_WORDS = {
    "backbone": "language model (Qwen2.5-VL backbone with latent queries)",
    "dit": "image feature generator (the DiT, tensors under model.dit)",
    "image_encoder": f"EVA-CLIP image encoder (tensors under {IMAGE_ENCODER_PREFIX[:-1]})",
    "decoder": "diffusion decoder",
}
COMPONENT_REMEDIES = {
    "backbone": DOWNLOAD_HINT,
    "dit": DOWNLOAD_HINT,
    "image_encoder": "Download jiuhai/eva_clip_vision_tower beside it.",
    "decoder": DOWNLOAD_HINT,
}


def open_checkpoint(folder: str | Path) -> CheckpointFiles:
    """Open a folder in the published layout and read the headers of its weight files.

    Raises:
        MissingFilesError: the folder, config.json or all weight files are missing.
        WrongCheckpointError: the folder holds another model, or a file is damaged.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise MissingFilesError(
            f'There is no checkpoint folder "{folder}".\n{DOWNLOAD_HINT} Or name the folder that holds config.json.'
        )
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise _no_config(folder)
    config = read_json(config_path)
    _refuse_foreign_config(folder, config)
    expected = _index(folder)
    paths = _weight_files(folder, expected)
    tensors: dict[str, TensorInfo] = {}
    for path in paths:
        tensors.update(read_header(path)[0])
    if not tensors and not expected:
        raise MissingFilesError(
            f'"{folder}" has a config.json but no weight file (*.safetensors).\n'
            "Run the download again; it continues where it stopped."
        )
    present = {path.name for path in paths}
    missing: dict[str, list[str]] = {}
    for key, shard in expected.items():
        if shard not in present:
            missing.setdefault(shard, []).append(key)
        elif key not in tensors:
            raise WrongCheckpointError(
                f'"{shard}" in "{folder}" lacks the tensor "{key}" that {INDEX_NAME} promises.\n'
                "The files come from different downloads. Delete the weight files and download them again."
            )
    _refuse_foreign_tensors(folder, [*tensors, *expected])
    return CheckpointFiles(folder, config, tensors, {shard: tuple(keys) for shard, keys in missing.items()})


def is_checkpoint_folder(folder: Path) -> bool:
    """Cheap look: does config.json there name a BLIP3-o model? Never raises."""
    try:
        return json.loads((folder / "config.json").read_text("utf-8")).get("model_type") in MODEL_TYPES
    except (OSError, ValueError, AttributeError):
        return False


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        WrongCheckpointError: it is not valid JSON.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise WrongCheckpointError(
            f'"{path.name}" in "{path.parent}" is not readable JSON.\nDelete it and download it again. ({error})'
        ) from error
    if not isinstance(value, dict):
        raise WrongCheckpointError(f'"{path}" holds no JSON object.\nDelete it and download it again.')
    return value


def _index(folder: Path) -> dict[str, str]:
    path = folder / INDEX_NAME
    if not path.is_file():
        return {}
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise WrongCheckpointError(f'"{INDEX_NAME}" in "{folder}" lists no weights.\nDownload it again.')
    return weight_map


def _weight_files(folder: Path, expected: dict[str, str]) -> list[Path]:
    """The model's own files: those of the index, else a single model.safetensors, else all; others are not ours."""
    paths = sorted(folder.glob("*.safetensors"))
    if expected:
        return [path for path in paths if path.name in expected.values()]
    single = folder / SINGLE_FILE_NAME
    return [single] if single in paths else paths


def _no_config(folder: Path) -> MissingFilesError | WrongCheckpointError:
    if (folder / "model_index.json").is_file():
        pipeline = read_json(folder / "model_index.json").get("_class_name", "a diffusers pipeline")
        return WrongCheckpointError(
            f'"{folder}" is not BLIP3-o: its model_index.json names {pipeline}.\n'
            "SDXL and other diffusers folders cannot be used as a checkpoint here; only BLIP3-o's own decoder can draw from "
            f"its features. {DOWNLOAD_HINT}"
        )
    inside = sorted(
        child.name for child in folder.iterdir() if child.is_dir() and is_checkpoint_folder(child)
    )
    if inside:
        return MissingFilesError(
            f'"{folder}" itself is not a checkpoint, but holds {", ".join(inside)}.\nName one of these: "{folder / inside[0]}".'
        )
    if folder.name == DECODER_FOLDER or (folder / "unet").is_dir():
        return MissingFilesError(
            f'"{folder}" is only the decoder of a checkpoint (no config.json).\nName the folder above it.'
        )
    return MissingFilesError(
        f'"{folder}" has no config.json, so it is not a complete BLIP3-o checkpoint.\n{DOWNLOAD_HINT}'
    )


def _refuse_foreign_config(folder: Path, config: dict[str, Any]) -> None:
    model_type = str(config.get("model_type", "nothing"))
    if model_type in MODEL_TYPES:
        text_type = (config.get("text_config") or {}).get("model_type", "")
        if "qwen3" not in text_type:
            return
    if model_type.startswith("blip3o") or "blip3o" in str(config.get("architectures", "")).lower():
        raise WrongCheckpointError(
            f'"{folder}" is a newer relative of BLIP3-o (BLIP3o-NEXT, model type "{model_type}"), a different network.\n'
            f"This program reads BLIP3o-Model-8B and BLIP3o-Model-4B. {DOWNLOAD_HINT}"
        )
    if model_type.startswith("qwen"):
        raise WrongCheckpointError(
            f'"{folder}" is a plain Qwen model (model type "{model_type}"): it can answer, but has no latent queries and no '
            f"DiT to draw with.\n{DOWNLOAD_HINT}"
        )
    raise WrongCheckpointError(
        f'"{folder}" is not a BLIP3-o checkpoint: config.json names the model type "{model_type}", expected '
        f'"{MODEL_TYPES[0]}".\n{DOWNLOAD_HINT}'
    )


def _refuse_foreign_tensors(folder: Path, names: list[str]) -> None:
    """NEXT folders also exist with our model type; their tensors tell."""
    foreign = next(
        (name for name in names if name.startswith("model.sana") or ".self_attn.q_norm." in name),
        None,
    )
    if foreign:
        raise WrongCheckpointError(
            f'"{folder}" is a BLIP3o-NEXT checkpoint (it holds "{foreign}"), a different network.\n'
            f"This program reads BLIP3o-Model-8B and BLIP3o-Model-4B. {DOWNLOAD_HINT}"
        )
