"""How fast a model is here, frame to finished mask, and where the time goes."""

from __future__ import annotations

from edgeseg.profile.comparison import Comparison, compare
from edgeseg.profile.machine import MachineUse, peak_rss_mb
from edgeseg.profile.measurement import Profile, profile
from edgeseg.profile.page import DEFINITIONS, speed_figures, stage_blocks, work_ms
from edgeseg.profile.setting import Setting
from edgeseg.profile.tuning import Sweep, sweep

__all__ = [
    "DEFINITIONS",
    "Comparison",
    "MachineUse",
    "Profile",
    "Setting",
    "Sweep",
    "compare",
    "peak_rss_mb",
    "profile",
    "speed_figures",
    "stage_blocks",
    "sweep",
    "work_ms",
]
