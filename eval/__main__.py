"""Measure methods on tasks.

    python -m eval tasks | run | sweep | table | compare | confirm | bound | continuations | cost | readme

    python -m eval sweep --model reference --methods all --keep 0.5 0.25 0.11 0.056
    python -m eval run --task pope --data data/pope --model checkpoints/llava-1.5-7b-hf --methods divprune --keep 0.25
    python -m eval compare "results/scenes-reference:divprune 0.25" "results/scenes-reference:vtc-cls 0.25"

`run` answers the samples and writes a row for each answer; after an interruption it continues where it stopped. Started
by `accelerate launch` or `torchrun`, each process takes its share and writes its own file; `--backend ray` distributes
the samples over the workers of a cluster. `sweep` answers what is missing, measures times, and writes table.md,
table.csv and plots; `table` does only the last of these.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    import torch

    import vtc
    import vtc.reference
    from eval import (
        comparison,
        confirm,
        continuations,
        cost,
        models,
        readme,
        runner,
        search,
        seeds,
        sweep,
        tasks,
        timing,
    )
    from eval.models import Loaded
    from eval.runs import Run
    from eval.sweep import Job
    from vtc.console import finish
    from vtc.files import check_writable, write_text
    from vtc.plain import parse_json
except KeyboardInterrupt:  # seconds pass before `finish` can say so
    print("eval: interrupted", file=sys.stderr)
    sys.exit(130)

_KEEP = (0.5, 0.25, 0.11, 0.056)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 2 after a one-line message about what a user can mend, as `vtc` does."""

    def work() -> int:
        args = _parser().parse_args(argv)
        return int(args.run(args))

    return finish("eval", work)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("tasks", help="list the tasks").set_defaults(run=_tasks)
    run = commands.add_parser("run", help="answer every sample with every method at every budget")
    _add_measuring(run)
    run.set_defaults(run=_run)
    sub = commands.add_parser("sweep", help="answer, measure times, then write tables and plots")
    _add_measuring(sub)
    sub.add_argument("--timed", type=int, default=6, metavar="N", help="samples to measure times on (6; 0: none)")
    sub.add_argument("--rounds", type=int, default=3, help="timed rounds per sample (3)")
    sub.add_argument(
        "--decode-tokens",
        type=int,
        default=timing.DECODE_TOKENS,
        help=f"timed answers' length ({timing.DECODE_TOKENS})",
    )
    sub.add_argument("--cost", choices=tuple(cost.LAYERS), help="add what a whole call would take at this shape")
    sub.set_defaults(run=_sweep)
    table = commands.add_parser("table", help="write tables and plots of the rows in a folder")
    table.add_argument("folder", type=Path)
    table.add_argument("--cost", choices=tuple(cost.LAYERS), help="add what a whole call would take at this shape")
    table.set_defaults(run=_table)
    taken = commands.add_parser("cost", help="write the table of costs of a shape from measurements")
    taken.add_argument("name", choices=tuple(cost.LAYERS))
    taken.add_argument("--bench", type=Path, help="what `vtc bench tower --json` wrote (the table there is)")
    taken.add_argument(
        "--selectors", type=Path, nargs="+", default=[], help="what `vtc bench selectors --json` wrote at every share"
    )
    taken.set_defaults(run=_cost)
    compare = commands.add_parser("compare", help="paired differences with significance")
    compare.add_argument(
        "a", metavar="A", nargs="?", help='a folder of results, or FOLDER:RUN, such as "results/x:divprune 0.25"'
    )
    compare.add_argument("b", metavar="B", nargs="?")
    compare.add_argument("--folder", type=Path, help="A and B are names of runs in this folder")
    compare.add_argument(
        "--pair", nargs=2, action="append", default=[], metavar=("A", "B"), help="one more pair; repeat"
    )
    compare.add_argument("--base", metavar="RUN", help="compare every run of --folder with this one")
    compare.set_defaults(run=_compare)
    once = commands.add_parser("confirm", help="write a rule down, then compare it on pictures nobody has looked at")
    once.add_argument("rule", nargs="+", metavar="METHOD@SITE=KEEP+...", help="settings to confirm")
    once.add_argument("--against", nargs="+", help="methods (random uniform, without --rival)")
    once.add_argument(
        "--rival", nargs="+", default=[], metavar="METHOD@SITE=KEEP+...", help="settings to compare them with, one each"
    )
    once.add_argument("--task", choices=("scenes", "clips"), default="scenes")
    once.add_argument("--number", type=int, help="of the confirming seed (the first that nobody has looked at)")
    once.add_argument("--locks", type=Path, default=confirm.LOCKS, help="folder of the rules that were written down")
    _add_model(once)
    _add_pictures(once, 300, 5)
    once.add_argument("--check", type=int, default=4, help="samples that plain generate answers too (4)")
    once.add_argument("--out", type=Path, help="folder for rows and tables (results/confirm-TASK-MODEL-RULE)")
    once.set_defaults(run=_confirm)
    sought = commands.add_parser("bound", help="search for tokens that answer as well as all, for each question")
    sought.add_argument("--task", choices=("scenes", "hard-scenes"), default="scenes")
    sought.add_argument("--method", default="vtc", help="where the search begins (vtc)")
    sought.add_argument("--keep", type=float, default=0.056, help="share of the visual tokens (0.056)")
    sought.add_argument("--draw", default=seeds.DEFAULT, metavar="PURPOSE:N", help="exploring:N or comparing:N")
    sought.add_argument("--candidates", type=int, default=24, help="sets per forward pass (24)")
    sought.add_argument("--steps", type=int, default=60, help="passes per search, at most (60)")
    _add_model(sought)
    _add_pictures(sought, 12, 5)
    sought.set_defaults(run=_bound)
    along = commands.add_parser("continuations", help="how far smaller caches move the probabilities of a long text")
    along.add_argument(
        "--text",
        choices=continuations.TEXTS,
        default="turns",
        help="turns: further questions and right answers; own: the model's with all tokens, which may not end; "
        "reference: the right answer (%(default)s)",
    )
    along.add_argument("--task", help="scenes or clips for turns, otherwise their descriptions (the first)")
    along.add_argument(
        "--methods",
        nargs="+",
        default=list(continuations.METHODS),
        metavar="METHOD(OPTION=VALUE, ...)@SITE",
        help=f"({' '.join(continuations.METHODS)})",
    )
    along.add_argument(
        "--keep", type=float, nargs="+", default=list(continuations.KEEP), help="fractions (0.1 to 0.9 in steps of 0.1)"
    )
    along.add_argument(
        "--scope", choices=continuations.SCOPES, default="all", help="whose entries may leave the caches (%(default)s)"
    )
    along.add_argument("--tokens", type=int, default=64, help="of each text, at most (64)")
    along.add_argument(
        "--profile", type=int, default=0, metavar="N", help="also prefixkv with budgets found on N other pictures (0)"
    )
    along.add_argument("--draw", default=seeds.DEFAULT, metavar="PURPOSE:N", help="exploring:N or comparing:N")
    _add_model(along)
    _add_pictures(along, 100, 8)
    along.add_argument("--out", type=Path, help="folder for rows and tables (results/continuations-MODEL-SCOPE-TEXT)")
    along.set_defaults(run=_continuations)
    page = commands.add_parser("readme", help="write README's table and picture from the committed results")
    page.set_defaults(run=_readme)
    return parser


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", nargs="+", default=["scenes"], help="see `python -m eval tasks` (scenes)")
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="[TASK=]FOLDER", help="the task's files; generated tasks need none"
    )
    _add_model(parser)
    parser.add_argument("--methods", nargs="+", help="names, or all that the model supports (all, or --setting alone)")
    parser.add_argument(
        "--setting",
        action="append",
        default=[],
        metavar="METHOD@SITE=KEEP+...",
        help="stages at any sites, such as divprune@vision:4=0.5+divprune@decoder=0.5, or with compact positions "
        '"resize@pixels=0.5+vtc=0.5 compact"; repeat for more',
    )
    parser.add_argument(
        "--keep",
        type=float,
        nargs="+",
        help="fractions, counts above 1 (those of --setting, or 0.5 0.25 0.11 0.056)",
    )
    parser.add_argument("--positions", nargs="+", choices=("original", "compact"), default=["original"])
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="METHOD.NAME=VALUE",
        help="option of a method, the value as JSON; repeat for more",
    )
    parser.add_argument("--limit", type=int, help=f"number of samples (all; generated tasks: {sweep.GENERATED_LIMIT})")
    _add_pictures(parser, None, None)
    parser.add_argument(
        "--draw",
        default=seeds.DEFAULT,
        metavar="PURPOSE:N",
        help="which: exploring:N or comparing:N (%(default)s)",
    )
    parser.add_argument(
        "--check", type=int, default=0, metavar="N", help="samples that plain generate answers as well (0)"
    )
    parser.add_argument("--frames", type=int, help="frames to show of each video; every task has a default")
    parser.add_argument("--retry", action="store_true", help="repeat samples that ended in an error")
    parser.add_argument(
        "--backend", choices=("local", "ray"), default="local", help="ray: workers of a cluster (local)"
    )
    parser.add_argument("--workers", type=int, help="of --backend ray (2)")
    parser.add_argument(
        "--out", type=Path, help="folder for rows and tables (results/TASK-MODEL); several tasks: one in it for each"
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="reference", help="reference, reference:NAME, or a checkpoint's folder")
    parser.add_argument("--batch-size", type=int, default=10, help="questions answered together, at most (10)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--attention", choices=("sdpa", "eager", "flash_attention_2", "flex_attention"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)


def _add_pictures(parser: argparse.ArgumentParser, pictures: int | None, per_picture: int | None) -> None:
    shown = "" if pictures is None else " (%(default)s)"
    parser.add_argument("--pictures", type=int, default=pictures, help=f"pictures or clips of a generated task{shown}")
    parser.add_argument("--per-picture", type=int, default=per_picture, help=f"questions about each, at most{shown}")


def _jobs(args: argparse.Namespace) -> list[Job]:
    """Return a job for each task; finds every mistake that can be found without a model."""
    if args.workers is not None and args.backend != "ray":
        raise vtc.ConfigError(f"--workers {args.workers} is of --backend ray, which was not given")
    folders = _data(args.data, args.task)
    model = Path(args.model).name.replace(":", "-")
    several = len(args.task) > 1
    base = args.out or Path("results") / (model if several else f"{args.task[0]}-{model}")
    jobs = [
        Job(
            task=name,
            data=folders.get(name),
            model=args.model,
            dtype=args.dtype,
            device=args.device,
            attention=args.attention,
            methods=tuple(args.methods or (() if args.setting else ("all",))),
            keep=tuple(args.keep or _budgets(args.setting)),
            settings=tuple(args.setting),
            pictures=args.pictures,
            per_picture=args.per_picture,
            draw=args.draw,
            check=args.check,
            positions=tuple(args.positions),
            options=_options(args.option),
            limit=args.limit,
            frames=args.frames,
            batch_size=args.batch_size,
            seed=args.seed,
            out=base / name if several else base,
        )
        for name in dict.fromkeys(args.task)
    ]
    for job in jobs:
        job.prepare()
    for job in jobs:
        _check_folder(job.out)
    return jobs


def _budgets(settings: Sequence[str]) -> tuple[float, ...]:
    """Return the budgets of settings, at which the baselines are measured too, or the usual ones without settings."""
    runs = [Run.of_stages(text) for text in settings]
    found = [run.keep_ratio or run.keep_tokens for run in runs]
    return tuple(dict.fromkeys(float(f"{keep:.6g}") for keep in found if keep)) or _KEEP


def _check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be made or written to, without making it: other mistakes may be found later."""
    there = next(each for each in (folder, *folder.parents) if each.exists())
    check_writable(folder / "rows.jsonl" if there == folder else there / folder.relative_to(there).parts[0])


def _data(given: Sequence[str], names: Sequence[str]) -> dict[str, Path]:
    named = dict(text.split("=", 1) for text in given if text.partition("=")[0] in names and "=" in text)
    bare = [text for text in given if text.partition("=")[0] not in named]
    if len(bare) > 1 or (bare and len(names) > 1):
        raise vtc.ConfigError(f"--data takes TASK=FOLDER where there are several tasks, got {', '.join(bare)}")
    return {**dict.fromkeys(names if bare else (), Path(bare[0]) if bare else None), **_paths(named)}


def _paths(named: dict[str, str]) -> dict[str, Path]:
    return {name: Path(folder) for name, folder in named.items()}


def _options(given: Sequence[str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for text in given:
        name, equals, value = text.partition("=")
        method, dot, option = name.partition(".")
        if not (equals and dot and option):
            raise vtc.ConfigError(f"--option takes METHOD.NAME=VALUE, got {text!r}")
        try:
            found.setdefault(method, {})[option] = parse_json(value)
        except vtc.ConfigError:
            found.setdefault(method, {})[option] = value
    return found


def _answer(args: argparse.Namespace, jobs: Sequence[Job]) -> Loaded | None:
    """Answer all jobs; return the model if it was loaded in this process."""
    if args.backend == "ray":
        from eval import ray_backend

        for job in jobs:
            ray_backend.answer(job, workers=2 if args.workers is None else args.workers, retry=args.retry)
        return None
    loaded = jobs[0].load()
    for job in jobs:
        sweep.answer(job, loaded, retry=args.retry)
    return loaded


def _run(args: argparse.Namespace) -> int:
    _answer(args, _jobs(args))
    return 0


def _sweep(args: argparse.Namespace) -> int:
    if runner.shard()[1] > 1:
        raise vtc.ConfigError(
            "sweep measures times and writes tables, which is for one process: use `accelerate launch -m eval run` "
            "with these arguments, and then `python -m eval sweep` for the rest"
        )
    for name, value, least in (
        ("timed", args.timed, 0),
        ("rounds", args.rounds, 1),
        ("decode-tokens", args.decode_tokens, 2),
    ):
        if value < least:
            raise vtc.ConfigError(f"--{name} must be at least {least}, got {value}")
    costs = _costs(args)
    jobs = _jobs(args)
    loaded = _answer(args, jobs)
    if args.timed:
        loaded = loaded or jobs[0].load()
        for job in jobs:
            sweep.take_times(job, loaded, count=args.timed, rounds=args.rounds, decode_tokens=args.decode_tokens)
    found = []
    for job in jobs:
        found.append(sweep.results(job.out, costs))
        found[-1].write(job.out)
        print(found[-1].markdown())
    if len(jobs) > 1:
        print(sweep.overview(found, jobs[0].out.parent))
    return 0


def _table(args: argparse.Namespace) -> int:
    found = sweep.results(args.folder, _costs(args))
    found.write(args.folder)
    print(found.markdown())
    return 0


def _costs(args: argparse.Namespace) -> cost.CostTable | None:
    return None if args.cost is None else cost.CostTable.load(args.cost)


def _cost(args: argparse.Namespace) -> int:
    path = cost.TABLES / f"{args.name}.json"
    given = [(args.bench or path, cost.bench_command(args.name))]
    given += [(file, cost.selectors_command(args.name, cost.SHARES[0])) for file in args.selectors]
    for file, command in given:
        if not file.is_file():
            raise vtc.InputError(f"{file}: no such file; make it with `{command}`")
    data = parse_json(given[0][0].read_bytes())
    if args.bench is not None:
        _, processor = vtc.reference.load("qwen2_5_vl")
        data = cost.from_bench(args.name, data, processor)
    if args.selectors:
        data = cost.with_selectors(data, [parse_json(file.read_bytes()) for file in args.selectors])
    cost.TABLES.mkdir(exist_ok=True)
    write_text(path, json.dumps(data, indent=2) + "\n")
    return 0


def _compare(args: argparse.Namespace) -> int:
    if (args.a is None) != (args.b is None) or not (args.a or args.pair or args.base):
        raise vtc.ConfigError("compare takes A and B, or --pair A B, or --base RUN with --folder")
    found = []
    for a, b in [*([(args.a, args.b)] if args.a else []), *args.pair]:
        found += comparison.compare(a, b, args.folder)
    if args.base is not None:
        if args.folder is None:
            raise vtc.ConfigError("--base names a run of --folder, which is missing")
        found += comparison.compare_with(args.base, args.folder)
    print(comparison.to_markdown(found))
    return 0


def _confirm(args: argparse.Namespace) -> int:
    against = args.against or ([] if args.rival else ["random", "uniform"])
    rule = confirm.rule_of(args.rule, against, args.task, args.pictures, args.per_picture, args.rival)
    model = Path(args.model).name.replace(":", "-")
    out = args.out or Path("results") / f"confirm-{args.task}-{model}-{rule.fingerprint[:12]}"
    job = Job(
        task=args.task,
        data=None,
        model=args.model,
        dtype=args.dtype,
        device=args.device,
        attention=args.attention,
        methods=rule.against,
        keep=rule.budgets(),
        positions=("original",),
        options={},
        limit=None,
        frames=None,
        batch_size=args.batch_size,
        seed=args.seed,
        out=out,
        settings=(*rule.settings, *rule.rivals),
        pictures=args.pictures,
        per_picture=args.per_picture,
        check=args.check,
    )
    _check_folder(out)
    print(confirm.confirm(rule, job, args.number, args.locks))
    return 0


def _bound(args: argparse.Namespace) -> int:
    if not 0 < args.keep < 1:
        raise vtc.ConfigError(f"--keep must lie between 0 and 1, got {args.keep:g}")
    for name in ("candidates", "steps", "pictures", "per_picture"):
        if getattr(args, name) < 1:
            raise vtc.ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    seed = seeds.seed_of(args.draw)
    task = tasks.get_task(args.task, pictures=args.pictures, per_picture=args.per_picture, seed=seed)
    loaded = models.load(args.model, dtype=args.dtype, device=args.device, attention=args.attention)
    found = search.bound(
        loaded,
        task,
        task.samples(None),
        method=args.method,
        keep=args.keep,
        candidates=args.candidates,
        steps=args.steps,
        seed=args.seed,
    )
    print(search.to_markdown(found, args.method, args.keep))
    return 0


def _continuations(args: argparse.Namespace) -> int:
    plan = continuations.Plan(
        task=args.task or continuations.TASKS[args.text][0],
        model=args.model,
        draw=args.draw,
        text=args.text,
        scope=args.scope,
        pictures=args.pictures,
        per_picture=args.per_picture,
        tokens=args.tokens,
        profile=args.profile,
        batch_size=args.batch_size,
        seed=args.seed,
        methods=tuple(dict.fromkeys(args.methods)),
        keep=tuple(dict.fromkeys(args.keep)),
    )
    plan.check()
    model = Path(args.model).name.replace(":", "-")
    out = args.out or Path("results") / f"continuations-{model}-{args.scope}-{args.text}"
    _check_folder(out)
    loaded = models.load(args.model, dtype=args.dtype, device=args.device, attention=args.attention)
    continuations.measure(plan, loaded, out)
    print(continuations.write(out))
    return 0


def _readme(_: argparse.Namespace) -> int:
    readme.write()
    readme.draw()
    return 0


def _tasks(_: argparse.Namespace) -> int:
    for name in tasks.names():
        task = tasks.get_task(name)
        print(f"{name:20} {task.modality:12} {task.licence}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
