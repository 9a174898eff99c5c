"""Stages d and e on real pictures with captions: latent queries and DiT learn, a checkpoint's other parts stay frozen.

The published recipe: the caption in the published template, the picture's EVA-CLIP features as the target, a thousand
noise levels drawn evenly, the whole conditioning dropped to zero for one sample in ten.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...blip3o_core.checkpoints.save import save_checkpoint
from ...blip3o_core.drawing.flow import TRAIN_TIMESTEPS
from ...blip3o_core.images import preprocess_for_image_encoder
from ...blip3o_core.language.prompts import generation_text
from ..data_sources import SampleStream
from ..trainer import Batch, load_trained
from .generation import OBJECTIVES, velocity_error

if TYPE_CHECKING:
    from ...blip3o_core.language.prompts import TextTokenizer
    from ...blip3o_core.pipeline import Blip3oPipeline


class ImageTextStage(nn.Module):
    """Flow matching on the image features of real pictures.

    Args:
        pipeline: a loaded checkpoint; its backbone (but for the latent queries), image encoder and decoder stay frozen.
        objective: "flow" (the paper's choice) or "mse" (regress the features from pure noise; such a checkpoint draws
            with one step and guidance 1).
    """

    def __init__(self, pipeline: Blip3oPipeline, objective: str = "flow") -> None:
        super().__init__()
        assert objective in OBJECTIVES, objective
        self.backbone = pipeline.backbone.requires_grad_(False)
        self.image_encoder = pipeline.image_encoder.requires_grad_(False)
        self.dit = pipeline.dit.requires_grad_(True)
        self.backbone.latent_queries.requires_grad_(True)
        self.objective = objective

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            features = self.image_encoder(batch["pixels"])
            embeddings = self.backbone.embed(batch["ids"])
        conditioning = self.backbone.encode_conditioning(embeddings, batch["mask"])
        error, _ = velocity_error(
            self.dit,
            features,
            batch["noise"],
            batch["index"],
            conditioning * batch["keep"],
            self.objective,
        )
        return error.mean(), {}


def save_trained(pipeline: Blip3oPipeline, stage: ImageTextStage, run: Path, folder: Path) -> Path:
    """Write a checkpoint with the averaged latent queries and DiT, and everything else as it was loaded."""
    load_trained(stage, run)
    return save_checkpoint(
        folder,
        pipeline.files.config,
        backbone=pipeline.backbone,
        dit=pipeline.dit,
        image_encoder=pipeline.image_encoder,
        decoder=pipeline.decoder,
        tokenizer_from=pipeline.files.folder,
    )


class ImageTextBatches:
    """Batches of a stream of samples by step number; a resumed run skips what it has already seen.

    Args:
        samples: this process's own stream, the same at every start.
        batch_size: of this process.
        noise_shape: (channels, H, W) of the feature grid.
    """

    def __init__(
        self,
        samples: SampleStream,
        tokenizer: TextTokenizer,
        *,
        image_size: int,
        noise_shape: tuple[int, int, int],
        batch_size: int,
        drop: float,
        seed: int,
    ) -> None:
        self.samples = samples
        self.reader = iter(samples)
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.noise_shape = noise_shape
        self.batch_size = batch_size
        self.drop = drop
        self.seed = seed
        self.next_step = 0

    def __call__(self, step: int) -> Batch:
        assert step >= self.next_step, f"step {step} has passed, the stream stands at {self.next_step}"
        self.samples.skip((step - self.next_step) * self.batch_size)
        self.next_step = step + 1
        chosen = list(islice(self.reader, self.batch_size))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        size = len(chosen)
        ids, mask = self._prompts([sample.caption for sample in chosen])
        place = (torch.randperm(size, generator=generator) + torch.rand(size, generator=generator)) / size
        return {
            "pixels": torch.stack([preprocess_for_image_encoder(s.picture, self.image_size) for s in chosen]),
            "ids": ids,
            "mask": mask,
            "noise": torch.randn(size, *self.noise_shape, generator=generator),
            "index": (place * TRAIN_TIMESTEPS).long().clamp(max=TRAIN_TIMESTEPS - 1),
            "keep": (torch.rand(size, 1, 1, generator=generator) >= self.drop).float(),
        }

    def _prompts(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids up to `[IMG]`, padded on the left, and the mask of real tokens, each (B, L)."""
        rows = [self.tokenizer.encode_for_generation(generation_text(caption)) for caption in captions]
        longest = max(map(len, rows))
        pad = self.tokenizer.pad
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return ids, mask
