"""Does a LoRA learn a thing that the built-in model was never shown, and keep the rest? Trains and judges, from nothing.

    python benchmarks/lora_proof.py [--seeds 0 1 2] [--variants "LoRA with preservation" ...] [--out benchmarks/results]

Twelve pictures of three shapes in the colours of a traffic light (tests/support/lora_concept.py). Each variant is
trained by the whole program with each seed, its file is loaded as for drawing, and judged by
- the pixel checker: shapes, colours, places and ground of every trigger prompt must be exactly right,
- a linear probe on image features, trained on renderings with their nearest kin, validated on renderings it never saw,
- GenEval-like prompts of the scene world that have nothing to do with it, the same with and without the LoRA.
Finished runs in the work folder are not done again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VARIANTS: dict[str, dict[str, Any]] = {
    "LoRA with preservation": {"train__prior__weight": 4.0},
    "LoRA with preservation, near prompts too": {"train__prior__weight": 4.0},
    "LoRA without preservation": {"train__prior__dop": False},
    "query tuning": {"adapter__type": "queries", "train__optimizer__lr": 2e-2},
    "negative control: scrambled pictures": {"train__prior__weight": 4.0},
}
# Held still beside the built-in prompts: some that share words with the trigger.
KEPT_NEAR = "LoRA with preservation, near prompts too"
SCRAMBLED = "negative control: scrambled pictures"
PROBE_PICTURES = 200
GRID_COLUMNS = 12
NOISE_SEED = 1000
COLUMNS = (
    "trigger_checked",
    "trigger_probed",
    "others",
    "others_drop",
    "gain",
    "concept",
    "drift",
    "leak",
    "seconds",
    "cpu_seconds",
)
HEADINGS = (
    "trigger, pixels", "trigger, probe", "other prompts", "drop", "gain", "concept", "drift", "leak", "s to train", "CPU s",
)  # fmt: skip


def load_package() -> None:
    """The checkout as `comfyui_blip3o`, and the tests' helpers."""
    spec = importlib.util.spec_from_file_location(
        "comfyui_blip3o", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    sys.modules["comfyui_blip3o"] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    sys.path.append(str(ROOT / "tests" / "support"))


def main() -> None:
    """Train, judge, write lora_proof.json, lora_proof.md and picture grids."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=120, help="of each training (default: 120)")
    parser.add_argument("--prompts", type=int, default=12, help="other prompts per category (default: 12)")
    parser.add_argument("--preset", default="fast", help="for drawing the judged pictures (default: fast)")
    parser.add_argument("--threads", type=int, default=1, help="default: 1, the fastest for so small a model")
    parser.add_argument("--work", type=Path, default=Path("lora-proof"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--note", default="", help="put under the table, e.g. what else the machine did")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    load_package()
    import torch

    torch.set_num_threads(arguments.threads)
    bench = Bench(arguments)
    rows = [bench.row(variant, seed) for seed in arguments.seeds for variant in arguments.variants]
    result = {
        "seeds": arguments.seeds,
        "threads": arguments.threads,
        "prompts_per_category": arguments.prompts,
        "preset": arguments.preset,
        "torch": torch.__version__,
        "checkpoint": bench.fingerprint,
        "note": arguments.note,
        "probe": bench.probe_scores,
        "base": bench.base,
        "rows": rows,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "lora_proof.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    (arguments.out / "lora_proof.md").write_text(to_markdown(result, arguments.variants), "utf-8")
    print(to_markdown(result, arguments.variants))


class Bench:
    """Trains and judges variants; what does not depend on them is computed once."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        import lora_concept
        from comfyui_blip3o.blip3o_core.checkpoints.fingerprints import checkpoint_fingerprint
        from comfyui_blip3o.blip3o_core.config import BUILT_IN_MODEL
        from comfyui_blip3o.blip3o_core.pipeline import load_pipeline
        from comfyui_blip3o.lora_training.prompts import DRIFT_SCENES, PRESERVED_SCENES
        from comfyui_blip3o.pretraining.evaluation.geneval import CATEGORIES, category_prompts

        self.arguments = arguments
        self.pipeline = load_pipeline(BUILT_IN_MODEL, device="cpu")
        self.fingerprint = checkpoint_fingerprint(self.pipeline.files)
        # Nothing is judged on what preservation was shown.
        shown = {*PRESERVED_SCENES, *DRIFT_SCENES, *lora_concept.NEAR_PROMPTS}
        self.others = [
            prompt
            for each in CATEGORIES
            for prompt in category_prompts(each, arguments.prompts + len(shown), 0)
            if prompt.text not in shown
        ]
        self.others = [
            prompt
            for each in CATEGORIES
            for prompt in [other for other in self.others if other.category == each][: arguments.prompts]
        ]
        self.concept = lora_concept
        encode = self.pipeline.encode_images
        features, labels = lora_concept.probe_set(encode, PROBE_PICTURES, 0)
        self.probe = lora_concept.train_probe(features, labels)
        features, labels = lora_concept.probe_set(encode, PROBE_PICTURES, 50_000)
        said = self.probe(features) > 0
        kin = slice(PROBE_PICTURES, 2 * PROBE_PICTURES)
        self.probe_scores = {
            "concept recognised": said[:PROBE_PICTURES].float().mean().item(),
            "nearest kin refused": 1 - said[kin].float().mean().item(),
            "known scenes refused": 1 - said[2 * PROBE_PICTURES :].float().mean().item(),
        }
        self.base = self._judge("base", None)

    def row(self, variant: str, seed: int) -> dict[str, Any]:
        """A trained and judged variant; read again when it was finished before."""
        name = f"{variant.split(':')[0].replace(',', '').replace(' ', '_')}_{seed}".lower()
        path = self.arguments.work / f"{name}.json"
        if path.is_file():
            row = json.loads(path.read_text("utf-8"))
            if row["checkpoint"] == self.fingerprint:
                return row
        row = {"variant": variant, "seed": seed, "checkpoint": self.fingerprint}
        row |= self._train(variant, seed, name)
        row |= self._judge(name, Path(row.pop("lora")))
        row["others_drop"] = self.base["others"] - row["others"]
        path.write_text(json.dumps(row), "utf-8")
        print(name, {key: round(row[key], 3) for key in COLUMNS}, flush=True)
        return row

    def _train(self, variant: str, seed: int, name: str) -> dict[str, Any]:
        from comfyui_blip3o.lora_training.config import parse_config
        from comfyui_blip3o.lora_training.prompts import PRESERVED_SCENES
        from comfyui_blip3o.lora_training.records import PHASES
        from comfyui_blip3o.lora_training.run import train_lora

        work, concept = self.arguments.work, self.concept
        scrambled = variant == SCRAMBLED
        data = concept.write_concept(work / ("scrambled" if scrambled else "pictures"), shuffled=scrambled)
        settings = dict(VARIANTS[variant])
        if variant == KEPT_NEAR:
            settings["train__prior__prompts"] = [*PRESERVED_SCENES, *concept.NEAR_PROMPTS]
        if self.arguments.steps:
            settings["train__steps"] = self.arguments.steps
        tree = concept.concept_tree(data.resolve(), (work / f"runs_{name}").resolve(), name, **settings)
        tree["run"]["seed"] = seed

        numbers: dict[int, dict[str, Any]] = {}

        def watch(event: dict[str, Any]) -> None:
            if event["event"] == "validation":
                numbers[event["step"]] = event

        start = time.monotonic(), time.process_time()
        result = train_lora(
            parse_config(tree),
            on_event=watch,
            only=[phase for phase in PHASES if phase != "prove"],
            fresh=True,
        )
        card = numbers[result.best_step]
        return {
            "lora": str(result.lora),
            "kilobytes": round(result.lora.stat().st_size / 1000),
            # Everything from the pictures to the file, with validations and sample pictures, without the report.
            "seconds": time.monotonic() - start[0],
            "cpu_seconds": time.process_time() - start[1],
            "steps": result.steps,
            "best_step": result.best_step,
            **{
                key: card[key]
                for key in ("gain", "train_gain", "concept", "drift", "zero_drift", "leak", "copy")
            },
        }

    def _judge(self, name: str, lora: Path | None) -> dict[str, Any]:
        """Shares of right pictures, with a LoRA or without."""
        import numpy as np
        from comfyui_blip3o.pretraining.evaluation.geneval import picture_grid, score_prompts

        preset = self.arguments.preset
        self.pipeline.unload_loras()
        if lora is not None:
            self.pipeline.load_lora(lora)
        trigger = self.concept.trigger_prompts()
        drawn = self.pipeline.generate(
            [text for text, *_ in trigger], seed=NOISE_SEED, preset=preset, batch_size=12
        )
        checked = [
            self.concept.shows_concept(picture, kind, ground)
            for picture, (_, kind, ground) in zip(drawn.pictures, trigger, strict=True)
        ]
        probed = (self.probe(drawn.image_features) > 0).tolist()
        rows = score_prompts(self.pipeline, self.others, seed=NOISE_SEED, preset=preset)
        categories = {
            each: float(np.mean([row["correct"] for row in rows if row["category"] == each]))
            for each in dict.fromkeys(row["category"] for row in rows)
        }
        self.arguments.out.mkdir(parents=True, exist_ok=True)
        shown = [
            *drawn.pictures,
            *[row["image"] for row in rows[:: max(1, len(rows) // (2 * GRID_COLUMNS))]][: 2 * GRID_COLUMNS],
        ]
        small = [picture.resize((96, 96)) for picture in shown]
        picture_grid(small, GRID_COLUMNS).save(self.arguments.out / f"lora_proof_{name}.jpg", quality=80)
        self.pipeline.unload_loras()
        return {
            "trigger_checked": float(np.mean(checked)),
            "trigger_probed": float(np.mean(probed)),
            "others": float(np.mean(list(categories.values()))),
            "categories": categories,
            "wrong": [text for (text, *_), right in zip(trigger, checked, strict=True) if not right],
        }


def to_markdown(result: dict[str, Any], variants: list[str]) -> str:
    """The table, mean and range over the seeds."""
    base, rows = result["base"], result["rows"]
    count = len(result["seeds"])
    lines = [
        "# Teaching the built-in model something new",
        "",
        f"Twelve pictures; mean over {count} seed(s), in brackets lowest and highest. Shares are of 36 trigger prompts (two thirds in "
        f"wordings that training never showed) and of {6 * result['prompts_per_category']} other prompts; `drop` is against "
        "the model without LoRA on the same prompts and noises. gain, concept, drift and leak are the program's own numbers at the "
        "step it chose.",
        "",
        f"| | {' | '.join(HEADINGS)} |",
        "|---|" + "---|" * len(HEADINGS),
        f"| no LoRA | {base['trigger_checked']:.3f} | {base['trigger_probed']:.3f} | {base['others']:.3f} |"
        + " |" * (len(HEADINGS) - 3),
    ]
    for variant in variants:
        mine = [row for row in rows if row["variant"] == variant]
        cells = []
        for key in COLUMNS:
            values = [row[key] for row in mine]
            digits = 0 if key.endswith("seconds") else 3
            mean, low, high = statistics.mean(values), min(values), max(values)
            cells.append(f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})")
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    probe = ", ".join(f"{name} {value:.3f}" for name, value in result["probe"].items())
    sizes = {row["variant"]: (row["kilobytes"], row["steps"]) for row in rows}
    about = "; ".join(f"{name}: {size} kB, {steps} steps" for name, (size, steps) in sizes.items())
    lines += [
        "",
        f"Probe, on renderings it never saw: {probe}. Files: {about}.",
        f"CPU, {result['threads']} threads, torch {result['torch']}, preset {result['preset']} for the judged pictures. {result['note']}".strip(),
        "",
        "Grids: three rows of trigger prompts, two of other prompts.",
        "",
    ]
    for name in (
        "base",
        *(
            f"{v.split(':')[0].replace(',', '').replace(' ', '_')}_{result['seeds'][0]}".lower()
            for v in variants
        ),
    ):
        lines += [f"![{name}](lora_proof_{name}.jpg)", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
