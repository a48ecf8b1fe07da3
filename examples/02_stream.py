"""A camera, a video or a generated street: print what is ahead, frame by frame.

python examples/02_stream.py 0
python examples/02_stream.py "synthetic:?scene=city&frames=20"
"""

from __future__ import annotations

import sys

import edgeseg


def main(source: str) -> None:
    """Streams ``source`` and prints the share of people and cars, and the age of each mask."""
    with edgeseg.load("streets") as model:
        for result in model.stream(source):
            shares = result.shares()
            print(
                f"frame {result.index:4d}  cars {shares['car']:5.1%}  "
                f"people {shares['pedestrian'] + shares['bicyclist']:5.1%}  "
                f"{result.age_ms:.0f} ms old"
            )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
