"""A table of the presses of kvpress: which of them work on a vision-language model, and why the others do not.

    python -m eval.presses > docs/kvpress.md

Each press is put on a reference model with a compression ratio of one half, and its prompt is read once. Needs kvpress:
pip install "vtc[kvpress]" && pip install --no-deps kvpress
"""

from __future__ import annotations

import argparse
import importlib.metadata
import inspect
import warnings
from typing import Any

import torch

import vtc
import vtc.reference

__all__ = ["main"]

_RATIO = 0.5
_SMALL = {"window_size": 8, "n_recent": 8, "lag_size": 8, "local_window_size": 8}
"""Windows that fit a short prompt."""


_ABOUT = """\
`vtc.compress(model, vtc.press(SnapKVPress(0.5)))` runs a press of NVIDIA's kvpress. `scope="visual"` ranks the entries
of visual tokens by its scores; with `scope="all"` the press decides about the whole prompt. Install it with
`pip install "vtc[kvpress]" && pip install --no-deps kvpress`, because it pins an older transformers.

Every press that works here works on quantized caches, too, where it ranks the entries as they are stored, and on
offloaded ones; a press that draws numbers takes them from torch's global generator.
"""


def made(kvpress: Any, name: str) -> Any:
    """Create a press with half of the entries to go; those around another press get `KnormPress`."""
    cls = getattr(kvpress, name)
    options: dict[str, Any] = {}
    for option in inspect.signature(cls).parameters.values():
        if option.name == "compression_ratio":
            options[option.name] = _RATIO
        elif option.name in _SMALL:
            options[option.name] = _SMALL[option.name]
        elif option.name in ("press", "base_press"):
            options[option.name] = kvpress.KnormPress(_RATIO)
        elif option.name == "presses":
            options[option.name] = [kvpress.KnormPress(_RATIO), kvpress.ThinKPress(0.5)]
        elif option.name in ("key_channel_compression_ratio", "head_compression_ratio"):
            options[option.name] = _RATIO
        elif option.name == "compression_ratios":
            options[option.name] = [_RATIO] * 8
        elif option.name == "lazy_threshold":
            options[option.name] = 0.2
    return cls(**options)


def tried(model: Any, inputs: Any, kvpress: Any, name: str, scope: str) -> str:
    """Say what came of one press."""
    try:
        with vtc.compressed(model, vtc.press(made(kvpress, name), scope=scope)), torch.inference_mode():
            model(**inputs, use_cache=True, logits_to_keep=1)
            report = vtc.report(model)
    except (vtc.VtcError, TypeError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        reason = str(cause).split("cannot be used: ")[-1].split("; give scope")[0]
        return "refused: " + " ".join(reason.split())[:120].replace("|", "/")
    stored = [sum(rows) for rows in report.stored_per_layer or ()]
    kept = sum(stored) / len(stored) / sum(report.lengths_before)
    return f"works, {100 * kept:.0f} % of the entries stay"


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2_5_vl", help="a reference model (qwen2_5_vl)")
    args = parser.parse_args()
    import kvpress
    import transformers

    warnings.filterwarnings("ignore")
    model, processor = vtc.reference.load(args.model)
    image = vtc.open_image(vtc.reference.samples()[0])
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is left of the cup?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=image, text=text, return_tensors="pt")
    names = sorted(name for name in dir(kvpress) if name.endswith("Press") and name not in ("BasePress", "ScorerPress"))
    print("# Presses of kvpress\n")
    print(_ABOUT)
    print(
        f"This table was made by `python -m eval.presses` on the reference model {args.model}: "
        f"kvpress {importlib.metadata.version('kvpress')}, transformers {transformers.__version__}, one prompt,\n"
        f"offline, compression ratio {_RATIO}, around another press KnormPress, windows of 8. Presses that ask for "
        "files from a hub may work online.\n"
    )
    print('| press | `scope="visual"` | `scope="all"` |\n| --- | --- | --- |')
    for name in names:
        if name == "ObservedAttentionPress":
            model.set_attn_implementation("eager")  # which alone tells its attention
        cells = [tried(model, inputs, kvpress, name, scope) for scope in ("visual", "all")]
        model.set_attn_implementation("sdpa")
        note = " (eager attention)" if name == "ObservedAttentionPress" else ""
        print(f"| `{name}`{note} | {cells[0]} | {cells[1]} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
