"""report.md and scorecard.json of a run: what it learned, for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...blip3o_core.checkpoints.save import write_json, write_text
from ..config import LoraConfig
from .judge import Scorecard

REPORT_NAME, SCORECARD_NAME = "report.md", "scorecard.json"
MEANINGS = {
    "gain": "how much lower the loss is than without the LoRA",
    "train_gain": "the same on pictures it was trained on",
    "concept": "how much nearer its pictures come to the training pictures (cosine, difference)",
    "leak": "the same with the class word instead of the trigger; should be near 0",
    "drift": "how much pictures of other prompts change (1 - cosine); should be near 0",
    "zero_drift": "how much the unprompted side of guidance changes; should be near 0",
    "copy": "largest likeness to one training picture; near 1 means that it repeats it",
}


def write_report(
    folder: Path,
    config: LoraConfig,
    scorecard: Scorecard,
    pictures: dict[str, str],
    notes: Sequence[str] = (),
) -> Path:
    """Write both files into a run's folder.

    Args:
        pictures: heading -> picture file, relative to the folder.
        notes: more lines, e.g. warnings of the run.
    """
    tree = scorecard.to_tree()
    write_json(folder / SCORECARD_NAME, tree)
    path = folder / REPORT_NAME
    write_text(path, report_text(config, tree, pictures, notes))
    return path


def report_text(
    config: LoraConfig, tree: dict[str, Any], pictures: dict[str, str], notes: Sequence[str] = ()
) -> str:
    """The report as Markdown, of a scorecard's tree."""
    trigger = f' Trigger: "{config.data.trigger}".' if config.data.trigger else ""
    shown_on = f"{tree['held_out']} held-out picture(s)" if tree["held_out"] else "training pictures"
    lines = [
        f"# {config.run.name}",
        "",
        f"Step {tree['step']} of {tree['steps']}, preset {config.run.preset}, seed {config.run.seed}.{trigger}",
        "",
        *(f"- {verdict}" for verdict in tree["verdicts"]),
        "",
        "| | value | what it is |",
        "|---|---|---|",
        f"| loss | {tree['loss']:.4f} (without LoRA {tree['base_loss']:.4f}) | on {shown_on}, fixed noise |",
        *(f"| {name} | {tree[name]:.3f} | {meaning} |" for name, meaning in MEANINGS.items()),
    ]
    if tree["ceiling"] is not None:
        lines.append(
            f"| ceiling | {tree['ceiling']:.3f} | what the frozen decoder keeps of the training pictures |"
        )
    if tree["separability"] is not None:
        lines.append(f"| trigger | {tree['separability']:.3f} | how far the trigger moves the conditioning |")
    lines += [
        "",
        f"Loss on {shown_on} by noise level:",
        "",
        "| sigma | without | with | change |",
        "|---|---|---|---|",
    ]
    for sigma, (base, now) in tree["per_sigma"].items():
        lines.append(f"| {sigma} | {base:.4f} | {now:.4f} | {(now - base) / max(base, 1e-12):+.0%} |")
    for heading, name in pictures.items():
        lines += ["", f"## {heading}", "", f"![{heading}]({name})"]
    if notes:
        lines += ["", "## Notes", "", *(f"- {' '.join(note.split())}" for note in notes)]
    return "\n".join(lines) + "\n"
