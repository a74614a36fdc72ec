"""Arguments that several commands share, and the configuration, model, inputs and pictures that they stand for."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vtc
import vtc.reference
from vtc import registry
from vtc.bench.timing import check_device
from vtc.chat import image_inputs
from vtc.errors import ConfigError, InputError
from vtc.files import check_writable, replacing
from vtc.notation import parse_stages
from vtc.plain import parse_json

if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULT_KEEP_RATIO = 0.25

# ------------------------------------------------------------------------------------------------------------- parsing


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add --model, --dtype and --device, which `load_model` takes."""
    parser.add_argument(
        "--model",
        default="reference",
        help="reference (the small model of vtc-reference), reference:NAME (another of its models), or the folder of a"
        " checkpoint (reference)",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="type of the weights; auto: as stored (auto)",
    )
    parser.add_argument(
        "--device",
        default="auto",
        help="torch device, such as cuda:1; auto: cuda if available, else cpu (auto)",
    )


def add_method(
    parser: argparse.ArgumentParser,
    default: str,
    *flags: str,
    option_help: str = "option of the method; repeat for more",
    line: bool = False,
) -> None:
    """Add --method, which may be a `line` of stages if `stages` or `configuration` reads it, and options as `flags`."""
    stated = ", or stages in a line, METHOD@SITE=KEEP+..." if line else ""
    parser.add_argument("--method", default=default, help=f"compression method, see `vtc methods`{stated} ({default})")
    parser.add_argument(
        *flags, dest="options", type=option, action="append", default=[], metavar="NAME=VALUE", help=option_help
    )


def add_budget(parser: argparse.ArgumentParser, *, of: str) -> argparse._MutuallyExclusiveGroup:
    """Add --keep-ratio and --keep-tokens, which counts the tokens `of` something, and return their group."""
    keep = parser.add_mutually_exclusive_group()
    keep.add_argument("--keep-ratio", type=float, help=f"fraction of visual tokens kept ({DEFAULT_KEEP_RATIO})")
    keep.add_argument("--keep-tokens", type=int, help=f"visual tokens kept of {of}, instead of a fraction")
    return keep


def add_site(parser: argparse.ArgumentParser) -> None:
    """Add --at, which `site` reads."""
    parser.add_argument(
        "--at",
        metavar="SITE",
        help="where visual tokens leave: pixels, vision:K, decoder, decoder:K, cache or cache:decoding, where K is a"
        " layer (by default where the method says)",
    )


def add_seed(parser: argparse.ArgumentParser) -> None:
    """Add --seed."""
    parser.add_argument("--seed", type=int, default=0, help="for what is drawn at random (0)")


def option(text: str) -> tuple[str, Any]:
    """`name=value` with the value as JSON where it is JSON, else as it stands.

    Raises
    ------
    argparse.ArgumentTypeError
        There is no name or no equals sign.
    """
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, parse_json(value)
    except ConfigError:
        return name, value


# -------------------------------------------------------------- checks before a model is loaded, which may take minutes


def stages(args: argparse.Namespace, **settings: Any) -> list[vtc.CompressionConfig]:
    """The configurations that --method describes where it is a line of stages, otherwise one: `configuration`.

    A method that is trained gets the modules that ship with a reference model, if no option of its own is given.

    Raises
    ------
    VtcError
        There is no such method, a value is not allowed, or a budget, site or option is given beside such a line.
    """
    if "=" not in args.method:
        return [_configuration(args, settings)]
    given = {"--keep-ratio": args.keep_ratio, "--keep-tokens": args.keep_tokens, "--at": args.at}
    beside = [flag for flag, value in given.items() if value is not None] + [name for name, _ in args.options]
    if beside:
        raise ConfigError(f"{', '.join(beside)} given beside --method {args.method!r}, which says it for each stage.")
    own = {name: value for name, value in settings.items() if (name, value) != ("positions", "original")}
    return [_with_modules(dataclasses.replace(config, **own), args) for config in parse_stages(args.method)]


def configuration(args: argparse.Namespace, **settings: Any) -> vtc.CompressionConfig:
    """The configuration that the method, its options, the budget and the site describe, with further `settings`.

    A line of one stage says all of this by itself.

    Raises
    ------
    VtcError
        There is no such method, a value is not allowed, or --method is a line of several stages.
    """
    first, *others = stages(args, **settings)
    if others:
        raise ConfigError(f"--method {args.method!r}: this command takes one stage, got {1 + len(others)}.")
    return first


def _configuration(args: argparse.Namespace, settings: dict[str, Any]) -> vtc.CompressionConfig:
    config = vtc.CompressionConfig(
        method=args.method,
        keep_ratio=DEFAULT_KEEP_RATIO if args.keep_ratio is None and args.keep_tokens is None else args.keep_ratio,
        keep_tokens=args.keep_tokens,
        options=dict(args.options),
        **site(args),
        **settings,
    )
    config = _with_modules(config, args)
    registry.get_selector(config.method, **config.options)
    return config


def _with_modules(config: vtc.CompressionConfig, args: argparse.Namespace) -> vtc.CompressionConfig:
    """Add the modules that ship with the model to the options of a trained method that has none."""
    own = options(config.method, config.options.items(), getattr(args, "model", ""), config.keep_tokens)
    return dataclasses.replace(config, options=own)


def options(method: str, given: Iterable[tuple[str, Any]], model: str, keep_tokens: int | None) -> dict[str, Any]:
    """Return the options of a method; where none is `given`, the modules that ship with a model, if there are any."""
    own = dict(given)
    found = None if own else shipped_modules(method, model, keep_tokens)
    return own if found is None else {"modules": found}


def shipped_modules(method: str, model: str, keep_tokens: int | None) -> str | None:
    """Return the folder of the modules of a method that ship with a reference model; None if there are none.

    Of several, which give so many tokens each, the largest that `keep_tokens` allows; all of them where it is None.
    """
    kind, _, name = model.partition(":")
    known = registry.selectors().get(method)
    if (
        kind != "reference"
        or known is None
        or "modules" not in known.options()
        or not vtc.reference.available()
        or (name and name not in vtc.reference.names())
    ):
        return None
    found = {}
    for folder, path in vtc.reference.modules(name or "llava").items():
        count = folder.removeprefix(method).removeprefix("-") if folder.startswith(method) else "x"
        if count == "" or count.isdecimal():
            found[int(count or 0)] = str(path)
    fitting = [count for count in found if keep_tokens is None or count <= keep_tokens]
    return found[max(fitting, default=min(found))] if found else None


def site(args: argparse.Namespace) -> dict[str, Any]:
    """`at` as a keyword argument where --at was given."""
    return {} if args.at is None else {"at": args.at}


def check_output(path: Path, suffixes: tuple[str, ...] | None = None) -> None:
    """Refuse a file that cannot be written later.

    Raises
    ------
    ConfigError
        It is a picture, and its suffix is none of `suffixes`.
    InputError
        It is a folder, or in a folder that does not exist or cannot be written to.
    """
    if suffixes is not None and path.suffix.lower() not in suffixes:
        raise ConfigError(f"{path}: the picture is written as {', '.join(suffixes)}.")
    check_writable(path)


def save(drawn: Image, path: Path) -> None:
    """Write a picture, in full or not at all.

    Raises
    ------
    InputError
        Its format holds no picture of that size.
    OSError
        Writing failed, as on a full disk.
    """
    with replacing(path) as file:
        try:
            drawn.save(file)
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None) is not None:  # of the system, not of an encoder
                raise
            raise InputError(
                f"{path}: a picture of {drawn.width} x {drawn.height} cannot be written: {error}. JPEG holds up to "
                "65,500 pixels along an edge and WebP up to 16,383, PNG more."
            ) from error


# -------------------------------------------------------------------------------------------------------------- models


def load_model(name: str, dtype: str, device: str) -> tuple[Any, Any]:
    """Load a model in evaluation mode, and its processor, from this machine's disk alone.

    Parameters
    ----------
    name, dtype, device : str
        Values of --model, --dtype and --device.

    Raises
    ------
    ConfigError
        The device does not exist, or there is no reference model of that name.
    InputError
        The folder is missing or holds no image-text-to-text model.
    UnsupportedModelError
        It is an original LLaVA for which transformers has no classes.
    StateError
        vtc-reference is not installed.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    check_device(device)
    model, processor = vtc.load(name, dtype=dtype)
    return model.to(device).eval(), processor


def prepare(model: Any, processor: Any, image: Image, question: str) -> Any:
    """Inputs of the model, on its device and in its dtype, for a question about a picture.

    Raises
    ------
    InputError
        The processor has no chat template, or does not take this picture or question.
    """
    return image_inputs(processor, [image], question).to(model.device, model.dtype)
