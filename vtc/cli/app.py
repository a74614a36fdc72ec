"""The `vtc` command: ask about a picture with and without compression, list what there is, measure."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils.logging import disable_progress_bar

import vtc
from vtc import registry
from vtc.bench import kernels, overhead, prefill
from vtc.cli import advise, calibrate, media
from vtc.errors import ConfigError, InputError, VtcError

if TYPE_CHECKING:
    from PIL.Image import Image

    from vtc.core.context import Stage

DEFAULT_KEEP_RATIO = 0.25


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments after the command's name; `sys.argv` without them.

    Returns
    -------
    int
        Exit status: 0, or 2 for a mistake in the arguments or the input, told on stderr in one line.
    """
    args = _parser().parse_args(argv)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except VtcError as error:
        print(f"vtc: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader (head, a pager) has gone. Python flushes once more on its way out; that must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vtc", description="Visual-token compression for transformers models.")
    parser.add_argument("--version", action="version", version=f"vtc {vtc.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_ask(commands)
    media.add_commands(commands)
    calibrate.add_command(commands)
    advise.add_command(commands)
    _add_methods(commands)
    _add_models(commands)
    _add_bench(commands)
    return parser


# ------------------------------------------------------------------------------------------------------------------ ask


def _add_ask(commands: Any) -> None:
    parser = commands.add_parser("ask", help="answer a question about a picture, without and with compression")
    parser.add_argument("image", type=Path, metavar="IMAGE")
    parser.add_argument("question", metavar="QUESTION")
    parser.add_argument(
        "--model",
        default="reference",
        help="reference (the small LLaVA of vtc-reference), reference:NAME (another one), or a checkpoint's folder",
    )
    parser.add_argument("--method", default="vtc-cls", help="see `vtc methods` (vtc-cls)")
    keep = parser.add_mutually_exclusive_group()
    keep.add_argument("--keep-ratio", type=float, help=f"fraction of visual tokens kept ({DEFAULT_KEEP_RATIO})")
    keep.add_argument("--keep-tokens", type=int, help="visual tokens kept per image, instead of a fraction")
    parser.add_argument("--positions", choices=("original", "compact"), default="original")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="length of the answer (32)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "-o",
        "--option",
        dest="options",
        type=_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="option of the method; repeat for more",
    )
    parser.set_defaults(run=_ask)


def _option(text: str) -> tuple[str, Any]:
    """`name=value` with the value as JSON where it is JSON, else as it stands."""
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _ask(args: argparse.Namespace) -> int:
    keep_ratio = DEFAULT_KEEP_RATIO if args.keep_ratio is None and args.keep_tokens is None else args.keep_ratio
    # Everything that can be wrong is looked at before a model is loaded, which may take minutes.
    config = vtc.CompressionConfig(
        method=args.method,
        keep_ratio=keep_ratio,
        keep_tokens=args.keep_tokens,
        positions=args.positions,
        options=dict(args.options),
    )
    registry.get_selector(config.method, **config.options)
    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}.")
    image = _open_image(args.image)

    model, processor = _load(args.model, args.dtype, args.device)
    inputs = _inputs(model, processor, image, args.question)
    print(f"{args.question}  [{args.image.name}]")
    print(f"  all tokens: {_answer(model, processor, inputs, args.max_new_tokens)}")
    with vtc.compressed(model, config):
        answer = _answer(model, processor, inputs, args.max_new_tokens)
        report = vtc.report(model)
    print(f"  {report.visual_tokens_after} of {report.visual_tokens_before}: {answer}\n")
    print(report)
    return 0


def _open_image(path: Path) -> Image:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ConfigError('Reading pictures needs pillow: pip install "vtc[vision]".') from error
    try:
        with Image.open(path) as image:
            return image.convert("RGB")  # decodes it, so that a truncated file shows here
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file.") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: a folder, not a picture.") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path}: not a picture that pillow can read.") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # pillow's PNG reader raises SyntaxError
        raise InputError(f"{path}: {error}.") from error


def _load(name: str, dtype: str, device: str) -> tuple[Any, Any]:
    """Model in evaluation mode on `device`, and its processor, from this machine's disk alone."""
    disable_progress_bar()
    source, _, reference_name = name.partition(":")
    if source == "reference":
        from vtc import reference

        model, processor = reference.load(reference_name or "llava")
    else:
        model, processor = _load_folder(Path(name))
    if dtype != "auto":
        model = model.to(getattr(torch, dtype))
    try:
        return model.to(device).eval(), processor
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        raise ConfigError(f"--device {device}: {_first_line(error)}") from error


def _load_folder(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder. --model takes the folder of a checkpoint, or the word reference.")
    try:
        model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, dtype="auto")
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"{folder}: cannot be loaded as an image-text-to-text model: {_first_line(error)}") from error
    return model, processor


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _inputs(model: Any, processor: Any, image: Image, question: str) -> Any:
    if not getattr(processor, "chat_template", None):
        raise InputError(
            f"{type(processor).__name__} has no chat template, so the question cannot be put to the model."
        )
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(conversation, add_generation_prompt=True)
    return processor(images=[image], text=[prompt], return_tensors="pt").to(model.device, model.dtype)


def _answer(model: Any, processor: Any, inputs: Any, max_new_tokens: int) -> str:
    """Greedy continuation of the prompt as text."""
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = output[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(new, skip_special_tokens=True)[0].strip()


# ------------------------------------------------------------------------------------------------------------ lists


def _add_methods(commands: Any) -> None:
    commands.add_parser("methods", help="list the compression methods").set_defaults(run=_methods)


def _methods(_: argparse.Namespace) -> int:
    rows = []
    for name, cls in registry.selectors().items():
        stages = cls().stages()
        needs = sorted({need.value for stage in stages for need in stage.requires})
        rows.append((name, _where(stages), ", ".join(needs) or "-", cls.paper))
    _print_table(("method", "where", "needs besides features", "from"), rows)
    return 0


def _where(stages: Sequence[Stage]) -> str:
    layers = [str(stage.layer) for stage in stages if stage.layer is not None]
    before = ["before the language model"] if len(layers) < len(stages) else []
    inside = [f"entering decoder layer{'s' if len(layers) > 1 else ''} {', '.join(layers)}"] if layers else []
    return " and ".join(before + inside)


def _add_models(commands: Any) -> None:
    commands.add_parser("models", help="list the supported model types").set_defaults(run=_models)


def _models(_: argparse.Namespace) -> int:
    rows = [
        (
            model_type,
            ", ".join(adapter.modalities),
            "refused" if adapter.decoder_stages_refused else "yes",
        )
        for model_type, adapter in registry.adapters().items()
    ]
    _print_table(("config.model_type", "inputs", "decoder stages"), rows)
    return 0


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


# ------------------------------------------------------------------------------------------------------------ bench


def _add_bench(commands: Any) -> None:
    parser = commands.add_parser("bench", help="measure speed on this machine, with random weights")
    benches = parser.add_subparsers(dest="bench", required=True, metavar="WHAT")
    for name, module, help_text in (
        ("prefill", prefill, "speed-up and realised share at the decoder shapes of real checkpoints"),
        ("overhead", overhead, "what compression costs on a small model"),
        ("kernels", kernels, "each operation of vtc.kernels beside the plain PyTorch way"),
    ):
        bench = benches.add_parser(name, help=help_text)
        module.add_arguments(bench)
        bench.set_defaults(run=module.run)
