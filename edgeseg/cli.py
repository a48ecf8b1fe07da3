"""The command line. Each command is one function; heavy imports happen inside it."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from edgeseg import __version__
from edgeseg.errors import EdgeSegError, RequestError, SinkError
from edgeseg.jsonfile import json_text, write_json
from edgeseg.progress import progress

if TYPE_CHECKING:
    from edgeseg.bundle import Bundle
    from edgeseg.calibration.lint import Placement
    from edgeseg.export.distill import Teacher
    from edgeseg.export.recipe import Recipe
    from edgeseg.model import Model
    from edgeseg.source import Source, Status
    from edgeseg.spec import ModelSpec

__all__ = ["main"]

_INTERRUPTED = 130
# What the extra `export` installs and the device side does without.
_WORKSTATION = (
    "torch",
    "torch_pruning",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnx_ir",
    "tomli",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 for a failure, 2 for a wrong request."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    command: Callable[[argparse.Namespace], int] = options.run
    try:
        with _stoppable():
            code = command(options)
        # Here, and not when Python ends, so that a reader who went away is noticed below.
        sys.stdout.flush()
        return code
    except EdgeSegError as error:
        print(f"edgeseg: {error}", file=sys.stderr)
        return error.exit_code
    except ImportError as error:
        message = _explained(error)
        if message is None:
            raise
        print(f"edgeseg: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("edgeseg: stopped", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away (`edgeseg ... | head`); nothing is wrong here.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


@contextmanager
def _stoppable() -> Iterator[None]:
    """Lets SIGTERM (``kill``, ``systemctl stop``, ``docker stop``) end a command as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _explained(error: ImportError) -> str | None:
    """One sentence for an import that fails because of the machine, None for a mistake of ours."""
    missing = (error.name or "").partition(".")[0]
    if missing in _WORKSTATION:
        return (
            f"this command prepares models and needs {missing}, which is not installed; "
            "pip install 'edgeseg[export]' adds it"
        )
    if missing == "edgeseg":
        return None
    return f"a library cannot be loaded ({error}); `edgeseg doctor` says what helps"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edgeseg",
        description="Real-time segmentation on edge devices.",
        epilog="Try `edgeseg demo` first. BUNDLE is a bundle's folder, an ONNX file made by "
        "`edgeseg export`, or a model that ships with EdgeSeg: streets, streets-int8, "
        "street-objects.",
    )
    parser.add_argument("--version", action="version", version=f"edgeseg {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    demo = _command(commands, "demo", _demo, "segment a generated street and show how it went")
    demo.add_argument("-o", "--output", default="edgeseg-demo", metavar="DIR")
    demo.add_argument("--frames", type=_count, default=150, metavar="N")
    _add_engine(demo)

    run = _command(commands, "run", _run, "segment a camera, a video or a folder")
    run.add_argument(
        "bundle", metavar="BUNDLE", help="or, without --source, a source for the shipped streets"
    )
    run.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="URI",
        help=f"{_SOURCES}; several are run in turns, and --save gets a name for each",
    )
    run.add_argument(
        "--save",
        action="append",
        default=[],
        metavar="TARGET",
        help="a video (.mp4, .mkv, .avi), a folder of PNGs, .jsonl, rtsp:// or rtp://; several at "
        "once, each in a thread of its own",
    )
    run.add_argument(
        "--serve",
        nargs="?",
        const="127.0.0.1:8080",
        metavar="HOST:PORT",
        help="a web page with the live pictures and figures; this machine's alone unless a host is "
        "named",
    )
    run.add_argument("--token", help="what --serve asks viewers for; made where it needs one")
    run.add_argument("--recordings", metavar="DIR", help="where --serve records videos to")
    run.add_argument("--show", action="store_true", help="open a window; q closes it")
    run.add_argument("--frames", type=_count, metavar="N", help="stop after so many")
    run.add_argument("--opacity", type=float, default=0.5, metavar="0-1")
    run.add_argument("--no-legend", action="store_true")
    run.add_argument("--masks", action="store_true", help="with --save DIR: class maps as well")
    _add_postprocess(run)
    _add_engine(run)
    _add_public_key(run)
    _add_json(run)

    profile = _command(commands, "profile", _profile, "measure frames per second, end to end")
    profile.add_argument("bundle", nargs="?", metavar="BUNDLE")
    profile.add_argument("--source", default="synthetic:?frames=0", metavar="URI", help=_SOURCES)
    profile.add_argument(
        "--frames", type=_count, metavar="N", help="so many; 100 unless --seconds is given"
    )
    profile.add_argument("--seconds", type=float, metavar="S", help="or as many as S seconds take")
    profile.add_argument(
        "--warm-up", type=_whole, default=10, metavar="N", help="before, not counted; 10"
    )
    profile.add_argument(
        "--layers", action="store_true", help="also the network's layers one by one"
    )
    profile.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="SETTING",
        help="measure these in turns with BUNDLE: a bundle, bundle@engine, bundle,threads=2, "
        "@onnxruntime, ,head=graph",
    )
    profile.add_argument(
        "--sweep",
        action="store_true",
        help="find the best number of threads here (of the bundles of --compare too) and keep it",
    )
    profile.add_argument(
        "--at-least", type=float, metavar="FPS", help="with --sweep: the largest that reaches it"
    )
    profile.add_argument("--no-save", action="store_true", help="with --sweep: keep nothing")
    profile.add_argument(
        "--rounds", type=_count, default=10, metavar="N", help="of --compare and --sweep; 10"
    )
    profile.add_argument("--seed", type=_whole, default=0, metavar="N", help="of their order")
    profile.add_argument("--report", metavar="FILE.html")
    _add_postprocess(profile)
    _add_engine(profile)
    _add_public_key(profile)
    _add_json(profile)

    estimate = _command(
        commands, "estimate", _estimate, "how fast it may be on a board that is not here"
    )
    estimate.add_argument("bundle", metavar="BUNDLE")
    estimate.add_argument(
        "--device", default="all", metavar="NAME", help="such as orin-nano-8gb; all Jetsons if not"
    )
    estimate.add_argument(
        "--precision",
        choices=("graph", "fp32", "fp16", "int8"),
        default="graph",
        help="what if all of it were so; the graph's own otherwise",
    )
    estimate.add_argument("--tf32", action="store_true", help="of an engine of build --tf32")
    estimate.add_argument("--report", metavar="FILE.html")
    _add_json(estimate)

    evaluate = _command(commands, "eval", _eval, "measure accuracy on labelled pictures")
    evaluate.add_argument("bundle", metavar="BUNDLE")
    evaluate.add_argument(
        "--data",
        required=True,
        metavar="URI",
        help="camvid:DIR (semantic), coco:DIR (instance), or synthetic:?frames=60 (both)",
    )
    evaluate.add_argument("--split", default="val", metavar="NAME")
    evaluate.add_argument("--limit", type=_count, metavar="N", help="so many pictures at most")
    evaluate.add_argument(
        "--boundary",
        action="store_true",
        help="boundary IoU and Hausdorff distance too, which take longer (semantic)",
    )
    evaluate.add_argument(
        "--panoptic",
        metavar="BUNDLE",
        help="panoptic quality of BUNDLE's objects on the first one's classes (synthetic:)",
    )
    evaluate.add_argument(
        "--compare",
        metavar="A,B,...",
        help="steps as for --postprocess, or other bundles: what each gains, and costs",
    )
    _add_postprocess(evaluate)
    _add_engine(evaluate)
    _add_public_key(evaluate)
    _add_json(evaluate)

    export = _command(commands, "export", _export, "make a bundle of a trained PyTorch model")
    export.add_argument(
        "model",
        metavar="MODEL",
        help="a name that EdgeSeg knows (bisenetv1, ..., streets), or a model of your own: "
        "package.module:factory, a file.onnx, or hf:FOLDER",
    )
    export.add_argument("--weights", metavar="FILE", help="the checkpoint (.pt, .pth)")
    export.add_argument("--size", metavar="HxW", help="network size, height first: 512x1024")
    export.add_argument("-o", "--output", required=True, metavar="BUNDLE")
    export.add_argument("--name", metavar="NAME", help="what it is called; the folder's name")
    export.add_argument("--classes", metavar="A,B,...", help="names of the classes, in order")
    export.add_argument("--fit", choices=("stretch", "letterbox"), default="stretch")
    export.add_argument("--confidence", action="store_true", help="add a confidence map")
    export.add_argument("--half-weights", action="store_true", help="store kernels as fp16")
    export.add_argument(
        "--views",
        metavar="A,B,...",
        help="average looks at several sizes, shares of the network size: 0.75,1.33 (semantic)",
    )
    export.add_argument(
        "--balance",
        action="append",
        default=[],
        metavar="URI",
        help="training pictures on which the classes' biases are set for the highest mean IoU, so "
        "that rare ones get their share (semantic)",
    )
    export.add_argument(
        "--data", metavar="URI", help="labelled pictures to verify and measure on: camvid:DIR"
    )
    export.add_argument("--split", default="val", metavar="NAME")
    own = export.add_argument_group(
        "models of your own", "what they cannot say themselves; normalisation is ImageNet's else"
    )
    own.add_argument("--task", choices=("semantic", "instance"), help="semantic if left out")
    own.add_argument("--mean", type=_three, metavar="R,G,B", help="of the training pictures")
    own.add_argument("--std", type=_three, metavar="R,G,B", help="of the training pictures")
    own.add_argument(
        "--scale",
        type=int,
        choices=(1, 255),
        default=1,
        help="largest value of a pixel that --mean and --std are meant for",
    )
    order = own.add_mutually_exclusive_group()
    order.add_argument("--rgb", dest="order", action="store_const", const="rgb")
    order.add_argument("--bgr", dest="order", action="store_const", const="bgr")
    own.add_argument(
        "--align-corners",
        action="store_true",
        help="logits below network size are upsampled by that convention",
    )
    own.add_argument(
        "--adapter",
        metavar="MODULE:FUNCTION",
        help="turns what the model returns into logits (1, classes, h, w), or for the task "
        "instance into a dict of boxes, scores and masks",
    )
    own.add_argument("--output-name", metavar="NAME", help="which output of an ONNX file is meant")
    own.add_argument(
        "--least-score",
        type=float,
        metavar="S",
        help="of an instance model: a detection's score is above it; 0.05",
    )
    own.add_argument(
        "--overlap",
        type=float,
        metavar="IOU",
        help="of an instance model: boxes of a class that overlap a better one by more go; 0.5, "
        "and 1 (none goes) where each candidate has its mask",
    )
    _add_json(export)

    quantize = _command(commands, "quantize", _quantize, "make an INT8 bundle of a bundle")
    quantize.add_argument("bundle", metavar="BUNDLE")
    quantize.add_argument(
        "--calibration",
        action="append",
        required=True,
        metavar="URI",
        help="frames like those the model will see: a folder, a list (.txt), a video, camvid:DIR; "
        "may be given several times",
    )
    quantize.add_argument("-o", "--output", required=True, metavar="BUNDLE")
    quantize.add_argument("--name", metavar="NAME", help="what it is called; the folder's name")
    quantize.add_argument(
        "--data",
        metavar="URI",
        help="labelled pictures to prove the accuracy on: camvid:DIR, coco:DIR for instances",
    )
    quantize.add_argument("--split", default="val", metavar="NAME")
    quantize.add_argument(
        "--max-drop",
        type=float,
        metavar="POINTS",
        help="points of mIoU, of AP for instances, that may be lost; layers stay in floating point "
        "to keep to it",
    )
    quantize.add_argument("--recipe", metavar="FILE.toml", help="every choice, in one file")
    quantize.add_argument(
        "--ranges", metavar="METHOD", help="minmax, average, percentile, entropy or mse"
    )
    quantize.add_argument("--frames", type=_count, metavar="N", help="calibration frames at most")
    quantize.add_argument(
        "--keep-float", metavar="LAYER,...", help="layers to leave in floating point"
    )
    quantize.add_argument(
        "--half", action="store_true", help="what is not INT8 becomes FP16 (for TensorRT)"
    )
    quantize.add_argument(
        "--fp16", action="store_true", help="nothing becomes INT8, everything FP16 (for TensorRT)"
    )
    quantize.add_argument(
        "--finetune",
        type=_count,
        metavar="STEPS",
        help="train the integers towards the fp32 outputs, without labels (needs PyTorch; not for "
        "instances)",
    )
    quantize.add_argument(
        "--sensitivity",
        action="store_true",
        help="measure the damage of every layer for the report, also if no budget needs it",
    )
    quantize.add_argument(
        "--allow-overlap",
        action="store_true",
        help="go on when calibration frames are also evaluation pictures, and record it",
    )
    quantize.add_argument("--engine", metavar="NAME", help="openvino or onnxruntime")
    quantize.add_argument("--threads", type=_whole, default=0, metavar="N", help="0: all")
    _add_json(quantize)

    train = _command(commands, "train", _train, "train a model on labelled pictures")
    train.add_argument("model", metavar="MODEL", help="as `edgeseg models` has them")
    _add_training(train)

    distill = _command(commands, "distill", _distill, "train a model with a teacher")
    distill.add_argument("model", metavar="STUDENT", help="as `edgeseg models` has them")
    distill.add_argument(
        "--teacher",
        required=True,
        metavar="WHAT",
        help="a bundle, a checkpoint (.pt, .pth), package.module:factory, or an ONNX file",
    )
    distill.add_argument(
        "--teacher-model", metavar="MODEL", help="what the checkpoint is of; STUDENT if left out"
    )
    distill.add_argument(
        "--alpha", type=float, metavar="0-1", help="the labels' share of the loss; 0.5"
    )
    distill.add_argument(
        "--temperature", type=float, metavar="T", help="at which outputs are compared; 2"
    )
    _add_training(distill)

    prune = _command(commands, "prune", _prune, "take channels out of a model until it costs less")
    prune.add_argument(
        "model", metavar="MODEL", help="a name that EdgeSeg knows: bisenetv2, ..., streets"
    )
    prune.add_argument("--weights", metavar="FILE", help="the checkpoint (.pt, .pth) or bundle")
    prune.add_argument("-o", "--output", required=True, metavar="FILE.pt")
    goal = prune.add_mutually_exclusive_group(required=True)
    goal.add_argument(
        "--macs", type=_amount, metavar="N", help="multiplications: 0.5 for half of them, or 1.2G"
    )
    goal.add_argument(
        "--params", type=_amount, metavar="N", help="parameters: 0.5 for half of them, or 1.5M"
    )
    goal.add_argument("--milliseconds", type=_amount, metavar="MS", help="measured on --engine")
    prune.add_argument("--size", metavar="HxW", help="network size, height first: 512x1024")
    prune.add_argument(
        "--importance",
        default="l2",
        metavar="MEASURE",
        help="which channels matter: activation, l1, l2, bn or taylor",
    )
    prune.add_argument(
        "--calibration",
        action="append",
        default=[],
        metavar="URI",
        help="frames like those the model will see, as for quantize; may be given several times; "
        "the batch norms are set anew on them",
    )
    prune.add_argument("--frames", type=_count, default=32, metavar="N", help="of each at most")
    prune.add_argument(
        "--labels", metavar="URI", help="labelled pictures for --importance taylor: camvid:DIR"
    )
    prune.add_argument(
        "--multiple",
        type=_count,
        default=8,
        metavar="N",
        help="channels left in a layer are a multiple of this; 32 for INT8 on tensor cores",
    )
    prune.add_argument(
        "--minimum", type=_count, default=8, metavar="N", help="channels left in a layer at least"
    )
    prune.add_argument(
        "--protect",
        action="append",
        default=[],
        metavar="NAME",
        help="a layer, or a module with all in it, that stays; may be given several times",
    )
    prune.add_argument(
        "--steps",
        type=_count,
        default=1,
        metavar="N",
        help="cut in so many steps, and measure importance anew at each",
    )
    prune.add_argument(
        "--recipe", metavar="FILE.toml", help="train by it after each step, as `edgeseg train` does"
    )
    prune.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    prune.add_argument("--workers", type=_whole, metavar="N", help="processes that prepare batches")
    prune.add_argument(
        "--engine", metavar="NAME", help="measure milliseconds on openvino or onnxruntime"
    )
    prune.add_argument("--threads", type=_whole, default=0, metavar="N", help="0: all")
    prune.add_argument("--report", metavar="FILE.html")
    _add_json(prune)

    adapt = _command(
        commands, "adapt", _adapt, "let a model get used to a camera, from frames without labels"
    )
    adapt.add_argument("bundle", metavar="BUNDLE", help="one that EdgeSeg can train, not quantized")
    adapt.add_argument("-o", "--output", required=True, metavar="DIR")
    adapt.add_argument(
        "--video",
        action="append",
        required=True,
        metavar="FILE",
        help="of the camera; or a folder of pictures; may be given several times",
    )
    adapt.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="URI",
        help="labelled pictures that the model shall not forget: camvid:DIR or synthetic:",
    )
    adapt.add_argument("--steps", type=_count, default=200, metavar="N", help="200")
    adapt.add_argument("--frames", type=_count, default=200, metavar="N", help="of each at most")
    adapt.add_argument(
        "--confidence",
        type=float,
        default=0.9,
        metavar="0-1",
        help="what the model is so sure of counts as the truth; 0.9",
    )
    adapt.add_argument("--learning-rate", type=float, default=1e-4, metavar="RATE")
    adapt.add_argument("--seed", type=_whole, default=0, metavar="N")
    adapt.add_argument("--minutes", type=float, metavar="M", help="end within so many minutes")
    adapt.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    adapt.add_argument("--workers", type=_whole, metavar="N", help="processes that prepare batches")
    adapt.add_argument("--name", help="of the new model; that of the folder otherwise")
    _add_json(adapt)

    compress = _command(
        commands, "compress", _compress, "prune, train and quantize a model by one recipe"
    )
    compress.add_argument("recipe", metavar="RECIPE.toml")
    compress.add_argument("-o", "--output", required=True, metavar="DIR", help="the bundle")
    compress.add_argument(
        "--engine", metavar="NAME", help="measure on openvino or onnxruntime; the best here"
    )
    compress.add_argument("--threads", type=_whole, default=0, metavar="N", help="0: all")
    compress.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    compress.add_argument(
        "--workers", type=_whole, metavar="N", help="processes that prepare batches"
    )
    _add_json(compress)

    build = _command(commands, "build", _build, "build a TensorRT engine on the device")
    build.add_argument("bundle", metavar="BUNDLE")
    _add_public_key(build)
    build.add_argument(
        "--engine", choices=("tensorrt",), default="tensorrt", help="the one that is built"
    )
    plugins = build.add_mutually_exclusive_group()
    plugins.add_argument(
        "--plugins",
        action="store_true",
        default=None,
        help="EdgeSeg's kernels must be in the engine; otherwise they are if they are built",
    )
    plugins.add_argument(
        "--no-plugins",
        dest="plugins",
        action="store_false",
        help="keep to TensorRT's own layers, so that the plan loads without EdgeSeg's library",
    )
    build.add_argument(
        "--level", type=_whole, default=3, metavar="0-5", help="how long to search for fast kernels"
    )
    build.add_argument(
        "--workspace", type=_count, metavar="MIB", help="scratch memory; otherwise what is free"
    )
    build.add_argument(
        "--version-compatible", action="store_true", help="newer TensorRT can load it, slower"
    )
    build.add_argument(
        "--hardware-compatible",
        choices=("ampere_plus", "same_compute_capability"),
        help="other GPUs can load it, slower",
    )
    build.add_argument("--dla", type=_whole, metavar="CORE", help="run what it can on a DLA core")
    build.add_argument("--tf32", action="store_true", help="round float32 convolutions to TF32")
    build.add_argument(
        "--timing-cache", metavar="FILE", help="measurements to reuse; beside the plan otherwise"
    )
    build.add_argument(
        "--no-strict",
        dest="strict",
        action="store_false",
        help="keep an engine that is not what the graph asks for, with a warning",
    )
    build.add_argument(
        "--no-memory-check", dest="memory_check", action="store_false", help="build in any case"
    )
    build.add_argument("--force", action="store_true", help="build also if a plan fits already")
    _add_json(build)

    inspect = _command(commands, "inspect", _inspect, "say what a bundle holds")
    inspect.add_argument("bundle", metavar="BUNDLE")
    _add_public_key(inspect)
    _add_json(inspect)

    sign = _command(commands, "sign", _sign, "sign a bundle, or check its signature")
    sign.add_argument("bundle", metavar="BUNDLE")
    sign.add_argument(
        "--key", metavar="KEY.pem", help="the elliptic-curve private key to sign with"
    )
    sign.add_argument("--check", action="store_true", help="check the signature that is there")
    sign.add_argument("--public-key", metavar="FILE", help="with --check: the key to check it with")

    models = _command(commands, "models", _models, "the models that export and train know")
    _add_json(models)

    doctor = _command(commands, "doctor", _doctor, "say what is here, and what is missing")
    _add_json(doctor)

    kernels = _command(
        commands, "kernels", _kernels, "build the compiled kernels; by default those for the CPU"
    )
    kernels.add_argument("action", choices=("build",))
    which = kernels.add_mutually_exclusive_group()
    which.add_argument(
        "--cuda", action="store_true", help="the CUDA library; needs CMake and nvcc, and a minute"
    )
    which.add_argument(
        "--tensorrt",
        action="store_true",
        help="the CUDA library and the TensorRT plugins; needs TensorRT's headers too",
    )
    kernels.add_argument(
        "--tensorrt-headers",
        metavar="DIR",
        help="folder of NvInferRuntime.h (goes with --tensorrt); the usual places otherwise",
    )
    kernels.add_argument(
        "--arch",
        metavar="LIST",
        help="compute capabilities of the GPUs to build for, such as 87 or 87,110; "
        "those that are here otherwise",
    )
    kernels.add_argument(
        "-o", "--output", metavar="DIR", help="where to; where engines look for it otherwise"
    )
    return parser


_SOURCES = (
    "a video file, a folder or glob of images, a camera (0, csi://0), http://, rtsp://, "
    "gst: and a pipeline, or synthetic:?seed=3&size=360x480; docs/streams.md has the options"
)


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    return parser


def _add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", metavar="NAME", help="tensorrt, openvino or onnxruntime")
    parser.add_argument("--threads", type=_whole, default=0, metavar="N", help="0: all")
    parser.add_argument(
        "--head",
        choices=("auto", "compiled", "graph"),
        default="auto",
        help="where the masks are brought to network size; auto takes the compiled kernel",
    )


def _add_postprocess(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--postprocess",
        metavar="A+B",
        help="what to do after the network: refine (borders follow the picture), rescore "
        "(scores count how sure the masks are; instances), or both: rescore+refine",
    )


def _add_training(train: argparse.ArgumentParser) -> None:
    """The options of all commands that train.

    None of them begins an option of torchrun, as --log or --start would: it calls that ambiguous.
    """
    train.add_argument("-o", "--output", required=True, metavar="FILE.pt")
    train.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="URI",
        help="camvid:DIR, coco:DIR or synthetic:, once for each set; those of the recipe if none",
    )
    train.add_argument(
        "--shares",
        metavar="N,N,...",
        help="samples of a batch from each --data; about 8 in all if left out",
    )
    train.add_argument("--split", default="train", metavar="NAME", help="of --data")
    train.add_argument(
        "--recipe", metavar="FILE.toml", help="every choice; the model's published one if left out"
    )
    train.add_argument("--weights", metavar="FILE", help="checkpoint or bundle to begin from")
    train.add_argument(
        "--validate",
        action="append",
        default=[],
        metavar="URI",
        help="evaluate on the split val of it now and then, and keep the best",
    )
    train.add_argument("--steps", type=_count, metavar="N", help="in place of the recipe's")
    train.add_argument("--seed", type=_whole, metavar="N", help="in place of the recipe's")
    train.add_argument("--minutes", type=float, metavar="M", help="end within so many minutes")
    train.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    train.add_argument("--workers", type=_whole, metavar="N", help="processes that prepare batches")
    train.add_argument(
        "--history",
        metavar="DIR",
        help="a table of all losses, and TensorBoard's if it is installed",
    )


def _add_public_key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--public-key",
        metavar="FILE",
        help="refuse a bundle that was not signed with the private key that belongs to it",
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", metavar="FILE", help="write the figures there; - is standard output"
    )


def _whole(text: str) -> int:
    return _number(text, least=0)


def _count(text: str) -> int:
    return _number(text, least=1)


def _three(text: str) -> tuple[float, float, float]:
    try:
        first, second, third = (float(value) for value in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"three numbers with commas between are wanted, such as 0.485,0.456,0.406, and "
            f"{text!r} came"
        ) from None
    return first, second, third


def _amount(text: str) -> float:
    sizes = {"k": 1e3, "M": 1e6, "G": 1e9}
    try:
        value = float(text.rstrip("kMG")) * sizes.get(text[-1:], 1)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(
            f"a number above 0 is wanted, such as 0.5, 1.2G or 1500000, and {text!r} came"
        )
    return value


def _number(text: str, *, least: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and int(text) >= least):
        raise argparse.ArgumentTypeError(
            f"a whole number from {least} to 999999999 is wanted, and {text!r} came"
        )
    return int(text)


def _load(options: argparse.Namespace, bundle: str, postprocess: str | None = None) -> Model:
    from edgeseg.model import load
    from edgeseg.postprocess import NOTHING_MORE

    head = {"auto": None, "compiled": True, "graph": False}[options.head]
    return load(
        bundle,
        engine=options.engine,
        threads=options.threads,
        compiled_head=head,
        postprocessing=NOTHING_MORE if postprocess is None else postprocess,
        public_key=getattr(options, "public_key", None),
    )


def _tell(options: argparse.Namespace, text: str, content: dict[str, object]) -> None:
    """The outcome for a person, and as JSON where it was asked for."""
    if options.json == "-":
        sys.stdout.write(json_text(content))
        return
    print(text)
    if options.json is not None:
        write_json(Path(options.json), content)


def _aside(line: str) -> None:
    """Says how long work goes on, where it does not mix with figures on standard output."""
    print(line, file=sys.stderr, flush=True)


def _check_json(options: argparse.Namespace) -> None:
    """Refuses a place that cannot be written before any work is done."""
    if options.json != "-":
        _check_file(options.json)


def _check_file(target: str | None) -> None:
    """Refuses ``target`` if no file of that name can be written."""
    if target is None:
        return
    path = Path(target)
    if path.is_dir():
        raise SinkError(f"{path} cannot be written: it is a folder, and a file is to be there")
    folder = path.resolve().parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise SinkError(f"{target} cannot be written: {folder} is no writable folder")


def _demo(options: argparse.Namespace) -> int:
    from edgeseg import kernels
    from edgeseg.demo import NEXT, run_demo

    with (
        _load(options, "streets") as plain,
        _load(options, "streets-int8") as quantized,
        progress("segmenting a street, twice") as update,
    ):
        if not kernels.available():
            print(
                "The compiled kernels are not here, so masks are brought to size inside the graph, "
                "which is slower; with a C++ compiler, `edgeseg kernels build` makes them.",
                file=sys.stderr,
            )
        demo = run_demo(
            (plain, quantized), Path(options.output), frames=options.frames, progress=update
        )
    commands = "\n".join("  " + line.replace("edgeseg", _program(), 1) for line in NEXT[:2])
    print(
        f"{demo.render()}\n\n"
        f"Look at\n  {demo.video}\n  {demo.report}\n\n"
        f"Now a video of your own, with either model\n{commands}"
    )
    return 0


def _program() -> str:
    """What to type for this program, from where it was started."""
    started = Path(sys.argv[0])
    if started.name == "__main__.py":
        return "python -m edgeseg"
    if started.name != "edgeseg" or shutil.which("edgeseg") is not None:
        return "edgeseg"
    # In a virtual environment that is not active, as after `make demo`.
    return os.path.relpath(started)


def _run(options: argparse.Namespace) -> int:
    from edgeseg.session import Look, Page, Session
    from edgeseg.source.address import without_password

    _check_json(options)
    bundle, uris = _model_and_sources(options)
    if options.serve is None and (options.token or options.recordings):
        raise RequestError("--token and --recordings are for the web page; add --serve")
    page = None
    if options.serve is not None:
        folder = Path(options.recordings) if options.recordings else None
        page = Page(options.serve, options.token, folder)
    title = without_password(uris[0]) if len(uris) == 1 else f"{len(uris)} sources"
    with _load(options, bundle, options.postprocess) as model:
        sources, failures = _opened_sources(uris)
        session = Session(
            model,
            sources,
            save=options.save,
            show=options.show,
            page=page,
            frames=options.frames,
            named=len(uris) > 1,
            look=Look(options.opacity, not options.no_legend, options.masks),
            tell=lambda line: print(f"edgeseg: {line}", file=sys.stderr, flush=True),
        )
        with progress(f"segmenting {title}") as update:
            outcome = session.run(update)
        engine, description = model.engine.name, model.engine.description
    if outcome.stopped:
        print("edgeseg: stopped; what was finished is kept", file=sys.stderr)
    lines, content = [description], dict[str, dict[str, object]]()
    for source in outcome.sources:
        summary = source.summary
        name = f"{source.name}: " if len(uris) > 1 else ""
        lines.append(
            f"{name}{summary.frames} frames, {summary.dropped} dropped, "
            f"{summary.fps:.1f} frames per second"
        )
        lines += [f"{name}{note}" for note in source.notes]
        lines += [f"{name}saved {target}" for target in source.saved]
        content[source.name] = {**summary.to_dict(), "notes": list(source.notes)}
        if source.error is not None:
            failures[source.name] = source.error
    for name, reason in failures.items():
        print(
            f"edgeseg: {name}: {reason}" if len(uris) > 1 else f"edgeseg: {reason}", file=sys.stderr
        )
    for outlet in outcome.outlets:
        if outlet.error is not None:
            # It was told when it happened.
            failures[outlet.name] = outlet.error
        elif outlet.dropped:
            lines.append(
                f"{outlet.name}: {outlet.dropped} results were not written, newer ones came"
            )
    found: dict[str, object] = {
        "engine": engine,
        "outlets": [asdict(outlet) for outlet in outcome.outlets],
        "failed": failures,
    }
    if len(uris) == 1:
        (only,) = content.values()
        found = {**only, **found}
    else:
        found["sources"] = content
    _tell(options, "\n".join(lines), found)
    return 1 if failures else 0


def _model_and_sources(options: argparse.Namespace) -> tuple[str, list[str]]:
    """The bundle and the URIs that were asked for; a URI alone is for the shipped model."""
    bundle, uris = options.bundle, list(options.source)
    if not uris:
        is_file = Path(bundle).is_file() and not bundle.endswith(".onnx")
        if ":" not in bundle and not is_file:
            raise RequestError(
                f"what {bundle} is to segment is missing; add --source, such as --source synthetic:"
            )
        bundle, uris = "streets", [bundle]
    if options.serve is not None:
        # Somebody is to look at it, and not for a few seconds.
        uris = ["synthetic:?live=1&frames=0" if uri == "synthetic:" else uri for uri in uris]
    return bundle, uris


def _opened_sources(uris: Sequence[str]) -> tuple[dict[str, Source], dict[str, str]]:
    """The sources that could be opened, by name, and why the others could not.

    Raises SourceError when none could, RequestError when one was asked for wrongly.
    """
    from edgeseg.errors import SourceError
    from edgeseg.source import open_source

    sources: dict[str, Source] = {}
    failures: dict[str, str] = {}
    first: SourceError | None = None
    with ExitStack() as stack:
        for name, uri in zip(_names_of(uris), uris, strict=True):
            try:
                source = stack.enter_context(open_source(uri))
            except SourceError as error:
                failures[name] = str(error)
                first = first or error
                continue
            source.listen(_state_teller(source))
            sources[name] = source
        if not sources and first is not None:
            raise first
        # They are the streams' from here on.
        stack.pop_all()
    return sources, failures


def _names_of(uris: Sequence[str]) -> list[str]:
    """A short name for each source, for files and messages: front.mp4 -> front; no two alike."""
    names: list[str] = []
    for uri in uris:
        head = uri.strip().partition("?")[0].rstrip("/:*")
        last = Path(head.rpartition("@")[2]).stem if not head.startswith("gst:") else "gst"
        plain = "".join(sign if sign.isalnum() else "-" for sign in last).strip("-") or "source"
        name, number = plain, 2
        while name in names:
            name, number = f"{plain}-{number}", number + 1
        names.append(name)
    return names


def _state_teller(source: Source) -> Callable[[Status], None]:
    """What says on standard error that a live source is lost, and that it is back."""
    from edgeseg.source.address import without_password

    lost = False

    def tell(status: Status) -> None:
        nonlocal lost
        if source.live and status.state in ("stalled", "reconnecting") and not lost:
            lost = True
            reason = f"{without_password(source.uri)} is lost: {status.reason}; trying again"
            print(f"edgeseg: {reason}", file=sys.stderr)
        elif lost and status.state == "live":
            lost = False
            print(f"edgeseg: {without_password(source.uri)} is back", file=sys.stderr)

    tell(source.status)
    return tell


def _profile(options: argparse.Namespace) -> int:
    from edgeseg.postprocess import NOTHING_MORE
    from edgeseg.profile import Comparison, Profile, Setting, Sweep, compare, profile, sweep

    _check_json(options)
    _check_file(options.report)
    if options.bundle is None and not options.compare:
        raise RequestError("a profile is of a BUNDLE, such as streets, and none came")
    if options.layers and (options.compare or options.sweep):
        raise RequestError("--layers is for one bundle; leave out --compare and --sweep")
    if options.public_key is not None and (options.compare or options.sweep):
        raise RequestError(
            "--public-key is for one bundle; check those of --compare and --sweep before, with "
            "`edgeseg sign BUNDLE --check --public-key FILE`"
        )
    if options.at_least is not None and not options.sweep:
        raise RequestError("--at-least goes with --sweep")
    given = Setting("", options.engine, options.threads, options.head)
    first, *others = ([] if options.bundle is None else [options.bundle]) + options.compare
    base = Setting.parse(first, given)
    settings = [base, *(Setting.parse(text, base) for text in others)]
    postprocessing = options.postprocess or NOTHING_MORE
    found: Comparison | Profile | Sweep
    try:
        if options.sweep:
            with progress("racing settings") as update:
                found = sweep(
                    settings,
                    options.source,
                    seconds=options.seconds,
                    frames=options.frames,
                    seed=options.seed,
                    at_least=options.at_least,
                    save=not options.no_save,
                    warm_up=options.warm_up,
                    rounds=options.rounds,
                    postprocessing=postprocessing,
                    progress=update,
                )
        elif options.compare:
            with progress("measuring in turns") as update:
                found = compare(
                    settings,
                    options.source,
                    seconds=options.seconds,
                    frames=options.frames,
                    seed=options.seed,
                    warm_up=options.warm_up,
                    rounds=options.rounds,
                    postprocessing=postprocessing,
                    progress=update,
                )
        else:
            options.engine, options.threads, options.head = base.engine, base.threads, base.head
            with (
                _load(options, base.bundle, options.postprocess) as model,
                progress(f"profiling {base.bundle}") as update,
            ):
                found = profile(
                    model,
                    options.source,
                    frames=options.frames,
                    seconds=options.seconds,
                    warm_up=options.warm_up,
                    layers=options.layers,
                    progress=update,
                )
    except KeyboardInterrupt:
        print("edgeseg: stopped before anything was measured", file=sys.stderr)
        return _INTERRUPTED
    if options.report is not None:
        found.report().write(options.report)
    _tell(options, found.render(), found.to_dict())
    return _INTERRUPTED if found.stopped else 0


def _estimate(options: argparse.Namespace) -> int:
    from edgeseg.bundle import Bundle
    from edgeseg.estimate import devices, estimate

    _check_json(options)
    _check_file(options.report)
    chosen = devices(options.device)
    found = estimate(
        Bundle.open(options.bundle), chosen, precision=options.precision, tf32=options.tf32
    )
    if options.report is not None:
        found.report().write(options.report)
    _tell(options, found.render(), found.to_dict())
    return 0


def _eval(options: argparse.Namespace) -> int:
    _check_json(options)
    if options.compare is not None:
        return _eval_side_by_side(options)
    if options.panoptic is not None and options.postprocess is not None:
        raise RequestError("--postprocess is for one model; leave it out, or --panoptic")
    with _load(options, options.bundle, options.postprocess) as model:
        if options.panoptic is not None:
            found, lines = _eval_segments(options, model)
        elif model.spec.task == "instance":
            found, lines = _eval_objects(options, model)
        else:
            found, lines = _eval_classes(options, model)
        lines = [f"{model.spec.name} on {model.engine.description}", *lines]
        _tell(options, "\n".join(lines), found)
    return 0


def _eval_classes(options: argparse.Namespace, model: Model) -> tuple[dict[str, object], list[str]]:
    """Figures of a semantic model, and their table."""
    from edgeseg.dataset import open_dataset
    from edgeseg.evaluate import evaluate

    dataset = open_dataset(options.data, options.split)
    with progress(f"evaluating on {options.data}") as update:
        found = evaluate(
            model.engine,
            dataset,
            limit=options.limit,
            boundary=options.boundary,
            postprocessing=model.postprocessing,
            progress=update,
        )
    columns = {"IoU": found.per_class, "Dice": found.per_class_dice}
    means = [found.miou, found.dice]
    if found.outlines is not None:
        columns["boundary"] = found.outlines.per_class_boundary_iou
        columns["HD95 px"] = found.outlines.per_class_hd95
        means += [found.outlines.boundary_iou, found.outlines.hd95]
    return found.to_dict(), [
        f"{found.data} {found.split}, {found.frames} pictures, "
        f"{found.pixel_accuracy:.4f} of the pixels right",
        "",
        f"{'':<16}" + "".join(f"{title:>10}" for title in columns),
        f"{'mean (mIoU)':<16}" + "".join(f"{mean:10.4f}" for mean in means),
        *_rows(columns),
    ]


def _eval_objects(options: argparse.Namespace, model: Model) -> tuple[dict[str, object], list[str]]:
    """Figures of an instance model, and their table."""
    from edgeseg.evaluate import evaluate_instances
    from edgeseg.instance_dataset import open_instances

    if options.boundary:
        raise RequestError("--boundary is for semantic models; an instance model has its AP")
    dataset = open_instances(options.data, options.split)
    with progress(f"evaluating on {options.data}") as update:
        found = evaluate_instances(
            model.engine,
            dataset,
            limit=options.limit,
            postprocessing=model.postprocessing,
            progress=update,
        )
    kinds = {"box": found.box} if found.mask is None else {"box": found.box, "mask": found.mask}
    totals = {
        kind: {
            # ap_small is "AP small".
            name[:2].upper() + name[2:].replace("_", " "): value
            for name, value in precision.to_dict().items()
        }
        for kind, precision in kinds.items()
    }
    classes = {kind: precision.to_classes() for kind, precision in kinds.items()}
    head = f"{'':<16}" + "".join(f"{kind:>10}" for kind in kinds)
    return found.to_dict(), [
        f"{found.data} {found.split}, {found.frames} pictures",
        "",
        head,
        *_rows(totals),
        "",
        f"{'AP of a class':<16}" + head[16:],
        *_rows(classes),
    ]


def _eval_segments(
    options: argparse.Namespace, model: Model
) -> tuple[dict[str, object], list[str]]:
    """Figures of a semantic and an instance model together, and their table."""
    from edgeseg.evaluate import evaluate_panoptic
    from edgeseg.panoptic_dataset import open_panoptic

    if options.boundary:
        raise RequestError("--boundary is for class maps; leave it out, or --panoptic")
    dataset = open_panoptic(options.data, options.split)
    with _load(options, options.panoptic) as other:
        with progress(f"evaluating on {options.data}") as update:
            found = evaluate_panoptic(
                model.engine, other.engine, dataset, limit=options.limit, progress=update
            )
        description = f"{other.spec.name} on {other.engine.description}"
    rows = {"all": found.all, "things": found.things, "stuff": found.stuff, **found.per_class}
    columns = {
        name.upper(): {row: figures.to_dict()[name] for row, figures in rows.items()}
        for name in ("pq", "sq", "rq")
    }
    return found.to_dict(), [
        description,
        f"{found.data} {found.split}, {found.frames} pictures",
        "",
        f"{'':<16}" + "".join(f"{title:>10}" for title in columns),
        *_rows(columns),
    ]


def _eval_side_by_side(options: argparse.Namespace) -> int:
    """One model against itself with steps after the network, and against other models."""
    from edgeseg.bundle import SHIPPED
    from edgeseg.compare import Candidate, compare
    from edgeseg.dataset import open_dataset
    from edgeseg.instance_dataset import open_instances
    from edgeseg.postprocess import STEPS, Postprocessing

    if options.boundary or options.panoptic is not None or options.postprocess is not None:
        raise RequestError(
            "--compare has figures of its own; --boundary, --panoptic and --postprocess do not go "
            "with it"
        )
    with ExitStack() as stack:
        model = stack.enter_context(_load(options, options.bundle))
        candidates = [Candidate(options.bundle, model.engine)]
        for item in (name.strip() for name in options.compare.split(",")):
            # A folder that is called like a step is ./refine.
            is_step = item.partition("+")[0].strip() in STEPS
            if item in SHIPPED or (item and not is_step and Path(item).exists()):
                other = stack.enter_context(_load(options, item))
                candidates.append(Candidate(item, other.engine))
            else:
                steps = Postprocessing.parse(item)
                steps.check(model.spec)
                candidates.append(Candidate(str(steps), model.engine, steps))
        is_semantic = model.spec.task == "semantic"
        opened = open_dataset if is_semantic else open_instances
        dataset = opened(options.data, options.split)
        with progress(f"comparing on {options.data}") as update:
            found = compare(candidates, dataset, limit=options.limit, progress=update)
        lines = [
            f"{model.spec.name} on {model.engine.description}",
            f"{found.data} {found.split}, {found.frames} pictures; gains in points; times with "
            "their middle half",
            "",
            found.render(),
        ]
        _tell(options, "\n".join(lines), {**found.to_dict(), "engine": model.engine.name})
    return 0


def _rows(columns: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """One line per name; the columns have the same names."""
    names = next(iter(columns.values()))
    values = {name: [column[name] for column in columns.values()] for name in names}
    return [
        f"{name:<16}"
        + "".join(f"{'absent' if value is None else format(value, '.4f'):>10}" for value in row)
        for name, row in values.items()
    ]


def _export(options: argparse.Namespace) -> int:
    from edgeseg.bundle import SHIPPED, Bundle

    _check_json(options)
    changed = (
        (options.size, options.weights, options.name, options.classes, options.data)
        != (None, None, None, None, None)
        or options.fit != "stretch"
        or options.confidence
        or options.half_weights
        or options.views is not None
        or options.balance
        or (options.mean, options.std, options.order) != (None, None, None)
        or (options.adapter, options.output_name) != (None, None)
        or (options.least_score, options.overlap) != (None, None)
        or options.align_corners
        or options.scale != 1
    )
    is_own = ":" in options.model or options.model.endswith(".onnx")
    if options.task is not None and not is_own:
        raise RequestError(
            f"{options.model} has one task, which EdgeSeg knows; --task is for models of your own"
        )
    if options.model in SHIPPED and not changed:
        bundle = Bundle.open(options.model)
        target = bundle.copy_to(options.output)
        _tell(options, f"{target}: {options.model}, as it ships", {"bundle": str(target)})
        return 0
    from edgeseg.export.foreign import importable_here
    from edgeseg.export.own import OwnOptions
    from edgeseg.export.package import ExportRequest, export_bundle
    from edgeseg.export.views import parse_views

    with importable_here(), progress(f"exporting {options.model}") as update:
        made = export_bundle(
            ExportRequest(
                model=options.model,
                weights=options.weights,
                size=options.size,
                name=options.name,
                classes=tuple(options.classes.split(",")) if options.classes else None,
                fit=options.fit,
                confidence=options.confidence,
                half_weights=options.half_weights,
                data=options.data,
                split=options.split,
                views=parse_views(options.views) if options.views is not None else (),
                balance=tuple(options.balance),
                own=OwnOptions(
                    mean=options.mean,
                    std=options.std,
                    order=options.order,
                    scale=options.scale,
                    align_corners=options.align_corners,
                    adapter=options.adapter,
                    output_name=options.output_name,
                    task=options.task or "semantic",
                    least_score=options.least_score,
                    overlap=options.overlap,
                ),
            ),
            options.output,
            progress=update,
        )
    lines = [
        made.verification.render(),
        f"saved {options.output}; try `edgeseg run {options.output} --source YOUR_VIDEO.mp4 "
        "--save segmented.mp4`",
    ]
    _tell(options, "\n".join(lines), made.to_dict())
    return 0


def _quantize(options: argparse.Namespace) -> int:
    _check_json(options)
    from edgeseg.bundle import Bundle
    from edgeseg.calibration.package import (
        QuantizeRequest,
        Trainer,
        layer_names,
        quantize_bundle,
    )
    from edgeseg.calibration.recipe import Finetuning, QuantizationRecipe

    recipe = QuantizationRecipe()
    if options.recipe is not None:
        recipe = QuantizationRecipe.read(options.recipe)
    given: dict[str, Any] = {"ranges": options.ranges, "frames": options.frames}
    if options.keep_float is not None:
        given["floats"] = tuple(name.strip() for name in options.keep_float.split(","))
    if options.half:
        given["half"] = True
    if options.fp16:
        if options.keep_float is not None or options.finetune is not None:
            raise RequestError(
                "--fp16 leaves no layer in INT8, so --keep-float and --finetune do not go with it"
            )
        floats = layer_names(Bundle.open(options.bundle))
        given.update(floats=floats, half=True, equalize=0.0)
    if options.finetune is not None:
        given["finetune"] = replace(recipe.finetune or Finetuning(), steps=options.finetune)
    recipe = replace(recipe, **{key: value for key, value in given.items() if value is not None})
    trainer: Trainer | None = None
    if recipe.finetune is not None:
        from edgeseg.export.finetune import train_integers

        trainer = train_integers
    made = quantize_bundle(
        QuantizeRequest(
            bundle=options.bundle,
            calibration=tuple(options.calibration),
            recipe=recipe,
            data=options.data,
            split=options.split,
            max_drop=options.max_drop,
            allow_overlap=options.allow_overlap,
            name=options.name,
            engine=options.engine,
            threads=options.threads,
            sensitivity=options.sensitivity,
        ),
        options.output,
        trainer=trainer,
        stage=progress,
    )
    lines = [
        made.render(),
        f"saved {options.output}; look at {Path(options.output) / 'report.html'}, then try "
        f"`edgeseg profile {options.output}`",
    ]
    _tell(options, "\n".join(lines), made.to_dict())
    return 0


def _train(options: argparse.Namespace) -> int:
    _run_training(options, _recipe(options), None)
    return 0


def _distill(options: argparse.Namespace) -> int:
    from edgeseg.export.distill import open_teacher
    from edgeseg.export.distillation import Distillation
    from edgeseg.export.foreign import importable_here

    recipe = _recipe(options)
    changes = {
        name: value
        for name, value in (("alpha", options.alpha), ("temperature", options.temperature))
        if value is not None
    }
    settings = replace(recipe.distillation or Distillation(), **changes)
    with importable_here():
        teacher = open_teacher(options.teacher, options.teacher_model or options.model, recipe.crop)
    _run_training(options, replace(recipe, distillation=settings), teacher)
    return 0


def _recipe(options: argparse.Namespace) -> Recipe:
    """What the options of a command that trains say."""
    from edgeseg.export.recipe import Recipe, sources_of

    sources = sources_of(options.data, options.shares, options.split)
    if options.recipe is not None:
        recipe = Recipe.read(options.recipe, model=options.model, sources=sources)
    else:
        recipe = Recipe.published(options.model, sources)
    changes = {
        name: value
        for name, value in (("steps", options.steps), ("seed", options.seed))
        if value is not None
    }
    return replace(recipe, **changes)


def _run_training(options: argparse.Namespace, recipe: Recipe, teacher: Teacher | None) -> None:
    from edgeseg.export.train import train

    with progress(f"training {options.model}") as update:
        train(
            recipe,
            options.output,
            start=options.weights,
            teacher=teacher,
            validate=tuple((uri, "val") for uri in options.validate),
            minutes=options.minutes,
            device=options.device,
            workers=options.workers,
            log=options.history,
            progress=update if sys.stderr.isatty() else None,
        )


def _prune(options: argparse.Namespace) -> int:
    _check_json(options)
    _check_file(options.report)
    from edgeseg.export.prune import Rules, Target
    from edgeseg.export.prune_request import PruneRequest, prune_checkpoint

    if options.macs is not None:
        target = Target("macs", options.macs)
    elif options.params is not None:
        target = Target("parameters", options.params)
    else:
        target = Target("milliseconds", options.milliseconds)
    made = prune_checkpoint(
        PruneRequest(
            model=options.model,
            target=target,
            weights=options.weights,
            size=options.size,
            importance=options.importance,
            calibration=tuple(options.calibration),
            frames=options.frames,
            labels=options.labels,
            rules=Rules(options.multiple, options.minimum, tuple(options.protect)),
            steps=options.steps,
            recipe=options.recipe,
            engine=options.engine,
            threads=options.threads,
        ),
        options.output,
        device=options.device,
        workers=options.workers,
        stage=progress,
    )
    if options.report is not None:
        made.report.report().write(options.report)
    further = "train it further, then " if options.recipe is None else ""
    # A model that ships has another name as an architecture.
    lines = [
        made.report.render(),
        f"saved {options.output}; {further}`edgeseg export {made.report.model} "
        f"--weights {options.output} ...`",
    ]
    _tell(options, "\n".join(lines), {"checkpoint": str(made.path), **made.report.to_dict()})
    return 0


def _adapt(options: argparse.Namespace) -> int:
    _check_json(options)
    from edgeseg.export.adapt import AdaptRequest, adapt_bundle

    made = adapt_bundle(
        AdaptRequest(
            bundle=options.bundle,
            frames=tuple(options.video),
            data=tuple(options.data),
            steps=options.steps,
            count=options.frames,
            confidence=options.confidence,
            learning_rate=options.learning_rate,
            seed=options.seed,
            name=options.name,
        ),
        options.output,
        device=options.device,
        workers=options.workers,
        minutes=options.minutes,
        stage=progress,
        report=_aside,
    )
    lines = [
        made.verification.render(),
        f"saved {options.output}; hold it against the old one with `edgeseg eval {options.bundle} "
        f"--compare {options.output} --data ...`, or look at both with `edgeseg run`",
    ]
    _tell(options, "\n".join(lines), made.to_dict())
    return 0


def _compress(options: argparse.Namespace) -> int:
    _check_json(options)
    from edgeseg.export.compress import compress
    from edgeseg.export.compress_recipe import CompressionRecipe
    from edgeseg.export.finetune import train_integers
    from edgeseg.export.foreign import importable_here

    recipe = CompressionRecipe.read(options.recipe)
    with importable_here():
        made = compress(
            recipe,
            options.output,
            engine=options.engine,
            threads=options.threads,
            device=options.device,
            workers=options.workers,
            trainer=train_integers,
            stage=progress,
            report=_aside,
        )
    lines = [
        made.report.render(),
        f"saved {options.output}; look at {Path(options.output) / 'report.html'}; the bundles of "
        f"all steps are in {made.steps}",
    ]
    _tell(options, "\n".join(lines), made.to_dict())
    return 0


def _build(options: argparse.Namespace) -> int:
    from edgeseg.bundle import Bundle
    from edgeseg.engine import open_engine
    from edgeseg.engine.build import BuildOptions, NoPlan, build_plan, find_plan
    from edgeseg.engine.cuda import open_cuda
    from edgeseg.engine.tensorrt import tensorrt_version
    from edgeseg.kernels.build import find_plugin_library

    _check_json(options)
    bundle = Bundle.open(options.bundle, public_key=options.public_key)
    wanted = BuildOptions(
        plugins=options.plugins,
        workspace_mb=options.workspace,
        level=options.level,
        version_compatible=options.version_compatible,
        hardware_compatible=options.hardware_compatible,
        dla=options.dla,
        tf32=options.tf32,
        timing_cache=None if options.timing_cache is None else Path(options.timing_cache),
        strict=options.strict,
        memory_check=options.memory_check,
    )
    version = tensorrt_version()
    with closing(open_cuda()) as cuda:
        library = find_plugin_library(int(version.split(".")[0]))
        found = find_plan(
            bundle,
            wanted,
            tensorrt_version=version,
            device=cuda.device,
            plugin_library=library,
        )
        if isinstance(found, NoPlan) or options.force:
            if isinstance(found, NoPlan):
                print(f"{bundle.name}: {found}", file=sys.stderr)
            with progress(f"building {bundle.name} for {cuda.device.name}") as report:
                found = build_plan(bundle, wanted, cuda=cuda, plugin_library=library, report=report)
        else:
            print(f"{bundle.name}: a plan that fits is here; --force builds anew", file=sys.stderr)
    # Proves that it loads and gives the masks that were recorded at export.
    engine = open_engine(bundle, "tensorrt", compiled_head=found.options.plugins)
    lines = [*found.render(), f"checked with the golden picture on {engine.description}"]
    engine.close()
    _tell(options, "\n".join(lines), found.to_dict())
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from edgeseg.bundle import Bundle

    _check_json(options)
    bundle = Bundle.open(options.bundle, public_key=options.public_key)
    spec = bundle.spec
    order = spec.preprocessing.order.upper()
    lines = [
        f"{spec.name}: {spec.task} segmentation with {spec.architecture}",
        f"  file          {bundle.model_path}",
        f"  size          {len(bundle.model.content) / 1e6:.1f} MB",
        f"  input         image uint8 (1, {spec.height}, {spec.width}, 3) BGR; frames are fitted "
        f"to it by {spec.fit}",
        f"  output        {_promised_outputs(spec)}",
        f"  in the graph  {order}, mean {spec.preprocessing.mean}, std {spec.preprocessing.std}",
        f"  classes       {', '.join(spec.classes)}",
        f"  golden pair   seed {bundle.golden.seed}"
        + ("" if bundle.golden.is_proof else ", in which nothing was found: it proves nothing"),
    ]
    for title in ("provenance", "verification", "accuracy"):
        if bundle.manifest.get(title):
            lines.append(f"  {title}")
            lines += [
                f"    {line}" for line in json.dumps(bundle.manifest[title], indent=2).splitlines()
            ]
    content: dict[str, object] = {
        "spec": json.loads(spec.to_json()),
        "manifest": dict(bundle.manifest),
    }
    quantization = bundle.manifest.get("quantization")
    if quantization:
        floats = [str(name) for name in _listed(quantization.get("floats"))]
        lines += [
            "  quantization",
            f"    layers in floating point: {', '.join(floats) or 'none'}",
            f"    calibrated with {_calibrated_with(quantization)}",
        ]
    placement = _placement(bundle)
    if placement is not None:
        lines += ["  placement for TensorRT", *(f"    {line}" for line in placement.lines())]
        content["placement"] = placement.to_dict()
    _tell(options, "\n".join(lines), content)
    return 0


def _promised_outputs(spec: ModelSpec) -> str:
    if spec.task == "instance":
        within = "the network's input" if spec.mask_extent == "image" else "the box"
        return (
            f"at most {spec.capacity} instances: boxes, scores, labels, count, and masks uint8 "
            f"of {spec.mask_height}x{spec.mask_width} over {within}"
        )
    more = ", confidence of the same shape" if spec.confidence else ""
    return f"class_map uint8 (1, {spec.height}, {spec.width}){more}"


def _calibrated_with(quantization: Mapping[str, Any]) -> str:
    sets = [
        entry for entry in _listed(quantization.get("calibration")) if isinstance(entry, Mapping)
    ]
    return ", ".join(f"{entry.get('frames')} frames of {entry.get('source')}" for entry in sets)


def _listed(value: object) -> list[Any]:
    """``value`` if it is a list: a manifest may be anybody's."""
    return value if isinstance(value, list) else []


def _sign(options: argparse.Namespace) -> int:
    from edgeseg.bundle import Bundle
    from edgeseg.signing import sign_folder

    if options.check in (options.public_key is None, options.key is not None):
        raise RequestError(
            "a bundle is signed with --key KEY.pem, and a signature checked with --check "
            "--public-key KEY.pub"
        )
    if options.check:
        bundle = Bundle.open(options.bundle, public_key=options.public_key)
        print(f"{bundle.folder} is what was signed with the key of {options.public_key}")
        return 0
    # What cannot be opened is not signed either.
    bundle = Bundle.open(options.bundle)
    if bundle.folder is None:
        raise RequestError(f"{bundle.model_path} is a lone file; give the bundle's folder")
    print(f"wrote {sign_folder(bundle.folder, options.key)}")
    return 0


def _placement(bundle: Bundle) -> Placement | None:
    """What the linter says of a quantized graph; None for floating point, and without onnx."""
    if not bundle.model.is_quantized():
        return None
    if importlib.util.find_spec("onnx") is None:
        print(
            "edgeseg: the placement of the quantization is not checked, since that needs onnx; "
            "pip install 'edgeseg[export]' adds it",
            file=sys.stderr,
        )
        return None
    import onnx

    from edgeseg.calibration.lint import lint

    return lint(onnx.load_model_from_string(bundle.model.content))


def _models(options: argparse.Namespace) -> int:
    from edgeseg.export.catalogue import catalogue

    _check_json(options)
    entries = catalogue()
    rows = [("model", "task", "size", "parameters", "GMACs", "checkpoints", "licence")]
    rows += [
        (
            entry.name,
            entry.task,
            entry.size,
            f"{entry.parameters / 1e6:.1f} M",
            f"{entry.macs / 1e9:.1f}",
            entry.checkpoints,
            entry.licence,
        )
        for entry in entries
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            text.rjust(width) if column in (3, 4) else text.ljust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    _tell(options, "\n".join(lines), {"models": [asdict(entry) for entry in entries]})
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from edgeseg.doctor import examine

    _check_json(options)
    diagnosis = examine()
    _tell(options, diagnosis.render(), diagnosis.to_dict())
    return diagnosis.exit_code


def _kernels(options: argparse.Namespace) -> int:
    from edgeseg.kernels.build import build, build_cuda, build_tensorrt

    directory = None if options.output is None else Path(options.output)
    headers = None if options.tensorrt_headers is None else Path(options.tensorrt_headers)
    architectures = None if options.arch is None else options.arch.split(",")
    if headers is not None and not options.tensorrt:
        raise RequestError("--tensorrt-headers goes with --tensorrt, which was not given.")
    if architectures is not None and not (options.cuda or options.tensorrt):
        raise RequestError("--arch goes with --cuda or --tensorrt, and neither was given.")
    if options.tensorrt:
        made = list(build_tensorrt(directory, headers, architectures))
    elif options.cuda:
        made = [build_cuda(directory, architectures)]
    else:
        made = [build(directory)]
    for path in made:
        print(f"built {path}")
    return 0
