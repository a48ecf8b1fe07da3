"""One picture: load the model that ships, segment, ask where things are, save the overlay.

python examples/01_frame.py PICTURE OUTPUT.png
"""

from __future__ import annotations

import sys

import cv2

import edgeseg


def main(picture: str, output: str) -> None:
    """Segments ``picture`` and writes the overlay to ``output``."""
    frame = cv2.imread(picture)
    if frame is None:
        sys.exit(f"{picture} is no picture that OpenCV can read")
    with edgeseg.load("streets") as model:
        result = model(frame)
    for name, share in result.shares().items():
        print(f"{name:<12} {share:6.1%}")
    print(f"road in the lower half: {result.mask('road')[frame.shape[0] // 2 :].mean():.1%}")
    cv2.imwrite(output, result.draw())


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
