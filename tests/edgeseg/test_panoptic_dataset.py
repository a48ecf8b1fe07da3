"""Segments of generated streets, against their class maps and objects."""

from __future__ import annotations

import numpy as np
import pytest

from edgeseg.dataset import open_dataset
from edgeseg.errors import RequestError
from edgeseg.instance_dataset import open_instances
from edgeseg.panoptic_dataset import open_panoptic
from edgeseg.panoptic_quality import VOID, PanopticQuality

URI = "synthetic:?size=200x280&frames=3"


def test_segments_are_the_classes_and_the_objects() -> None:
    data = open_panoptic(URI, "val")
    semantic, instances = open_dataset(URI, "val"), open_instances(URI, "val")
    assert {data.classes[label] for label in data.things} == set(instances.classes)
    assert (len(data), data.title, data.split) == (3, semantic.title, "val")
    crowds = 0
    for sample, pixel_wise, objects in zip(data, semantic, instances, strict=True):
        np.testing.assert_array_equal(sample.pixels, pixel_wise.pixels)
        assert sample.name == pixel_wise.name == objects.name
        labels = np.full(sample.ids.shape, 99)
        things = {}
        for segment in sample.segments:
            where = sample.ids == segment.id
            labels[where] = segment.label
            if segment.label in data.things:
                things[where.tobytes()] = (data.classes[segment.label], segment.crowd)
                crowds += segment.crowd
            else:
                assert not segment.crowd
        np.testing.assert_array_equal(labels, pixel_wise.labels)
        assert things == {
            one.mask(200, 280).tobytes(): (instances.classes[one.label], one.crowd)
            for one in objects.annotations
        }
        assert len({segment.id for segment in sample.segments} | {VOID}) == 1 + len(sample.segments)
    assert crowds
    assert data.hashes() == semantic.hashes()


def test_the_truth_is_of_the_best_quality() -> None:
    data = open_panoptic(URI, "val")
    quality = PanopticQuality(len(data.classes), data.things)
    for sample in data:
        quality.update(sample.ids, sample.segments, sample.ids, sample.segments)
    assert quality.all().pq == quality.things().pq == quality.stuff().pq == 1


@pytest.mark.parametrize("uri", ["coco:x", "camvid:x", "synthetic", ""])
def test_uris_that_cannot_be(uri: str) -> None:
    with pytest.raises(RequestError, match="a data set with classes and objects is synthetic:"):
        open_panoptic(uri, "val")
    with pytest.raises(RequestError, match="'frame' came"):
        open_panoptic("synthetic:?frame=1", "val")
