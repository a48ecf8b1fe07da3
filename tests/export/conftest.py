"""What several of these test files need: a small network, cached exports, the parity packs."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseg.classes import CAMVID, class_list
from edgeseg.spec import ModelSpec, Preprocessing

if TYPE_CHECKING:
    from edgeseg.export.models import SemanticNetwork
    from edgeseg.export.onnx import Export

PARITY = Path(__file__).resolve().parents[3] / "shared" / "parity"


@dataclass(frozen=True)
class Parity:
    """One parity pack: its description, its arrays if they are not held out, its generators."""

    pack: dict[str, Any]
    wanted: dict[str, NDArray[Any]]
    generators: ModuleType

    def arrays(self, *, training: bool = False) -> dict[str, NDArray[Any]]:
        """Every weight of the network, with the training heads or without."""
        keys = dict(self.pack["keys"])
        if training:
            keys.update(self.pack["train_only_keys"])
        filled: dict[str, NDArray[Any]] = self.generators.fill_all(keys, self.pack["overrides"])
        return filled

    def input(self, case: str) -> NDArray[Any]:
        """The input of ``case``."""
        made: NDArray[Any] = self.generators.make_input(self.pack["input"][case])
        return made

    def check(self, output: str, found: NDArray[Any]) -> None:
        """``found`` within the limits of ``output``; it must be in the pack."""
        entry = self.pack["outputs"][output]
        assert list(found.shape) == entry["shape"], output
        stored = found[tuple(slice(None, None, step) for step in entry["stride"])]
        wanted = self.wanted[output]
        if "max_differing_fraction" in entry:
            assert np.mean(stored != wanted) <= entry["max_differing_fraction"], output
        else:
            assert np.abs(stored - wanted).max() <= entry["max_abs"], output


@pytest.fixture(scope="session")
def parity() -> Callable[[str], Parity]:
    """Opens a parity pack by name; skips where the packs are not beside the checkout."""

    def opened(name: str) -> Parity:
        if not (PARITY / f"{name}.json").is_file():
            pytest.skip(f"needs the parity packs in {PARITY}")
        place = importlib.util.spec_from_file_location("keyed_weights", PARITY / "keyed_weights.py")
        assert place is not None and place.loader is not None
        generators = importlib.util.module_from_spec(place)
        place.loader.exec_module(generators)
        generators.self_test()
        pack = json.loads((PARITY / f"{name}.json").read_text(encoding="utf-8"))
        stored = PARITY / f"{name}.npz"
        wanted = dict(np.load(stored)) if stored.is_file() else {}
        return Parity(pack, wanted, generators)

    return opened


def _lively(network: SemanticNetwork, seed: int) -> SemanticNetwork:
    """Random weights and statistics, so that no two arrays of the state are alike."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        noise = torch.rand(tensor.shape, generator=generator)
        if tensor.ndim > 1:
            tensor.copy_((noise - 0.5) * 2 * (6 / tensor[0].numel()) ** 0.5)
        else:
            # Also the variances, which must stay above zero; means and biases may be anything.
            tensor.copy_(noise * 0.5 + (0.75 if name.endswith(("weight", "var")) else -0.25))
    return network


@pytest.fixture(scope="session")
def lively() -> Callable[[SemanticNetwork, int], SemanticNetwork]:
    """Fills a network with random weights, in place, and returns it."""
    return _lively


@pytest.fixture(scope="session")
def tiny_class() -> type[SemanticNetwork]:
    """A network of three convolutions with the interface of the real ones, quick to export."""
    pytest.importorskip("torch")
    from torch import Tensor, nn
    from torch.nn import functional

    from edgeseg.export.models.layers import ConvBNReLU
    from edgeseg.export.models.semantic import SemanticNetwork

    class Tiny(SemanticNetwork):
        """Logits at 1/4, then bilinear."""

        stride = 4
        smallest = 4
        classifier = "classify.weight"
        image_convolutions = ("first.conv.weight",)
        auxiliary_prefixes = ("extra.",)

        def __init__(self, num_classes: int, *, auxiliary_heads: bool = False) -> None:
            super().__init__()
            self.num_classes = num_classes
            self.first = ConvBNReLU(3, 8, stride=2)
            self.second = ConvBNReLU(8, 12, stride=2)
            self.classify = nn.Conv2d(12, num_classes, 1)
            if auxiliary_heads:
                self.extra = nn.Conv2d(8, num_classes, 1)

        def low_resolution_logits(self, x: Tensor) -> Tensor:
            out: Tensor = self.classify(self.second(self.first(x)))
            return out

        def forward(self, x: Tensor) -> Tensor:
            return functional.interpolate(
                self.low_resolution_logits(x),
                size=x.shape[2:],
                mode="bilinear",
                align_corners=self.align_corners,
            )

    return Tiny


@pytest.fixture
def tiny_definition(
    monkeypatch: pytest.MonkeyPatch, tiny_class: type[SemanticNetwork]
) -> Iterator[str]:
    """Makes the small network known by the name it gives, for one test."""
    from edgeseg.export.models import DEFINITIONS, ModelDefinition

    entry = ModelDefinition(
        name="tiny",
        network=cast(Any, tiny_class),
        preprocessing=DEFINITIONS["bisenetv2"].preprocessing,
        paper="none",
        licence="none",
        checkpoints="nowhere",
    )
    monkeypatch.setitem(DEFINITIONS, "tiny", entry)
    yield "tiny"


def _spec(
    architecture: str,
    *,
    num_classes: int = 11,
    size: tuple[int, int] = (64, 96),
    order: str = "rgb",
    confidence: bool = False,
) -> ModelSpec:
    classes = class_list(num_classes)
    return ModelSpec(
        name="of a test",
        architecture=architecture,
        task="semantic",
        height=size[0],
        width=size[1],
        classes=classes.names,
        colours=classes.colours,
        ignore=classes.ignore,
        preprocessing=Preprocessing(
            mean=(0.3257, 0.3690, 0.3223),
            std=(0.2112, 0.2148, 0.2115),
            order=cast(Any, order),
        ),
        confidence=confidence,
    )


@pytest.fixture(scope="session")
def make_spec() -> Callable[..., ModelSpec]:
    """Makes a ModelSpec; every argument but the architecture has a default."""
    return _spec


@dataclass(frozen=True)
class Exportation:
    """One export of the session: the network, what was promised, the model, and its file."""

    network: SemanticNetwork
    spec: ModelSpec
    export: Export
    path: Path


@pytest.fixture(scope="session")
def exported(
    tmp_path_factory: pytest.TempPathFactory, tiny_class: type[SemanticNetwork]
) -> Callable[..., Exportation]:
    """Exports a network once per session and combination of arguments."""
    from edgeseg.export.models import create_semantic
    from edgeseg.export.onnx import export_network

    made: dict[tuple[object, ...], Exportation] = {}

    def export(
        architecture: str,
        *,
        order: str = "rgb",
        confidence: bool = False,
        align_corners: bool = False,
        half_weights: bool = False,
        num_classes: int = 11,
        size: tuple[int, int] = (64, 96),
    ) -> Exportation:
        key = (architecture, order, confidence, align_corners, half_weights, num_classes, size)
        if key not in made:
            network: SemanticNetwork
            if architecture == "tiny":
                kind = type("Tiny", (tiny_class,), {"align_corners": align_corners})
                network = kind(num_classes).eval()
            else:
                network = create_semantic(architecture, num_classes)
            _lively(network, 5)
            spec = _spec(
                architecture,
                num_classes=num_classes,
                size=size,
                order=order,
                confidence=confidence,
            )
            export = export_network(
                network, spec, half_weights=half_weights, source_sha256="0123abcd"
            )
            path = tmp_path_factory.mktemp("export") / "model.onnx"
            export.write(path)
            made[key] = Exportation(network, spec, export, path)
        return made[key]

    return export


@pytest.fixture(scope="session")
def camvid(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URI of a CamVid folder with five generated pictures as its split "val"."""
    from edgeseg.synthetic import Street

    folder = tmp_path_factory.mktemp("camvid")
    for part in ("images", "labels"):
        (folder / part / "val").mkdir(parents=True)
    for seed in range(5):
        frame = Street(72, 96, seed=seed).frame(10 * seed)
        labels = frame.class_map.copy()
        labels[:4] = CAMVID.ignore
        assert cv2.imwrite(str(folder / "images" / "val" / f"{seed}.png"), frame.pixels)
        assert cv2.imwrite(str(folder / "labels" / "val" / f"{seed}.png"), labels)
    return f"camvid:{folder}"
