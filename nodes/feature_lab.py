"""Nodes that work on image features: encode, blend, compose, compare, save and load."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Any

import folder_paths
import torch
import torch.nn.functional as F
from comfy_api.latest import io, ui
from safetensors import safe_open
from torch import Tensor

from ..blip3o_core.checkpoints.safetensor_files import write_safetensors
from ..blip3o_core.drawing.sampling import to_grid
from ..blip3o_core.errors import BadInputError
from ..blip3o_core.images import to_pil
from ..blip3o_core.untrusted import brief
from .native import host
from .native.sockets import ImageEncoderHandle, ImageEncoderType, feature_grid, features_latent
from .native.widgets import parse_weights

CATEGORY = "BLIP3-o/feature lab"
FILE_SUFFIX = ".features.safetensors"
FILE_KEY = "image_features"
HEAT_MAP_SIDE = 512
MAX_BLEND = 8
ENCODE_BATCH = 8


def encode_images(handle: ImageEncoderHandle, images: Tensor) -> Tensor:
    """Feature grid (B, channels, H, W) of images (B, H, W, 3), a few at a time."""
    pictures = to_pil(images)
    progress = host.StepProgress(len(pictures))
    parts = []
    for start in range(0, len(pictures), ENCODE_BATCH):
        parts.append(handle.pipeline.encode_images(pictures[start : start + ENCODE_BATCH]))
        progress(min(start + ENCODE_BATCH, len(pictures)))
    tokens = torch.cat(parts)
    side = round(tokens.shape[1] ** 0.5)
    return host.to_intermediate(to_grid(tokens, (side, side)))


def parse_shares(text: str, count: int) -> list[float]:
    """Weights of `count` inputs, made to sum to 1.

    Raises:
        BadInputError: see parse_weights, or a sum of zero.
    """
    weights = parse_weights(text, count, "input")
    total = sum(weights)
    if abs(total) < 1e-6:
        raise BadInputError(f'The weights "{text}" add up to zero.\nUse numbers whose sum is not zero.')
    return [weight / total for weight in weights]


def slerp(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Walk the share (0 ... 1) of the way from one feature to another along the sphere; lengths are blended linearly.

    Args:
        first, second: (B, channels, H, W).
    """
    lengths = first.norm(dim=1, keepdim=True), second.norm(dim=1, keepdim=True)
    directions = F.normalize(first, dim=1), F.normalize(second, dim=1)
    angle = (directions[0] * directions[1]).sum(dim=1, keepdim=True).clamp(-1, 1).acos()
    # Where the two (nearly) agree or oppose each other the arc is not defined; the straight line is.
    is_arc = (angle > 1e-3) & (angle < torch.pi - 1e-3)
    sine = torch.where(is_arc, angle.sin(), torch.ones_like(angle))
    arc = ((1 - share) * angle).sin() / sine * directions[0] + (share * angle).sin() / sine * directions[1]
    line = (1 - share) * directions[0] + share * directions[1]
    return torch.where(is_arc, arc, line) * ((1 - share) * lengths[0] + share * lengths[1])


def blend(grids: list[Tensor], weights: list[float], mode: str) -> Tensor:
    """Weighted mean of feature grids, straight ("lerp") or along the sphere ("slerp"); weights sum to 1."""
    batch = max(grid.shape[0] for grid in grids)
    grids = [grid if grid.shape[0] == batch else repeat_batch(grid, batch) for grid in grids]
    if mode == "lerp":
        return reduce(torch.add, (weight * grid for weight, grid in zip(weights, grids, strict=True)))
    result, gathered = grids[0], weights[0]
    for weight, grid in zip(weights[1:], grids[1:], strict=True):
        gathered += weight
        result = slerp(result, grid, weight / gathered if gathered else 0.0)
    return result


def repeat_batch(grid: Tensor, batch: int) -> Tensor:
    """Repeat rows from the start until there are `batch`."""
    return grid[torch.arange(batch) % grid.shape[0]]


def same_shape(first: Tensor, second: Tensor) -> None:
    """Refuse features of different models.

    Raises:
        BadInputError: channels or grid differ.
    """
    if first.shape[1:] != second.shape[1:]:
        raise BadInputError(
            "These image features come from different models or grids and cannot be combined.\n"
            f"Make them with the same checkpoint. ({tuple(first.shape[1:])} and {tuple(second.shape[1:])})"
        )


def similarity_map(first: Tensor, second: Tensor) -> Tensor:
    """Cosine similarity of the features at each place, (B, H, W) in [-1, 1]."""
    batch = max(first.shape[0], second.shape[0])
    return F.cosine_similarity(repeat_batch(first, batch).float(), repeat_batch(second, batch).float(), dim=1)


def heat_picture(similarity: Tensor) -> Tensor:
    """Pictures (B, side, side, 3) of a similarity map: dark blue = different (0 or less), yellow = the same (1)."""
    stops = torch.tensor([[0.05, 0.03, 0.35], [0.55, 0.10, 0.55], [0.93, 0.40, 0.25], [0.98, 0.95, 0.45]])
    position = similarity.clamp(0, 1) * (len(stops) - 1)
    lower = position.floor().long().clamp(max=len(stops) - 2)
    share = (position - lower)[..., None]
    colours = stops[lower] * (1 - share) + stops[lower + 1] * share  # (B, H, W, 3)
    scaled = F.interpolate(colours.movedim(-1, 1), size=(HEAT_MAP_SIDE, HEAT_MAP_SIDE), mode="nearest")
    return scaled.movedim(1, -1)


class EncodeImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BLIP3oEncodeImage",
            display_name="Encode Image (BLIP3-o)",
            category=CATEGORY,
            description="Turn pictures into image features. Connect them to Decode Image Features to redraw the picture, or to "
            "start_features of Sample Image Features to vary it.",
            search_aliases=["blip3o", "eva clip", "clip vision encode", "image variation", "reconstruct"],
            inputs=[
                ImageEncoderType.Input("image_encoder", tooltip="From Load Image Encoder."),
                io.Image.Input("images", tooltip="Pictures; the centre square of each is seen."),
            ],
            outputs=[io.Latent.Output("image_features", tooltip="8 x 8 image features per picture.")],
        )

    @classmethod
    def execute(cls, image_encoder: ImageEncoderHandle, images: Tensor) -> io.NodeOutput:
        return io.NodeOutput(features_latent(encode_images(image_encoder, images)))


class BlendFeatures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        features = io.Latent.Input(
            "features", tooltip="Image features to blend; a free socket appears when one is used."
        )
        return io.Schema(
            node_id="BLIP3oBlendFeatures",
            display_name="Blend Image Features (BLIP3-o)",
            category=CATEGORY,
            description="Mix the content of two to eight sets of image features. Connect the result to Decode Image Features.",
            search_aliases=["blip3o", "mix", "merge images", "interpolate", "lerp", "slerp"],
            inputs=[
                io.Autogrow.Input(
                    "features",
                    template=io.Autogrow.TemplatePrefix(features, prefix="features_", min=2, max=MAX_BLEND),
                    tooltip="Two to eight sets of image features.",
                ),
                io.Combo.Input(
                    "mode",
                    options=["slerp", "lerp"],
                    default="slerp",
                    tooltip="slerp keeps full contrast on the way; lerp is the plain mean and looks softer.",
                ),
                io.String.Input(
                    "weights",
                    default="",
                    placeholder="1, 1",
                    tooltip="One number per input, with commas. Empty: all the same. A larger number shows more of that input.",
                ),
            ],
            outputs=[io.Latent.Output("image_features", tooltip="The blend.")],
        )

    @classmethod
    def execute(cls, features: dict[str, dict[str, Any]], mode: str, weights: str) -> io.NodeOutput:
        grids = [feature_grid(latent) for latent in features.values() if latent is not None]
        for grid in grids[1:]:
            same_shape(grids[0], grid)
        return io.NodeOutput(features_latent(blend(grids, parse_shares(weights, len(grids)), mode)))


class ComposeFeatures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BLIP3oComposeFeatures",
            display_name="Compose Image Features (BLIP3-o)",
            category=CATEGORY,
            description="Make a collage: put one set of image features into another where a mask is white. "
            "Connect several one after another for more parts.",
            search_aliases=["blip3o", "collage", "composite", "mask", "regional"],
            inputs=[
                io.Latent.Input("background", tooltip="Image features that stay where the mask is black."),
                io.Latent.Input("foreground", tooltip="Image features that appear where the mask is white."),
                io.Mask.Input("mask", tooltip="Any size; it is averaged over the 8 x 8 places."),
                io.Boolean.Input(
                    "hard_edge",
                    default=False,
                    tooltip="On: each of the 8 x 8 places takes one side only. Off: edges blend.",
                ),
            ],
            outputs=[io.Latent.Output("image_features", tooltip="The collage.")],
        )

    @classmethod
    def execute(
        cls, background: dict[str, Any], foreground: dict[str, Any], mask: Tensor, hard_edge: bool
    ) -> io.NodeOutput:
        behind, front = feature_grid(background), feature_grid(foreground)
        same_shape(behind, front)
        batch = max(behind.shape[0], front.shape[0], mask.shape[0] if mask.ndim == 3 else 1)
        height, width = behind.shape[-2:]
        places = F.adaptive_avg_pool2d(mask.reshape(-1, 1, *mask.shape[-2:]).float(), (height, width))
        if hard_edge:
            places = (places >= 0.5).float()
        behind, front, places = (repeat_batch(part, batch) for part in (behind, front, places))
        return io.NodeOutput(features_latent(behind + places * (front - behind)))


class CompareFeatures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BLIP3oCompareFeatures",
            display_name="Compare Image Features (BLIP3-o)",
            category=CATEGORY,
            description="Tell how alike two pictures are to the model, and where: yellow places agree, blue ones differ.",
            search_aliases=["blip3o", "cosine", "similarity", "heat map", "difference"],
            inputs=[
                io.Latent.Input("first", tooltip="Image features, e.g. of the original picture."),
                io.Latent.Input("second", tooltip="Image features to compare with."),
            ],
            outputs=[
                io.Float.Output(
                    "similarity", tooltip="Mean cosine: 1 is the same, about 0 has nothing in common."
                ),
                io.Image.Output("heat_map", tooltip="Similarity at each of the 8 x 8 places."),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, first: dict[str, Any], second: dict[str, Any]) -> io.NodeOutput:
        grids = feature_grid(first), feature_grid(second)
        same_shape(*grids)
        similarity = similarity_map(*grids)
        picture = heat_picture(similarity.cpu())
        return io.NodeOutput(similarity.mean().item(), picture, ui=ui.PreviewImage(picture, cls=cls))


class SaveFeatures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BLIP3oSaveFeatures",
            display_name="Save Image Features (BLIP3-o)",
            category=CATEGORY,
            description="Keep image features in a small file in the output folder, to load them in another graph.",
            search_aliases=["blip3o", "save latent", "export"],
            inputs=[
                io.Latent.Input("image_features", tooltip="What to keep."),
                io.String.Input(
                    "filename_prefix",
                    default="features/BLIP3o",
                    tooltip="Folder and name in ComfyUI's output folder; a number is added.",
                ),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, image_features: dict[str, Any], filename_prefix: str) -> io.NodeOutput:
        path = host.save_path(filename_prefix, FILE_SUFFIX)
        write_safetensors({FILE_KEY: feature_grid(image_features)}, path)
        return io.NodeOutput(ui=ui.PreviewText(f"Saved {path.name}"))


def list_feature_files() -> list[str]:
    """Feature files below output and input, newest first, as ComfyUI's annotated names."""
    found = []
    for label, root in (
        ("output", Path(folder_paths.get_output_directory())),
        ("input", Path(folder_paths.get_input_directory())),
    ):
        for path in root.rglob(f"*{FILE_SUFFIX}"):
            found.append((path.stat().st_mtime, f"{path.relative_to(root).as_posix()} [{label}]"))
    return [name for _, name in sorted(found, reverse=True)]


class LoadFeatures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BLIP3oLoadFeatures",
            display_name="Load Image Features (BLIP3-o)",
            category=CATEGORY,
            description="Load image features that Save Image Features kept, from the output or input folder.",
            search_aliases=["blip3o", "load latent", "import"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=list_feature_files(),
                    tooltip='File to load; press "R" to refresh the list.',
                )
            ],
            outputs=[io.Latent.Output("image_features", tooltip="The features of the file.")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        return host.files_fingerprint([host.user_file(file)])

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        path = host.user_file(file)
        try:
            with safe_open(str(path), framework="pt") as opened:
                grid = opened.get_tensor(FILE_KEY)
        except Exception as error:  # the library raises its own class, OSError and others
            raise BadInputError(
                f'"{file}" holds no image features.\nChoose a file that "Save Image Features (BLIP3-o)" wrote. ({brief(error)})'
            ) from error
        return io.NodeOutput(features_latent(host.to_intermediate(grid)))


NODES = [EncodeImage, BlendFeatures, ComposeFeatures, CompareFeatures, SaveFeatures, LoadFeatures]
