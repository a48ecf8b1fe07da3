"""What pruning, distillation and INT8 cost and gain: one recipe, step by step.

Runs `edgeseg compress` on a recipe, by default the one that makes a small "streets", and prints its
table: accuracy and milliseconds of every step, measured in turn on the same pictures. Steps that
are there already from an earlier run are not made again, only measured.

With --seeds N it also trains the first pruned checkpoint N times with its teacher and N times
without, from the same seeds and for the same number of steps (--steps), on crops of the same size
(--crop, the recipe's if left out), and says which is better on all labelled pictures: what the
teacher is worth. Both are evaluated by PyTorch.

    python benchmarks/bench_compression.py [RECIPE.toml] [--work DIR] [--seeds 3] [--json FILE]

It takes hours on a CPU. --quick runs a miniature, only to see that everything works.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from rounds import add_output_arguments, machine, say, write_json

from edgeseg.calibration.recipe import QuantizationRecipe
from edgeseg.dataset import open_dataset
from edgeseg.export.compress import compress
from edgeseg.export.compress_recipe import CompressionRecipe, Cut
from edgeseg.export.distill import open_teacher
from edgeseg.export.distillation import Distillation
from edgeseg.export.models import SemanticNetwork
from edgeseg.export.package import read_network
from edgeseg.export.preprocess import evaluate_network
from edgeseg.export.recipe import Recipe, Source
from edgeseg.export.train import train
from edgeseg.progress import progress
from edgeseg.spec import parse_size

RECIPE = Path(__file__).parents[1] / "export" / "recipes" / "streets_small.toml"
PACKAGES = ("edgeseg", "torch", "torch-pruning", "openvino", "onnxruntime", "numpy")


def miniature() -> CompressionRecipe:
    """Everything once, in a minute."""
    streets = "synthetic:?frames=6&size=96x128"
    return CompressionRecipe(
        model="streets",
        size="96x128",
        data=streets,
        calibration=(streets,),
        max_drop=100.0,
        cuts=(Cut(macs=0.6),),
        train=Recipe(
            model="bisenetv2",
            sources=(Source(streets, 2),),
            steps=2,
            crop=(96, 128),
            full_height=96,
            warmup=1,
            distillation=Distillation(),
        ),
        quantize=QuantizationRecipe(frames=6),
    )


def miou(recipe: CompressionRecipe, checkpoint: Path, size: tuple[int, int]) -> float:
    """Of a checkpoint, on all labelled pictures of the recipe."""
    network, _, _ = read_network(recipe.architecture, str(checkpoint))
    assert isinstance(network, SemanticNetwork)
    return evaluate_network(network, open_dataset(recipe.data, recipe.split), size).miou()


def seeds(
    recipe: CompressionRecipe, steps: Path, work: Path, count: int, settings: Recipe
) -> list[dict[str, float]]:
    """mIoU with and without the teacher, for each seed."""
    assert recipe.size is not None
    size = parse_size(recipe.size)
    pruned = next(steps.glob("1-pruned*.pt"))
    teacher = open_teacher(str(steps / "0-original"), recipe.architecture, settings.crop)
    found = []
    for seed in range(count):
        settings = replace(settings, seed=seed)
        row: dict[str, float] = {"seed": seed}
        for name, with_teacher in (("distilled", True), ("fine_tuned", False)):
            file = work / f"{name}-{seed}-{settings.steps}.pt"
            if not file.exists():
                with progress(f"{name}, seed {seed}") as update:
                    train(
                        settings if with_teacher else replace(settings, distillation=None),
                        file,
                        start=pruned,
                        teacher=teacher if with_teacher else None,
                        report=lambda _: None,
                        progress=update,
                    )
            row[name] = miou(recipe, file, size)
        found.append(row)
        say(
            f"seed {seed}: distilled {row['distilled']:.4f}, fine-tuned {row['fine_tuned']:.4f} "
            f"({(row['distilled'] - row['fine_tuned']) * 100:+.2f} points)"
        )
    return found


def main() -> int:
    """Measures, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", nargs="?", default=str(RECIPE), metavar="RECIPE.toml")
    parser.add_argument("--work", metavar="DIR", help="for all that is made; kept there")
    parser.add_argument("--engine", help="openvino or onnxruntime")
    parser.add_argument("--seeds", type=int, default=0, help="trainings with and without a teacher")
    parser.add_argument("--steps", type=int, default=300, help="of each of these")
    parser.add_argument("--crop", metavar="HxW", help="of each of these")
    add_output_arguments(parser)
    options = parser.parse_args()
    recipe = miniature() if options.quick else CompressionRecipe.read(options.recipe)
    if options.quick:
        options.seeds, options.steps = 1, 2
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(options.work or temporary)
        made = compress(
            recipe,
            work / "small",
            engine=options.engine,
            stage=progress,
            report=lambda line: print(line, file=sys.stderr, flush=True),
        )
        say(made.report.render())
        figures = made.report.to_dict()
        trained: list[dict[str, float]] = []
        if options.seeds and recipe.train is not None and recipe.train.distillation is not None:
            settings = replace(recipe.train, steps=options.steps)
            if options.crop is not None:
                settings = replace(settings, crop=parse_size(options.crop))
            trained = seeds(recipe, made.steps, work, options.seeds, settings)
            gains = [(row["distilled"] - row["fine_tuned"]) * 100 for row in trained]
            say(
                f"distillation against fine-tuning, {options.steps} steps each: "
                f"{statistics.mean(gains):+.2f} points "
                f"({min(gains):+.2f} to {max(gains):+.2f}, {len(gains)} seeds)"
            )
        write_json(
            options.json,
            {
                "benchmark": "compression",
                "machine": machine(PACKAGES),
                "recipe": "miniature" if options.quick else Path(options.recipe).name,
                "quick": options.quick,
                "rows": figures.pop("steps"),
                **figures,
                "seeds": {"steps": options.steps, "crop": options.crop, "rows": trained}
                if trained
                else None,
            },
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
