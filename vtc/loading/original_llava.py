"""Checkpoints in the layout of the original LLaVA code, as transformers' `LlavaForConditionalGeneration` or LLaVA-NeXT.

The published `llava-v1.5-*` and `llava-v1.6-*` are one LLaMA or Mistral whose files also hold the projector, and
sometimes the vision tower:

| original | transformers |
| --- | --- |
| `model.embed_tokens`, `model.layers`, `model.norm` | `model.language_model.*` |
| `lm_head` | `lm_head` |
| `model.mm_projector.0`, `.2` | `model.multi_modal_projector.linear_1`, `.linear_2` |
| `model.image_newline` | `model.image_newline` (LLaVA-NeXT) |
| `model.vision_tower.vision_tower.vision_model.*` | `model.vision_tower.*` |

Their configuration is LLaMA's with `mm_*` beside it. Two things have no counterpart there and are made here: the
placeholder `<image>`, which the original code cuts out of the text before it makes tokens, becomes a token with a row
in the embeddings; and the turns of a conversation, which are code there, become a chat template.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtc.errors import InputError, UnsupportedModelError
from vtc.loading.towers import Tower, find_tower
from vtc.loading.weights import Weights, first_line, read_json, tensor

__all__ = ["is_original_llava", "load_original_llava"]

_TEXT = {"LlavaLlamaForCausalLM": "LlamaConfig", "LlavaMistralForCausalLM": "MistralConfig"}
_FEATURES = {"patch": "default", "cls_patch": "full"}
_PLACEHOLDER = "<image>"
_RENAMED = (
    (r"model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"model\.vision_tower\.vision_tower\.(vision_model\.)?", "model.vision_tower."),
    (r"model\.(?=(embed_tokens|layers|norm)\.)", "model.language_model."),
)
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$|embeddings\.position_ids$")
"""Buffers that older files hold and that are computed today."""

_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
)


@dataclass(frozen=True)
class Turns:
    """How a conversation is written: what stands before it, and around what each side says."""

    start: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    prompt: str


_VICUNA_TURNS = Turns(_VICUNA, ("USER: ", " "), ("ASSISTANT: ", "</s>"), "ASSISTANT:")
_MISTRAL_TURNS = Turns("", ("[INST] ", " [/INST]"), (" ", " </s>"), "")
_CHATML_TURNS = Turns(
    "<|im_start|>system\nAnswer the questions.<|im_end|>",
    ("<|im_start|>user\n", "<|im_end|>"),
    ("<|im_start|>assistant\n", "<|im_end|>"),
    "<|im_start|>assistant\n",
)
_LLAMA_3_TURNS = Turns(
    "<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision assistant. You are able to "
    "understand the visual content that the user provides, and assist the user with a variety of tasks using natural "
    "language.<|eot_id|>",
    ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
)
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>")
_TURN_WORDS = ("<|im_start|>", "<|start_header_id|>", "<|end_header_id|>", *_TURN_ENDS)
_PARTS = ("adapter_model.bin", "adapter_model.safetensors", "non_lora_trainables.bin", "mm_projector.bin")
"""Files that training only a part of a model leaves in place of its weights."""


def is_original_llava(config: dict[str, Any]) -> bool:
    """Tell whether a `config.json` is one of the original code: transformers' own have no `mm_vision_tower`."""
    return "mm_vision_tower" in config or any(re.match("Llava.*ForCausalLM", name) for name in _architectures(config))


def load_original_llava(
    folder: Path, config: dict[str, Any], vision_tower: Path | None, dtype: str | torch.dtype, options: dict[str, Any]
) -> tuple[Any, Any]:
    """Load the folder of an original checkpoint; see `vtc.load`.

    Raises
    ------
    UnsupportedModelError
        transformers has no class for it: another language model, projector, tower or way to divide pictures.
    InputError
        Files are missing or broken, among them those of the vision tower.
    """
    import transformers

    check(folder, config)
    _refuse_parts(folder)
    weights = Weights.of(folder)
    tied = bool(config.get("tie_word_embeddings"))
    _check_complete(folder, weights, tied)
    inside = any(".vision_tower." in name for name in weights.named)
    tower = find_tower(folder, str(config["mm_vision_tower"]), vision_tower, weights_inside=inside)
    tokenizer = _tokenizer(folder, config)
    anyres = config.get("image_aspect_ratio") == "anyres"
    family = "LlavaNext" if anyres else "Llava"

    named = renamed(weights)
    if not inside:
        named.update({f"model.vision_tower.{name}": value for name, value in tower.weights().items()})
    if not anyres:
        named.pop("model.image_newline", None)  # which a picture in one piece does not use
    if tied:
        named["lm_head.weight"] = named["model.language_model.embed_tokens.weight"]
    image_id = _with_placeholder(tokenizer, named)
    settings = {
        "vision_config": tower.config,
        "text_config": _text_config(config, named, tokenizer),
        "image_token_index": image_id,
        "image_seq_length": tower.tokens,
        "projector_hidden_act": "gelu",
        "vision_feature_select_strategy": _FEATURES[config.get("mm_vision_select_feature", "patch")],
        "vision_feature_layer": _layer(folder, config, tower),
        "tie_word_embeddings": tied,
    }
    if anyres:
        # Written as (width, height) there and as (height, width) here; the first of equals wins in both.
        settings["image_grid_pinpoints"] = [[height, width] for width, height in pinpoints(folder, config)]
    own = getattr(transformers, f"{family}Config")(**settings)
    cls = getattr(transformers, f"{family}ForConditionalGeneration")
    if dtype == "auto":
        dtype = tensor(named["model.language_model.norm.weight"]).dtype
    _check_names(folder, cls, own, named)
    model = cls.from_pretrained(None, config=own, state_dict=named, dtype=dtype, local_files_only=True, **options)
    turns = _turns(config, tokenizer)
    _set_generation(folder, model, tokenizer, image_id)
    return model, _processor(config, own, tower, tokenizer, turns, family)


def check(folder: Path, config: dict[str, Any]) -> None:
    """Refuse what transformers has no classes for, before anything is read.

    Raises
    ------
    UnsupportedModelError
        It names the setting and what is possible.
    """
    names = _architectures(config)
    if not names or names[0] not in _TEXT:
        _refuse(folder, f"its class is {', '.join(names) or 'not named'}", f"only {' and '.join(_TEXT)} can be read")
    if "quantization_config" in config:
        _refuse(folder, "its weights are quantised", "load the unquantised ones with quantization_config=")
    if (projector := config.get("mm_projector_type", "linear")) != "mlp2x_gelu":
        _refuse(folder, f"its projector is {projector}", "transformers has mlp2x_gelu alone, that of v1.5 and v1.6")
    if config.get("mm_resampler_type") is not None:
        _refuse(folder, f"it has the resampler {config['mm_resampler_type']}", "transformers has none")
    if config.get("s2"):
        _refuse(folder, "its tower looks at several scales (s2)", "transformers looks at one")
    if (feature := config.get("mm_vision_select_feature", "patch")) not in _FEATURES:
        _refuse(folder, f"mm_vision_select_feature is {feature}", f"{' or '.join(_FEATURES)} can be read")
    ratio, merge = config.get("image_aspect_ratio"), config.get("mm_patch_merge_type", "flat")
    if ratio not in (None, "square", "pad", "anyres"):
        _refuse(folder, f"image_aspect_ratio is {ratio}", "square, pad or anyres can be read")
    if ratio == "anyres" and merge != "spatial_unpad":
        _refuse(folder, f"mm_patch_merge_type is {merge}", "LLaVA-NeXT of transformers has spatial_unpad alone")
    if ratio == "anyres" and feature != "patch":
        _refuse(folder, f"mm_vision_select_feature is {feature}", "pictures that are divided (anyres) have patch alone")
    if not isinstance(config.get("mm_vision_tower"), str):
        _refuse(folder, "its configuration names no mm_vision_tower", "it may be a language model alone")


def _layer(folder: Path, config: dict[str, Any], tower: Tower) -> int:
    """Return the layer of the tower that feeds the projector; transformers has none in front of the first."""
    given, last = config.get("mm_vision_select_layer", -2), tower.config.num_hidden_layers
    if not re.fullmatch(r"-?\d+", str(given)) or not 1 <= abs(int(given)) <= last:
        _refuse(
            folder, f"mm_vision_select_layer is {given}", f"its tower has layers from 1 to {last}, or -{last} to -1"
        )
    return int(given)


def pinpoints(folder: Path, config: dict[str, Any]) -> list[tuple[int, int]]:
    """Return the (width, height) that a picture of any size is fitted to, written as a list or as text of one.

    Raises
    ------
    InputError
        `image_grid_pinpoints` is neither.
    """
    given = config.get("image_grid_pinpoints")
    text = str(given).replace("(", "[").replace(")", "]")
    pairs = re.findall(r"\[\s*(\d+)\s*,\s*(\d+)\s*\]", text)
    if not pairs:
        raise InputError(f"{folder}: image_grid_pinpoints is {given!r}; expected pairs of width and height")
    return [(int(width), int(height)) for width, height in pairs]


def renamed(weights: Weights) -> dict[str, Any]:
    """Return the stored weights under the names of transformers, still on the disk."""
    named = {}
    for name, stored in weights.named.items():
        if _COMPUTED.search(name):
            continue
        for pattern, replacement in _RENAMED:
            new, found = re.subn(f"^{pattern}", replacement, name)
            if found:
                name = new
                break
        named[name] = stored
    return named


def _architectures(config: dict[str, Any]) -> list[str]:
    names = config.get("architectures") or []
    return [str(name) for name in names] if isinstance(names, list) else []


def _refuse(folder: Path, found: str, possible: str) -> None:
    raise UnsupportedModelError(f"{folder}: this original LLaVA checkpoint cannot be converted: {found}; {possible}")


def _refuse_parts(folder: Path) -> None:
    """Refuse what training a part of a model saved; the published v1.5 have a projector, too, but beside all shards."""
    found = [name for name in _PARTS if (folder / name).is_file()]
    if found and not [*folder.glob("pytorch_model*.bin*"), *folder.glob("model*.safetensors*")]:
        _refuse_incomplete(folder, f"only {', '.join(found)}")


def _check_complete(folder: Path, weights: Weights, tied: bool) -> None:
    """Refuse weights of which the language model is missing."""
    needed = {"model.embed_tokens.weight", "model.norm.weight"} | (set() if tied else {"lm_head.weight"})
    if not needed <= set(weights.named):
        _refuse_incomplete(folder, f"no {_some(sorted(needed - set(weights.named)))}")


def _refuse_incomplete(folder: Path, found: str) -> None:
    raise InputError(
        f"{folder}: holds no complete language model, as with a LoRA or a projector alone, but {found}; merge it with "
        "its base by the code that trained it, then load the result"
    )


def _check_names(folder: Path, cls: Any, config: Any, named: dict[str, Any]) -> None:
    """Refuse weights that do not fit before the large ones are read, by the model's own names and shapes."""
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in cls(config).state_dict().items()}
    lacking, unknown = sorted(expected.keys() - named.keys()), sorted(named.keys() - expected.keys())
    if lacking or unknown:
        said = [f"lacks {_some(lacking)}"] * bool(lacking) + [f"has unknown {_some(unknown)}"] * bool(unknown)
        raise InputError(f"{folder}: its weights do not fit {cls.__name__}: the checkpoint {' and '.join(said)}")
    for name, shape in expected.items():
        found = _shape(named[name])
        if found != shape:
            raise InputError(f"{folder}: {name} has the shape {found}, and its configuration says {shape}")


def _shape(stored: Any) -> tuple[int, ...]:
    return tuple(stored.shape if isinstance(stored, Tensor) else stored.get_shape())


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _text_config(config: dict[str, Any], named: dict[str, Any], tokenizer: Any) -> Any:
    import transformers

    cls = getattr(transformers, _TEXT[_architectures(config)[0]])
    known = {*cls().to_dict(), "rope_theta", "rope_scaling", "attention_bias"}
    leave = {"architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "vocab_size"}
    settings = {name: value for name, value in config.items() if name in known - leave}
    return cls.from_dict(
        {
            **settings,
            "vocab_size": _shape(named["lm_head.weight"])[0],
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": bool(config.get("tie_word_embeddings")),
        }
    )


# ---------------------------------------------------------------------------------------------------------- tokenizer


def _tokenizer(folder: Path, config: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer, LlamaTokenizer

    kinds = ("tokenizer.model", "tokenizer.json")
    found = [name for name in kinds if (folder / name).is_file()]
    if not found:
        raise InputError(f"{folder}: holds no tokenizer, neither {' nor '.join(kinds)}")
    if found == ["tokenizer.model"] and not _reads_sentencepiece():
        raise InputError(
            f"{folder}: its tokenizer is a tokenizer.model, which the packages sentencepiece and protobuf read: "
            'pip install "vtc[llava]"'
        )
    settings = folder / "tokenizer_config.json"
    stated = read_json(settings) if settings.is_file() else None
    cls = AutoTokenizer
    if stated is None or "Llama" in str(stated.get("tokenizer_class")):
        cls = LlamaTokenizer  # AutoTokenizer would ask config.json, which names a class that is unknown here
    try:
        # transformers' puts a space before a text whatever the file says. Yi's, that of v1.6-34b, says none, and the
        # tokenizer of that time heeds it unless it is told not to be "legacy".
        heeded = cls is LlamaTokenizer and (stated or {}).get("legacy") is not False
        space = {} if not heeded or _puts_space(folder) else {"add_prefix_space": False}
        tokenizer = cls.from_pretrained(folder, local_files_only=True, **space)
    except Exception as error:  # files of others can raise anything
        raise InputError(f"{folder}: its tokenizer cannot be loaded: {first_line(error)}") from error
    _add_words(tokenizer, config)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def _puts_space(folder: Path) -> bool:
    """Tell whether a tokenizer of LLaMA, by its own file, puts a space before a text."""
    if (folder / "tokenizer.model").is_file() and _reads_sentencepiece():
        from sentencepiece import SentencePieceProcessor

        pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode("a", out_type=str)
    else:
        from tokenizers import Tokenizer

        pieces = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("a", add_special_tokens=False).tokens
    return bool(pieces[0].startswith("▁"))


def _add_words(tokenizer: Any, config: dict[str, Any]) -> None:
    """Add the words that the original code adds when it loads, and make each word around a turn one token."""
    from transformers import AddedToken

    words = ["<im_patch>"] if config.get("mm_use_im_patch_token", True) else []
    words += ["<im_start>", "<im_end>"] if config.get("mm_use_im_start_end") else []
    known = tokenizer.get_vocab()
    words += [word for word in _TURN_WORDS if word in known]
    tokenizer.add_tokens([AddedToken(word, special=True, normalized=False) for word in words], special_tokens=True)


def _reads_sentencepiece() -> bool:
    try:
        return all(importlib.util.find_spec(name) is not None for name in ("sentencepiece", "google.protobuf"))
    except ModuleNotFoundError:  # there is no package google
        return False


def _with_placeholder(tokenizer: Any, named: dict[str, Any]) -> int:
    """Give the placeholder an id of its own, and rows in both embeddings where its id is beyond them.

    The new rows are the mean of the others. The logit of the placeholder is then the mean of all logits, and never
    their maximum.
    """
    from transformers import AddedToken

    tokenizer.add_tokens([AddedToken(_PLACEHOLDER, special=True, normalized=False)], special_tokens=True)
    image_id = int(tokenizer.convert_tokens_to_ids(_PLACEHOLDER))
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        if _shape(named[name])[0] <= image_id:
            rows = tensor(named[name])
            mean = rows.float().mean(dim=0, keepdim=True).to(rows.dtype)
            named[name] = torch.cat([rows, mean.expand(image_id + 1 - len(rows), -1)])
    return image_id


def _after_placeholder(tokenizer: Any) -> str:
    """Return what has to follow the placeholder so that the text behind it makes the tokens that it makes alone.

    The original code makes tokens of each piece of text between pictures by itself, and a tokenizer of LLaMA puts a
    space before a text; transformers' makes tokens of the whole prompt, and some put none after a placeholder.
    """
    image_id = tokenizer.convert_tokens_to_ids(_PLACEHOLDER)
    alone = tokenizer("\nWhat", add_special_tokens=False)["input_ids"]
    for glue in ("", " "):
        together = tokenizer(f"{_PLACEHOLDER}{glue}\nWhat", add_special_tokens=False)["input_ids"]
        if together[together.index(image_id) + 1 :] == alone:
            return glue
    return ""


# -------------------------------------------------------------------------------------------------- prompts, pictures


def _turns(config: dict[str, Any], tokenizer: Any) -> Turns:
    """Return how the published checkpoints of this kind were asked: Mistral's, Yi's (34b), LLaMA 3's, Vicuna's way."""
    if "Mistral" in _architectures(config)[0]:
        return _MISTRAL_TURNS
    words = tokenizer.get_vocab()
    if "<|start_header_id|>" in words:
        return _LLAMA_3_TURNS
    return _CHATML_TURNS if "<|im_start|>" in words else _VICUNA_TURNS


def chat_template(turns: Turns, picture: str) -> str:
    """Return the turns as a template of Jinja, with pictures in front of what the user says, as the original has them.

    `picture` is what stands for one of them.
    """
    start, shown, prompt = (repr(text) for text in (turns.start, picture, turns.prompt))
    users, assistants = (tuple(map(repr, pair)) for pair in (turns.user, turns.assistant))
    said = (
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
        "{% endif %}"
    )
    return (
        f"{{{{ {start} }}}}"
        "{% for message in messages %}"
        f"{{% if message['role'] == 'user' %}}{{{{ {users[0]} }}}}"
        "{% if message['content'] is not string %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        f"{{{{ {shown} }}}}"
        f"{{% endif %}}{{% endfor %}}{{% endif %}}{said}{{{{ {users[1]} }}}}"
        f"{{% elif message['role'] == 'assistant' %}}{{{{ {assistants[0]} }}}}{said}{{{{ {assistants[1]} }}}}"
        "{% else %}{{ raise_exception('the prompts of the original LLaVA have turns of user and assistant alone, got ' "
        "+ message['role']) }}{% endif %}{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {prompt} }}}}{{% endif %}}"
    )


def _processor(config: dict[str, Any], own: Any, tower: Tower, tokenizer: Any, turns: Turns, family: str) -> Any:
    import transformers

    settings = tower.image_settings()
    if family == "LlavaNext":
        settings["image_grid_pinpoints"] = own.image_grid_pinpoints
    else:
        settings["do_pad"] = config.get("image_aspect_ratio") == "pad"
    picture = f"{_PLACEHOLDER}{_after_placeholder(tokenizer)}\n"
    if config.get("mm_use_im_start_end"):
        picture = f"<im_start>{_PLACEHOLDER}<im_end>\n"
    # Pillow's way to resize, as in the original: torchvision's differs in the last bits of a pixel.
    return getattr(transformers, f"{family}Processor")(
        image_processor=getattr(transformers, f"{family}ImageProcessorPil")(**settings),
        tokenizer=tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy=own.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        image_token=_PLACEHOLDER,
        chat_template=chat_template(turns, picture),
    )


def _set_generation(folder: Path, model: Any, tokenizer: Any, image_id: int) -> None:
    """Set where an answer ends; whether it is sampled is left to the caller, as in the original."""
    config = model.generation_config
    ends = {tokenizer.eos_token_id}
    stored = folder / "generation_config.json"
    if stored.is_file():
        stated = read_json(stored).get("eos_token_id")
        ends |= set(stated) if isinstance(stated, list) else {stated}
    ends |= {tokenizer.get_vocab().get(word) for word in _TURN_ENDS}
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = sorted(end for end in ends if end is not None)
    config.pad_token_id = tokenizer.pad_token_id
    config.suppress_tokens = [image_id]
