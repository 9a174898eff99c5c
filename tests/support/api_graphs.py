"""Short API graphs for tests against the real server."""

from __future__ import annotations

from typing import Any

BUILT_IN = "built-in: tiny"
SAMPLING = {
    "max_new_tokens": 12,
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": 0,
    "repetition_penalty": 1.0,
    "seed": 0,
    "max_pixels": 1003520,
}

# Lines for `more` of Training Settings: as little measuring as there can be.
QUICK_TRAINING = "\n".join(
    (
        "sample.steps=2",
        "validate.noise_seeds=1",
        "validate.sigmas=[0.5]",
        "validate.drift_prompts=[a blue square]",
        "train.prior.prompts=[a green star]",
        "save.dtype=fp32",
    )
)


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def text_to_image(
    checkpoint: str = BUILT_IN,
    *,
    seed: int = 1,
    steps: int = 4,
    pixel_steps: int = 4,
    batch: int = 1,
    prompt: str = "a red circle",
) -> dict[str, Any]:
    """Nodes 1 load, 2 encode, 3 features, 4 pixels, 5 preview."""
    return {
        "1": node("BLIP3oLoad", checkpoint=checkpoint, dtype="auto"),
        "2": node("BLIP3oEncodePrompt", backbone=["1", 0], prompt=prompt, negative_prompt=""),
        "3": node(
            "BLIP3oSampleFeatures",
            dit=["1", 1],
            positive=["2", 0],
            negative=["2", 1],
            seed=seed,
            steps=steps,
            cfg=3.0,
            sampler="euler",
            shift=1.0,
            batch_size=batch,
        ),
        "4": node(
            "BLIP3oDecodeFeatures",
            decoder=["1", 2],
            vae=["1", 3],
            image_features=["3", 0],
            seed=seed,
            steps=pixel_steps,
            cfg=3.0,
            width=0,
            height=0,
            sampler="euler",
            scheduler="published",
            tiled=False,
        ),
        "5": node("PreviewImage", images=["4", 0]),
    }


def ask(
    checkpoint: str = BUILT_IN, *, question: str = "What color is it?", **sampling: Any
) -> dict[str, Any]:
    """Nodes 1 load, 6 an empty picture, 7 ask."""
    return {
        "1": node("BLIP3oLoad", checkpoint=checkpoint, dtype="auto"),
        "6": node("EmptyImage", width=112, height=112, batch_size=1, color=16711680),
        "7": node(
            "BLIP3oAsk",
            backbone=["1", 0],
            question=question,
            batch="one answer per image",
            system_prompt="You are a helpful assistant.",
            images=["6", 0],
            **{**SAMPLING, **sampling},
        ),
    }
