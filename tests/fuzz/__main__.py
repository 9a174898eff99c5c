"""`python -m tests.fuzz --cases 5000`: spoil files, read them, and say how it ended. Linux only: it forks and bounds memory."""

import argparse
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case, to repeat one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one target")
    arguments = parser.parse_args()
    sys.path[:0] = [str(TESTS), str(TESTS / "support")]
    import conftest  # noqa: F401 - loads the checkout as comfyui_blip3o

    from .harness import WELL, run_cases, table

    outcomes = []
    for outcome in run_cases(arguments.cases, arguments.seed, arguments.first, arguments.only):
        outcomes.append(outcome)
        if outcome.kind not in WELL:
            sys.stderr.write(f"{outcome.kind}: {outcome.target}, case {outcome.case}\n{outcome.detail}\n\n")
    sys.stdout.write(f"{table(outcomes)}\n")
    return int(any(outcome.kind not in WELL for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
