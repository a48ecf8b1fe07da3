"""Prune, train, quantize: from a trained model to a small bundle, by one recipe."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgeseg import __version__
from edgeseg.bundle import Bundle, check_new_bundle, new_bundle, write_manifest
from edgeseg.calibration.accuracy import labelled
from edgeseg.calibration.calibrate import Stage, silent
from edgeseg.calibration.package import QuantizeRequest, Trainer, quantize_bundle
from edgeseg.compare import Candidate, Comparison, compare
from edgeseg.engine import cpu_engine, open_engine
from edgeseg.errors import RequestError, WeightsError
from edgeseg.export.balance import balancing_pictures
from edgeseg.export.compress_recipe import CompressionRecipe, Cut
from edgeseg.export.compress_report import CompressionReport, Step
from edgeseg.export.distill import open_teacher
from edgeseg.export.latency import check_engine
from edgeseg.export.onnx import sha256_of
from edgeseg.export.package import ExportRequest, export_bundle, read_network
from edgeseg.export.prune_request import PruneRequest, prune_checkpoint
from edgeseg.export.structure import positions_of, structure_of, total
from edgeseg.export.train import train

__all__ = ["Compressed", "compress"]

#: frames that pruning measures activations, derivatives and batch norms on, at most
_PRUNING_FRAMES = 32


@dataclass(frozen=True)
class Compressed:
    """The finished bundle, the folder with the bundle of every step, and the figures of all."""

    path: Path
    steps: Path
    report: CompressionReport

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {"bundle": str(self.path), "steps": str(self.steps), **self.report.to_dict()}


def compress(
    recipe: CompressionRecipe,
    target: str | os.PathLike[str],
    *,
    engine: str | None = None,
    threads: int = 0,
    device: str = "auto",
    workers: int | None = None,
    trainer: Trainer | None = None,
    stage: Stage = silent,
    report: Callable[[str], None] = print,
) -> Compressed:
    """Runs ``recipe`` and writes the bundle of its best trade-off to ``target``.

    That is the fastest step on ``engine`` (None: the best one here for the CPU) that loses no more
    than the recipe's ``max_drop``; all steps are measured side by side, picture by picture. Each
    step's checkpoint and bundle are kept beside the target in ``NAME.steps``, and a second call
    with the same recipe goes on where the first one was stopped, within a training too. ``device``
    and ``workers``: as for ``train``; ``trainer``: as for ``quantize_bundle``.

    RequestError when nothing but the model as it came is within ``max_drop``; the bundles of all
    steps are there nevertheless. Otherwise the errors of its parts, see `read_network`,
    `prune_checkpoint`, `train` and `quantize_bundle`.
    """
    engine = engine or cpu_engine()
    check_engine(engine)
    target = Path(target)
    if recipe.quantize is not None and recipe.quantize.finetune is not None and trainer is None:
        raise RequestError("the recipe asks for fine-tuning of the integers, and no trainer came")
    check_new_bundle(target)
    run = _Run(recipe, target, engine, threads, stage, report)
    run.original()
    trained = "distilled" if recipe.train and recipe.train.distillation else "trained"
    for number, cut in enumerate(recipe.cuts, 1):
        suffix = f" {number}" if len(recipe.cuts) > 1 else ""
        run.prune(cut, f"pruned{suffix}")
        if recipe.train is not None:
            run.train(f"{trained}{suffix}", cut.train_steps, device, workers)
    if not recipe.cuts and recipe.train is not None:
        run.train(trained, None, device, workers)
    if recipe.quantize is not None:
        run.quantize(trainer)
    return run.finish()


class _Run:
    """One recipe on its way; see ``compress``.

    A step's files are named after its place. ``NN-name.json`` is written last: it holds a key, a
    hash of all that led there, and a step whose key is the one wanted is not done again.
    """

    def __init__(
        self,
        recipe: CompressionRecipe,
        target: Path,
        engine: str,
        threads: int,
        stage: Stage,
        report: Callable[[str], None],
    ) -> None:
        self._recipe = recipe
        self._target = target
        self._folder = target.resolve().parent / f"{target.resolve().name}.steps"
        self._engine = engine
        self._threads = threads
        self._stage = stage
        self._report = report
        self._steps: list[Step] = []
        self._key = ""
        #: what the next step begins from
        self._weights: str | None = recipe.weights
        self._model = recipe.model
        self._size, self._classes = recipe.size, recipe.classes
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WeightsError(f"{self._folder} cannot be written ({error.strerror})") from error

    def original(self) -> None:
        """The model as it came."""
        recipe = self._recipe
        _, _, path = read_network(recipe.model, recipe.weights)

        def make(bundle: Path, _: Path) -> None:
            self._export(recipe.weights, bundle, recipe.model)

        said = {"checkpoint": sha256_of(path), "size": recipe.size, "classes": recipe.classes}
        self._step("original", said, make, None)
        spec = Bundle.open(self._steps[0].bundle).spec
        self._size, self._classes = f"{spec.height}x{spec.width}", spec.classes
        # Data that do not fit are found before hours of work.
        self._dataset = labelled(recipe.data, recipe.split, spec)
        if recipe.balance:
            balancing_pictures(recipe.model, recipe.balance, spec)
        # The others begin from a file.
        self._model = recipe.architecture
        self._weights = self._weights or str(path)

    def prune(self, cut: Cut, title: str) -> None:
        """One of the recipe's cuts."""
        recipe = self._recipe
        request = PruneRequest(
            model=self._model,
            target=cut.target(self._steps[0].cost),
            weights=self._weights,
            size=self._size,
            importance=cut.importance,
            calibration=recipe.calibration,
            frames=min(recipe.frames, _PRUNING_FRAMES),
            rules=cut.rules,
            steps=cut.steps,
            engine=self._engine if cut.milliseconds is not None else None,
            threads=self._threads,
        )

        def make(bundle: Path, checkpoint: Path) -> None:
            prune_checkpoint(request, checkpoint, stage=self._stage)
            self._export(str(checkpoint), bundle, checkpoint.stem)

        said = {
            # How long the training after it takes is no part of the cut.
            "cut": asdict(replace(cut, train_steps=None)),
            "calibration": recipe.calibration,
            "frames": request.frames,
        }
        self._step(title, said, make, ".pt")

    def train(self, title: str, steps: int | None, device: str, workers: int | None) -> None:
        """What mends a cut, or makes the network better without one."""
        settings, begin, model = self._recipe.train, self._weights, self._model
        assert settings is not None
        if steps is not None:
            settings = replace(settings, steps=steps)

        def make(bundle: Path, checkpoint: Path) -> None:
            teacher = None
            if settings.distillation is not None:
                name = self._recipe.teacher or str(self._steps[0].bundle)
                teacher = open_teacher(name, model, settings.crop)
            with self._stage(f"training {model}, {title}") as update:
                train(
                    settings,
                    checkpoint,
                    start=begin,
                    teacher=teacher,
                    device=device,
                    workers=workers,
                    log=checkpoint.with_suffix(".history"),
                    report=lambda _: None,
                    progress=update,
                )
            self._export(str(checkpoint), bundle, checkpoint.stem, self._recipe.balance)

        said = {
            "recipe": asdict(settings),
            "teacher": self._recipe.teacher,
            "balance": self._recipe.balance,
        }
        self._step(title, said, make, ".pt")

    def quantize(self, trainer: Trainer | None) -> None:
        """The last step."""
        recipe, before = self._recipe, self._steps[-1]
        settings = recipe.quantize
        assert settings is not None
        request = QuantizeRequest(
            bundle=str(before.bundle),
            calibration=recipe.calibration,
            recipe=replace(settings, frames=min(settings.frames, recipe.frames)),
            data=recipe.data if recipe.pictures is None else None,
            split=recipe.split,
            name=self._target.resolve().name,
            engine=self._engine,
            threads=self._threads,
        )

        def make(bundle: Path, _: Path) -> None:
            quantize_bundle(request, bundle, trainer=trainer, stage=self._stage)

        said = {"recipe": request.recipe.to_dict(), "calibration": recipe.calibration}
        self._step("INT8", said, make, None)

    def finish(self) -> Compressed:
        """Measures all steps, and writes the bundle of the best."""
        recipe = self._recipe
        comparison, engine = self._compared()
        report = CompressionReport(
            name=self._target.resolve().name,
            recipe=recipe,
            steps=tuple(self._steps),
            comparison=comparison,
            engine=engine,
        )
        text = json.dumps(report.to_dict(), indent=2)
        (self._folder / "figures.json").write_text(text + "\n", encoding="utf-8")
        page = report.report().write(self._folder / "report.html")
        best = report.best
        if best == 0:
            self._report(report.render())
            raise RequestError(
                f"{self._target} was not written, as nothing beat the original within max_drop; "
                f"look at {page}, then take one of the bundles beside it, raise max_drop, or train "
                "longer"
            )
        bundle = Bundle.open(self._steps[best].bundle)
        with new_bundle(self._target) as folder:
            for file in sorted(bundle.model_path.parent.iterdir()):
                if file.name not in ("bundle.json", "report.html"):
                    (folder / file.name).write_bytes(file.read_bytes())
            own = bundle.model_path.parent / "report.html"
            if own.is_file():
                (folder / "step.html").write_bytes(own.read_bytes())
            (folder / "report.html").write_bytes(page.read_bytes())
            entries = {key: value for key, value in bundle.manifest.items() if key != "files"}
            write_manifest(folder, {**entries, "compression": report.to_dict()})
        return Compressed(self._target, self._folder, report)

    def _compared(self) -> tuple[Comparison, str]:
        """All steps side by side, and what ran them."""
        with ExitStack() as stack:
            candidates = []
            for step in self._steps:
                engine = open_engine(Bundle.open(step.bundle), self._engine, threads=self._threads)
                stack.callback(engine.close)
                candidates.append(Candidate(step.title, engine))
            with self._stage(f"measuring {len(candidates)} steps") as update:
                found = compare(
                    candidates, self._dataset, limit=self._recipe.pictures, progress=update
                )
            return found, candidates[0].engine.description

    def _export(
        self, weights: str | None, bundle: Path, title: str, balance: tuple[str, ...] = ()
    ) -> None:
        with self._stage(f"exporting {title}") as update:
            export_bundle(
                ExportRequest(
                    model=self._model,
                    weights=weights,
                    size=self._size,
                    name=self._target.resolve().name,
                    classes=self._classes,
                    balance=balance,
                ),
                bundle,
                progress=update,
            )

    def _step(
        self,
        title: str,
        said: Mapping[str, Any],
        make: Callable[[Path, Path], None],
        suffix: str | None,
    ) -> None:
        """Does a step, unless it is done; ``suffix`` is that of its checkpoint, if it has one."""
        place = f"{len(self._steps)}-{title.replace(' ', '-')}"
        bundle, record = self._folder / place, self._folder / f"{place}.json"
        checkpoint = self._folder / f"{place}{suffix or ''}"
        content = json.dumps([self._key, title, said, __version__], sort_keys=True, default=str)
        self._key = hashlib.sha256(content.encode()).hexdigest()
        if _read(record).get("key") == self._key and (bundle / "bundle.json").is_file():
            self._report(f"{title}: done already, {bundle}")
        else:
            make(bundle, checkpoint)
            record.write_text(json.dumps({"key": self._key}) + "\n", encoding="utf-8")
            self._report(f"{title}: {bundle}")
        if suffix is not None:
            self._weights = str(checkpoint)
        self._steps.append(self._described(title, bundle))

    def _described(self, title: str, bundle: Path) -> Step:
        network, _, _ = read_network(self._model, self._weights)
        spec = Bundle.open(bundle).spec
        structure = structure_of(network)
        positions = positions_of(network, (spec.height, spec.width))
        filters = {name: structure[name].out_channels for name in positions}
        return Step(title, bundle, total(structure, positions), filters)


def _read(record: Path) -> dict[str, Any]:
    """What a step left behind; nothing where it did not finish."""
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
