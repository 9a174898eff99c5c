"""Which files make a checkpoint folder, and what an artist is told when some are missing or foreign."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config import PUBLISHED_REPOS
from ..errors import MissingFilesError, WrongCheckpointError
from ..untrusted import is_inner_name, parse_json, quote, read_json
from .keys import IMAGE_ENCODER_PREFIX, to_component_key
from .safetensor_files import TensorInfo, read_header

MODEL_TYPES = ("blip3o_qwen", "blip3o_qwen_inference")
# Fields that only BLIP3-o's training code writes into config.json: they tell a folder whose model_type was lost.
OWN_FIELDS = ("n_query", "gen_vision_tower", "gen_hidden_size")
INDEX_NAME = "model.safetensors.index.json"
SINGLE_FILE_NAME = "model.safetensors"
DECODER_FOLDER = "diffusion-decoder"
# Where the decoder is looked for, relative to the checkpoint folder: finetunes are saved without one and may share one.
DECODER_FOLDERS = (DECODER_FOLDER, f"../{DECODER_FOLDER}")
DECODER_NETWORKS = ("unet", "vae")
# Names of a decoder network's weights in diffusers' variants, the published one first. Each may be split: then an index lists its parts.
DECODER_WEIGHTS = tuple(
    f"diffusion_pytorch_model{variant}.safetensors" for variant in (".bf16", "", ".fp16", ".fp32")
)
# Where a separately downloaded EVA-CLIP is looked for, relative to the checkpoint folder.
IMAGE_ENCODER_FOLDERS = ("eva_clip_vision_tower", "../eva_clip_vision_tower")
IMAGE_ENCODER_FILES = ("model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin")
DOWNLOAD_HINT = 'Download a checkpoint with "blip3o download 8b" (or 4b).'


@dataclass(frozen=True)
class LeftOut:
    """Tensors of one kind that a checkpoint holds and no network needs.

    Attributes:
        name: what they are, or the beginning of their names.
        is_known: a leftover that published or older code is known to save.
    """

    name: str
    tensors: int
    bytes: int
    is_known: bool


@dataclass(frozen=True, eq=False)
class CheckpointFiles:
    """An opened checkpoint folder: configuration and the headers of its weight files; no weight is read yet.

    Attributes:
        folder: the folder.
        config: config.json.
        tensors: name in the file -> where it lies, of all shards that are present.
        promised: name in the file -> shard in which the index expects it; empty without an index.
        image_encoder: a separate EVA-CLIP file or its folder, instead of what the checkpoint holds.
        decoder: a decoder folder, or a checkpoint folder that has one, instead of its own.
        is_strict: refuse what is left out otherwise, see open_checkpoint.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    promised: dict[str, str] = field(default_factory=dict)
    image_encoder: Path | None = None
    decoder: Path | None = None
    is_strict: bool = False

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def published_repo(self) -> str:
        """Words for the published repository of this size, from which missing parts can be taken."""
        text: dict[str, Any] = self.config.get("text_config") or self.config
        repo = PUBLISHED_REPOS.get(text.get("hidden_size", 0))
        return repo or f"{' or '.join(PUBLISHED_REPOS.values())}, whichever it was made from"

    def component_tensors(self, component: str) -> dict[str, TensorInfo]:
        """Everything the files hold under a component's names: our key -> where it lies.

        What of it the network needs is decided by match.match_network.

        Args:
            component: one of keys.COMPONENTS; the decoder's keys begin with `unet.` and `vae.`.

        Raises:
            MissingFilesError: a shard that holds some of them is missing, or a separate file is.
            WrongCheckpointError: the files hold none of them.
        """
        if component == "decoder":
            return {
                f"{network}.{key}": info
                for network in DECODER_NETWORKS
                for key, info in self.decoder_tensors(network).items()
            }
        found: dict[str, TensorInfo] = {}
        for file_key, info in self.tensors.items():
            place = to_component_key(file_key)
            if place is not None and place.component == component:
                found[place.key] = info
        self._require_shards(component)
        if not found:
            raise WrongCheckpointError(
                f'Checkpoint "{self.name}" has no {COMPONENT_WORDS[component]}.\n'
                f"We looked for it in {len({info.path for info in self.tensors.values()})} weight file(s) of {self.folder}. "
                f"{self.remedy(component)}"
            )
        return found

    def remedy(self, component: str) -> str:
        """What to do when a component, or a part of it, is not there."""
        if component == "image_encoder":
            return "Download jiuhai/eva_clip_vision_tower beside it (blip3o download with --use encode does that)."
        return f"It can be taken from {self.published_repo}. {DOWNLOAD_HINT}"

    def has_component(self, component: str) -> bool:
        """Whether the shards present or expected hold any tensor of a component; of the decoder, whether its folder is there."""
        if component == "decoder":
            return (self.decoder_folder / "unet" / "config.json").is_file()
        if component == "image_encoder" and self.image_encoder is not None:
            return True
        return any(
            (place := to_component_key(key)) and place.component == component
            for key in (*self.tensors, *self.promised)
        )

    @cached_property
    def left_out(self) -> tuple[LeftOut, ...]:
        """What the weight files hold that belongs to no network, the largest first; of the networks' own extras see match.Match."""
        rest = {key: info for key, info in self.tensors.items() if not _belongs(key)}
        places = {key: to_component_key(key) for key in rest}
        return group_left_out(
            (place.key, True, rest[key]) if place else (beginning(key), False, rest[key])
            for key, place in places.items()
        )

    def _require_shards(self, component: str) -> None:
        present = {info.path.name for info in self.tensors.values()}
        needed = {
            shard
            for key, shard in self.promised.items()
            if shard not in present and (place := to_component_key(key)) and place.component == component
        }
        if needed:
            total = len(present | set(self.promised.values()))
            raise MissingFilesError(
                f'BLIP3-o checkpoint "{self.name}" is not complete: {len(needed)} of '
                f"{total} weight files are missing ({', '.join(sorted(needed))}).\n"
                f'Download them into "{self.folder}" (run the download again; it fetches only what is missing).'
            )

    @cached_property
    def decoder_folder(self) -> Path:
        """The folder with `unet`, `vae` and `scheduler`; where it should be when there is none."""
        if self.decoder is not None:
            inside = self.decoder / DECODER_FOLDER
            return inside if inside.is_dir() else self.decoder
        candidates = [self.folder / name for name in DECODER_FOLDERS]
        return next((each for each in candidates if (each / "unet" / "config.json").is_file()), candidates[0])

    def decoder_files(self, network: str) -> list[Path]:
        """Weight files of the decoder's `unet` or `vae`: one, or all parts of a split one.

        Raises:
            MissingFilesError: the folder or a file is missing.
        """
        folder = self.decoder_folder / network
        for name in DECODER_WEIGHTS:
            if (folder / name).is_file():
                return [folder / name]
            index = folder / split_index_name(name)
            if index.is_file():
                parts = [folder / part for part in sorted(set(read_weight_map(index).values()))]
                if missing := [part.name for part in parts if not part.is_file()]:
                    raise self._no_decoder(network, missing[0])
                return parts
        raise self._no_decoder(network, DECODER_WEIGHTS[0])

    def decoder_tensors(self, network: str) -> dict[str, TensorInfo]:
        """Tensors of the decoder's `unet` or `vae` by their key."""
        tensors: dict[str, TensorInfo] = {}
        for path in self.decoder_files(network):
            tensors |= read_header(path)[0]
        return tensors

    def decoder_config(self, part: str) -> dict[str, Any]:
        """Configuration of the decoder's `unet`, `vae` or `scheduler`."""
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        path = self.decoder_folder / part / name
        if not path.is_file():
            raise self._no_decoder(part, name)
        return read_json(path)

    def _no_decoder(self, part: str, file: str) -> MissingFilesError:
        folder = self.decoder_folder
        if self.decoder is not None:
            return MissingFilesError(
                f'"{self.decoder}" is no complete decoder: "{file}" is missing in "{folder / part}".\n'
                f'Name a folder "{DECODER_FOLDER}", or a checkpoint folder that holds one.'
            )
        pickles = sorted((folder / part).glob("diffusion_pytorch_model*.bin"))
        if pickles:
            return MissingFilesError(
                f'The decoder {part} of checkpoint "{self.name}" is there only as a pickle ("{pickles[0].name}" in '
                f'"{pickles[0].parent}"), which can hold code and is not opened.\nDownload the .safetensors file of it.'
            )
        return MissingFilesError(
            f'BLIP3-o checkpoint "{self.name}" has no decoder {part}: "{file}" is missing in "{folder / part}".\n'
            f'Download the folder "{DECODER_FOLDER}" of {self.published_repo} into "{self.folder}", or name one that lies '
            "elsewhere as decoder (--decoder FOLDER; all published checkpoints have the same)."
        )

    def image_encoder_file(self) -> Path | None:
        """A separate EVA-CLIP file, or None when the tower is inside the shards.

        Raises:
            MissingFilesError: it is neither inside the shards nor beside the checkpoint.
        """
        override = self.image_encoder
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
        """Bytes on disk of each component that is present; what is left out does not count."""
        sizes: dict[str, int] = {}
        for key, info in self.tensors.items():
            place = to_component_key(key)
            if place is not None and place.component is not None:
                sizes[place.component] = sizes.get(place.component, 0) + info.nbytes
        for network in DECODER_NETWORKS:
            try:
                size = sum(path.stat().st_size for path in self.decoder_files(network))
            except MissingFilesError:
                continue
            sizes["decoder"] = sizes.get("decoder", 0) + size
        return sizes


COMPONENT_WORDS = {
    "backbone": "language model (Qwen2.5-VL backbone with latent queries)",
    "dit": "image feature generator (the DiT, tensors under model.dit)",
    "image_encoder": f"EVA-CLIP image encoder (tensors under {IMAGE_ENCODER_PREFIX[:-1]})",
    "decoder": "diffusion decoder",
}


def open_checkpoint(
    folder: str | Path,
    *,
    image_encoder: str | Path | None = None,
    decoder: str | Path | None = None,
    strict: bool = False,
) -> CheckpointFiles:
    """Open a folder in the published layout and read the headers of its weight files.

    Args:
        image_encoder: a separate EVA-CLIP file or its folder, instead of what the checkpoint holds.
        decoder: a decoder folder, or a checkpoint folder that has one, instead of its own.
        strict: refuse tensors that no network needs instead of leaving them out.

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
    promised = read_weight_map(folder / INDEX_NAME) if (folder / INDEX_NAME).is_file() else {}
    tensors: dict[str, TensorInfo] = {}
    for path in _weight_files(folder, promised):
        tensors.update(read_header(path)[0])
    _refuse_foreign(folder, config, [*tensors, *promised])
    if not tensors and not promised:
        raise _no_weights(folder)
    files = CheckpointFiles(
        folder,
        config,
        tensors,
        promised,
        image_encoder=None if image_encoder is None else Path(image_encoder).expanduser(),
        decoder=None if decoder is None else Path(decoder).expanduser(),
        is_strict=strict,
    )
    if strict and files.left_out:
        raise unneeded_error(files.name, [key for key in tensors if not _belongs(key)], tensors)
    return files


def unneeded_error(name: str, keys: list[str], tensors: dict[str, TensorInfo]) -> WrongCheckpointError:
    """The refusal of tensors that nothing needs, for those who ask for strictness."""
    return WrongCheckpointError(
        f'Checkpoint "{name}" holds {len(keys)} tensor(s) that BLIP3-o does not need, e.g. '
        f'"{keys[0]}" in {tensors[keys[0]].path.name}.\n'
        "Leave the strict check off (no --strict): what is not needed is then left out."
    )


def is_checkpoint_folder(folder: Path) -> bool:
    """Cheap look: does config.json there describe a BLIP3-o model? Never raises."""
    try:
        config = parse_json((folder / "config.json").read_bytes())
        return config.get("model_type") in MODEL_TYPES or any(name in config for name in OWN_FIELDS)
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def split_index_name(weights: str) -> str:
    """Name of the index of a split weight file, as transformers and diffusers write it: the variant comes last."""
    stem, _, variant = weights.removesuffix(".safetensors").partition(".")
    return f"{stem}.safetensors.index{'.' + variant if variant else ''}.json"


def read_weight_map(path: Path) -> dict[str, str]:
    """Tensor -> weight file, of an index.

    Raises:
        WrongCheckpointError: it lists no weights, or files outside its folder.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise WrongCheckpointError(f'"{path.name}" in "{path.parent}" lists no weights.\nDownload it again.')
    for name in set(weight_map.values()):
        if Path(name).name != name or not is_inner_name(name) or not name.endswith(".safetensors"):
            raise WrongCheckpointError(
                f'"{path.name}" in "{path.parent}" names a weight file that cannot be one: {quote(name)}.\nDownload it again.'
            )
    return weight_map


def _weight_files(folder: Path, promised: dict[str, str]) -> list[Path]:
    """The model's own files: those of the index, else a single model.safetensors, else all; others are not ours."""
    paths = sorted(folder.glob("*.safetensors"))
    if promised:
        expected = set(promised.values())
        return [path for path in paths if path.name in expected]
    single = folder / SINGLE_FILE_NAME
    return [single] if single in paths else paths


def _belongs(file_key: str) -> bool:
    place = to_component_key(file_key)
    return place is not None and place.component is not None


def beginning(key: str) -> str:
    """What an unknown tensor is listed under: the first words of its name."""
    return ".".join(key.split(".")[:2])


def group_left_out(found: Iterable[tuple[str, bool, TensorInfo]]) -> tuple[LeftOut, ...]:
    """Tensors of the same name and kind together, the largest group first.

    Args:
        found: (name, whether it is known, the tensor) of each.
    """
    kinds: dict[tuple[str, bool], list[TensorInfo]] = {}
    for name, is_known, info in found:
        kinds.setdefault((name, is_known), []).append(info)
    groups = [
        LeftOut(name, len(infos), sum(info.nbytes for info in infos), is_known)
        for (name, is_known), infos in kinds.items()
    ]
    return tuple(sorted(groups, key=lambda group: -group.bytes))


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


def _no_weights(folder: Path) -> MissingFilesError:
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if pickles:
        return MissingFilesError(
            f'"{folder}" holds its weights only as pickles ("{pickles[0].name}"), which can hold code and are not opened.\n'
            "Save the model again as safetensors (in training code: safe_serialization=True), or download such a checkpoint."
        )
    return MissingFilesError(
        f'"{folder}" has a config.json but no weight file (*.safetensors).\n'
        "Run the download again; it continues where it stopped."
    )


def _refuse_foreign(folder: Path, config: dict[str, Any], names: list[str]) -> None:
    """Raise WrongCheckpointError for another model. Tensors decide: savers lose or change the model type."""
    places = [place for name in names if (place := to_component_key(name))]
    foreign = next(
        (name for name in names if name.startswith("model.sana") or ".self_attn.q_norm." in name), None
    )
    model_type = str(config.get("model_type") or "")
    text_config = config.get("text_config")
    text_type = str(text_config.get("model_type", "")) if isinstance(text_config, dict) else ""
    if foreign is not None:
        raise _is_next(folder, f'it holds "{foreign}"')
    if "qwen3" in model_type + text_type:
        raise _is_next(folder, f'model type "{text_type or model_type}"')
    if model_type in MODEL_TYPES or any(place.component == "dit" for place in places):
        return
    if "blip3o" in model_type or "blip3o" in str(config.get("architectures", "")).lower():
        raise _is_next(folder, f'model type "{model_type or "none"}"')
    if model_type.startswith("qwen"):
        raise WrongCheckpointError(
            f'"{folder}" is a plain Qwen model (model type "{model_type}"): it can answer, but has no latent queries and no '
            f"DiT to draw with.\n{DOWNLOAD_HINT}"
        )
    found = f'names the model type "{model_type}"' if model_type else "names no model type"
    raise WrongCheckpointError(
        f'"{folder}" is not a BLIP3-o checkpoint: config.json {found}, expected "{MODEL_TYPES[0]}", and no weight file holds '
        f"a DiT.\n{DOWNLOAD_HINT}"
    )


def _is_next(folder: Path, reason: str) -> WrongCheckpointError:
    return WrongCheckpointError(
        f'"{folder}" is a newer relative of BLIP3-o (BLIP3o-NEXT: {reason}), a different network.\n'
        f"This program reads BLIP3o-Model-8B and BLIP3o-Model-4B. {DOWNLOAD_HINT}"
    )
