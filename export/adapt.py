"""A model that gets used to one's own camera, from frames that nobody has labelled."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from edgeseg.bundle import Bundle, check_new_bundle
from edgeseg.calibration.calibrate import Stage, silent
from edgeseg.errors import RequestError
from edgeseg.export.distill import open_teacher
from edgeseg.export.distillation import Distillation
from edgeseg.export.models import DEFINITIONS
from edgeseg.export.package import Exported, ExportRequest, export_bundle
from edgeseg.export.recipe import FRAMES_PREFIX, Recipe, Source
from edgeseg.export.train import train

__all__ = ["AdaptRequest", "adapt_bundle"]

#: samples of a batch from the camera, and as many from labelled pictures if there are any
_SHARE = 4


@dataclass(frozen=True)
class AdaptRequest:
    """What to adapt, and to what.

    ``bundle``: a model of an architecture that EdgeSeg trains, not quantized. ``frames``: URIs of
    frames like those that it will see, as for ``open_frames``: a video, a folder, a list.
    ``data``: labelled pictures that it shall not forget, as ``--data`` of ``edgeseg train``.
    ``confidence``: what the model is sure of by so much counts as the truth.
    """

    bundle: str
    frames: tuple[str, ...]
    data: tuple[str, ...] = ()
    steps: int = 200
    count: int = 200
    confidence: float = 0.9
    learning_rate: float = 1e-4
    seed: int = 0
    name: str | None = None

    def __post_init__(self) -> None:
        if not self.frames:
            raise RequestError(
                "adapting needs frames of the camera; name a video, a folder or a list"
            )

    def recipe(self, bundle: Bundle) -> Recipe:
        """How the model of ``bundle`` is trained for it."""
        spec = bundle.spec
        sources = [Source(FRAMES_PREFIX + uri, _SHARE) for uri in self.frames]
        sources += [Source(uri, _SHARE) for uri in self.data]
        return Recipe(
            model=spec.architecture,
            sources=tuple(sources),
            steps=self.steps,
            crop=(spec.height, spec.width),
            full_height=spec.height,
            scale=(0.8, 1.4),
            aspect=1.15,
            colour=0.3,
            learning_rate=self.learning_rate,
            warmup=min(20, self.steps),
            average=0.99,
            class_weights=0.0,
            # The teacher sees what the student sees, so beside its labels it would teach nothing.
            distillation=Distillation(alpha=1.0, confidence=self.confidence, frames=self.count),
            seed=self.seed,
        )


def adapt_bundle(
    request: AdaptRequest,
    target: str | Path,
    *,
    device: str = "auto",
    workers: int | None = None,
    minutes: float | None = None,
    stage: Stage = silent,
    report: Callable[[str], None] = print,
) -> Exported:
    """Writes the adapted bundle to ``target``, whole or not at all; the original is only read.

    The model labels the frames itself, keeps what it is sure of, and learns that under other
    scales, crops and light; its batch norms get the camera's statistics on the way. A run that was
    interrupted goes on. ``device``, ``workers``, ``minutes``: as for ``train``.

    RequestError for a bundle that cannot be trained; the errors of `open_frames`, `train` and
    `export_bundle`.
    """
    target = Path(target)
    bundle = Bundle.open(request.bundle)
    spec = bundle.spec
    if bundle.model.is_quantized():
        raise RequestError(
            f"{request.bundle} is quantized, and integers are not trained; adapt the bundle that "
            "it came from, then quantize that one on the same frames"
        )
    if spec.architecture not in DEFINITIONS:
        raise RequestError(
            f"{request.bundle} ({spec.architecture}, {spec.task}) cannot be adapted: that is for "
            "models of an architecture in `edgeseg models`"
        )
    check_new_bundle(target)
    resolved = target.resolve()
    if resolved == bundle.model_path.parent.resolve():
        raise RequestError(f"{target} is the bundle to adapt; give the new one another name")
    checkpoint = resolved.with_name(resolved.name + ".adapt.pt")
    recipe = request.recipe(bundle)
    teacher = open_teacher(request.bundle, spec.architecture, recipe.crop)
    with stage(f"adapting {spec.name}") as update:
        train(
            recipe,
            checkpoint,
            start=bundle.model_path,
            teacher=teacher,
            device=device,
            workers=workers,
            minutes=minutes,
            report=report,
            progress=update,
        )
    try:
        with stage(f"exporting {resolved.name}") as update:
            exported = export_bundle(
                ExportRequest(
                    model=spec.architecture,
                    weights=str(checkpoint),
                    size=f"{spec.height}x{spec.width}",
                    name=request.name or resolved.name,
                    classes=spec.classes,
                    fit=spec.fit,
                    confidence=spec.confidence,
                ),
                target,
                provenance={
                    "adapted_from": {
                        "name": bundle.name,
                        "sha256": hashlib.sha256(bundle.model.content).hexdigest(),
                    },
                    "adapted_with": asdict(request),
                },
                progress=update,
            )
    except BaseException:
        report(f"the adapted weights are kept in {checkpoint}")
        raise
    checkpoint.unlink()
    return exported
