"""How fast a bundle will be on a board that is not here: a roofline over its layers.

Calibrated against published speeds (`published.py`), and told as an interval.
"""

from edgeseg.estimate.devices import DEVICES, Device, device, devices
from edgeseg.estimate.layers import Layer, Network, Wanted
from edgeseg.estimate.speed import DeviceEstimate, Estimate, LayerEstimate, estimate

__all__ = [
    "DEVICES",
    "Device",
    "DeviceEstimate",
    "Estimate",
    "Layer",
    "LayerEstimate",
    "Network",
    "Wanted",
    "device",
    "devices",
    "estimate",
]
