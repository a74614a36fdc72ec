"""`vtc methods`: list the compression methods."""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vtc import registry
from vtc.cli.tables import print_table

if TYPE_CHECKING:
    from vtc.core.selector import Selector
    from vtc.core.stage import Stage

_HEADER = ("method", "where", "reads", "models", "inputs", "cost", "from")
_LEGEND = (
    "where: in a model as deep as LLaVA-1.5 7B; reads: signals besides features, in brackets those that only some "
    "models have; cost: the largest terms of signals and choice, in N tokens, K kept, T of text and the width d."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.epilog = _LEGEND
    parser.add_argument(
        "pattern", nargs="?", default="*", help="only methods of this name, which may have wildcards (*)"
    )
    parser.add_argument("--markdown", action="store_true", help="print the table of the README")


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    methods = registry.selectors(args.pattern)
    if args.markdown:
        print(markdown(methods), end="")
        return 0
    print_table(_HEADER, [(name, *_facts(cls), cls.paper) for name, cls in methods.items()])
    return 0


def markdown(methods: dict[str, type[Selector]]) -> str:
    """Return the table of these methods as Markdown."""
    header = ("name", "what it does", "where", "`at=`", "reads", "models", "inputs", "cost", "from")
    rows = [header, ("---",) * len(header)]
    for name, cls in methods.items():
        where, reads, *facts = _facts(cls)
        reads = re.sub(r"\w+", lambda word: f"`{word[0]}`", reads)
        sites = ", ".join(f"`{word}`" for word in movable_to(cls)) or "-"
        rows.append((f"`{name}`", _summary(cls), where, sites, reads, *facts, _link(cls.paper)))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _facts(cls: type[Selector]) -> tuple[str, ...]:
    """Say where a method works, what it reads, in which models, on what, and at what cost."""
    from vtc.core.stage import ModelShape

    plain, with_cls = (_stages(cls, ModelShape(32, 24, 22, cls=cls_token)) for cls_token in (False, True))
    always = {signal.name for stage in plain for signal in stage.requires}
    sometimes = {signal.name for stage in with_cls for signal in stage.requires} - always
    reads = ", ".join([*sorted(always), *(f"({name})" for name in sorted(sometimes))])
    return where(plain), reads or "-", models(cls, plain), ", ".join(cls.inputs), cls.cost or "-"


def _stages(cls: type[Selector], shape: Any) -> tuple[Stage, ...]:
    from vtc.errors import ConfigError

    selector = cls()
    try:
        return selector.resolve(shape, 0.25).stages(shape, 0.25)
    except ConfigError:  # it needs a package that is not installed
        return selector.stages(None, 0.25)


def where(stages: Sequence[Stage]) -> str:
    """Say in words where a method of these stages works."""
    from vtc.core.actions import Action
    from vtc.core.sites import BeforeDecoder, CacheAfterPrefill, DecoderLayer, Pixels, VisionLayer

    said = []
    for kind, words in (
        (Pixels, "before the vision tower"),
        (VisionLayer, "entering tower layer"),
        (BeforeDecoder, "before the language model"),
        (DecoderLayer, "entering decoder layer"),
        (CacheAfterPrefill, "in the cache"),
    ):
        for updating in (False, True):
            sites = [stage.site for stage in stages if (stage.action is Action.UPDATE) is updating]
            here = [site for site in sites if isinstance(site, kind)]
            layers = [site.layer for site in here if isinstance(site, (VisionLayer, DecoderLayer))]
            if here:
                place = f"{words}{'s' if len(layers) > 1 else ''} {_span(layers)}" if layers else words
                said.append(f"updates on {place}" if updating else place)
    return " and ".join(said)


def _span(layers: Sequence[int]) -> str:
    """Name layers: all if they are few or unevenly spaced, otherwise by their ends."""
    if len(layers) < 4:
        return ", ".join(map(str, layers))
    steps = {after - before for before, after in itertools.pairwise(layers)}
    if len(steps) > 1:
        return ", ".join(map(str, layers))
    return f"{layers[0]} to {layers[-1]}" + ("" if steps == {1} else f" in steps of {steps.pop()}")


def models(cls: type[Selector], stages: Sequence[Stage]) -> str:
    """Say in which families a method of these stages can work."""
    from vtc.core.actions import Action
    from vtc.core.sites import CacheAfterPrefill, DecoderLayer

    removing = [stage.site for stage in stages if stage.action is not Action.UPDATE]
    inside = any(isinstance(site, (DecoderLayer, CacheAfterPrefill)) for site in removing)
    resamples = any(stage.action is Action.RESAMPLE for stage in stages)
    adapters = registry.adapters()
    able = [
        name
        for name, adapter in adapters.items()
        if not (inside and adapter.decoder_stages_refused) and not (resamples and adapter.resampling_refused)
    ]
    unable = [name for name in adapters if name not in able]
    said = "all" if not unable else f"not {', '.join(unable)}" if len(unable) < len(able) else ", ".join(able)
    needed = [type(signal) for stage in stages for signal in stage.requires if signal.needs_cls]
    if not needed:
        return said
    instead = [text for kind, text in cls.instead.items() if issubclass(needed[0], kind)]
    return f"{said}, with [CLS]{f' or {instead[0]}' if instead else ''}"


def movable_to(cls: type[Selector]) -> list[str]:
    """Return the words for the sites at which a user may place a method; none for one of several stages."""
    from vtc.core.sites import DecoderLayer, VisionLayer
    from vtc.core.stage import ModelShape

    if len(_stages(cls, ModelShape(32, 24, 22))) > 1:
        return []
    return [f"{site.word}:K" if site in (DecoderLayer, VisionLayer) else site.word for site in cls.sites]


def _summary(cls: type[Selector]) -> str:
    """Return the first line of the docstring."""
    lines = (vars(cls).get("__doc__") or "").strip().splitlines()
    return lines[0].rstrip(".") if lines and not lines[0].startswith(f"{cls.__name__}(") else "-"


def _link(paper: str) -> str:
    """Turn where a method comes from into a link, if it names a paper or a repository."""
    arxiv, repository = re.search(r"arXiv (\d{4}\.\d{5})", paper), re.search(r"github\.com/\S+", paper)
    if arxiv:
        return f"[{arxiv[1]}](https://arxiv.org/abs/{arxiv[1]})"
    return (
        f"[{paper.split(',')[0]}](https://{repository[0]})"
        if repository
        else paper.split(";")[0].split(",")[-1].strip()
    )
