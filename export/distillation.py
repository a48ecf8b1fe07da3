"""What a small network learns from a large one, or from itself before it was pruned.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531); Shu et
al., "Channel-wise Knowledge Distillation for Dense Prediction" (ICCV 2021, arXiv 2011.13256);
Romero et al., "FitNets" (arXiv 1412.6550) for features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeseg.errors import RequestError
from edgeseg.export.models.yolact import Heads

__all__ = [
    "Distillation",
    "Imitation",
    "channel_divergence",
    "head_imitation",
    "semantic_imitation",
    "softened_divergence",
]

#: how much YOLACT's parts count, as its own loss weighs them
_BOX, _CLASS, _MASK = 1.5, 1.0, 6.125


@dataclass(frozen=True)
class Distillation:
    """How much is learned from the labels, and how much from a teacher.

    The loss is ``alpha`` times that of the labels, ``1 - alpha`` times that of the teacher's
    outputs, plus ``channels`` times the channel-wise divergence of semantic logits and ``features``
    times the distance of inner maps. Outputs are compared at ``temperature``: the higher, the more
    the classes count that the teacher finds unlikely. ``channel_temperature`` is that of positions.
    ``layers``: pairs [student's module, teacher's module] whose maps are compared.

    Sources ``frames:`` have no labels; the teacher gives them theirs, where it is sure by
    ``confidence``, 0 to 1, on at most ``frames`` frames of each.
    """

    alpha: float = 0.5
    temperature: float = 2.0
    channels: float = 0.0
    channel_temperature: float = 4.0
    features: float = 0.0
    layers: tuple[tuple[str, str], ...] = ()
    confidence: float = 0.9
    frames: int = 200

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise RequestError(
                f"alpha of a distillation, the labels' share, is 0 to 1, and {self.alpha} came"
            )
        if self.temperature <= 0 or self.channel_temperature <= 0:
            raise RequestError("a temperature is above 0")
        if self.channels < 0 or self.features < 0:
            raise RequestError("channels and features of a distillation are 0 or more")
        if bool(self.layers) != (self.features > 0):
            raise RequestError(
                "features of a distillation above 0 need layers, pairs of [student's module, "
                "teacher's module], and layers need features above 0"
            )
        if not 0 <= self.confidence <= 1:
            raise RequestError(
                f"confidence of a distillation is 0 to 1, and {self.confidence} came"
            )
        if self.frames < 1:
            raise RequestError(f"frames of a distillation are 1 or more, and {self.frames} came")
        if any(len(pair) != 2 for pair in self.layers):
            raise RequestError("layers of a distillation are pairs [student's, teacher's]")


def softened_divergence(
    student: Tensor, teacher: Tensor, temperature: float, weights: Tensor | None = None
) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over all but the class axis.

    ``student``, ``teacher``: (N, classes, ...) logits. The factor keeps the gradient's size as the
    temperature grows (arXiv 1503.02531, section 2). ``weights``: (N, ...) for a weighted mean.
    """
    wanted = functional.log_softmax(teacher.float() / temperature, dim=1)
    found = functional.log_softmax(student.float() / temperature, dim=1)
    each = (wanted.exp() * (wanted - found)).sum(dim=1)
    if weights is None:
        return each.mean() * temperature**2
    return (each * weights).sum() / weights.sum().clamp(min=1e-6) * temperature**2


def channel_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL between where the teacher and the student see each class; mean over (N, classes).

    ``student``, ``teacher``: (N, classes, H, W) logits. Each channel is made a distribution over
    the positions by a softmax (arXiv 2011.13256, equations 3 to 5).
    """
    wanted = functional.log_softmax(teacher.float().flatten(2) / temperature, dim=2)
    found = functional.log_softmax(student.float().flatten(2) / temperature, dim=2)
    return (wanted.exp() * (wanted - found)).sum(dim=2).mean() * temperature**2


def head_imitation(student: Heads, teacher: Heads, temperature: float) -> dict[str, Tensor]:
    """How far a YOLACT's raw heads are from those of another with the same priors.

    "soft class": softened divergence of all priors, each weighted by the probability that the
    teacher sees an object there, so that the countless background ones do not drown the rest, plus
    the same mean over all. "soft box" and "soft mask": smooth L1 of the raw boxes and squared
    difference of the coefficients, weighted alike; "soft prototypes": squared difference over the
    teacher's mean square. A prototype means something only with its coefficients, so the student's
    must be in the teacher's order: it has to begin as the teacher or a pruned copy of it.

    RequestError when the heads are of different shapes.
    """
    for name in ("loc", "conf", "mask", "proto"):
        mine, theirs = student[name].shape, teacher[name].shape
        if mine != theirs:
            raise RequestError(
                f"a teacher has heads as its student's, and its {name} is {tuple(theirs)} where "
                f"the student's is {tuple(mine)}; take one of the same priors and classes"
            )
    conf = teacher["conf"].float()
    objects = 1 - conf.softmax(dim=2)[..., 0]
    total = objects.sum().clamp(min=1e-6)
    classes = (student["conf"].float().transpose(1, 2), conf.transpose(1, 2))
    box = functional.smooth_l1_loss(
        student["loc"].float(), teacher["loc"].float(), reduction="none"
    ).sum(dim=2)
    mask = (student["mask"].float() - teacher["mask"].float()).square().mean(dim=2)
    wanted = teacher["proto"].float()
    prototypes = (student["proto"].float() - wanted).square().mean()
    return {
        "soft class": _CLASS
        * (
            softened_divergence(*classes, temperature, objects)
            + softened_divergence(*classes, temperature)
        ),
        "soft box": _BOX * (box * objects).sum() / total,
        "soft mask": _MASK * (mask * objects).sum() / total,
        "soft prototypes": prototypes / wanted.square().mean().clamp(min=1e-6),
    }


class Imitation(nn.Module):
    """Inner maps of a student brought to the width of a teacher's, and compared.

    ``layers``: pairs (student's module, teacher's module). A 1x1 convolution, learned with the
    student and thrown away after, makes up for another number of channels; maps of another size
    are resized bilinearly. RequestError for modules that do not exist or give no map.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        layers: Sequence[tuple[str, str]],
        x: Tensor,
    ) -> None:
        super().__init__()
        self._layers = tuple(layers)
        self._maps: dict[str, dict[str, Tensor]] = {"student": {}, "teacher": {}}
        names = [[pair[index] for pair in layers] for index in (0, 1)]
        for network, who, wanted in zip((student, teacher), self._maps, names, strict=True):
            self._watch(network, who, wanted)
        with torch.no_grad():
            for network in (student, teacher):
                was = network.training
                network.eval()(x)
                network.train(was)
        self.projectors = nn.ModuleList()
        for mine, theirs in self._layers:
            narrow = self._maps["student"][mine].shape[1]
            wide = self._maps["teacher"][theirs].shape[1]
            self.projectors.append(nn.Conv2d(narrow, wide, 1))

    def _watch(self, network: nn.Module, who: str, names: Sequence[str]) -> None:
        modules = dict(network.named_modules())
        for name in names:
            if name not in modules:
                raise RequestError(
                    f"the {who} has no module {name!r}; its first are "
                    f"{', '.join(list(modules)[1:9])}"
                )

            def keep(_: nn.Module, inputs: object, output: object, *, name: str = name) -> None:
                if not isinstance(output, Tensor) or output.ndim != 4:
                    raise RequestError(
                        f"module {name!r} of the {who} gives no map of (N, channels, H, W)"
                    )
                self._maps[who][name] = output

            modules[name].register_forward_hook(keep)

    def forward(self) -> Tensor:
        """Mean over the layers of the mean squared difference over the teacher's mean square.

        Of the maps that both networks gave when they last ran.
        """
        losses = []
        for (mine, theirs), projector in zip(self._layers, self.projectors, strict=True):
            wanted = self._maps["teacher"][theirs].detach().float()
            found = projector(self._maps["student"][mine].float())
            if found.shape[2:] != wanted.shape[2:]:
                found = functional.interpolate(
                    found, size=wanted.shape[2:], mode="bilinear", align_corners=False
                )
            losses.append((found - wanted).square().mean() / wanted.square().mean().clamp(min=1e-6))
        return torch.stack(losses).mean()


def semantic_imitation(
    student: Tensor, teacher: Tensor, settings: Distillation
) -> Mapping[str, Tensor]:
    """Parts of what semantic logits (N, classes, H, W) are off, without the factors of the parts.

    RequestError when the classes differ.
    """
    if student.shape[1] != teacher.shape[1]:
        raise RequestError(
            f"a teacher has the classes of its student, and it gives {teacher.shape[1]} where the "
            f"student gives {student.shape[1]}"
        )
    if teacher.shape[2:] != student.shape[2:]:
        teacher = functional.interpolate(
            teacher, size=student.shape[2:], mode="bilinear", align_corners=False
        )
    parts = {"soft": softened_divergence(student, teacher, settings.temperature)}
    if settings.channels:
        parts["channels"] = channel_divergence(student, teacher, settings.channel_temperature)
    return parts
