"""A loaded model: call it on a frame, or stream it over a camera."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from edgeseg.bundle import Bundle
from edgeseg.engine import Engine, open_engine
from edgeseg.engine.device_frame import frame_of
from edgeseg.frame import Frame
from edgeseg.geometry import Geometry
from edgeseg.pipeline import Pipeline
from edgeseg.postprocess import NOTHING_MORE, Postprocessing
from edgeseg.result import AnyResult, result_of
from edgeseg.source import Source, open_source
from edgeseg.spec import ModelSpec

__all__ = ["Model", "load"]


class Model:
    """A bundle on an engine. Also a context manager; ``close`` gives the memory back."""

    def __init__(
        self, bundle: Bundle, engine: Engine, postprocessing: Postprocessing = NOTHING_MORE
    ) -> None:
        postprocessing.check(bundle.spec)
        self._bundle = bundle
        self._engine = engine
        self._postprocessing = postprocessing

    @property
    def bundle(self) -> Bundle:
        """Where the model came from."""
        return self._bundle

    @property
    def engine(self) -> Engine:
        """What runs it."""
        return self._engine

    @property
    def postprocessing(self) -> Postprocessing:
        """What is done after the network."""
        return self._postprocessing

    @property
    def spec(self) -> ModelSpec:
        """Its classes, colours and network size."""
        return self._bundle.spec

    def __call__(self, frame: Any) -> AnyResult:
        """The classes, or the instances, of any (height, width, 3) uint8 BGR array or ``Frame``.

        An array is numpy's, or has DLPack or a CUDA array interface; one on the GPU is read there
        by TensorRT, and copied to the host for other engines. FrameError, with the conversion to
        use, for anything else.
        """
        taken = frame if isinstance(frame, Frame) else frame_of(frame)
        geometry = Geometry.between(taken.height, taken.width, self.spec)
        outputs = self._engine.submit(self._engine.prepare(taken, geometry)).outputs()
        return result_of(outputs, taken, geometry, self.spec, self._postprocessing)

    def stream(
        self, source: str | int | os.PathLike[str] | Source, *, frames: int | None = None
    ) -> Iterator[AnyResult]:
        """Results of a camera, video, folder or stream, in order, as they are finished.

        ``source``: a URI (see ``open_source``), a camera's number, a path, or an opened source.
        ``frames``: stop after so many results. A live source gives its newest frame and drops what
        the model is too slow for; a file drops nothing. Reading, inference and your loop overlap.
        The source is closed when the loop ends, however it ends.

        SourceError when the source cannot be opened.
        """
        opened = (
            source
            if isinstance(source, Source)
            else open_source(os.fspath(source) if isinstance(source, os.PathLike) else str(source))
        )
        return self._results(
            Pipeline(self._engine, opened, max_frames=frames, postprocessing=self._postprocessing)
        )

    @staticmethod
    def _results(pipeline: Pipeline) -> Iterator[AnyResult]:
        with pipeline:
            yield from pipeline

    def close(self) -> None:
        """Gives the engine's memory back; the model must not be called afterwards."""
        self._engine.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def load(
    source: str | os.PathLike[str] = "streets",
    *,
    engine: str | None = None,
    threads: int = 0,
    compiled_head: bool | None = None,
    postprocessing: str | Postprocessing = NOTHING_MORE,
    public_key: str | os.PathLike[str] | None = None,
) -> Model:
    """The model of a bundle, opened on the best engine that is here.

    ``source``: a bundle's folder, an ONNX file made by EdgeSeg, or a model that ships with it
    (``"streets"``, ``"streets-int8"``, ``"street-objects"``). ``engine``: ``"tensorrt"``,
    ``"openvino"`` or ``"onnxruntime"``; None chooses. TensorRT builds its plan the first time,
    which takes minutes.
    ``threads``: 0 leaves it to the library. ``compiled_head``: False upsamples inside the graph,
    None uses the compiled kernel if it is there. ``postprocessing``: steps after the network, as
    `Postprocessing` or by name, such as ``"refine"``; docs/postprocessing.md has their prices.
    ``public_key``: a PEM file; a bundle that was not signed with the private key that belongs to it
    (`edgeseg sign`) is refused before anything of the model is looked at.

    BundleError, EngineError or RequestError say in one sentence what is wrong and what helps.
    """
    if isinstance(postprocessing, str):
        postprocessing = Postprocessing.parse(postprocessing)
    bundle = Bundle.open(source, public_key=public_key)
    # Before the engine is opened: that may take minutes.
    postprocessing.check(bundle.spec)
    opened = open_engine(bundle, engine, threads=threads, compiled_head=compiled_head)
    return Model(bundle, opened, postprocessing)
