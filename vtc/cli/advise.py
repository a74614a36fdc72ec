"""`vtc advise`: the cheapest setting that keeps the answers, on the user's own prompts."""

from __future__ import annotations

import argparse
import shlex
import sys
from contextlib import suppress
from pathlib import Path

import vtc
from vtc import limits
from vtc.cli import arguments, samples
from vtc.errors import InputError, VtcError

_KEEP_RATIOS = (0.5, 0.25, 0.11, 0.056)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    samples.add_arguments(parser)
    arguments.add_model(parser)
    arguments.add_seed(parser)
    parser.add_argument("--agreement", type=float, default=0.9, help="share of answers that must stay the same (0.9)")
    parser.add_argument("--methods", nargs="+", help="see `vtc methods` (all that the model can run)")
    parser.add_argument(
        "--setting",
        action="append",
        metavar="METHOD@SITE=KEEP+...",
        help="stages to try beside the methods; repeat for more (without --methods, some before or inside the tower)",
    )
    parser.add_argument(
        "--keep-ratios",
        type=float,
        nargs="+",
        default=list(_KEEP_RATIOS),
        help=f"fractions of visual tokens to try ({' '.join(map(str, _KEEP_RATIOS))})",
    )
    parser.add_argument("--max-new-tokens", type=int, default=16, help="length of the answers compared (16)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds per prompt (3)")
    parser.add_argument("-o", "--output", type=Path, help="where the chosen configuration goes, as JSON")


def run(args: argparse.Namespace) -> int:
    """Print what was measured and what is advised, and write the configuration if asked."""
    if args.output is not None:
        arguments.check_output(args.output)
    limits.check_count("--max-new-tokens", args.max_new_tokens, limits.MAX_NEW_TOKENS)
    limits.check_count("--rounds", args.rounds, limits.MAX_ROUNDS)
    given = samples.read(args)
    model, processor = arguments.load_model(args.model, args.dtype, args.device)
    advice = vtc.advise(
        model,
        processor,
        samples.encode(given, processor),
        agreement=args.agreement,
        methods=args.methods,
        settings=args.setting,
        keep_ratios=args.keep_ratios,
        max_new_tokens=args.max_new_tokens,
        rounds=args.rounds,
        seed=args.seed,
        progress=sys.stderr.isatty(),
    )
    print(advice)
    if advice.chosen is not None:
        print("\n".join(_commands(advice.chosen)))
    if args.output is not None and advice.stages is None:
        raise InputError(f"{args.output}: nothing was written, because no setting can be advised (see above).")
    if args.output is not None and advice.stages is not None:
        vtc.save_stages(args.output, advice.stages)
        print(f'use it: vtc.compress(model, vtc.load_stages("{args.output}"))')
    return 0


def _commands(chosen: vtc.AdvisedSetting) -> list[str]:
    """Return the command lines that use a setting: in transformers, and in vLLM if it can run there."""
    from vtc.integrations.vllm.settings import planned

    method = shlex.quote(chosen.name)
    lines = [f"vtc ask IMAGE QUESTION --method {method}"]
    if len(chosen.stages) == 1:
        with suppress(VtcError):
            planned(chosen.stages[0])
            lines.append(f"vtc serve CHECKPOINT --method {method}")
    return lines
