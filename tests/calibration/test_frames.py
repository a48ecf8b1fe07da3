"""Frames to calibrate with: where they come from, what is said about them, what is refused."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseg.calibration import frames as frames_module
from edgeseg.calibration.frames import (
    AIM,
    FEW,
    CalibrationFrames,
    check_overlap,
    open_frames,
    overlap_error,
)
from edgeseg.dataset import SPLIT_SEEDS, open_dataset
from edgeseg.errors import CalibrationError, RequestError
from edgeseg.geometry import Geometry
from edgeseg.spec import ModelSpec, Preprocessing
from edgeseg.synthetic import Street

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
SPEC = ModelSpec(
    name="of a test",
    architecture="none",
    task="semantic",
    height=36,
    width=48,
    classes=("a", "b"),
    colours=((0, 0, 0), (1, 1, 1)),
    ignore=255,
    preprocessing=Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bgr"),
)

Picture = NDArray[np.uint8]


@cache
def street(seed: int, height: int = 72, width: int = 96) -> Picture:
    return Street(height, width, seed=seed).frame(40).pixels


def save(path: Path, picture: Picture) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), picture)
    return path


def numbered(value: int) -> Picture:
    """A picture that survives compression and tells its number, 0 to 255, by its brightness."""
    ramp = np.linspace(-20, 20, 48)[None, :, None] * np.ones((36, 1, 3))
    shaded: Picture = np.clip(value + ramp, 0, 255).astype(np.uint8)
    return shaded


def video(path: Path, length: int, *, codec: str = "MJPG", step: int = 1) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), 10, (48, 36))
    assert writer.isOpened()
    for number in range(length):
        writer.write(numbered(30 + step * number))
    writer.release()
    return path


def number_of(pixels: Picture, step: int) -> int:
    # The codecs darken the ramps by 0.5 to 3.5 levels.
    return round((float(pixels.mean()) - 28) / step)


def same(first: CalibrationFrames, second: CalibrationFrames) -> None:
    """Two sequences of frames with the same names and pixels, one at least."""
    count = 0
    for (name, pixels), (other_name, other) in zip(first, second, strict=True):
        assert name == other_name
        np.testing.assert_array_equal(pixels, other)
        assert pixels.shape == (SPEC.height, SPEC.width, 3)
        assert pixels.dtype == np.uint8
        count += 1
    assert count == len(first) == len(first.hashes) > 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four streets, one of them in a folder below, and files that are none."""
    place = tmp_path / "pictures"
    for seed, name in enumerate(("b.png", "a.png", "below/c.PNG", "d.png")):
        save(place / name, street(seed))
    (place / "readme.md").write_text("no image")
    (place / "._a.png").write_bytes(b"a side file")
    save(place / ".thumbnails/a.png", street(9))
    return place


def test_folder(folder: Path) -> None:
    frames = open_frames(str(folder), SPEC)
    assert [name for name, _ in frames] == ["a.png", "b.png", "below/c.PNG", "d.png"]
    assert frames.title == "folder pictures"
    assert frames.skipped == ()
    assert frames.sizes == {(72, 96): 4}
    assert frames.hashes == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in frames.hashes
    }
    for name, pixels in frames:
        picture = cv2.imread(str(folder / name))
        assert picture is not None
        wanted = Geometry.between(72, 96, SPEC).fit(picture)  # type: ignore[arg-type]
        np.testing.assert_array_equal(pixels, wanted)
    same(frames, frames)


def write_list(folder: Path) -> str:
    names = ["a.png", "", "  below/c.PNG ", "a.png", str(folder / "d.png")]
    (folder / "train.txt").write_text("\n".join(names), encoding="utf-8-sig")
    return str(folder / "train.txt")


def write_camvid(folder: Path) -> str:
    for name in ("images/train/x.png", "images/train/y.png", "images/val/z.png"):
        save(folder / name, street(len(name)))
    save(folder / "labels/train/x.png", street(0))
    return f"camvid:{folder}"


@pytest.mark.parametrize(
    ("uri", "title", "names"),
    [
        (write_list, "list train.txt", ["a.png", "below/c.PNG", "{folder}/d.png"]),
        (write_camvid, "CamVid train", ["x.png", "y.png"]),
        (lambda folder: str(folder / "a.png"), "a.png", ["a.png"]),
        (lambda folder: str(video(folder / "clip.avi", 3)), "clip.avi", ["frame 0", "frame 1"]),
        (
            lambda _: "synthetic:?seed=7&size=48x64&frames=5",
            "synthetic streets train",
            ["street 7 frame 0", "street 7 frame 50"],
        ),
    ],
    ids=["list", "camvid", "image", "video", "synthetic"],
)
def test_other_places(
    folder: Path, uri: Callable[[Path], str], title: str, names: list[str]
) -> None:
    frames = open_frames(uri(folder), SPEC)
    assert frames.title == title
    wanted = [name.format(folder=folder) for name in names]
    assert list(frames.hashes)[: len(names)] == wanted
    same(frames, frames)


def test_list_notes_what_is_missing_or_twice(folder: Path) -> None:
    uri = write_list(folder)
    with Path(uri).open("a") as file:
        file.write("\nnowhere/e.png\nbelow")
    frames = open_frames(uri, SPEC)
    assert len(frames) == 3
    assert frames.skipped == ("nowhere/e.png", "below")
    assert frames.notes[0] == "1 lines of list train.txt name an image a second time"
    assert frames.notes[1] == (
        "2 of 5 frames could not be read and were skipped: nowhere/e.png, below"
    )


def test_generated_frames_are_hashed_by_their_pixels() -> None:
    frames = open_frames("synthetic:?size=48x64&frames=6", SPEC)
    assert frames.hashes == open_dataset("synthetic:?size=48x64&frames=6", "train").hashes()
    assert frames.pixel_hashes() == frames.hashes
    shown = Street(48, 64, seed=SPLIT_SEEDS["train"], frames=None).frame(50).pixels
    assert frames.hashes["street 0 frame 50"] == hashlib.sha256(shown.tobytes()).hexdigest()


@pytest.mark.parametrize("count", [1, 2, 7, 39, 40, 41])
def test_spread_evenly(tmp_path: Path, count: int) -> None:
    for number in range(40):
        save(tmp_path / f"{number:02}.png", numbered(4 * number))
    frames = open_frames(str(tmp_path), SPEC, count=count)
    found = [int(Path(name).stem) for name in frames.hashes]
    wanted = min(count, 40)
    assert len(set(found)) == wanted
    # As many before the first and after the last as between two, up to rounding.
    gaps = [2 * found[0] + 1, *(b - a for a, b in pairwise(found)), 2 * (39 - found[-1]) + 1]
    assert max(abs(gap - 40 / wanted) for gap in gaps) <= 1


@pytest.mark.parametrize("codec", ["MJPG", "mp4v"])
@pytest.mark.parametrize("seek", [1, 1000])
def test_video_over_its_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str, seek: int
) -> None:
    monkeypatch.setattr(frames_module, "_SEEK", seek)
    clip = video(tmp_path / ("a.avi" if codec == "MJPG" else "a.mp4"), 50, codec=codec, step=4)
    frames = open_frames(str(clip), SPEC, count=5)
    assert list(frames.hashes) == [f"frame {index}" for index in (5, 15, 25, 35, 45)]
    assert [number_of(pixels, 4) for _, pixels in frames] == [5, 15, 25, 35, 45]
    assert frames.hashes == frames.pixel_hashes()
    same(frames, frames)


def test_video_that_cannot_be_sought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = video(tmp_path / "a.avi", 50, step=4)
    wanted = open_frames(str(clip), SPEC, count=5)
    tries: list[int] = []

    def sought(capture: cv2.VideoCapture, index: int) -> bool:
        # Works once, wrongly, and never again: what came of it must not stay.
        tries.append(index)
        capture.set(cv2.CAP_PROP_POS_FRAMES, 1)
        return len(tries) == 1 and capture.grab()

    monkeypatch.setattr(frames_module, "_SEEK", 1)
    monkeypatch.setattr(frames_module, "_sought", sought)
    frames = open_frames(str(clip), SPEC, count=5)
    assert tries == [5, 15]
    assert frames.hashes == wanted.hashes
    same(frames, wanted)


@pytest.mark.parametrize("promised", [80, None])
def test_video_with_a_wrong_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, promised: int | None
) -> None:
    clip = video(tmp_path / "a.avi", 40)
    monkeypatch.setattr("edgeseg.source.video.promised_length", lambda capture: promised)
    frames = open_frames(str(clip), SPEC, count=4)
    assert list(frames.hashes) == [f"frame {index}" for index in (5, 15, 25, 35)]
    header = "the header of a.avi promises 80 frames and 40 could be read"
    assert (header in frames.notes) == (promised is not None)
    same(frames, frames)


def test_digest_follows_names_and_contents(folder: Path) -> None:
    def digest() -> str:
        return open_frames(str(folder), SPEC).digest()

    first = digest()
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert digest() == first
    (folder / "a.png").rename(folder / "a0.png")
    renamed = digest()
    assert renamed != first
    save(folder / "a0.png", street(77))
    assert digest() not in (first, renamed)


def test_sizes_are_fitted_and_noted(folder: Path) -> None:
    for name, size in (("e.png", (120, 60)), ("f.png", (36, 48)), ("g.png", (36, 48))):
        save(folder / name, street(3, *size))
    spec = replace(SPEC, fit="letterbox")
    frames = open_frames(str(folder), spec)
    assert frames.sizes == {(72, 96): 4, (36, 48): 2, (120, 60): 1}
    assert (
        "frames come in 3 sizes (4 of 72x96, 2 of 36x48, 1 of 120x60); all were brought to "
        "36x48 (letterbox)"
    ) in frames.notes
    fitted = dict(frames)
    assert {pixels.shape for pixels in fitted.values()} == {(36, 48, 3)}
    np.testing.assert_array_equal(fitted["f.png"], street(3, 36, 48))
    # 120x60 becomes 36x18 in the middle.
    assert (fitted["e.png"][:, :15] == 114).all()
    assert (fitted["e.png"][:, 33:] == 114).all()


def test_unreadable_files_are_named(folder: Path) -> None:
    for name in ("bad1.png", "bad2.jpg"):
        (folder / name).write_bytes(b"no picture")
    (folder / "empty.png").touch()
    frames = open_frames(str(folder), SPEC)
    assert frames.skipped == ("bad1.png", "bad2.jpg", "empty.png")
    assert len(frames) == 4
    assert set(frames.hashes).isdisjoint(frames.skipped)
    assert frames.notes[0] == (
        "3 of 7 frames could not be read and were skipped: bad1.png, bad2.jpg, empty.png"
    )


@pytest.mark.parametrize("change", ["other", "gone", "damaged"])
def test_change_during_calibration(folder: Path, change: str) -> None:
    frames = open_frames(str(folder), SPEC)
    if change == "gone":
        (folder / "b.png").unlink()
    elif change == "other":
        save(folder / "b.png", street(55))
    else:
        (folder / "b.png").write_bytes(b"")
    with pytest.raises(CalibrationError, match=r"b\.png of folder pictures has changed or gone"):
        list(frames)


def test_video_cut_during_calibration(tmp_path: Path) -> None:
    frames = open_frames(str(video(tmp_path / "a.avi", 40)), SPEC, count=4)
    video(tmp_path / "a.avi", 20)
    with pytest.raises(CalibrationError, match=r"frame 25 of a\.avi has changed or gone"):
        list(frames)


def few_notes(frames: CalibrationFrames) -> list[str]:
    return [note for note in frames.notes if f"aim at {AIM} or more" in note]


@pytest.mark.parametrize(
    ("number", "copies", "wanted"),
    [
        (1, 1, "1 frame may not"),
        (FEW - 1, 1, f"{FEW - 1} frames may not"),
        (FEW, 1, None),
        (5, 8, "5 distinct frames among 40 may not"),
        (1, 3, "1 distinct frame among 3 may not"),
    ],
)
def test_few_frames(tmp_path: Path, number: int, copies: int, wanted: str | None) -> None:
    rng = np.random.default_rng(0)
    for seed in range(number):
        shown = street(seed)
        for copy in range(copies):
            # A camera that stands still gives the same but for its noise.
            noise = rng.normal(0, 4 * bool(copy), shown.shape)
            noisy = np.clip(shown + noise, 0, 255).astype(np.uint8)
            save(tmp_path / f"{seed}-{copy}.png", noisy)
    notes = few_notes(open_frames(str(tmp_path), SPEC))
    if wanted is None:
        assert notes == []
    else:
        (note,) = notes
        assert note.startswith(wanted)


def uniform(rng: np.random.Generator, height: int = 90, width: int = 120) -> Picture:
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def gaussian(rng: np.random.Generator, mean: float, deviation: float) -> Picture:
    levels = rng.normal(mean, deviation, (90, 120, 3))
    made: Picture = np.clip(levels, 0, 255).astype(np.uint8)
    return made


def recoded(picture: Picture, quality: int) -> Picture:
    written, contents = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert written
    return cv2.imdecode(contents, cv2.IMREAD_COLOR)  # type: ignore[return-value]


def resized(picture: Picture, height: int, width: int) -> Picture:
    return cv2.resize(picture, (width, height))  # type: ignore[return-value]


NOISE: dict[str, Callable[[np.random.Generator], Picture]] = {
    "uniform": uniform,
    "grey": lambda rng: uniform(rng)[:, :, :1].repeat(3, axis=2),
    "small": lambda rng: uniform(rng, 32, 48),
    "large": lambda rng: uniform(rng, 720, 960),
    "gaussian": lambda rng: gaussian(rng, 128, 40),
    "dim": lambda rng: gaussian(rng, 10, 5),
    "faint": lambda rng: gaussian(rng, 100, 0.6),
    "compressed": lambda rng: recoded(uniform(rng, 360, 480), 10),
    "enlarged": lambda rng: resized(uniform(rng, 60, 80), 360, 480),
    "blurred": lambda rng: cv2.GaussianBlur(uniform(rng, 360, 480), (0, 0), 3),  # type: ignore[dict-item,return-value]
    "rows": lambda rng: uniform(rng, 360, 1).repeat(480, axis=1),
    "salt": lambda rng: (255 * (rng.random((90, 120, 1)) < 0.05)).astype(np.uint8).repeat(3, 2),
    "black": lambda rng: np.zeros((90, 120, 3), np.uint8),
    "one colour": lambda rng: np.full((90, 120, 3), rng.integers(0, 256, 3), np.uint8),
}

# What happens to photographs, night, weather and cheap cameras included.
HARDSHIPS: dict[str, Callable[[Picture, np.random.Generator], Picture]] = {
    "none": lambda picture, rng: picture,
    "compressed": lambda picture, rng: recoded(picture, 5),
    "dark": lambda picture, rng: (picture * 0.05).astype(np.uint8),
    "night": lambda picture, rng: spoiled(picture, 0.15, 10, rng),
    "noisy": lambda picture, rng: spoiled(picture, 1.0, 50, rng),
    "brightened": lambda picture, rng: spoiled(spoiled(picture, 0.08, 4, rng), 8, 0, rng),
    "fog": lambda picture, rng: (picture * 0.1 + 180).astype(np.uint8),
    "blurred": lambda picture, rng: cv2.GaussianBlur(picture, (0, 0), 15),  # type: ignore[dict-item,return-value]
    "negative": lambda picture, rng: 255 - picture,
    "tiny": lambda picture, rng: resized(picture, 24, 32),
}


def spoiled(picture: Picture, gain: float, deviation: float, rng: np.random.Generator) -> Picture:
    levels = picture * gain + rng.normal(0, deviation, picture.shape)
    made: Picture = np.clip(levels, 0, 255).astype(np.uint8)
    return made


@pytest.mark.parametrize("kind", NOISE)
def test_noise_is_refused(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(1)
    for number in range(5):
        save(tmp_path / f"random/{number}.png", NOISE[kind](rng))
    for number in range(4):
        save(tmp_path / f"random/street{number}.png", street(number))
    with pytest.raises(
        CalibrationError,
        match=r"of the 9 frames of folder random, 5 show noise or nothing \(0\.png, 1\.png, ",
    ):
        open_frames(str(tmp_path / "random"), SPEC)
    # One less, and it is a warning.
    (tmp_path / "random/0.png").unlink()
    notes = open_frames(str(tmp_path / "random"), SPEC).notes
    assert notes[0] == (
        "4 of 8 frames show noise or nothing, which makes ranges worse; take them away: "
        "1.png, 2.png, 3.png, 4.png"
    )


@pytest.mark.parametrize("hardship", HARDSHIPS)
def test_pictures_are_not_refused(tmp_path: Path, hardship: str) -> None:
    rng = np.random.default_rng(2)
    for seed in range(6):
        spoilt = HARDSHIPS[hardship](street(seed, 360, 480), rng)
        save(tmp_path / f"{seed}.png", spoilt)
    notes = open_frames(str(tmp_path), SPEC).notes
    assert not any("noise" in note for note in notes)


@pytest.mark.parametrize("hardship", [name for name in HARDSHIPS if name != "tiny"])
@pytest.mark.parametrize("data", ["camvid/images/train", "coco_mini/train2017"])
def test_photographs_are_not_refused(tmp_path: Path, data: str, hardship: str) -> None:
    files = sorted((SHARED / data).glob("*.jpg"))[::40]
    if not files:
        pytest.skip(f"needs the photographs in {SHARED / data}")
    rng = np.random.default_rng(3)
    for number, file in enumerate(files):
        picture = cv2.imread(str(file))
        assert picture is not None
        spoilt = HARDSHIPS[hardship](picture, rng)  # type: ignore[arg-type]
        save(tmp_path / f"{number}.bmp", spoilt)
    frames = open_frames(str(tmp_path), SPEC)
    assert len(frames) == len(files)
    assert not any("noise" in note for note in frames.notes)


def test_overlap_is_found_by_file_and_by_pixels(tmp_path: Path) -> None:
    pictures = {f"p{seed}": recoded(street(seed), 90) for seed in range(6)}
    for stem, shown in pictures.items():
        save(tmp_path / f"camvid/images/val/{stem}.bmp", shown)
        labels: Picture = np.zeros(shown.shape[:2], np.uint8)
        save(tmp_path / f"camvid/labels/val/{stem}.png", labels)
    place = tmp_path / "calibration"
    save(place / "other.png", street(50))
    save(place / "file.bmp", pictures["p1"])
    save(place / "stored-again.png", pictures["p4"])
    nudged = pictures["p2"].copy()
    nudged[0, 0, 0] ^= 1
    save(place / "changed.png", nudged)
    frames = open_frames(str(place), SPEC)
    dataset = open_dataset(f"camvid:{tmp_path / 'camvid'}", "val")
    names = check_overlap(frames, dataset)
    assert names == ("file.bmp", "stored-again.png")
    # The file itself is known by its bytes, the other one by its pixels alone.
    held = set(dataset.hashes().values())
    assert [frames.hashes[name] in held for name in names] == [True, False]
    error = overlap_error(names, dataset)
    assert isinstance(error, CalibrationError)
    assert str(error) == (
        "2 frames to calibrate with are also in the evaluation set CamVid val (file.bmp, "
        "stored-again.png), and accuracy measured on what ranges were fitted to flatters; "
        "calibrate with other frames, or let --allow-overlap go on and record it"
    )
    many = overlap_error([f"{number}.png" for number in range(8)], dataset)
    assert "8 frames to calibrate with are" in str(many)
    assert "4.png and 3 more)" in str(many)
    assert "1 frame to calibrate with is also" in str(overlap_error(["a.png"], dataset))


@pytest.mark.parametrize(("split", "overlap"), [("train", 4), ("val", 0)])
def test_overlap_of_generated_frames(split: str, overlap: int) -> None:
    frames = open_frames("synthetic:?size=48x64&frames=6", SPEC)
    dataset = open_dataset("synthetic:?size=48x64&frames=4", split)
    assert check_overlap(frames, dataset) == tuple(frames.hashes)[:overlap]


def make_empty_folder(folder: Path) -> str:
    (folder / "empty").mkdir()
    return str(folder / "empty")


def make_unreadable_folder(folder: Path) -> str:
    for number in range(7):
        (folder / f"bad/{number}.png").parent.mkdir(exist_ok=True)
        (folder / f"bad/{number}.png").write_bytes(b"no picture")
    return str(folder / "bad")


def make_data_set(folder: Path) -> str:
    write_camvid(folder)
    return str(folder)


def make_file(name: str, contents: bytes) -> Callable[[Path], str]:
    def made(folder: Path) -> str:
        (folder / name).write_bytes(contents)
        return str(folder / name)

    return made


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (lambda folder: str(folder / "nowhere"), r"nowhere does not exist; calibration frames are"),
        (lambda folder: "rtsp://camera/1", "does not exist; calibration frames are a folder"),
        (lambda folder: "coco:somewhere", "does not exist; calibration frames are a folder"),
        (make_empty_folder, r"empty holds no images \(\.png, .*give a video by its own name"),
        (
            make_unreadable_folder,
            r"none of the 7 frames of folder bad can be read \(0\.png, .* 4\.png and 2 more\)",
        ),
        (make_data_set, r"is a data set, .*camvid:.* takes the images of its split train"),
        (lambda folder: f"camvid:{folder}", r"calibrates with DIR/images/train, and .*is no fol"),
        (make_file("a.txt", b" \n\n"), "a.txt lists no images"),
        (make_file("a.lst", b"\xff\xfe\x00"), "a.lst should be a list of images in UTF-8"),
        (make_file("b.txt", b"x.png\ny.png\n"), r"none of the 2 frames of list b\.txt.*x\.png, y"),
        (make_file("c.mp4", b"no video at all"), r"c\.mp4 is no video that OpenCV can read"),
        (make_file("d.mp4", b""), r"d\.mp4 is empty, and a video was promised"),
    ],
    ids=lambda value: None if isinstance(value, str) else getattr(value, "__name__", None),
)
def test_bad_places(folder: Path, uri: Callable[[Path], str], message: str) -> None:
    with pytest.raises(CalibrationError, match=message) as caught:
        open_frames(uri(folder), SPEC)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("uri", "count", "message"),
    [
        ("", 5, "an empty text came"),
        ("camvid:", 5, "needs the folder with images/train"),
        ("synthetic:?speed=3", 5, "'speed' came"),
        ("synthetic:", 0, "a count of 0 came"),
    ],
)
def test_bad_requests(uri: str, count: int, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        open_frames(uri, SPEC, count=count)


def test_one_frame_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than one frame is decoded ahead of what was asked for."""
    for seed in range(6):
        save(tmp_path / f"{seed}.png", street(seed))
    frames = open_frames(str(tmp_path), SPEC)
    decoded: list[int] = []
    decode = frames_module._decoded

    def counted(contents: bytes) -> Picture | None:
        decoded.append(len(contents))
        return decode(contents)

    monkeypatch.setattr(frames_module, "_decoded", counted)
    for number, _ in enumerate(frames, start=1):
        assert len(decoded) == number
