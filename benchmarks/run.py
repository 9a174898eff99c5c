"""Speed and memory of every stage, as ratios measured in one run; prints a table and writes JSON and Markdown.

    python benchmarks/run.py                                  # this machine's CPU: tiny and middle sizes
    python benchmarks/run.py --device cuda --name one_gpu     # tiny, middle and the published sizes
    python benchmarks/run.py --stages quality                 # what faster settings cost

Every stage and size runs in a process of its own. Modes of a stage take turns after a warm-up; quoted are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from common import Row, measure_limits, to_markdown

STAGES = (
    "load",
    "encode",
    "sample",
    "sample_batch",
    "comfyui",
    "decode",
    "ask",
    "memory",
    "start",
    "quality",
    "formats",
    "counts",
)
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--sizes", nargs="+", choices=("tiny", "middle", "full"))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument(
        "--checkpoint", type=Path, help="large checkpoint for the stage load (default: a random one)"
    )
    parser.add_argument("--machine", default=describe_machine(), help="what the tables call this machine")
    parser.add_argument("--name", help="write results/NAME.md and results/NAME.json")
    parser.add_argument("--child", nargs=2, metavar=("STAGE", "SIZE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device here; leave --device out to measure the CPU")
    if arguments.child:
        torch.set_num_threads(arguments.threads)
        print(json.dumps(run_stage(*arguments.child, arguments)))
        return
    sizes = arguments.sizes or (
        ("tiny", "middle") if arguments.device == "cpu" else ("tiny", "middle", "full")
    )
    results: dict[str, list] = {}
    for stage in arguments.stages:
        for size in sizes_of(stage, sizes, arguments.device):
            print(f"{stage}, {size} ...", file=sys.stderr, flush=True)
            results.setdefault(stage, []).append(run_child(stage, size, sys.argv[1:], arguments.threads))
        if arguments.name:  # at once: a long run may be cut off
            write_results(results, arguments)
    print(report(results, arguments))


def write_results(results: dict[str, list], arguments: argparse.Namespace) -> None:
    """Write the tables; stages that were not run this time keep what an earlier run under this name found."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{arguments.name}.json"
    before = json.loads(path.read_text("utf-8"))["results"] if path.is_file() else {}
    merged = {stage: found for stage in STAGES if (found := results.get(stage) or before.get(stage))}
    entry = {"machine": arguments.machine, "results": merged}
    path.write_text(json.dumps(entry, indent=1) + "\n", "utf-8")
    (RESULTS / f"{arguments.name}.md").write_text(report(merged, arguments), "utf-8")


def sizes_of(stage: str, sizes: Sequence[str], device: str) -> Sequence[str]:
    """The sizes at which a stage makes sense and ends in minutes."""
    if stage == "load":  # files can be taken out of the system's cache on Linux only
        return ["tiny", "large"] if hasattr(os, "posix_fadvise") else ["tiny"]
    if stage in ("start", "quality"):
        return ["tiny"]
    if stage == "formats":
        return ["tiny", "full"]
    if stage == "counts":
        return ["full"]
    return ["tiny"] if stage in ("sample_batch", "memory") and device == "cpu" else sizes


def run_child(stage: str, size: str, options: list[str], threads: int) -> dict:
    """One stage in a process of its own, so that its peak memory is its own too."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, *options, "--child", stage, size],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def run_stage(stage: str, size: str, arguments: argparse.Namespace) -> dict:
    """Rows of a stage, or the tables of one that compares qualities."""
    import answers
    import stages
    from networks import SizedPipeline

    device = torch.device(arguments.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    networks, rounds = SizedPipeline(size, device, dtype), arguments.rounds
    if stage == "quality":
        from quality import measure_quality, quality_json

        return {"quality": quality_json(measure_quality(networks))}
    if stage == "formats":
        from formats import measure_formats

        return {"formats": measure_formats(networks)}
    if stage == "counts":
        from counts import measure_counts

        return {"counts": measure_counts()}
    if stage == "start":
        rows = [row for preset in ("standard", "fast") for row in stages.start_stage(rounds, preset)]
    elif stage == "comfyui":
        return {"rows": run_in_comfyui(size, arguments)}
    elif stage == "memory":
        from memory import memory_stage

        rows = memory_stage(size, device, dtype, rounds)
    elif stage == "load":
        from loading import load_stage

        rows = load_stage(size, device, rounds, arguments.checkpoint)
    else:
        limits = measure_limits(device, dtype)
        rows = {
            "encode": lambda: stages.encode_stage(networks, limits, rounds),
            "sample": lambda: stages.sampling_stage(networks, limits, rounds),
            "sample_batch": lambda: stages.sampling_stage(
                networks, limits, rounds, batch=16 if device.type == "cuda" else 4
            ),
            "decode": lambda: stages.decode_stage(networks, limits, rounds),
            "ask": lambda: answers.ask_stage(networks, limits, rounds),
        }[stage]()
        return {"rows": [asdict(row) for row in rows], "limits": asdict(limits)}
    return {"rows": [asdict(row) for row in rows]}


def run_in_comfyui(size: str, arguments: argparse.Namespace) -> list[dict]:
    """Rows of the stage comfyui; none without a ComfyUI, which is said."""
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
    from comfyui_server import COMFYUI, comfyui_python

    if not (COMFYUI / "main.py").is_file():
        print(f"no ComfyUI at {COMFYUI}: the stage comfyui is left out (set COMFYUI_PATH)", file=sys.stderr)
        return []
    script = Path(__file__).with_name("comfyui.py")
    options = [str(COMFYUI), size, arguments.device, str(arguments.rounds), str(arguments.threads)]
    done = subprocess.run(
        [comfyui_python(), "-W", "ignore", str(script), *options],
        cwd=COMFYUI,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("ROWS "))
    return json.loads(line.removeprefix("ROWS "))


def report(results: dict[str, list], arguments: argparse.Namespace) -> str:
    """Markdown: the machine in words, one table of times, one of each comparison of qualities."""
    from counts import counts_markdown
    from formats import formats_markdown
    from quality import QualityRow, quality_markdown

    lines = [f"# Benchmarks: {arguments.machine}\n\n"]
    lines.append(
        f"PyTorch {torch.__version__.split('+')[0]}, {arguments.threads} thread(s) on the CPU, medians of {arguments.rounds} rounds "
        "in which all modes of a stage take turns. Times are per prompt, picture or answer. The gain is against the "
        "first mode of the stage; a difference is the largest one, in units of the plain result's spread. The limit is "
        "bytes / bandwidth or operations / peak, whichever is longer, both measured in the same process.\n\n"
    )
    if arguments.device == "cpu":
        lines.append(
            "Rows for CUDA are missing here: `python benchmarks/run.py --device cuda --name NAME` makes them.\n\n"
        )
    found = [entry for stage in results.values() for entry in stage]
    rows = [Row(**row) for entry in found for row in entry.get("rows", [])]
    if rows:
        lines.append(to_markdown(rows) + "\n")
    for limits in [entry["limits"] for entry in found if "limits" in entry][:1]:
        lines.append(
            f"Measured limits of the first stage: {limits['bandwidth'] / 1e9:.0f} GB/s, {limits['flops'] / 1e12:.2f} TFLOP/s.\n\n"
        )
    for entry in found:
        if "quality" in entry:
            tables = {
                title: [QualityRow(**row) for row in table] for title, table in entry["quality"].items()
            }
            lines.append("## Quality of faster settings, built-in model\n\n" + quality_markdown(tables))
        if "counts" in entry:
            lines.append(counts_markdown(entry["counts"]))
        if "formats" in entry:
            lines.append(formats_markdown(entry["formats"]))
    return "".join(lines)


def describe_machine() -> str:
    """What ran this, without names."""
    if torch.cuda.is_available():
        return f"one {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} {platform.machine()} CPU cores"


if __name__ == "__main__":
    main()
