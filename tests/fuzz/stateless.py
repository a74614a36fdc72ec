"""Fuzz without a model: selections, configurations, files of samples, pictures, videos.

Each check is a function of drawn values. What is valid must work and keep its promises; what is not must end in the
package's own errors, never in another.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image

import vtc
from tests.fuzz.campaign import COUNTS, settings, watched
from tests.selectors.inputs import SELECTING, shape_of
from tests.video import clips
from vtc.cli import samples
from vtc.config import CompressionConfig
from vtc.core.observations import TokenGrids
from vtc.registry import get_selector, selectors

METHODS = sorted(name for name, cls in selectors().items() if not cls.trained)

# ------------------------------------------------------------------------------------------------------ selections

FILLINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "random": lambda x: x,
    "zeros": torch.zeros_like,
    "ones": torch.ones_like,
    "huge": lambda x: x.sign() * 6e4,
    "vast": lambda x: x * 1e18,  # refused: methods square features
    "tiny": lambda x: x * 1e-30,
    "duplicates": lambda x: x[torch.arange(len(x)) // 2] if x.ndim else x,
    "ties": lambda x: x.round(),
    "one stands out": lambda x: torch.cat([x[:1] + 1e3, x[1:]]) if x.ndim else x,
    "negative": lambda x: -x.abs() - 1,
    "broken": lambda x: x.masked_fill(x > 1, math.nan),
}
DTYPES = (torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64)

a_grid = st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(1, 7))
some_grids = st.lists(a_grid, min_size=1, max_size=3)
a_budget = st.one_of(
    st.builds(lambda n: {"keep_tokens": n}, st.integers(1, 300)),
    st.builds(lambda r: {"keep_ratio": r}, st.floats(0, 1, exclude_min=True, allow_subnormal=True)),
    st.sampled_from(({"keep_ratio": 1.0}, {"keep_ratio": 1e-300}, {"keep_tokens": 1})),
)
a_selection = st.fixed_dictionaries(
    {
        "method": st.sampled_from(SELECTING),
        "grids": some_grids,
        "budget": a_budget,
        "width": st.sampled_from((1, 2, 3, 12, 64)),
        "filling": st.sampled_from(tuple(FILLINGS)),
        "dtype": st.sampled_from(DTYPES),
        "seed": st.integers(0, 2**32),
        "structural": st.sampled_from((0, 0, 1, 7)),
        "others": st.sampled_from((0, 0, 1, 3)),
    }
)


def tensors_of(drawn: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `vtc.select` but for method and budget."""
    draw = torch.Generator().manual_seed(drawn["seed"])
    n = sum(math.prod(grid) for grid in drawn["grids"])
    fill, dtype = FILLINGS[drawn["filling"]], drawn["dtype"]
    stage = get_selector(drawn["method"]).resolve(None, drawn["budget"].get("keep_ratio")).stages()[0]
    signals: dict[Any, torch.Tensor] = {}
    for signal in stage.requires:
        if signal.reads is TokenGrids:
            continue
        value = torch.randn(*shape_of(signal, n, drawn["width"]), generator=draw)
        if signal.axes[-1] == "N":  # probabilities
            value = value.softmax(-1)
            value = value if drawn["filling"] in ("random", "huge", "vast", "negative") else fill(value)
        else:
            value = fill(value)
        signals[signal] = value.to(dtype)
    features = fill(torch.randn(n, drawn["width"], generator=draw)).to(dtype)
    return {"features": features, "grid_thw": drawn["grids"], "signals": signals}


def check_selection(drawn: dict[str, Any]) -> None:
    """The budget is met, indices ascend, seeds reproduce, nothing is changed, numbers stay finite."""
    COUNTS["selections"] += 1
    given = tensors_of(drawn)
    values = [given["features"], *given["signals"].values()]
    finite = all(bool(value.float().isfinite().all()) and bool(value.isfinite().all()) for value in values)
    finite &= bool((given["features"].abs() < 1e15).all())
    before = [value.clone() for value in values]
    state = torch.get_rng_state()

    def select() -> vtc.Selection:
        return vtc.select(
            drawn["method"],
            **given,
            **drawn["budget"],
            structural=drawn["structural"],
            other_visuals=drawn["others"],
            seed=drawn["seed"],
        )

    try:
        selection = select()
    except vtc.InputError:
        assert not finite or drawn["dtype"] == torch.float64, "selection: finite numbers were refused"
        return
    assert finite, "selection: NaN, or features too large to square, were taken"
    n = len(given["features"])
    selector = get_selector(drawn["method"])
    budget = vtc.budget.resolve_budget(n, **drawn["budget"])
    assert selection.n == n, "selection: n"
    exact = not selector.adaptive
    assert selection.k == budget if exact else 0 <= selection.k <= n, (
        f"selection: {drawn['method']} keeps {selection.k} of {n}, asked for {budget}"
    )
    if drawn["budget"].get("keep_ratio") == 1.0 and exact:
        assert selection.k == n, "selection: not everything is kept"
    assert select().to_dict() == selection.to_dict(), f"selection: {drawn['method']} does not reproduce"
    assert vtc.Selection.from_dict(json.loads(json.dumps(selection.to_dict()))).to_dict() == selection.to_dict()
    assert torch.equal(torch.get_rng_state(), state), f"selection: {drawn['method']} draws from the global generator"
    for value, earlier in zip(values, before, strict=True):
        assert torch.equal(value, earlier), f"selection: {drawn['method']} changes its input"
    merged = selection.merge(given["features"])
    assert bool(merged.isfinite().all()), f"selection: {drawn['method']} merges to numbers that are not finite"
    assert merged.shape == (selection.k, drawn["width"])


a_wrong_argument = st.fixed_dictionaries(
    {},
    optional={
        "keep_tokens": st.one_of(st.integers(-3, 3), st.floats(), st.text(max_size=3), st.booleans()),
        "keep_ratio": st.one_of(st.floats(), st.integers(-1, 2), st.text(max_size=3)),
        "grid_thw": st.one_of(
            st.none(),
            st.lists(st.integers(-2, 9), max_size=4),
            st.lists(st.lists(st.integers(0, 3), max_size=4), max_size=3),
        ),
        "features": st.builds(lambda shape: torch.zeros(shape), st.lists(st.integers(0, 4), max_size=3)),
        "cls_attention": st.builds(lambda shape: torch.ones(shape), st.lists(st.integers(0, 5), max_size=5)),
        "text_attention": st.builds(lambda shape: torch.ones(shape), st.lists(st.integers(0, 5), max_size=5)),
        "seed": st.integers(0, 9),
        "layer": st.one_of(st.integers(-2, 3), st.text(max_size=2), st.none(), st.floats()),
        "option": st.integers(),
    },
)


def check_wrong_selection(method: str, given: dict[str, Any]) -> None:
    """Arguments that fit each other by chance only: an answer, or the package's own error."""
    COUNTS["selections"] += 1
    with contextlib.suppress(vtc.VtcError):
        selection = vtc.select(method, **given)
        assert 0 <= selection.k <= selection.n


# -------------------------------------------------------------------------------------------------- configurations


def _json_of(integers: st.SearchStrategy[int]) -> st.SearchStrategy[Any]:
    return st.recursive(
        st.one_of(
            st.none(), st.booleans(), integers, st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=5)
        ),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
        max_leaves=6,
    )


json_values = _json_of(st.integers())
option_values = _json_of(st.integers(1 - 2**63, 2**63 - 1))  # larger ones are refused
a_site = st.one_of(
    st.none(),
    st.sampled_from(
        ("decoder", "decoder:2", "cache", "cache:decoding", "pixels", "vision:3", "decoder:0", "decoder:-1", "")
    ),
    st.text(max_size=10),
    st.builds(lambda n: f"decoder:{n}", st.integers()),
)
a_configuration = st.fixed_dictionaries(
    {"method": st.sampled_from(METHODS), "keep_ratio": st.floats(0, 1, exclude_min=True)},
    optional={
        "positions": st.sampled_from(("original", "compact")),
        "structural": st.sampled_from(("keep", "drop")),
        "seed": st.integers(0, 2**63 - 1),
        "options": st.dictionaries(st.text(max_size=5), option_values, max_size=3),
        "at": st.sampled_from((None, "decoder", "decoder:2", "cache", "cache:decoding", "pixels", "vision:3")),
    },
)
FIELDS = ("method", "keep_ratio", "keep_tokens", "positions", "structural", "seed", "options", "at", "version")
_anything = st.one_of(
    json_values,
    st.floats(),
    st.binary(max_size=3),
    st.complex_numbers(max_magnitude=2),
    st.sets(st.integers(), max_size=2),
)
a_broken_mapping = st.one_of(
    st.dictionaries(
        st.one_of(st.sampled_from(FIELDS), st.text(max_size=4), st.integers(), st.none()), _anything, max_size=6
    ),
    st.builds(
        lambda good, name, value: {**good, name: value},
        a_configuration,
        st.sampled_from(FIELDS),
        st.one_of(_anything, a_site),
    ),
    _anything,
)


def check_configuration(values: dict[str, Any], folder: Path) -> None:
    """A configuration survives its dictionary, its JSON and its file, and is a value."""
    COUNTS["configurations"] += 1
    config = CompressionConfig(**values)
    twins = [CompressionConfig.from_dict(config.to_dict()), CompressionConfig.from_json(config.to_json())]
    config.save(folder / "config.json")
    twins.append(CompressionConfig.load(folder / "config.json"))
    for twin in twins:
        assert twin == config, "configuration: a round trip changes it"
        assert twin.to_json() == config.to_json(), "configuration: JSON is not stable"
        assert hash(twin) == hash(config), "configuration: equal ones have different hashes"


def check_broken_configuration(data: Any) -> None:
    """Only ConfigError comes out, and what is taken survives a round trip."""
    COUNTS["configurations"] += 1
    try:
        config = CompressionConfig.from_dict(data)
    except vtc.ConfigError:
        return
    assert CompressionConfig.from_json(config.to_json()) == config, "configuration: a round trip changes it"


def check_broken_json(text: str | bytes, folder: Path) -> None:
    COUNTS["configurations"] += 1
    path = folder / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(vtc.ConfigError):
        CompressionConfig.load(path)
    if isinstance(text, str):
        with contextlib.suppress(vtc.ConfigError):
            CompressionConfig.from_json(text)


def check_options(drawn: tuple[str, dict[str, Any]]) -> None:
    """A method takes its options or refuses them with ConfigError; what it takes it can also describe."""
    method, options = drawn
    COUNTS["configurations"] += 1
    with contextlib.suppress(vtc.ConfigError):
        selector = get_selector(method, **options)
        hash(selector)
        selector.resolve(None, 0.5).stages()


@functools.cache
def options_of(method: str) -> tuple[str, ...]:
    return tuple(item.name for item in dataclasses.fields(selectors()[method]))


@st.composite
def some_options(draw: Any) -> tuple[str, dict[str, Any]]:
    method = draw(st.sampled_from(METHODS))
    names = st.sampled_from((*options_of(method), "other"))
    values = st.one_of(json_values, st.floats(), st.integers(0, 6), st.lists(st.integers(-1, 5), max_size=4))
    return method, draw(st.dictionaries(names, values, max_size=3))


broken_json = st.one_of(
    st.text(max_size=40),
    st.binary(max_size=40),
    st.builds(lambda data: json.dumps(data), json_values),
    st.builds(
        lambda values, at, by: json.dumps({**values, "options": {}})[:at] + by,
        a_configuration,
        st.integers(0, 120),
        st.text(max_size=5),
    ),
    st.sampled_from(("1" * 5000, "[" * 100000, '{"a":' * 100000)),
    st.sampled_from(('{"method": "fastv", "keep_ratio": 1e999}', "NaN", "\\ud800")),
)


# ----------------------------------------------------------------------------------------------------------- files

MODES = (
    "1",
    "L",
    "P",
    "RGB",
    "RGBA",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "LA",
    "PA",
    "I;16",
    "RGBX",
    "RGBa",
    "La",
)
FORMATS = ("png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm", "ico", "tga", "jpeg2000", "pcx", "sgi", "dds")

a_picture = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(MODES),
        "size": st.tuples(st.integers(1, 40), st.integers(1, 40)),
        "format": st.sampled_from(FORMATS),
        "seed": st.integers(0, 999),
    }
)
damage = st.fixed_dictionaries(
    {
        "cut": st.one_of(st.none(), st.floats(0, 1)),
        "changes": st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6),
        "more": st.binary(max_size=8),
    }
)


def damaged(data: bytes, how: dict[str, Any]) -> bytes:
    out = bytearray(data)
    for place, value in how["changes"]:
        if out:
            out[min(int(place * len(out)), len(out) - 1)] = value
    if how["cut"] is not None:
        out = out[: int(how["cut"] * len(out))]
    return bytes(out) + how["more"]


@functools.lru_cache(maxsize=4000)
def _encoded(mode: str, size: tuple[int, int], name: str, seed: int) -> bytes | None:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    try:
        Image.fromarray(pixels).convert(mode).save(file, name)
    except (OSError, ValueError, KeyError):
        return None  # pillow does not write this kind
    return file.getvalue()


def check_picture(picture: dict[str, Any], how: dict[str, Any] | None, folder: Path) -> None:
    """A picture is opened in RGB; what is damaged is opened or refused in words."""
    data = _encoded(picture["mode"], picture["size"], picture["format"], picture["seed"])
    if data is None:
        return
    COUNTS["files"] += 1
    path = folder / f"picture.{picture['format']}"
    path.write_bytes(data if how is None else damaged(data, how))
    try:
        image = vtc.open_image(path)
    except vtc.VtcError as error:
        # Values in floats do not say what is white.
        assert how is not None or picture["mode"] == "F", (
            f"picture: {picture['mode']} as {picture['format']} is refused: {error}"
        )
        assert str(path) in str(error), "picture: the message does not name the file"
        return
    assert image.mode == "RGB", "picture: not in RGB"
    exact = how is None and picture["format"] != "ico"  # which pillow writes in sizes of its own
    assert not exact or image.size == picture["size"], "picture: another size"


def check_bytes(data: bytes, folder: Path) -> None:
    COUNTS["files"] += 1
    for name in ("bytes.png", "bytes.mp4"):
        (folder / name).write_bytes(data)
    with contextlib.suppress(vtc.VtcError):
        vtc.open_image(folder / "bytes.png")
    with contextlib.suppress(vtc.VtcError), vtc.video.VideoFile(folder / "bytes.mp4") as file:
        file.read([0])


CONTAINERS = (
    ("mp4", "mpeg4"),
    ("avi", "mpeg4"),
    ("mkv", "mpeg4"),
    ("webm", "libvpx"),
    ("mov", "mpeg4"),
    ("ts", "mpeg2video"),
    ("gif", "gif"),
)


@functools.lru_cache(maxsize=200)
def _clip(kind: int, count: int, size: int) -> bytes:
    suffix, codec = CONTAINERS[kind]
    with tempfile.TemporaryDirectory() as folder:
        pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        shown = clips.frames(count, 16 + 16 * size, 16 + 8 * size)
        return clips.write(Path(folder) / f"clip.{suffix}", shown, codec=codec, pix_fmt=pix_fmt, gop=3).read_bytes()


a_clip = st.tuples(st.integers(0, len(CONTAINERS) - 1), st.integers(1, 9), st.integers(0, 2))


def check_video(clip: tuple[int, int, int], how: dict[str, Any] | None, places: list[int], folder: Path) -> None:
    """A clip has its frames; what is damaged is read or refused in words."""
    if CONTAINERS[clip[0]][0] == "ts" and clip[1] < 4:
        return  # FFmpeg does not open transport streams of a few packets
    COUNTS["files"] += 1
    path = folder / f"clip.{CONTAINERS[clip[0]][0]}"
    path.write_bytes(_clip(*clip) if how is None else damaged(_clip(*clip), how))
    try:
        with vtc.video.VideoFile(path) as file:
            count = len(file.times)
            assert how is not None or count == clip[1], f"video: {count} frames of {clip[1]} in {path.suffix}"
            assert np.isfinite(file.times).all(), "video: times"
            assert count == file.info.frames
            wanted = sorted({place % count for place in places})
            frames = file.read(wanted)
            assert frames.shape == (len(wanted), file.info.height, file.info.width, 3), "video: shape"
            assert frames.dtype == np.uint8
    except vtc.VtcError as error:
        assert how is not None, f"video: a good {path.suffix} is refused: {error}"
        assert str(path) in str(error), "video: the message does not name the file"


a_line = st.one_of(
    st.builds(lambda data: json.dumps(data), json_values),
    st.builds(
        lambda kind, path, question: json.dumps({kind: path, "question": question}),
        st.sampled_from(("image", "video", "sound")),
        st.one_of(st.sampled_from(("good.png", "bad.png", "gone.png", ".", "", "good.mp4")), json_values),
        json_values,
    ),
    st.text(max_size=30),
    st.just(""),
    st.just("[" * 100000),
)


def check_samples(lines: list[str], raw: bytes | None, limit: int | None, frames: int, folder: Path) -> None:
    """A file of samples is read or refused in words."""
    COUNTS["files"] += 1
    path = folder / "samples.jsonl"
    if raw is not None:
        path.write_bytes(raw)
    else:
        path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    with contextlib.suppress(vtc.VtcError):
        found = samples.read(argparse.Namespace(samples=path, limit=limit, frames=frames))
        assert found, "samples: none, and no error"
        assert all(isinstance(sample["question"], str) for sample in found)


@functools.cache
def _folder() -> Path:
    """One folder for all examples, with files that samples may name."""
    folder = tempfile.TemporaryDirectory(prefix="vtc-fuzz-")
    path = Path(folder.name)
    _folder.__dict__["kept"] = folder  # until the interpreter ends
    Image.new("RGB", (4, 4)).save(path / "good.png")
    (path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    (path / "good.mp4").write_bytes(_clip(0, 3, 0))
    return path


# ------------------------------------------------------------------------------------------------------- all of it


def _here(check: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(check)
    def run(**drawn: Any) -> None:
        check(**drawn, folder=_folder())

    return run


PROPERTIES: dict[str, dict[str, tuple[dict[str, Any], Callable[..., None]]]] = {
    # Part, name: what is drawn, and what is done with it.
    "selections": {
        "selection": ({"drawn": a_selection}, check_selection),
        "wrong selection": ({"method": st.sampled_from(SELECTING), "given": a_wrong_argument}, check_wrong_selection),
    },
    "configs": {
        "configuration": ({"values": a_configuration}, _here(check_configuration)),
        "broken configuration": ({"data": a_broken_mapping}, check_broken_configuration),
        "broken JSON": ({"text": broken_json}, _here(check_broken_json)),
        "options": ({"drawn": some_options()}, check_options),
    },
    "files": {
        "picture": ({"picture": a_picture, "how": st.none()}, _here(check_picture)),
        "damaged picture": ({"picture": a_picture, "how": damage}, _here(check_picture)),
        "bytes": ({"data": st.binary(max_size=200)}, _here(check_bytes)),
        "video": (
            {"clip": a_clip, "how": st.none(), "places": st.lists(st.integers(0, 20), min_size=1, max_size=4)},
            _here(check_video),
        ),
        "damaged video": (
            {"clip": a_clip, "how": damage, "places": st.lists(st.integers(0, 20), min_size=1, max_size=4)},
            _here(check_video),
        ),
        "samples": (
            {
                "lines": st.lists(a_line, max_size=4),
                "raw": st.one_of(st.none(), st.none(), st.binary(max_size=30)),
                "limit": st.one_of(st.none(), st.integers(-1, 3)),
                "frames": st.integers(-1, 4),
            },
            _here(check_samples),
        ),
    },
}
EXAMPLES = {"selections": 400, "configs": 200, "files": 60}
"""Of each property in the test suite; runs of the campaign make ten times as many at once."""


def run(part: str, name: str, *, seed: int | None = None) -> None:
    """Run examples of one property; without a seed always the same ones."""
    examples = EXAMPLES[part] * (1 if seed is None else 10)
    strategies, check = PROPERTIES[part][name]

    def example(**drawn: Any) -> None:
        with watched():
            check(**drawn)

    example.__name__ = example.__qualname__ = check.__name__
    test = settings(examples, derandomize=seed is None)(hypothesis.given(**strategies)(example))
    if seed is not None:
        test = hypothesis.seed(seed)(test)
    test()
