"""What takes bytes that nobody vouches for, and inputs for each that are nearly right."""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import http.client
import io
import json
import os
import socket
from collections.abc import Callable, Iterator
from importlib import util
from pathlib import Path
from random import Random
from typing import Any

import cv2
import numpy as np

from edgeseg import cli
from edgeseg.bundle import GOLDEN_KEY, SPEC_KEY, Bundle
from edgeseg.calibration.recipe import QuantizationRecipe
from edgeseg.engine.attest import Attestation
from edgeseg.engine.cuda import Device
from edgeseg.engine.graph import Graph
from edgeseg.engine.head import opened_graph
from edgeseg.engine.plan import BuildOptions, Plan, find_plan
from edgeseg.errors import BundleError, EdgeSegError
from edgeseg.estimate import Network
from edgeseg.golden import Detection, Golden, InstanceGolden, golden_from_json, golden_image
from edgeseg.instances import InstanceOutputs
from edgeseg.onnxfile import MASK_HEAD, OnnxFile
from edgeseg.result import Outputs
from edgeseg.source import mjpeg
from edgeseg.source.address import Address, without_password
from edgeseg.source.status import FrameLedger
from edgeseg.spec import ModelSpec, Preprocessing
from edgeseg.tomlfile import read_toml
from tests.conftest import Tiny
from tests.fuzz.harness import Target
from tests.fuzz.mutate import mutated_bytes, mutated_json, mutated_protobuf, mutated_text

SEMANTIC = ModelSpec(
    name="tiny",
    architecture="strongest-channel",
    task="semantic",
    height=32,
    width=48,
    classes=("blue", "green", "red"),
    colours=((0, 0, 255), (0, 255, 0), (255, 0, 0)),
    ignore=255,
    preprocessing=Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bgr"),
)
INSTANCE = ModelSpec(
    **{**vars(SEMANTIC), "task": "instance", "capacity": 6, "mask_height": 16, "mask_width": 24}
)


class Manifest(Target):
    """``bundle.json``, in a folder that has more in it than a bundle should."""

    name = "manifest"

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "bundle"
        self._corpus: list[bytes] = []

    def prepare(self) -> None:
        Tiny(SEMANTIC).write(self._folder)
        os.mkfifo(self._folder / "pipe")
        (self._folder / "folder").mkdir()
        (self._folder / "link").symlink_to("report.html")
        (self._folder / "out").symlink_to("/etc/hostname")
        (self._folder / "zero").symlink_to("/dev/zero")
        with (self._folder / "huge").open("wb") as file:
            file.truncate(1 << 40)
        path = self._folder / "bundle.json"
        plain = json.loads(path.read_text(encoding="utf-8"))
        full = {
            **plain,
            "provenance": {"checkpoint": "a.pt", "sha256": "0" * 64, "tools": {"torch": "2.8"}},
            "verification": {"images": 8, "agreement": 0.999},
            "accuracy": [{"data": "CamVid", "miou": 0.63, "per_class": {"blue": 0.5}}],
            "quantization": {
                "floats": ["conv"],
                "calibration": [{"frames": 8, "source": "clip.mp4", "sha256": ["0" * 64]}],
                "recipe": {"ranges": "mse", "percentile": 99.99},
                "scales": {"conv": [0.1, 0.2]},
            },
        }
        self._corpus = [path.read_bytes(), *(json.dumps(each).encode() for each in (plain, full))]
        # Links and pipes that are named with the hash of what they lead to.
        for name in ("link", "pipe", "out", "zero", "huge", "folder"):
            files = {**plain["files"], name: hashlib.sha256(b"<p>a report").hexdigest()}
            self._corpus.append(json.dumps({**full, "files": files}).encode())

    def make(self, rng: Random) -> bytes:
        return mutated_json(rng, self._corpus)

    def read(self, data: bytes) -> None:
        (self._folder / "bundle.json").write_bytes(data)
        with contextlib.redirect_stdout(io.StringIO()):
            cli._inspect(argparse.Namespace(bundle=str(self._folder), json=None, public_key=None))


class Spec(Target):
    """The description in an ONNX file's metadata."""

    name = "spec"

    def __init__(self, folder: Path) -> None:
        self._corpus = [SEMANTIC.to_json().encode(), INSTANCE.to_json().encode()]

    def make(self, rng: Random) -> bytes:
        return mutated_json(rng, self._corpus)

    def read(self, data: bytes) -> None:
        # As `OnnxFile.metadata` gives it.
        spec = ModelSpec.from_json(data.decode("utf-8", "replace"))
        assert ModelSpec.from_json(spec.to_json()) == spec
        "\n".join((spec.name, spec.architecture, *spec.classes)).encode()


class GoldenPair(Target):
    """The golden pair in an ONNX file's metadata."""

    name = "golden"

    def __init__(self, folder: Path) -> None:
        class_map = np.arange(32 * 48, dtype=np.uint8).reshape(32, 48) % 3
        found = Detection(1, 0.75, (1.0, 2.0, 30.5, 20.0), 0.25)
        self._semantic = Outputs(class_map, None)
        self._instances = InstanceOutputs(
            boxes=np.array([[1, 2, 30.5, 20]], np.float32),
            scores=np.array([0.75], np.float32),
            labels=np.array([1], np.int32),
            masks=np.full((1, 16, 24), 64, np.uint8),
        )
        self._corpus = [
            Golden.of(3, class_map).to_json().encode(),
            b'{"seed": 3, "samples": "000102"}',
            InstanceGolden(5, (found, found), 16 * 24).to_json().encode(),
            InstanceGolden(5, (), 16 * 24).to_json().encode(),
        ]

    def make(self, rng: Random) -> bytes:
        return mutated_json(rng, self._corpus)

    def read(self, data: bytes) -> None:
        golden = golden_from_json(data.decode("utf-8", "replace"))
        golden_image(golden.seed, 8, 12)
        for outputs in (self._semantic, self._instances):
            assert 0 <= golden.agreement_of(outputs) <= 1
        assert golden_from_json(golden.to_json()).to_json() == golden.to_json()


class Model(Target):
    """An ONNX file: opened, and rewritten for every engine."""

    name = "onnx"

    def __init__(self, folder: Path) -> None:
        self._path = folder / "model.onnx"
        self._corpus: list[bytes] = []

    def prepare(self) -> None:
        self._corpus = _models()

    def make(self, rng: Random) -> bytes:
        return mutated_protobuf(rng, self._corpus)

    def read(self, data: bytes) -> None:
        self._path.write_bytes(data)
        bundle = Bundle.open(self._path)
        model = bundle.model
        for way in (
            model.is_quantized,
            model.has_operators,
            lambda: opened_graph(model, bundle.spec, compiled_head=True),
            lambda: opened_graph(model, bundle.spec, compiled_head=False),
            lambda: model.for_tensorrt(plugins=True),
            lambda: model.for_tensorrt(plugins=False),
        ):
            # Each on its own: what one refuses, the next may take.
            with contextlib.suppress(EdgeSegError):
                way()


class Layers(Target):
    """An ONNX file's layers, as the builder and `edgeseg estimate` follow them."""

    name = "layers"

    def __init__(self, folder: Path) -> None:
        self._corpus: list[bytes] = []

    def prepare(self) -> None:
        self._corpus = [*_models(), *_graphs()]

    def make(self, rng: Random) -> bytes:
        return mutated_protobuf(rng, self._corpus)

    def read(self, data: bytes) -> None:
        refused = None
        try:
            graph = Graph.read(data)
            graph.precisions()
            graph.operators()
            graph.activation_bytes()
        except BundleError as error:
            refused = error
        for fused in (True, False):
            network = Network.read(data, fused=fused)
            assert network.macs >= 0 and network.moved_bytes >= 0
        if refused is not None:
            raise refused


class Uri(Target):
    """What a user, or a file of cameras, calls a source; nothing is opened."""

    name = "uri"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._corpus = [
            "0", "/dev/video0?width=1280&height=720&fps=30&format=mjpeg", "csi://0?flip=2&fps=29.97",
            "rtsp://user:secret@host:554/path?latency=100&transport=udp", "rtmp://host/live",
            "http://host/video.mjpg?a=b&reconnect=60#timeout=3&verify=0", "udp://@:5000",
            "https://[::1]:8443/x?repeats=1", "gst: v4l2src ! videoconvert?timeout=3",
            "synthetic:?seed=3&size=360x480&live=1&scene=city&frames=9", "clip.mp4?loop=always",
            "frames/*.png?fps=10", "frames", "what?.png", "a?loop=2", "~/x.mp4", "one.jpg?loop=3",
        ]  # fmt: skip
        self._words = [
            "?", "&", "=", "#", "://", "@", ":", "%", "%00", "%ff", "+", "loop=", "fps=", "size=",
            "width=", "height=", "latency=", "timeout=", "reconnect=always", "seed=", "synthetic:",
            "csi://", "rtsp://", "gst:", "http://", "/dev/", "*", "[", "]", "~", "~nobody/",
        ]  # fmt: skip

    def prepare(self) -> None:
        for name in ("clip.mp4", "one.jpg", "a?loop=2", "frames/1.png"):
            path = self._folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"")
        os.chdir(self._folder)

    def make(self, rng: Random) -> bytes:
        text = mutated_text(rng, self._corpus, self._words)
        return text.encode("utf-8", "surrogatepass")

    def read(self, data: bytes) -> None:
        # As Python gives what is no UTF-8 on a command line.
        text = data.decode("utf-8", "surrogateescape")
        assert "p4ssw0rd" not in without_password("rtsp://user:p4ssw0rd@host/" + text)
        address = Address.of(text)
        assert address.kind and address.target is not None and address.shown is not None


class Multipart(Target):
    """The body of an MJPEG stream, in pieces of any size."""

    name = "multipart"

    def __init__(self, folder: Path) -> None:
        pictures = []
        for height, width, quality in ((1, 1, 50), (16, 24, 90), (48, 64, 10)):
            pixels = np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)
            done, encoded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
            assert done
            pictures.append(encoded.tobytes())
        self._corpus = [
            b"".join(_part(picture, length=length) for picture in pictures)
            for length in (True, False)
        ]
        self._corpus += [
            _part(pictures[1]) * 3 + b"--frame--",
            b"--frame\r\nContent-Length: 999999999\r\n\r\n" + pictures[1] + _part(pictures[0]),
            # Byte by byte, these take minutes where the same bytes are looked through again.
            b"--frame\r\n" * 5000 + _part(pictures[0]),
            b"--frame\r\nContent-Length: 40000\r\n\r\n" + b"y" * 90_000 + _part(pictures[0]),
            b"--frame\r\n\r\n" * 300 + _part(pictures[0]),
        ]
        self._types = [
            'multipart/x-mixed-replace; boundary="frame"',
            "multipart/x;boundary=--frame",
        ]

    def make(self, rng: Random) -> bytes:
        kind = mutated_text(rng, self._types) if rng.random() < 0.1 else rng.choice(self._types)
        pieces = rng.choice((1, 7, 100, 1 << 16))
        head = f"{kind}\n{pieces}\n".encode("utf-8", "surrogatepass")
        return head + mutated_bytes(rng, self._corpus)

    def read(self, data: bytes) -> None:
        kind, _, rest = data.partition(b"\n")
        size, _, body = rest.partition(b"\n")
        boundary = mjpeg.boundary_of(kind.decode("latin-1")) or b"frame"
        piece = int(size) if size.isdigit() and len(size) < 6 else 100
        parts = mjpeg.PartReader(boundary)
        for start in range(0, len(body), max(piece, 1)):
            for part, _ in parts.feed(body[start : start + max(piece, 1)], start):
                mjpeg.jpeg_size(part)
                picture = mjpeg.whole_jpeg(part)
                assert picture is None or picture.ndim == 3


class Http(Target):
    """A server's whole answer, with redirections and challenges, on a line that is no network."""

    name = "http"

    def __init__(self, folder: Path) -> None:
        done, encoded = cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))
        assert done
        body = _part(encoded.tobytes()) * 2
        self._corpus = [
            b"HTTP/1.1 200 OK\r\nContent-Type: multipart/x-mixed-replace; boundary=frame\r\n\r\n"
            + body,
            b"HTTP/1.1 200 OK\r\nContent-Type: multipart/x-mixed-replace; boundary=frame\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body),
            b"HTTP/1.1 302 Found\r\nLocation: http://user:secret@other:81/next?a=b\r\n\r\n",
            b"HTTP/1.1 301 Moved\r\nLocation: //[::1]/next\r\n\r\n",
            b'HTTP/1.1 401 No\r\nWWW-Authenticate: Digest realm="a", nonce="b", '
            b'qop="auth,auth-int", '
            b'algorithm=MD5, opaque="c"\r\nWWW-Authenticate: Basic realm="a"\r\n\r\n',
            b"HTTP/1.0 401 No\r\nWWW-Authenticate: Basic\r\n\r\n",
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 503 Busy\r\nRetry-After: 3\r\n\r\nno",
        ]

    def make(self, rng: Random) -> bytes:
        if rng.random() < 0.3:
            texts = [each.decode("latin-1") for each in self._corpus]
            words = ("\r\n", ": ", "Location: http://", "[", "]", "%", '="', "algorithm=SHA-256")
            return mutated_text(rng, texts, words).encode("latin-1", "replace")
        return mutated_bytes(rng, self._corpus)

    def read(self, data: bytes) -> None:
        answers = [data, self._corpus[0]]

        def connect(*_: Any, **__: Any) -> Any:
            return _Line(answers.pop(0) if answers else b"")

        def refuse(_: Any) -> None:
            raise ConnectionRefusedError(111, "Connection refused")

        with (
            _replaced(socket, "create_connection", connect),
            _replaced(http.client.HTTPSConnection, "connect", refuse),
        ):
            response = mjpeg.get("http://user:secret@camera/video", 1.0)
            boundary = mjpeg.boundary_of(response.content_type)
            if boundary is not None:
                reader = mjpeg.MjpegReader(response, boundary, FrameLedger())
                while reader.read() is not None:
                    pass
            response.close()


class Sidecar(Target):
    """The description beside a TensorRT plan."""

    name = "sidecar"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._corpus: list[bytes] = []

    def prepare(self) -> None:
        os.environ["XDG_CACHE_HOME"] = str(self._folder / "cache")
        self._bundle = Bundle.open(Tiny(SEMANTIC).write(self._folder / "bundle"))
        engines = self._folder / "bundle" / "engines"
        engines.mkdir()
        (engines / "x.plan").write_bytes(b"plan")
        self._sidecar = engines / "x.json"
        self._device = Device(0, "Orin", (8, 7), integrated=True)
        plan = Plan(
            path=engines / "x.plan",
            sha256=hashlib.sha256(b"plan").hexdigest(),
            onnx_sha256=hashlib.sha256(self._bundle.model.content).hexdigest(),
            tensorrt="10.3.0",
            device=self._device,
            options=BuildOptions(plugins=False),
            library=None,
            workspace_bytes=1 << 28,
            attestation=Attestation(9, {"int8": 4}, ("EdgeSegUpsampleArgmax",), 1, 0, 0, ()),
            warnings=("something minor",),
            build_seconds=51.1,
            edgeseg="0.1.0",
        )
        values = plan.to_dict()
        library = {"name": "libedgeseg_plugins.so", "sha256": "0" * 64}
        self._corpus = [
            json.dumps(each).encode() for each in (values, {**values, "plugin_library": library})
        ]

    def make(self, rng: Random) -> bytes:
        return mutated_json(rng, self._corpus)

    def read(self, data: bytes) -> None:
        self._sidecar.write_bytes(data)
        found = find_plan(
            self._bundle,
            BuildOptions(plugins=False),
            tensorrt_version="10.3.0",
            device=self._device,
            plugin_library=None,
        )
        if isinstance(found, Plan):
            "\n".join(found.render()).encode("utf-8")
            return
        raise BundleError(str(found))


class Recipe(Target):
    """A recipe in TOML."""

    name = "recipe"

    def __init__(self, folder: Path) -> None:
        self._path = folder / "recipe.toml"
        recipes = Path(__file__).resolve().parents[2] / "calibration" / "recipes"
        self._corpus = [
            *(path.read_text(encoding="utf-8") for path in sorted(recipes.glob("*.toml"))),
            'ranges = "mse"\npercentile = 99.9\nfloats = ["a", "b"]\nhalf = true\n'
            '[finetune]\ndata = ["synthetic:"]\nsteps = 9\nrate = 1e-4\n',
        ]
        self._words = ["[", "]", "[[", "{", "=", '"', '"""', "'", "\n", "#", ".", "nan", "inf",
                       "1979-05-27", "0x", "\\u", "finetune.", "true"]  # fmt: skip

    def make(self, rng: Random) -> bytes:
        if rng.random() < 0.2:
            return mutated_bytes(rng, [text.encode() for text in self._corpus])
        return mutated_text(rng, self._corpus, self._words).encode("utf-8", "surrogatepass")

    def read(self, data: bytes) -> None:
        self._path.write_bytes(data)
        read_toml(self._path)
        QuantizationRecipe.read(self._path)


class Signature(Target):
    """``model.sig``, and what it is a signature of."""

    name = "signature"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._corpus: list[bytes] = []

    def prepare(self) -> None:
        from edgeseg.signing import sign_folder
        from tests.edgeseg.keys import write_keys

        self._bundle = Tiny(SEMANTIC).write(self._folder / "bundle")
        private, self._public = write_keys(self._folder)
        self._corpus = [sign_folder(self._bundle, private).read_bytes()]
        self._right = self._corpus[0]

    def make(self, rng: Random) -> bytes:
        return mutated_json(rng, self._corpus)

    def read(self, data: bytes) -> None:
        (self._bundle / "model.sig").write_bytes(data)
        Bundle.open(self._bundle, public_key=self._public)
        # Whatever was taken says the same as the one that was signed.
        assert _envelope(data) == _envelope(self._right)


TARGETS: dict[str, Callable[[Path], Target]] = {
    target.name: target
    for target in (
        Manifest, Spec, GoldenPair, Model, Layers, Uri, Multipart, Http, Sidecar, Recipe,
        *((Signature,) if util.find_spec("model_signing") else ()),
    )
}  # fmt: skip


# --- what they are made of


def _models() -> list[bytes]:
    """EdgeSeg's own files: both tasks, both forms of the head, quantized, with a subgraph."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    tiny = Tiny(SEMANTIC).model()
    sure = Tiny(ModelSpec(**{**vars(SEMANTIC), "confidence": True})).model()
    half = onnx.ModelProto()
    half.CopyFrom(tiny)
    kernel = half.graph.initializer[0]
    narrow = numpy_helper.from_array(numpy_helper.to_array(kernel).astype(np.float16), "narrow")
    half.graph.initializer[0].CopyFrom(narrow)
    half.graph.node.insert(
        0, helper.make_node("Cast", ["narrow"], ["kernel"], "wide", to=TensorProto.FLOAT)
    )
    then = helper.make_graph(
        [helper.make_node("Constant", [], ["y"], value=helper.make_tensor("c", 1, [1], [1.0]))],
        "then",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    half.graph.node.append(
        helper.make_node("If", ["flag"], ["unused"], then_branch=then, else_branch=then)
    )
    masks = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("Cast", ["image"], ["x"], to=TensorProto.FLOAT),
                helper.make_node(
                    MASK_HEAD,
                    ["prototypes", "coefficients", "boxes", "count"],
                    ["masks"],
                    "head",
                    domain="edgeseg",
                    network_height=32,
                    network_width=48,
                ),
            ],
            "instances",
            [helper.make_tensor_value_info("image", TensorProto.UINT8, [1, 32, 48, 3])],
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
                for name, shape in (("boxes", [1, 6, 4]), ("masks", [1, 6, 16, 24]))
            ],
        )
    )
    golden = InstanceGolden(5, (), 16 * 24)
    helper.set_model_props(masks, {SPEC_KEY: INSTANCE.to_json(), GOLDEN_KEY: golden.to_json()})
    contents = [each.SerializeToString() for each in (tiny, sure, half, masks)]
    for content in contents:
        assert GOLDEN_KEY in OnnxFile(content).metadata()
    return contents


def _graphs() -> list[bytes]:
    """One node of each operator whose shapes are followed, in chains and with odd attributes."""
    from onnx import TensorProto, helper

    from edgeseg.engine.graph import _SHAPES
    from edgeseg.estimate.shapes import _RULES

    operators = sorted({*_SHAPES, *_RULES, "Split", "TopK", "Shape", "Constant"})
    attributes: dict[str, dict[str, Any]] = {
        "MaxPool": {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [0, 0, 0, 0]},
        "AveragePool": {"kernel_shape": [2, 2], "ceil_mode": 1},
        "Transpose": {"perm": [0, 2, 3, 1]},
        "Concat": {"axis": 0},
        "Gather": {"axis": 1},
        "Split": {"axis": 1},
        "TopK": {"axis": -1},
        "DepthToSpace": {"blocksize": 2},
        "SpaceToDepth": {"blocksize": 2},
        "Constant": {"value_ints": [1, 2, 3]},
        "Cast": {"to": 1},
        "Conv": {"strides": [1, 1], "group": 1, "dilations": [1, 1]},
    }
    made = []
    for start in range(0, len(operators), 6):
        nodes = []
        before = "x"
        for op in operators[start : start + 6]:
            inputs = [before, "k" if "Conv" in op or op in ("MatMul", "Gemm") else "sizes"]
            more = ["sizes"] * 2 if op in ("Slice", "Resize", "Where") else []
            nodes.append(
                helper.make_node(
                    op, [*inputs, *more], [f"{op}0", f"{op}1"], op, **attributes.get(op, {})
                )
            )
            before = f"{op}0"
        graph = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 8, 8])],
            [helper.make_tensor_value_info(before, TensorProto.FLOAT, None)],
            [
                helper.make_tensor("k", TensorProto.FLOAT, [4, 4, 1, 1], [0.5] * 16),
                helper.make_tensor("sizes", TensorProto.INT64, [4], [1, 2, 3, 4]),
            ],
        )
        made.append(helper.make_model(graph).SerializeToString())
    return made


def _part(picture: bytes, *, length: bool = True) -> bytes:
    head = b"--frame\r\nContent-Type: image/jpeg\r\n"
    if length:
        head += b"Content-Length: %d\r\n" % len(picture)
    return head + b"\r\n" + picture + b"\r\n"


def _envelope(signature: bytes) -> bytes:
    # Letters that are none of base64's are passed over.
    return base64.b64decode(json.loads(signature)["dsseEnvelope"]["payload"])


class _Line:
    """A socket whose other end has said everything already."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer

    def makefile(self, mode: str, *_: Any) -> io.BufferedReader:
        return io.BufferedReader(io.BytesIO(self._answer))

    def sendall(self, data: bytes) -> None:
        pass

    def setsockopt(self, *_: int) -> None:
        pass

    def settimeout(self, seconds: float) -> None:
        pass

    def shutdown(self, how: int) -> None:
        pass

    def close(self) -> None:
        pass


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
