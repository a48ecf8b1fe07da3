"""``python -m tests.fuzz TARGET... --inputs 20000 --seed 1``, or ``TARGET --file INPUT`` again."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import cv2

from tests.fuzz.harness import repeat, run
from tests.fuzz.targets import TARGETS


def main() -> int:
    """0 when every input was taken or refused."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="+", choices=("all", *TARGETS), metavar="TARGET")
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--file", type=Path, help="an input that was kept, in place of new ones")
    parser.add_argument("--crashes", type=Path, default=Path("build/fuzz"), metavar="DIR")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    names = list(TARGETS) if "all" in options.targets else options.targets
    failed = False
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            target = TARGETS[name](Path(folder))
            if options.file is not None:
                repeat(target, options.file.read_bytes())
                continue
            outcome = run(target, inputs=options.inputs, seed=options.seed, crashes=options.crashes)
        failed = failed or bool(outcome.failures)
        print(json.dumps(outcome.to_dict()), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
