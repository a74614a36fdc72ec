"""Measure methods on tasks: `python -m eval tasks | run | sweep | compare`.

    python -m eval sweep --task scenes --limit 200 --out results/scenes
    python -m eval run --task pope --data data/pope --model checkpoints/llava-1.5-7b-hf --methods divprune --keep 0.25 \
        --out results/pope
    python -m eval compare results/scenes "divprune 0.25" "vtc-cls 0.25"

`run` answers and writes rows; interrupted, it goes on where it stopped. Started by `accelerate launch` or `torchrun`,
each process takes its share and writes a file of its own, and `sweep --table-only` puts them together. `sweep` runs,
takes times, and writes table.md, table.csv and pictures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import vtc
from eval import journal, models, runner, statistics, tables, tasks
from eval.cells import Cell, sweep_cells
from eval.tasks.base import Sample, Task

_KEEP = (0.5, 0.25, 0.11, 0.056)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 2 for a mistake in the arguments or the input, told in one line."""
    parser = argparse.ArgumentParser(
        prog="python -m eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("tasks", help="list the tasks").set_defaults(run=_tasks)
    for name, action, text in (
        ("run", _run, "answer every sample in every cell, row by row"),
        ("sweep", _sweep, "run, then table and pictures"),
    ):
        sub = commands.add_parser(name, help=text)
        _add_measuring(sub)
        if name == "sweep":
            sub.add_argument("--table-only", action="store_true", help="from rows that are there, nothing is run")
            sub.add_argument("--timed", type=int, default=6, metavar="N", help="samples to take times on (6; 0: none)")
            sub.add_argument("--rounds", type=int, default=3, help="timed rounds per sample (3)")
        sub.set_defaults(run=action)
    compare = commands.add_parser("compare", help="paired difference of two cells")
    compare.add_argument("folder", type=Path)
    compare.add_argument("a", help='name of a cell, such as "divprune 0.25"')
    compare.add_argument("b")
    compare.add_argument("--other", type=Path, help="folder of the second cell, if it is another run's")
    compare.set_defaults(run=_compare)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except vtc.VtcError as error:
        print(f"eval: error: {error}", file=sys.stderr)
        return 2


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", required=True, help="see `python -m eval tasks`")
    parser.add_argument("--data", type=Path, help="folder with the task's files; generated tasks need none")
    parser.add_argument("--model", default="reference", help="reference, reference:NAME, or a checkpoint's folder")
    parser.add_argument("--methods", nargs="+", default=["all"], help="names, or all (all)")
    parser.add_argument("--keep", type=float, nargs="+", default=list(_KEEP), help="fractions, or counts above 1")
    parser.add_argument("--positions", nargs="+", choices=("original", "compact"), default=["original"])
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="METHOD.NAME=VALUE",
        help="option of a method, the value as JSON; repeat for more",
    )
    parser.add_argument("--limit", type=int, help="samples, from the start")
    parser.add_argument("--frames", type=int, help="frames shown of each video; every task has a usual number")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--attention", choices=("sdpa", "eager", "flash_attention_2", "flex_attention"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder for rows and tables")


def _options(given: Sequence[str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for text in given:
        name, equals, value = text.partition("=")
        method, dot, option = name.partition(".")
        if not (equals and dot and option):
            raise vtc.ConfigError(f"--option takes METHOD.NAME=VALUE, got {text!r}")
        try:
            found.setdefault(method, {})[option] = json.loads(value)
        except json.JSONDecodeError:
            found.setdefault(method, {})[option] = value
    return found


def _prepare(args: argparse.Namespace) -> tuple[Task, Sequence[Sample], list[Cell]]:
    """Everything that can be wrong without a model."""
    task = tasks.get_task(args.task, **_task_options(args))
    cells = sweep_cells(
        args.methods, args.keep, positions=args.positions, bounds=task.knows_truth, options=_options(args.option)
    )
    if args.limit is not None and args.limit < 1:
        raise vtc.ConfigError(f"--limit must be at least 1, got {args.limit}")
    samples = task.samples(args.data)[: args.limit]
    if not samples:
        raise vtc.InputError(f"{args.task}: no samples in {args.data}")
    return task, samples, cells


def _task_options(args: argparse.Namespace) -> dict[str, Any]:
    if args.frames is None:
        return {}
    if args.frames < 1:
        raise vtc.ConfigError(f"--frames must be at least 1, got {args.frames}")
    if not hasattr(tasks.get_task(args.task), "frames"):
        raise vtc.ConfigError(f"--frames was given, but {args.task} shows no video files")
    return {"frames": args.frames}


def _identity(args: argparse.Namespace, loaded: models.Loaded | None) -> dict[str, Any]:
    """What rows must share to stand in one table."""
    return {
        "task": args.task,
        **({"frames": args.frames} if args.frames is not None else {}),
        "model": args.model,
        "weights": None if loaded is None else loaded.weights,
        "dtype": args.dtype,
        "attention": args.attention,
        "seed": args.seed,
    }


def _measure(
    args: argparse.Namespace, loaded: models.Loaded, task: Task, samples: Sequence[Sample], cells: list[Cell]
) -> None:
    rank, world = runner.shard()
    name = "rows.jsonl" if world == 1 else f"rows.{rank}-of-{world}.jsonl"
    with journal.Journal(args.out / name, _identity(args, loaded), runner.conditions()) as rows:
        runner.run(loaded, task, samples, cells, rows, batch_size=args.batch_size, seed=args.seed, progress=rank == 0)


def _load(args: argparse.Namespace, samples: Sequence[Sample]) -> models.Loaded:
    loaded = models.load(args.model, dtype=args.dtype, device=args.device, attention=args.attention)
    models.check_modality(loaded, "video" if any(sample.video for sample in samples) else "image")
    return loaded


def _run(args: argparse.Namespace) -> int:
    task, samples, cells = _prepare(args)
    _measure(args, _load(args, samples), task, samples, cells)
    return 0


def _sweep(args: argparse.Namespace) -> int:
    task, samples, cells = _prepare(args)
    times = None
    if not args.table_only:
        loaded = _load(args, samples)
        _measure(args, loaded, task, samples, cells)
        if args.timed:
            times = runner.timings(loaded, samples[: args.timed], cells, rounds=args.rounds, seed=args.seed)
    header, rows = journal.read(args.out)
    frame = tables.summary(rows, cells, task, times, seed=args.seed)
    kinds = tables.by_kind(rows, task.main_score)
    title = f"{args.task}, {header['run']['model']}"
    frame.to_csv(args.out / "table.csv", index=False, float_format="%.6g")
    parts = [f"# {title}", tables.markdown(frame)]
    if not kinds.empty:
        parts += ["## By kind of question", tables.kinds_markdown(kinds)]
    told = {**header["run"], **header["conditions"], "samples": len(samples)}
    if times is not None:
        told["times"] = (
            f"medians over {args.timed} samples x {args.rounds} interleaved rounds, batch 1, vision included"
        )
    parts.append("\n".join(f"- {key}: {value}" for key, value in told.items() if value is not None))
    (args.out / "table.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    tables.plots(frame, kinds, args.out, title)
    print("\n\n".join(parts))
    return 0


def _compare(args: argparse.Namespace) -> int:
    sides = []
    for folder, cell in ((args.folder, args.a), (args.other or args.folder, args.b)):
        header, rows = journal.read(folder)
        good = {row["sample"]: row for row in rows if row["cell"] == cell and "error" not in row}
        if not good:
            known = ", ".join(dict.fromkeys(row["cell"] for row in rows))
            raise vtc.InputError(f"{folder} has no cell {cell!r}; it has: {known}")
        sides.append((header["run"]["task"], good))
    (task_a, a), (task_b, b) = sides
    shared = [name for name in a if name in b]
    if task_a != task_b or not shared:
        raise vtc.InputError(f"nothing to pair: {len(shared)} samples in common, tasks {task_a} and {task_b}")
    main = tasks.get_task(task_a).main_score
    x, y = ([side[name]["scores"][main] for name in shared] for side in (a, b))
    difference, (low, high), p = statistics.paired(x, y, [a[name]["group"] for name in shared])
    print(f"{args.b} - {args.a}: {difference:+.4f} (95 % {low:+.4f} to {high:+.4f}), p = {p:.4f} by sign flips of")
    print(f"whole groups; {len(shared)} samples in {len({a[name]['group'] for name in shared})} groups")
    if set(x) | set(y) <= {0.0, 1.0}:
        print(f"McNemar, samples taken as independent: p = {statistics.mcnemar(x, y):.4f}")
    return 0


def _tasks(_: argparse.Namespace) -> int:
    for name in tasks.names():
        task = tasks.get_task(name)
        print(f"{name:20} {task.modality:12} {task.licence}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
