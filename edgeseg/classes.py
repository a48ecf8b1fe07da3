"""Class lists of the data sets that EdgeSeg knows: names, colours, and the label to ignore."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CAMVID", "CITYSCAPES", "COCO", "ClassList", "class_list", "named_classes"]


@dataclass(frozen=True)
class ClassList:
    """Names and colours of the classes of one data set, in the order of their label values.

    ``colours`` are (red, green, blue), 0-255, one per name. ``ignore`` is the label value that
    stands for "no label" in the ground truth.
    """

    title: str
    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    ignore: int

    def __post_init__(self) -> None:
        if len(self.names) != len(self.colours):
            raise ValueError(f"{self.title}: {len(self.names)} names, {len(self.colours)} colours")


# Brostow et al., "Semantic object classes in video" (2009), in the eleven-class form of
# SegNet (Badrinarayanan et al., 2015).
CAMVID = ClassList(
    title="CamVid",
    names=(
        "sky",
        "building",
        "pole",
        "road",
        "pavement",
        "tree",
        "sign_symbol",
        "fence",
        "car",
        "pedestrian",
        "bicyclist",
    ),
    colours=(
        (128, 128, 128),
        (128, 0, 0),
        (192, 192, 128),
        (128, 64, 128),
        (60, 40, 222),
        (128, 128, 0),
        (192, 128, 128),
        (64, 64, 128),
        (64, 0, 128),
        (64, 64, 0),
        (0, 128, 192),
    ),
    ignore=11,
)

# Cordts et al., "The Cityscapes Dataset" (2016), train ids.
CITYSCAPES = ClassList(
    title="Cityscapes",
    names=(
        "road",
        "sidewalk",
        "building",
        "wall",
        "fence",
        "pole",
        "traffic light",
        "traffic sign",
        "vegetation",
        "terrain",
        "sky",
        "person",
        "rider",
        "car",
        "truck",
        "bus",
        "train",
        "motorcycle",
        "bicycle",
    ),
    colours=(
        (128, 64, 128),
        (244, 35, 232),
        (70, 70, 70),
        (102, 102, 156),
        (190, 153, 153),
        (153, 153, 153),
        (250, 170, 30),
        (220, 220, 0),
        (107, 142, 35),
        (152, 251, 152),
        (70, 130, 180),
        (220, 20, 60),
        (255, 0, 0),
        (0, 0, 142),
        (0, 0, 70),
        (0, 60, 100),
        (0, 80, 100),
        (0, 0, 230),
        (119, 11, 32),
    ),
    ignore=255,
)


def _spread_colour(index: int) -> tuple[int, int, int]:
    """Colour ``index`` of an endless palette: the bits of the index, interleaved over r, g, b.

    The construction of the PASCAL VOC palette (Everingham et al., VOC development kit).
    """
    red = green = blue = 0
    for shift in range(7, -1, -1):
        red |= (index & 1) << shift
        green |= (index >> 1 & 1) << shift
        blue |= (index >> 2 & 1) << shift
        index >>= 3
    return red, green, blue


# Lin et al., "Microsoft COCO: Common Objects in Context" (2014), the 80 classes with instances, in
# the order of their category ids. No class is black: that is the palette's background.
_COCO_NAMES = (
    "person",
    "bicycle",
    "car",
    "motorcycle",
    "airplane",
    "bus",
    "train",
    "truck",
    "boat",
    "traffic light",
    "fire hydrant",
    "stop sign",
    "parking meter",
    "bench",
    "bird",
    "cat",
    "dog",
    "horse",
    "sheep",
    "cow",
    "elephant",
    "bear",
    "zebra",
    "giraffe",
    "backpack",
    "umbrella",
    "handbag",
    "tie",
    "suitcase",
    "frisbee",
    "skis",
    "snowboard",
    "sports ball",
    "kite",
    "baseball bat",
    "baseball glove",
    "skateboard",
    "surfboard",
    "tennis racket",
    "bottle",
    "wine glass",
    "cup",
    "fork",
    "knife",
    "spoon",
    "bowl",
    "banana",
    "apple",
    "sandwich",
    "orange",
    "broccoli",
    "carrot",
    "hot dog",
    "pizza",
    "donut",
    "cake",
    "chair",
    "couch",
    "potted plant",
    "bed",
    "dining table",
    "toilet",
    "tv",
    "laptop",
    "mouse",
    "remote",
    "keyboard",
    "cell phone",
    "microwave",
    "oven",
    "toaster",
    "sink",
    "refrigerator",
    "book",
    "clock",
    "vase",
    "scissors",
    "teddy bear",
    "hair drier",
    "toothbrush",
)

COCO = ClassList(
    title="COCO",
    names=_COCO_NAMES,
    colours=tuple(_spread_colour(index) for index in range(1, len(_COCO_NAMES) + 1)),
    ignore=255,
)


def named_classes(names: tuple[str, ...]) -> ClassList:
    """The classes ``names``, in the colours of the first known list that has all of them."""
    colours = class_list(len(names)).colours
    for known in (CAMVID, CITYSCAPES, COCO):
        by_name = dict(zip(known.names, known.colours, strict=True))
        if all(name in by_name for name in names):
            colours = tuple(by_name[name] for name in names)
            break
    return ClassList("given", names, colours, ignore=class_list(len(names)).ignore)


def class_list(num_classes: int) -> ClassList:
    """The list a checkpoint with ``num_classes`` outputs most likely means.

    11 is CamVid, 19 is Cityscapes, 80 is COCO; any other number gets names ``class 0`` ... and
    evenly spread colours.
    """
    for known in (CAMVID, CITYSCAPES, COCO):
        if len(known.names) == num_classes:
            return known
    return ClassList(
        title=f"{num_classes} classes",
        names=tuple(f"class {index}" for index in range(num_classes)),
        colours=tuple(_spread_colour(index) for index in range(num_classes)),
        ignore=255,
    )
