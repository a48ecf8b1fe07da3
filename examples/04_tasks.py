"""The three tasks on one frame: classes, objects, and both in one; each saved as a picture.

    python examples/04_tasks.py PICTURE FOLDER

PICTURE may be left out with "synthetic:", which draws a street.
"""

from __future__ import annotations

import sys
from pathlib import Path

import cv2

import edgeseg
from edgeseg.instances import InstanceResult
from edgeseg.panoptic import PanopticResult
from edgeseg.result import SemanticResult
from edgeseg.synthetic import Street


def main(picture: str, folder: str) -> None:
    """Segments ``picture`` in three ways and writes semantic, instance and panoptic.jpg."""
    if picture == "synthetic:":
        frame = Street(480, 640, seed=3_000_007).frame(60).pixels
    else:
        read = cv2.imread(picture)
        if read is None:
            sys.exit(f"{picture} is no picture that OpenCV can read")
        frame = read.astype("uint8", copy=False)
    with edgeseg.load("streets") as classes, edgeseg.load("street-objects") as objects:
        semantic, instances = classes(frame), objects(frame)
    if not isinstance(semantic, SemanticResult) or not isinstance(instances, InstanceResult):
        raise TypeError("streets gives classes of pixels and street-objects instances")
    panoptic = PanopticResult.fuse(semantic, instances)
    Path(folder).mkdir(parents=True, exist_ok=True)
    results: tuple[tuple[str, SemanticResult | InstanceResult | PanopticResult], ...] = (
        ("semantic", semantic),
        ("instance", instances),
        ("panoptic", panoptic),
    )
    for name, result in results:
        print(f"{name:<9} {result.summary}")
        cv2.imwrite(f"{folder}/{name}.jpg", result.draw(), [cv2.IMWRITE_JPEG_QUALITY, 85])


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
