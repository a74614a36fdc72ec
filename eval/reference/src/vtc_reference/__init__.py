"""Small trained vision-language models that need no network.

    import vtc_reference

    model, processor = vtc_reference.load("llava")     # a stock transformers model, float32, eval mode
    vtc_reference.export("llava", "checkpoints/llava")  # the same as an ordinary checkpoint folder
    vtc_reference.export_open_clip("checkpoints/clip")  # a contrastive model on the tower of "llava", for open_clip
    pictures = vtc_reference.samples()                  # paths of sample images
    videos = vtc_reference.clips()                      # paths of sample clips

Each model's folder holds a ``README.md`` (model card): what it can do, how it was made, and the licence of every part.
"""

from __future__ import annotations

from vtc_reference.loading import card, clips, export, export_open_clip, load, modules, names, samples

__all__ = ["card", "clips", "export", "export_open_clip", "load", "modules", "names", "samples"]

__version__ = "0.1.0"
