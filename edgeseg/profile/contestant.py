"""Models that are open side by side, each measured in short blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeseg.errors import EngineError, RequestError
from edgeseg.model import Model, load
from edgeseg.pipeline import Pipeline
from edgeseg.postprocess import NOTHING_MORE, Postprocessing
from edgeseg.profile.frames import KeptFrames, kept_frames
from edgeseg.profile.page import work_ms
from edgeseg.profile.setting import Setting
from edgeseg.profile.timeline import Timeline
from edgeseg.sensors import Sensors

if TYPE_CHECKING:
    from edgeseg.frame import Pixels

__all__ = ["Block", "Contestant", "Contestants", "contestants"]

_BLOCK_S = 0.4
# The first masks of a block meet cold caches and threads that are still at the last one's work.
_LEFT_OUT = 2
_LEAST, _MOST = 2, 5000
_PILOT = 2


@dataclass(frozen=True)
class Block:
    """One measurement of a setting.

    ``seconds_per_frame``: from finished mask to finished mask. ``work_ms``: median work on a frame,
    from pixels to mask. ``joules_per_frame``: None where power is not available.
    """

    seconds_per_frame: float
    work_ms: float
    joules_per_frame: float | None = None


def check_length(frames: int | None, seconds: float | None) -> None:
    """RequestError when nothing can be measured in so many frames or seconds."""
    if seconds is not None and not 0 < seconds < math.inf:
        raise RequestError(f"a profile takes more than 0 seconds, and {seconds} came")
    if frames is not None and frames < 2:
        raise RequestError(f"a profile takes 2 frames or more, and {frames} came")


class Contestant:
    """One opened model, and how many frames a block of it has."""

    def __init__(self, model: Model, pictures: Sequence[Pixels], sensors: Sensors) -> None:
        self._model = model
        self._pictures = pictures
        self._sensors = sensors
        self._frames = _PILOT
        self.throttled: bool | None = None

    @property
    def model(self) -> Model:
        """What is measured."""
        return self._model

    @property
    def description(self) -> str:
        """One line for a person: library, device, threads."""
        return self._model.engine.description

    @property
    def network_size(self) -> tuple[int, int]:
        """(height, width) of the network's input."""
        return self._model.spec.height, self._model.spec.width

    def prepare(self, warm_up: int, *, frames: int | None, block_s: float | None) -> None:
        """Warms up, and settles the frames of a block: ``frames``, or what ``block_s`` takes."""
        for number in range(warm_up):
            self._model(self._pictures[number % len(self._pictures)])
        if frames is not None:
            self._frames = frames
            return
        wanted_s = _BLOCK_S if block_s is None else block_s
        pilot_s = self.measure().seconds_per_frame
        self._frames = min(max(math.ceil(wanted_s / pilot_s), _LEAST), _MOST)

    def measure(self) -> Block:
        """One block; EngineError when the engine gave no masks."""
        timeline = Timeline()
        # What it says is of the time since the reading before.
        self._sensors.read()
        with Pipeline(
            self._model.engine,
            KeptFrames(self._pictures, self._frames + _LEFT_OUT),
            postprocessing=self._model.postprocessing,
        ) as pipeline:
            for result in pipeline:
                timeline.add(result)
        reading = self._sensors.read()
        if reading.throttled is not None:
            self.throttled = bool(self.throttled) or reading.throttled
        seconds = timeline.seconds
        if len(seconds) < _LEFT_OUT + 2 or not seconds[-1] > seconds[_LEFT_OUT]:
            raise EngineError(f"{self.description} gave {len(seconds)} masks, too few to measure")
        per_frame = float(seconds[-1] - seconds[_LEFT_OUT]) / (len(seconds) - 1 - _LEFT_OUT)
        joules = None if reading.power_w is None else reading.power_w * per_frame
        return Block(per_frame, work_ms(pipeline.ledger.summary()), joules)


class Contestants:
    """Those of one comparison, on the same pictures."""

    def __init__(self, found: Sequence[Contestant], pictures: Sequence[Pixels]) -> None:
        self.all = tuple(found)
        self.frame_size = (pictures[0].shape[0], pictures[0].shape[1])

    def prepare(self, warm_up: int, *, frames: int | None, block_s: float | None) -> None:
        """Prepares each, see `Contestant.prepare`."""
        for contestant in self.all:
            contestant.prepare(warm_up, frames=frames, block_s=block_s)

    def throttled(self) -> bool | None:
        """Whether the machine slowed down in any block; None where it does not say."""
        told = [each.throttled for each in self.all if each.throttled is not None]
        return any(told) if told else None


@contextmanager
def contestants(
    settings: Sequence[Setting], uri: str, postprocessing: str | Postprocessing = NOTHING_MORE
) -> Iterator[Contestants]:
    """The settings, opened side by side in one process, and closed when the block ends."""
    pictures = kept_frames(uri)
    with ExitStack() as stack:
        sensors = Sensors()
        stack.callback(sensors.close)
        found = []
        best: str | None = None
        for setting in settings:
            model = load(
                setting.bundle,
                engine=setting.engine or best,
                threads=setting.threads,
                compiled_head=setting.compiled_head,
                postprocessing=postprocessing,
            )
            found.append(Contestant(stack.enter_context(model), pictures, sensors))
            if setting.engine is None:
                # Looked for once, and told once what is passed over.
                best = model.engine.name
        yield Contestants(found, pictures)
