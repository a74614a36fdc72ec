from __future__ import annotations

import copy
import dataclasses
import enum
import errno
import json
import os
import pickle
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vtc
from tests import tiny
from vtc._version import package_version
from vtc.budget import largest_remainder, resolve_budget
from vtc.config import CompressionConfig
from vtc.core.sites import BeforeDecoder, DecoderLayer, Site
from vtc.errors import ConfigError, InputError, VtcError
from vtc.notation import parse_stages, write_stages

FULL = CompressionConfig(
    "vtc-cls",
    keep_tokens=64,
    positions="compact",
    structural="drop",
    seed=7,
    options={"start_layer": 16, "score_source": "cls", "layers": [1, 2], "nested": {"a": (0.5, None)}},
    at=DecoderLayer(16),
)


# --- CompressionConfig -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("config", [CompressionConfig("divprune", keep_ratio=0.25), FULL])
def test_round_trips(config: CompressionConfig, tmp_path: Path) -> None:
    config.save(tmp_path / "config.json")
    copies: list[Callable[[], CompressionConfig]] = [
        lambda: CompressionConfig.from_dict(config.to_dict()),
        lambda: CompressionConfig.from_json(config.to_json()),
        lambda: CompressionConfig.load(tmp_path / "config.json"),
        lambda: copy.deepcopy(config),
        lambda: pickle.loads(pickle.dumps(config)),
    ]
    for make in copies:
        assert make() == config
        assert hash(make()) == hash(config)
    assert CompressionConfig.load(tmp_path / "config.json").to_json() == config.to_json()


def test_json_is_stable() -> None:
    data = json.loads(FULL.to_json())
    assert list(data) == [
        "version",
        "method",
        "keep_ratio",
        "keep_tokens",
        "positions",
        "structural",
        "seed",
        "options",
        "at",
    ]
    assert data == {
        "version": package_version(),
        "method": "vtc-cls",
        "keep_ratio": None,
        "keep_tokens": 64,
        "positions": "compact",
        "structural": "drop",
        "seed": 7,
        "options": {"start_layer": 16, "score_source": "cls", "layers": [1, 2], "nested": {"a": [0.5, None]}},
        "at": "decoder:16",
    }


@pytest.mark.parametrize(
    ("at", "word", "site"),
    [
        (None, None, None),
        ("decoder", "decoder", BeforeDecoder()),
        ("decoder:3", "decoder:3", DecoderLayer(3)),
        (DecoderLayer(3), "decoder:3", DecoderLayer(3)),
    ],
)
def test_at_is_a_site_or_its_word(at: str | Site | None, word: str | None, site: Site | None) -> None:
    config = CompressionConfig("divprune", keep_ratio=0.25, at=at)
    assert (config.at, config.site) == (word, site)
    assert json.loads(config.to_json())["at"] == word
    again = CompressionConfig.from_json(config.to_json())
    assert again == config == CompressionConfig("divprune", keep_ratio=0.25, at=word)
    assert again.site == site


def test_json_without_a_site_loads() -> None:
    old = {name: value for name, value in FULL.to_dict().items() if name != "at"}
    config = CompressionConfig.from_dict({**old, "version": "0.1.0"})
    assert (config.at, config.site) == (None, None)
    assert config == dataclasses.replace(FULL, at=None)


def test_options_are_a_private_copy() -> None:
    options = {"layers": [1, 2]}
    config = CompressionConfig("m", keep_ratio=0.5, options=options)
    options["layers"].append(3)
    assert config.options == {"layers": (1, 2)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": ""}, "method must be"),
        ({"method": None}, "method must be"),
        ({"keep_tokens": None}, "exactly one.*got neither"),
        ({"keep_ratio": 0.5}, "exactly one.*keep_ratio=0.5 and keep_tokens=64"),
        ({"positions": "new"}, "positions must be one of.*'new'"),
        ({"structural": True}, "structural must be one of.*True"),
        ({"seed": -1}, "seed must be.*-1"),
        ({"seed": 1.0}, "seed must be.*1.0"),
        ({"seed": True}, "seed must be.*True"),
        ({"at": "decoder:0"}, "at least 1, got 0"),
        ({"at": "middle"}, r"one of the words .*, decoder, .*decoder:K .*got 'middle'"),
        ({"at": 16}, "one of the words .*got 16"),
        ({"options": [1]}, "options must be a mapping"),
        ({"options": {"x": float("nan")}}, "options.x: nan cannot be written"),
        ({"options": {"x": {"y": object()}}}, "options.x.y: .* cannot be written"),
        ({"options": {1: 2}}, "keys must be strings, got 1"),
        ({"keep_rate": 0.5}, r"Unknown keys \['keep_rate'\].*Known keys"),
    ],
)
def test_invalid_values_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CompressionConfig.from_dict({**FULL.to_dict(), **changes})


def test_what_is_no_configuration() -> None:
    with pytest.raises(ConfigError, match="names no method"):
        CompressionConfig.from_dict({"keep_ratio": 0.5})
    with pytest.raises(ConfigError, match="is a mapping, got list"):
        CompressionConfig.from_json("[]")
    with pytest.raises(ConfigError, match="not valid JSON"):
        CompressionConfig.from_json("{")


def test_load_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"broken\.json.*names no method"):
        CompressionConfig.load(tmp_path / "broken.json")


# --- budgets ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("n", "ratio", "expected"),
    [(576, 0.098, 56), (5, 0.5, 2), (7, 0.5, 4), (25, 0.5, 12), (576, 0.001, 1), (1, 0.5, 1), (9, 1.0, 9), (9, 1, 9)],
)
def test_ratios_round_half_to_even(n: int, ratio: float, expected: int) -> None:
    assert resolve_budget(n, keep_ratio=ratio) == expected


@pytest.mark.parametrize(("n", "tokens", "expected"), [(10, 4, 4), (10, 10, 10), (10, 99, 10)])
def test_tokens_are_capped(n: int, tokens: int, expected: int) -> None:
    assert resolve_budget(n, keep_tokens=tokens) == expected


@pytest.mark.parametrize("ratio", [0, 0.0, -0.5, 1.0001, float("nan"), float("inf"), True, "0.5"])
def test_bad_ratios(ratio: Any) -> None:
    with pytest.raises(ConfigError, match=r"keep_ratio.*\(0, 1\]"):
        resolve_budget(10, keep_ratio=ratio)


@pytest.mark.parametrize("tokens", [0, -3, 1.5, float("nan"), True, "4"])
def test_bad_tokens(tokens: Any) -> None:
    with pytest.raises(ConfigError, match="keep_tokens must be"):
        resolve_budget(10, keep_tokens=tokens)


def test_neither_both_and_nothing() -> None:
    with pytest.raises(ConfigError, match="neither"):
        resolve_budget(10)
    with pytest.raises(ConfigError, match=r"keep_ratio=0.5 and keep_tokens=5"):
        resolve_budget(10, 0.5, 5)
    with pytest.raises(InputError, match="no visual tokens"):
        resolve_budget(0, 0.5)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(any), st.integers(0, 10**6))
def test_largest_remainder_is_exact_and_fair(sizes: list[int], draw: int) -> None:
    total = draw % (sum(sizes) + 1)
    shares = largest_remainder(total, sizes)
    assert sum(shares) == total
    for share, size in zip(shares, sizes, strict=True):
        assert 0 <= share <= size
        assert abs(share - total * size / sum(sizes)) < 1


def test_largest_remainder_ties_and_errors() -> None:
    assert largest_remainder(2, [5, 5, 5]) == [1, 1, 0]
    for total, sizes in [(1, [0, 0]), (-1, [1]), (1, [2, -1])]:
        with pytest.raises(InputError, match="Cannot share"):
            largest_remainder(total, sizes)


def test_errors_are_value_errors() -> None:
    assert issubclass(VtcError, ValueError)
    assert all(issubclass(error, VtcError) for error in (ConfigError, InputError))


# --- odd values -----------------------------------------------------------------------------------------------------
class Colour(str, enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    LOW = 3


def test_numbers_of_numpy_are_stored_as_pythons_own() -> None:
    options = {
        "a": np.float32(0.5), "b": np.int64(3), "c": np.bool_(True), "d": np.str_("x"), "e": [np.float16(0.25)],
        "f": Colour.RED, "g": Level.LOW, "h": Fraction(1, 4), "i": np.array(7), "j": {"k": np.uint8(1)},
    }  # fmt: skip
    config = CompressionConfig("m", keep_ratio=np.float32(0.25), seed=np.int64(3), options=options)  # type: ignore[arg-type]
    plain = CompressionConfig(
        "m",
        keep_ratio=0.25,
        seed=3,
        options={"a": 0.5, "b": 3, "c": True, "d": "x", "e": [0.25], "f": "red", "g": 3, "h": 0.25, "i": 7,
                 "j": {"k": 1}},
    )  # fmt: skip
    assert config == plain
    assert repr(config) == repr(plain), "their types too"
    assert CompressionConfig.from_json(config.to_json()) == plain
    count = CompressionConfig("m", keep_tokens=np.int64(4), at=DecoderLayer(np.int64(3)))  # type: ignore[arg-type]
    assert repr(count) == repr(CompressionConfig("m", keep_tokens=4, at="decoder:3"))
    assert resolve_budget(8, np.float64(0.5)) == resolve_budget(8, None, np.int8(4)) == 4


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


LOOP: list[Any] = []
LOOP.append(LOOP)


ODD: dict[str, Any] = {
    "loop": LOOP, "deep": nested(40), "deeper": nested(100_000), "long": 10**5000, "low": -(2**63) - 1,
    "nan": np.float64("nan"), "inf": np.inf, "complex64": np.complex64(1j), "complex": 1j, "set": {1, 2},
    "array": np.zeros(2), "decimal": Decimal("1"), "bytes": b"bytes", "date": np.datetime64("2020"), "type": type,
    "fraction": Fraction(10**400), "object": object(),
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD)
def test_what_json_cannot_hold_is_named(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"options\.x(\.y)?: .*(cannot be written to JSON|levels)") as caught:
        CompressionConfig("m", keep_ratio=0.5, options={"x": ODD[kind]})
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("kind", [*(kind for kind in ODD if kind != "low"), "mapping"])
@pytest.mark.parametrize("name", ["method", "keep_ratio", "keep_tokens", "seed", "positions", "structural", "at"])
def test_odd_values_of_every_field_are_refused(name: str, kind: str) -> None:
    budget = {} if name in ("keep_ratio", "keep_tokens") else {"keep_ratio": 0.5}
    with pytest.raises(ConfigError, match=r"must|exactly one") as caught:
        CompressionConfig.from_dict({"method": "m", **budget, name: ODD.get(kind, {})})
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "levels"),
        (b'{"method": "m", "keep_ratio": 0.5, "options": {"x": ' + b"[" * 500 + b"]" * 500 + b"}}", "levels"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "digits"),
        (b"\xff\xfe{}", "JSON"),
        (b'{"method": "\xff"}', "utf-8"),
        (b"\0", "JSON"),
        (b"", "JSON"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"config\.json: .*{message}"):
        CompressionConfig.load(tmp_path / "config.json")
    with pytest.raises(ConfigError, match=message):
        CompressionConfig.from_json(content)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for name, message in (("none.json", "no such file"), (".", "this is a folder"), ("a\0b", "null")):
        with pytest.raises(ConfigError, match=message):
            CompressionConfig.load(os.path.join(tmp_path, name))
    with pytest.raises(ConfigError, match="text of JSON, got None"):
        CompressionConfig.from_json(None)  # type: ignore[arg-type]


def test_a_disk_that_fills_up_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FULL.save(tmp_path / "config.json")

    def fill(path: Path, *_: Any, **__: Any) -> None:
        with path.open("w") as file:
            file.write("{")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", fill)
        for name in ("config.json", "other.json"):
            with pytest.raises(OSError, match=f"No space.*{name}"):
                CompressionConfig("m", keep_ratio=0.5).save(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert CompressionConfig.load(tmp_path / "config.json") == FULL


def test_stages_survive_a_file_and_a_single_configuration_is_one_stage(tmp_path: Path) -> None:
    stages = parse_stages("divprune@vision:4=0.5+vtc=64")
    vtc.save_stages(tmp_path / "two.json", stages)
    assert vtc.load_stages(tmp_path / "two.json") == stages
    stages[1].save(tmp_path / "one.json")
    assert vtc.load_stages(tmp_path / "one.json") == stages[1:]
    for text in ("[]", "3", "[3]", "{", '[{"method": "vtc"}, {}]'):
        (tmp_path / "broken.json").write_text(text)
        with pytest.raises(vtc.ConfigError, match=r"broken\.json"):
            vtc.load_stages(tmp_path / "broken.json")
    with pytest.raises(vtc.ConfigError, match="no such file"):
        vtc.load_stages(tmp_path / "missing.json")


@pytest.mark.parametrize(
    "text",
    [
        "vtc=0.25",
        "divprune@vision:8=0.5+vtc=0.25",
        "uniform@pixels=64+fastv@decoder:2=0.5",
        "h2o(scope=all)@cache:decoding=0.25",
        "vtc=0.5+snapkv(window=16, pooling=max)@cache=0.5",
        "prefixkv(scope=all, budgets=[0.5, 0.25])@cache=0.375",
        'snapkv(budgets={"name": "pyramid", "beta": 10})=0.5',
        "resize@pixels=0.56+vtc=0.39 compact",
    ],
)
def test_the_notation_is_written_as_it_is_read(text: str) -> None:
    assert write_stages(parse_stages(text)) == text


def test_a_line_says_where_positions_are() -> None:
    assert [each.positions for each in parse_stages("resize=0.5+vtc=0.5 compact")] == ["compact", "compact"]
    assert [each.positions for each in parse_stages("resize=0.5+vtc=0.5")] == ["original", "original"]
    case = tiny.build("qwen2_5_vl")
    for line, asked, expected in (
        ("resize=0.5+vtc=0.5", "original", "original"),
        ("resize=0.5+vtc=0.5", "compact", "compact"),
        ("resize=0.5+vtc=0.5 compact", "original", "compact"),
    ):
        with vtc.compressed(case.model, line, positions=asked), torch.inference_mode():
            case.model(**case.batch("single"))
            assert {each.positions for each in vtc.report(case.model).configs} == {expected}


def test_the_notation_gives_options_their_types() -> None:
    (config,) = parse_stages('snapkv(window=16,pooling="max", budgets=[0.5,0.25] )=0.375')
    assert config.options == {"window": 16, "pooling": "max", "budgets": (0.5, 0.25)}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("snapkv(window=16=0.5", "METHOD"),
        ("snapkv(window=16)", "METHOD"),
        ("snapkv(window=16)x=0.5", "METHOD"),
        ("(window=16)=0.5", "METHOD"),
        ("snapkv@cache(window=16)=0.5", "at must"),
        ("snapkv()=0.5", "OPTION=VALUE"),
        ("snapkv(16)=0.5", "OPTION=VALUE"),
        ("snapkv(window=)=0.5", "OPTION=VALUE"),
        ("snapkv(window=16, window=8)=0.5", "window is given twice"),
        ("snapkv(window=1 6)=0.5", "window=1 6 is neither a word nor JSON"),
        ("snapkv(windows=16)=0.5", "windows"),
        ("vtc=0.5 compact+resize=0.5", "METHOD"),
        ("vtc=0.5 dense", "METHOD"),
        ("snapkv(window=no)=0.5", "window must be an integer"),
    ],
)
def test_the_notation_says_what_is_wrong(text: str, match: str) -> None:
    with pytest.raises(vtc.ConfigError, match=match):
        parse_stages(text)
