"""Relevance of visual tokens to the question, by a contrastive model beside the one that answers.

    relevance = vtc.relevance.OpenClip("clip-vit-l-14-336", tokenizer="llava-1.5-7b-hf")
    vtc.compress(model, "cdpruner", keep_ratio=0.11, relevance=relevance, similarity="inverted")

The model is any of open_clip that is on this disk; the extra ``vtc[openclip]`` brings the package. Nothing is
downloaded.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .core.observations import Observation, PatchPixels, PromptText, VisionHidden
from .core.signals import Signal, VisionSignal
from .errors import ConfigError, InputError, StateError
from .plain import shown

__all__ = ["OpenClip", "PixelEmbeddings", "QuestionEmbeddings", "TowerEmbeddings"]

_MARK, _OTHER = "\ufffcquestion\ufffc", "\ufffcother\ufffc"
_CONFIG = "open_clip_config.json"


class OpenClip(Mapping[str, Any]):
    """A contrastive model of open_clip, and how the question is found: an option of methods that choose by text.

    It is a mapping of plain values, so that a configuration that holds it survives JSON; the model is loaded when it is
    used first.

    Parameters
    ----------
    model
        Folder with ``open_clip_config.json`` and weights, as open_clip's own ``save`` and the hub write it.
    question
        What the tokens are to be relevant to; None: it is picked out of each prompt.
    tokenizer
        Folder of the tokenizer of the model that answers, or the tokenizer or processor itself where it was loaded from
        a folder. A prompt is decoded by it, and what its chat template puts around the last turn of the user is taken
        off. Needed unless there is a `question`.
    image
        "tower": features of the model's own vision tower, through the LayerNorm and the projection behind open_clip's
        tower, for models whose tower is that of the contrastive model, as in LLaVA with CLIP; "own": open_clip's tower
        sees the picture as well, a second pass.
    mean, std
        Three numbers each, by which the model's processor normalises pixels; for "own", which gets them back.

    Raises
    ------
    ConfigError
        There is no such folder, neither a question nor a tokenizer, or another argument is wrong.

    Notes
    -----
    CDPruner (arXiv 2506.10967) measures relevance so: patches of the layer that feeds the projector and segments of the
    question, none longer than the text tower reads, as normalised embeddings; a token's relevance is its mean cosine to
    the segments.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        question: str | None = None,
        tokenizer: Any = None,
        image: str = "tower",
        mean: Any = None,
        std: Any = None,
    ) -> None:
        folder = Path(os.fspath(model)) if isinstance(model, (str, os.PathLike)) else None
        if folder is None or not (folder / _CONFIG).is_file():
            raise ConfigError(f"OpenClip: model is the folder of an open_clip model, with {_CONFIG}; got {model!r}.")
        if question is not None and (not isinstance(question, str) or not question.strip()):
            raise ConfigError(f"OpenClip: question is a text or None, got {shown(question)}.")
        if question is None and tokenizer is None:
            raise ConfigError("OpenClip: give tokenizer, by which questions are read out of prompts, or a question.")
        if image not in ("tower", "own"):
            raise ConfigError(f'OpenClip: image must be "tower" or "own", got {shown(image)}.')
        numbers = {name: _three(name, value) for name, value in (("mean", mean), ("std", std))}
        if (image == "own") != all(value is not None for value in numbers.values()):
            raise ConfigError('OpenClip: image="own" needs mean and std of the model\'s processor, "tower" takes none.')
        self._values = {
            "openclip": str(folder),
            "question": question,
            "tokenizer": None if tokenizer is None else _folder_of(tokenizer),
            "image": image,
            **numbers,
        }

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> OpenClip:
        """Read what the mapping holds, as a configuration has it.

        Raises
        ------
        ConfigError
            It holds something else, or its values are not allowed.
        """
        names = {"openclip", "question", "tokenizer", "image", "mean", "std"}
        if not isinstance(values, Mapping) or "openclip" not in values or set(values) - names:
            raise ConfigError(f"relevance must be a vtc.relevance.OpenClip, got {shown(values)}.")
        return cls(values["openclip"], **{name: value for name, value in values.items() if name != "openclip"})

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(tuple(self._values.items()))

    def __repr__(self) -> str:
        named = [
            f"{name}={value!r}" for name, value in self._values.items() if name != "openclip" and value is not None
        ]
        return f"OpenClip({', '.join([repr(self['openclip']), *named])})"

    def signals(self) -> tuple[Signal, Signal]:
        """Return the signals to require: embeddings (N, E) of the tokens, and (S, E) of the question's segments."""
        folder = self["openclip"]
        question = QuestionEmbeddings(folder, self["question"], self["tokenizer"])
        if self["image"] == "own":
            return PixelEmbeddings(folder, self["mean"], self["std"]), question
        return TowerEmbeddings(model=folder), question


@dataclass(frozen=True)
class TowerEmbeddings(VisionSignal):
    """Features of the vision tower in the space of a contrastive model, (N, E)."""

    name: ClassVar[str] = "tower_embeddings"
    reads: ClassVar[type[Observation]] = VisionHidden
    axes: ClassVar[tuple[str, ...]] = ("N", "E")

    model: str = ""

    def compute(self, raw: VisionHidden) -> Tensor:
        """(B, M, E): behind the last LayerNorm and the projection of open_clip's tower."""
        visual = _loaded(self.model, raw.hidden.device).visual
        norm, projection = getattr(visual, "ln_post", None), getattr(visual, "proj", None)
        if norm is None or projection is None or getattr(visual, "attn_pool", None) is not None:
            raise InputError(f'{self.model}: its tower has no projection for single patches; give image="own".')
        if projection.shape[0] != raw.hidden.shape[-1]:
            raise InputError(
                f"{self.model} projects features {projection.shape[0]} wide, but the model's tower has "
                f'{raw.hidden.shape[-1]}: it is another tower; give image="own".'
            )
        return F.normalize(norm(raw.hidden.float()) @ projection, dim=-1)


@dataclass(frozen=True)
class PixelEmbeddings(Signal):
    """Embeddings of the places of a picture by a second look at it, (N, E)."""

    name: ClassVar[str] = "pixel_embeddings"
    reads: ClassVar[type[Observation]] = PatchPixels
    axes: ClassVar[tuple[str, ...]] = ("N", "E")

    model: str = ""
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def compute(self, raw: PatchPixels) -> Tensor:
        """(C, M, E): each crop or frame as a picture for open_clip's tower, its patches resampled to those of the crop.

        Raises
        ------
        InputError
            Nobody knows how the patches of this family lie.
        """
        if raw.size is not None:
            height, width = raw.size
            return torch.cat(
                [self._look(crop[None], crop.shape[1] // height, crop.shape[2] // width) for crop in raw.crops]
            )
        pictures = None if raw.pictures is None else raw.pictures()
        if pictures is None:
            raise InputError(
                "a second look needs pictures, and the patches of this family do not tell how they lie; use a model "
                "whose tower is given crops, or of the Qwen-VL family"
            )
        looks = [self._look(each.frames, *each.grid).flatten(0, 1)[each.order] for each in pictures]
        return torch.cat(looks)[None]

    def _look(self, frames: Tensor, rows: int, columns: int) -> Tensor:
        """(F, rows * columns, E): what open_clip's tower makes of frames (F, C, H, W)."""
        visual = _loaded(self.model, frames.device).visual
        mean, std = (torch.tensor(part, device=frames.device)[:, None, None] for part in (self.mean, self.std))
        own = [_normalisation(self.model, name, mean) for name in ("mean", "std")]
        side = visual.image_size if isinstance(visual.image_size, (tuple, list)) else (visual.image_size,) * 2
        found = []
        for frame in frames:
            pixels = (frame.float() * std + mean - own[0]) / own[1]
            pixels = F.interpolate(pixels[None], size=tuple(side), mode="bicubic", antialias=True, align_corners=False)
            grid = F.interpolate(
                _patches(self.model, visual, pixels), size=(rows, columns), mode="bilinear", align_corners=False
            )
            found.append(F.normalize(grid.flatten(2).transpose(1, 2), dim=-1))
        return torch.cat(found)


@dataclass(frozen=True)
class QuestionEmbeddings(Signal):
    """Embeddings of the segments of the question, (S, E)."""

    name: ClassVar[str] = "question_embeddings"
    reads: ClassVar[type[Observation]] = PromptText
    axes: ClassVar[tuple[str, ...]] = ("S", "E")
    per_token: ClassVar[bool] = False

    model: str = ""
    question: str | None = None
    tokenizer: str | None = None

    def compute(self, raw: PromptText) -> Tensor:
        """(S, E)."""
        question = self.question if self.question is not None else asked(self.tokenizer, raw)
        return _encoded(self.model, question, raw.embeddings.device)


def asked(tokenizer: str | None, raw: PromptText) -> str:
    """Return the last turn of the user in a prompt, without what the chat template puts around it.

    Where there is no template, or the prompt was not made by it, that is the text behind the first picture, or if there
    is none the whole text.
    """
    reader = _tokenizer(tokenizer)
    befores, after = _around(tokenizer)
    text = str(reader.decode(raw.ids.tolist(), skip_special_tokens=False))
    stop = text.rfind(after) if after else len(text)
    starts = [text.rfind(before, 0, max(stop, 0)) + len(before) for before in befores if before in text[: max(stop, 0)]]
    if starts and max(starts) < stop:
        text = text[max(starts) : stop]
    elif raw.behind is not None and bool(raw.behind.any()):
        text = str(reader.decode(raw.ids[raw.behind].tolist(), skip_special_tokens=True))
    for token in reader.all_special_tokens:
        text = text.replace(token, " ")
    return " ".join(text.split())


@functools.lru_cache(maxsize=4)
def _around(tokenizer: str | None) -> tuple[tuple[str, ...], str]:
    """What the chat template puts before a turn of the user, and behind the last, without spaces.

    Before: the beginning of a prompt, what follows an answer, what follows a system prompt. Empty without a template.
    """
    reader = _tokenizer(tokenizer)
    for parts in (True, False):  # templates want a list of parts, or take only a text

        def says(role: str, parts: bool = parts) -> dict[str, Any]:
            text = _MARK if role == "user" else _OTHER
            return {"role": role, "content": [{"type": "text", "text": text}] if parts else text}

        chats = (("user",), ("user", "assistant", "user"), ("system", "user"))
        found = [_rendered(reader, [says(role) for role in roles]) for roles in chats]
        if found[0] is not None:
            before = {text[0].strip() for text in found if text is not None} - {""}
            return tuple(sorted(before)), found[0][1].strip()
    return (), ""


def _rendered(reader: Any, chat: list[dict[str, Any]]) -> tuple[str, str] | None:
    """Return what a chat template puts right before and behind the last marked text; None where it leaves that out."""
    try:
        made = str(reader.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    except Exception:  # a template is a program of others; there may be none
        return None
    before, found, after = made.rpartition(_MARK)
    return (before.rpartition(_OTHER)[2], after) if found else None


@functools.lru_cache(maxsize=4)
def _tokenizer(folder: str | None) -> Any:
    from transformers import AutoProcessor, AutoTokenizer

    if folder is None:
        raise StateError("OpenClip: a question is read out of a prompt by a tokenizer, and there is none.")
    try:
        reader = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # files of others can be wrong in any way
        raise InputError(f"{folder}: no tokenizer can be loaded from there: {error}") from error
    if reader.chat_template is None:  # of a model for pictures it is often the processor's
        try:
            reader.chat_template = AutoProcessor.from_pretrained(folder, local_files_only=True).chat_template
        except Exception:  # the folder of a tokenizer alone
            reader.chat_template = None
    return reader


@functools.lru_cache(maxsize=2)
def _loaded(folder: str, device: torch.device) -> Any:
    """Load an open_clip model in evaluation mode and in float32."""
    try:
        import open_clip
    except ImportError as error:
        raise StateError("vtc.relevance.OpenClip needs open_clip: pip install vtc[openclip]") from error
    try:
        model, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    except Exception as error:  # files of others can be wrong in any way
        raise InputError(f"{folder}: open_clip cannot load this model: {error}") from error
    return model.to(device).float().eval().requires_grad_(False)


@functools.lru_cache(maxsize=256)
def _encoded(folder: str, question: str, device: torch.device) -> Tensor:
    """Normalised embeddings (S, E) of the segments of a question, none longer than the text tower reads."""
    import open_clip

    model = _loaded(folder, device)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    rows = torch.cat([tokenizer([segment]) for segment in _segments(tokenizer, question)])
    with torch.no_grad():
        return F.normalize(model.encode_text(rows.to(device)).float(), dim=-1)


def _segments(tokenizer: Any, text: str) -> list[str]:
    """Halve a text until the text tower reads each part whole: what is cut off does not change the tokens."""
    words = text.split()
    if len(words) < 2 or not torch.equal(tokenizer([text]), tokenizer([f"{text} {text}"])):
        return [text]
    middle = len(words) // 2
    return [part for half in (words[:middle], words[middle:]) for part in _segments(tokenizer, " ".join(half))]


def _patches(folder: str, visual: Any, pixels: Tensor) -> Tensor:
    """(1, E, H, W): embeddings of the patches of a picture by open_clip's tower, each as if all others were like it.

    Behind the last layer a tower pools; of patches that are all alike every way to pool them makes that of one. Where
    it takes a class token, that is LayerNorm and projection of the patch; where it attends, as in SigLIP and CoCa, the
    value of the patch.

    Raises
    ------
    InputError
        The tower has no patches in its last layer, as a convolutional one.
    """
    trunk: Any = getattr(visual, "trunk", None)
    if all(hasattr(trunk, name) for name in ("num_prefix_tokens", "patch_embed", "forward_head")):
        first = trunk.num_prefix_tokens
        alike = trunk.forward_features(pixels)[0, first:, None].expand(-1, first + 1, -1)
        pooled, size = visual.head(trunk.forward_head(alike)), trunk.patch_embed.grid_size
    elif all(hasattr(visual, name) for name in ("transformer", "ln_post", "grid_size")):
        seen: list[Tensor] = []
        hook = visual.transformer.register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            visual(pixels)
        finally:
            hook.remove()
        patches, size = seen[0][0, 1:], visual.grid_size
        if getattr(visual, "attn_pool", None) is None:
            pooled = visual.ln_post(patches)
        else:
            pooled = _attended(visual, patches[:, None])[:, 0]
        pooled = pooled if visual.proj is None else pooled @ visual.proj
    else:
        raise InputError(f"{folder}: its tower, {type(visual).__name__}, has no patches in its last layer; use a ViT.")
    found: Tensor = pooled.T.unflatten(1, tuple(size))[None]
    return found


def _attended(visual: Any, tokens: Tensor) -> Tensor:
    """Pool tokens (M, N, D) by attention, as the towers of CoCa do in open_clip."""
    second, normed = getattr(visual, "attn_pool_contrastive", None), visual.ln_post
    found: Tensor
    if second is None:
        found = normed(visual.attn_pool(tokens))
    else:
        tokens = normed(tokens)
        found = second(tokens if visual.attn_pool_type == "parallel" else visual.attn_pool(tokens))
    return found


def _normalisation(folder: str, name: str, like: Tensor) -> Tensor:
    """Mean or standard deviation (3, 1, 1) by which open_clip's processor normalises."""
    value = _loaded(folder, like.device).visual.preprocess_cfg[name]
    return torch.tensor(value, device=like.device)[:, None, None]


def _three(name: str, value: Any) -> tuple[float, ...] | None:
    if value is None:
        return None
    try:
        numbers = tuple(float(number) for number in value)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != 3 or (name == "std" and min(numbers) <= 0):
        raise ConfigError(f"OpenClip: {name} must be three numbers, got {shown(value)}.")
    return numbers


def _folder_of(tokenizer: Any) -> str:
    """Return the folder that a tokenizer or processor was loaded from."""
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    name = inner if isinstance(inner, (str, os.PathLike)) else getattr(inner, "name_or_path", "")
    if not name or not Path(name).is_dir():
        raise ConfigError(
            f"OpenClip: tokenizer must be a folder, or a tokenizer loaded from one that is still there; got {name!r}. "
            "Save it with save_pretrained and give that folder."
        )
    return str(Path(name))
