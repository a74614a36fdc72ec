"""Relevance by a contrastive model: an option that survives JSON, the question of a prompt, what it finds."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import vtc
from tests import tiny
from vtc import relevance
from vtc.core.observations import PatchPixels, PromptText
from vtc.engine.install import adapter_for
from vtc.errors import ConfigError, InputError, StateError
from vtc.registry import get_selector
from vtc.relevance import OpenClip

vtc_reference = pytest.importorskip("vtc_reference")

REFERENCE = Path(vtc_reference.__file__).parent
TOKENIZER = REFERENCE / "tokenizer"


_PARTS = (
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
)
TEMPLATES = {
    "parts alone": "{% for message in messages %}{{ message['role'].upper() }}: " + _PARTS + " {% endfor %}ASSISTANT:",
    "a system prompt of its own": "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|start|>system\nYou help.<|end|>\n{% endif %}<|start|>{{ message['role'] }}\n"
    + _PARTS
    + "<|end|>\n{% endfor %}<|start|>assistant\n",
    "a beginning": "[start]{% for message in messages %}<|{{ message['role'] }}|>\n"
    + _PARTS
    + "{% endfor %}<|assistant|>",
}
"""Templates as those of LLaVA 1.5, Qwen2-VL and GLM-4V are built."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What looks like the folder of an open_clip model."""
    (tmp_path / "open_clip_config.json").write_text("{}")
    return tmp_path


@pytest.fixture(scope="module")
def answering(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a processor with a chat template."""
    where = tmp_path_factory.mktemp("processor")
    vtc_reference.load("llava")[1].save_pretrained(where)
    return str(where)


class StandIn(nn.Module):
    """A contrastive model of width 6 on features of width `width`, with patches of 14 pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.visual = nn.Module()
        self.visual.ln_post = nn.LayerNorm(width)
        self.visual.proj = nn.Parameter(torch.randn(width, 6, generator=generator), requires_grad=False)
        self.visual.conv = nn.Conv2d(3, width, 14, 14)
        self.visual.transformer = nn.Identity()
        self.visual.image_size, self.visual.grid_size = (28, 42), (2, 3)
        self.visual.preprocess_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
        self.visual.forward = self.look

    def look(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.visual.conv(pixels).flatten(2).transpose(1, 2)
        return self.visual.transformer(nn.functional.pad(patches, (0, 0, 1, 0)))[:, 0]


class TestOption:
    def test_it_survives_json(self, folder: Path) -> None:
        option = OpenClip(folder, question="Where is the cup?")
        config = vtc.CompressionConfig("cdpruner", keep_ratio=0.25, options={"relevance": option})
        again = vtc.CompressionConfig.from_json(config.to_json())
        assert again == config
        selector = get_selector("cdpruner", **again.options)
        assert selector.relevance == option
        assert hash(selector) == hash(get_selector("cdpruner", relevance=option))
        assert copy.deepcopy(option) == option
        assert repr(option) == f"OpenClip({str(folder)!r}, question='Where is the cup?', image='tower')"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "give tokenizer"),
            ({"question": "  "}, "question is a text"),
            ({"question": "a", "image": "else"}, 'image must be "tower" or "own"'),
            ({"question": "a", "image": "own"}, "needs mean and std"),
            ({"question": "a", "mean": (0, 0, 0), "std": (1, 1, 1)}, "takes none"),
            ({"question": "a", "image": "own", "mean": (0, 0, 0), "std": (1, 0, 1)}, "std must be three numbers"),
            ({"tokenizer": "nowhere"}, "loaded from one that is still there"),
        ],
    )
    def test_mistakes_are_named(self, folder: Path, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            OpenClip(folder, **arguments)

    def test_folders_without_a_model_are_refused(self, tmp_path: Path) -> None:
        for model in (tmp_path, "ViT-L-14", 3):
            with pytest.raises(ConfigError, match="the folder of an open_clip model"):
                OpenClip(model, question="a")  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"must be a vtc\.relevance\.OpenClip, got"):
            get_selector("cdpruner", relevance={"folder": "x"})

    def test_the_text_is_said_once(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match="no effect beside relevance"):
            get_selector("cdpruner", text="after", relevance=OpenClip(folder, question="a"))

    @pytest.mark.parametrize("method", ["vtc", "hiprune"])
    def test_it_has_no_effect_where_no_text_counts(self, folder: Path, method: str) -> None:
        for options in ({"relevance": OpenClip(folder, question="a")}, {"similarity": "inverted"}):
            with pytest.raises(ConfigError, match=f"{method}: relevance and similarity have no effect"):
                get_selector(method, **options)

    @pytest.mark.parametrize("options", [{"theta": 0.3}, {"similarity": "inverted"}, {"text": "after"}])
    def test_text_that_has_no_weight_has_no_options(self, options: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match="have no effect with relevance_weight=0"):
            get_selector("cdpruner", relevance_weight=0, **options)

    @pytest.mark.parametrize("at", ["pixels", "vision:1"])
    def test_no_text_is_known_before_the_decoder(self, at: str) -> None:
        model = tiny.build("llava").model
        with pytest.raises(vtc.UnsupportedMethodError, match="it is read before the decoder and inside it"):
            vtc.compress(model, "vtc", keep_ratio=0.5, at=at, relevance_weight=0.5)

    def test_a_processor_names_its_folder(self, folder: Path, answering: str) -> None:
        from transformers import AutoTokenizer

        reader = AutoTokenizer.from_pretrained(answering)
        assert OpenClip(folder, tokenizer=reader)["tokenizer"] == answering
        assert OpenClip(folder, tokenizer=SimpleNamespace(tokenizer=reader))["tokenizer"] == answering

    def test_the_package_is_asked_for(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
        with pytest.raises(StateError, match=r"pip install vtc\[openclip\]"):
            relevance._loaded.__wrapped__(str(folder), torch.device("cpu"))


class TestQuestion:
    def ask(self, folder: str, text: str, behind: int | None = None) -> str:
        from transformers import AutoTokenizer

        ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
        place = None if behind is None else torch.arange(len(ids)) >= behind
        return relevance.asked(folder, PromptText(ids, torch.zeros(len(ids), 4), place))

    def test_it_is_the_last_turn_of_the_user(self, answering: str) -> None:
        processor = vtc_reference.load("llava")[1]
        first = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour is the cup?"}]}
        turns = [first, {"role": "assistant", "content": [{"type": "text", "text": "red"}]}]
        turns.append({"role": "user", "content": [{"type": "text", "text": "Where is the star?"}]})
        one = processor.apply_chat_template([first], add_generation_prompt=True).replace("<image>", "")
        assert self.ask(answering, one) == "What colour is the cup?"
        three = processor.apply_chat_template(turns, add_generation_prompt=True).replace("<image>", "")
        assert self.ask(answering, three) == "Where is the star?"

    @pytest.mark.parametrize("name", TEMPLATES)
    @pytest.mark.parametrize("turns", ["one", "three", "system"])
    def test_it_is_found_by_templates_of_all_kinds(
        self, name: str, turns: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from transformers import AutoTokenizer

        def says(role: str, text: str, *shown: dict[str, str]) -> dict[str, Any]:
            return {"role": role, "content": [*shown, {"type": "text", "text": text}]}

        image = {"type": "image"}
        chats = {
            "one": [says("user", "Where is it?", image)],
            "three": [says("user", "What?", image), says("assistant", "red."), says("user", "Where is it?")],
            "system": [says("system", "Be brief."), says("user", "Where is it?", image)],
        }
        words = AutoTokenizer.from_pretrained(TOKENIZER)
        words.chat_template = TEMPLATES[name]
        reader = SimpleNamespace(
            decode=lambda ids, **_: "".join(map(chr, ids)),
            apply_chat_template=words.apply_chat_template,
            all_special_tokens=["<image>", "<|start|>", "<|end|>"],
        )
        monkeypatch.setattr(relevance, "_tokenizer", lambda _: reader)
        prompt = words.apply_chat_template(chats[turns], tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([ord(letter) for letter in prompt])
        behind = torch.arange(len(ids)) > prompt.index("<image>")
        relevance._around.cache_clear()
        found = relevance.asked(name, PromptText(ids, torch.zeros(len(ids), 4), behind))
        relevance._around.cache_clear()
        assert found == "Where is it?"

    def test_without_a_template_it_stands_behind_the_picture(self) -> None:
        assert self.ask(str(TOKENIZER), "red Where is the star?", behind=1) == "Where is the star?"
        assert self.ask(str(TOKENIZER), "Where is the star?") == "Where is the star?"

    def test_long_ones_are_cut_into_parts_that_are_read_whole(self) -> None:
        def tokenizer(texts: list[str]) -> torch.Tensor:
            ids = [len(word) for word in texts[0].split()][:4]
            return torch.tensor([ids + [0] * (4 - len(ids))])

        text = "one three five seven nine eleven thirteen fifteen seventeen"
        parts = relevance._segments(tokenizer, text)
        assert " ".join(parts) == text
        assert all(len(part.split()) < 4 for part in parts)
        assert relevance._segments(tokenizer, "one two") == ["one two"]


@pytest.fixture
def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A contrastive model of a width, in the place of one on disk; its question is one direction."""

    def install(width: int) -> tuple[StandIn, torch.Tensor]:
        model = StandIn(width)
        question = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
        monkeypatch.setattr(relevance, "_loaded", lambda *_: model)
        monkeypatch.setattr(relevance, "_encoded", lambda *_: nn.functional.normalize(question, dim=1))
        return model, question

    return install


class TestModels:
    @torch.no_grad()
    def test_the_tower_is_read_once(self, folder: Path, stand_in: Any) -> None:
        case = tiny.build("llava")
        width = case.model.config.vision_config.hidden_size
        model, question = stand_in(width)
        inputs = case.batch("single")
        seen: list[torch.Tensor] = []
        layer = case.model.config.vision_feature_layer
        with vtc.compressed(case.model, "cdpruner", keep_ratio=0.25, relevance=OpenClip(folder, question="x")):
            case.model(**inputs)
            kept = vtc.report(case.model).segments[0].kept
            tower = case.model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
            seen.append(tower.hidden_states[layer][0, 1:])
        embedded = nn.functional.normalize(model.visual.ln_post(seen[0]) @ model.visual.proj, dim=1)
        features = case.model.get_image_features(inputs["pixel_values"]).pooler_output
        features = features[0] if isinstance(features, (list, tuple)) else features
        expected = vtc.select(
            "cdpruner",
            keep_tokens=len(kept),
            features=features.reshape(-1, features.shape[-1]),
            relevance=OpenClip(folder, question="x"),
            tower_embeddings=embedded,
            question_embeddings=nn.functional.normalize(question, dim=1),
        )
        assert torch.equal(kept, expected.keep)

    @pytest.mark.parametrize(
        ("method", "options"),
        [
            ("rediprune", {}),
            ("mmtok", {}),
            ("eadp", {}),
            ("hiprune", {"text": 0.5}),
            ("vtc", {"relevance_weight": 1.0}),
            ("vtc@decoder:2", {"relevance_weight": 1.0}),
        ],
    )
    @torch.no_grad()
    def test_every_method_with_a_text_takes_it(
        self, folder: Path, stand_in: Any, method: str, options: dict[str, Any]
    ) -> None:
        """What is kept follows the contrastive model, its question and the sign of the similarity."""
        case = tiny.build("llava")
        _, question = stand_in(case.model.config.vision_config.hidden_size)
        name, _, at = method.partition("@")
        place = {"at": at} if at else {}

        def kept(**more: Any) -> list[int]:
            with vtc.compressed(case.model, name, keep_ratio=0.25, **options, **place, **more):
                case.model(**case.batch("single"))
                return list(vtc.report(case.model).segments[0].kept.tolist())

        own, theirs = kept(), kept(relevance=OpenClip(folder, question="x"))
        other = "direct" if name == "eadp" else "inverted"
        assert kept(relevance=OpenClip(folder, question="x"), similarity=other) != theirs
        question.neg_()
        assert kept(relevance=OpenClip(folder, question="x"), similarity=other) == theirs
        assert own != theirs

    @torch.no_grad()
    def test_another_tower_is_refused_by_its_width(self, folder: Path, stand_in: Any) -> None:
        case = tiny.build("llava")
        stand_in(case.model.config.vision_config.hidden_size + 2)
        vtc.compress(case.model, "cdpruner", keep_ratio=0.25, relevance=OpenClip(folder, question="x"))
        with pytest.raises(InputError, match='another tower; give image="own"'):
            case.model(**case.batch("single"))

    @pytest.mark.parametrize("name", ["internvl", "qwen2_5_vl", "qwen3_vl", "glm4v"])
    @torch.no_grad()
    def test_a_second_look_is_told_in_the_report(self, folder: Path, stand_in: Any, name: str) -> None:
        case = tiny.build(name)
        stand_in(8)
        option = OpenClip(folder, question="x", image="own", mean=(0.5,) * 3, std=(0.5,) * 3)
        with vtc.compressed(case.model, "cdpruner", keep_ratio=0.5, relevance=option):
            case.model(**case.batch("two_images"))
            report = vtc.report(case.model)
        assert all(segment.tokens_after < segment.tokens_before for segment in report.segments)
        assert report.selector_ms > 0

    def test_patches_that_do_not_tell_how_they_lie_are_refused(self, folder: Path) -> None:
        signal = relevance.PixelEmbeddings(str(folder), (0.0,) * 3, (1.0,) * 3)
        with pytest.raises(InputError, match="do not tell how they lie"):
            signal.compute(PatchPixels((torch.zeros(4, 3, 16),), None, packed=True))

    @pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen2_5_vl_video", "glm4v"])
    def test_packed_patches_lie_where_their_pixels_do(self, name: str) -> None:
        case = tiny.build(name)
        inputs = case.batch("single")
        modality = case.family.modality
        pixels = inputs["pixel_values" if modality == "image" else "pixel_values_videos"]
        adapter = adapter_for(case.model)
        crops, size = adapter.patch_pixels(modality, inputs, pixels)
        assert size is None
        for crop, picture in zip(crops, adapter.pictures(modality, inputs, crops), strict=True):
            joined = crop.shape[2] // (picture.frames[0, 0].numel() // (picture.grid[0] * picture.grid[1]))
            means = crop.unflatten(2, (joined, -1))[:, :, 0].mean(dim=(1, 2))
            blocks = nn.functional.adaptive_avg_pool2d(picture.frames.mean(dim=1), picture.grid).flatten()
            torch.testing.assert_close(means, blocks[picture.order])
            assert sorted(picture.order.tolist()) == list(range(len(crop)))

    @pytest.mark.parametrize("pooling", ["attends", "of timm", "none"])
    def test_a_second_look_by_towers_that_pool_patches(
        self, folder: Path, pooling: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """CoCa's and SigLIP's towers attend to patches; each patch counts as if all others were like it."""
        model: Any = SimpleNamespace(visual=StandIn(8).visual)
        visual, value = model.visual, torch.randn(8, 8, generator=torch.Generator().manual_seed(2))
        crop = torch.randn(3, 28, 42, generator=torch.Generator().manual_seed(3))
        patches = visual.conv((crop[None] - 0.5) / 0.5).flatten(2).transpose(1, 2)[0]

        def attend(tokens: torch.Tensor) -> torch.Tensor:
            return (tokens @ tokens.mean(dim=1, keepdim=True).mT).softmax(dim=1).mT @ (tokens @ value)

        if pooling == "attends":
            visual.attn_pool = attend
            expected = visual.ln_post(patches @ value) @ visual.proj
        else:
            model.visual = visual = SimpleNamespace(
                image_size=(28, 42), preprocess_cfg=visual.preprocess_cfg, conv=visual.conv, head=nn.Identity()
            )
            expected = patches @ value
        if pooling == "of timm":
            visual.trunk = SimpleNamespace(
                num_prefix_tokens=1,
                patch_embed=SimpleNamespace(grid_size=(2, 3)),
                forward_features=lambda pixels: nn.functional.pad(
                    visual.conv(pixels).flatten(2).transpose(1, 2), (0, 0, 1, 0)
                ),
                forward_head=lambda tokens: attend(tokens[:, 1:])[:, 0],
            )
        monkeypatch.setattr(relevance, "_loaded", lambda *_: model)
        signal = relevance.PixelEmbeddings(str(folder), (0.0,) * 3, (1.0,) * 3)
        if pooling == "none":
            with pytest.raises(InputError, match="SimpleNamespace, has no patches in its last layer"):
                signal.compute(PatchPixels((crop,), (14, 14), False))
            return
        with torch.no_grad():
            found = signal.compute(PatchPixels((crop,), (14, 14), False))[0]
            expected = nn.functional.normalize(expected, dim=1)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)

    def test_a_second_look_follows_the_picture(self, folder: Path, stand_in: Any) -> None:
        # One bright corner: its place differs from all others, which are equal.
        stand_in(8)
        crop = torch.zeros(3, 28, 42)
        crop[:, 14:, 28:] = 1.0
        signal = relevance.PixelEmbeddings(str(folder), (0.0,) * 3, (1.0,) * 3)
        with torch.no_grad():
            found = signal.compute(PatchPixels((crop,), (14, 14), False))[0]
        assert found.shape == (6, 6)
        torch.testing.assert_close(found[:2], found[:1].expand(2, -1))
        assert float(found[5] @ found[0]) < 0.99


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The contrastive model of the reference distribution, written for open_clip."""
    pytest.importorskip("open_clip")
    return str(vtc_reference.export_open_clip(tmp_path_factory.mktemp("open_clip")))


class TestPackage:
    """With open_clip itself, where it is installed, and the contrastive model of the reference distribution."""

    @torch.no_grad()
    def test_its_tower_is_that_of_llava(self, exported: str) -> None:
        model = relevance._loaded(exported, torch.device("cpu"))
        llava, _ = vtc_reference.load("llava")
        pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        seen: list[torch.Tensor] = []
        model.visual.transformer.register_forward_hook(lambda module, args, output: seen.append(output))
        model.visual(pixels)
        theirs = llava.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(seen[0], theirs, rtol=1e-3, atol=2e-3)

    @torch.no_grad()
    def test_the_asked_object_is_found(self, exported: str, answering: str) -> None:
        eval_scenes = pytest.importorskip("eval.tasks.scenes.scene")
        from eval.tasks.scenes.questions import ask

        llava, processor = vtc_reference.load("llava")
        tower, _ = OpenClip(exported, tokenizer=answering).signals()
        better = total = 0
        for index in range(4):
            scene = eval_scenes.make_scene("test", 0, index)
            pixels = processor.image_processor(scene.image, return_tensors="pt").pixel_values
            hidden = llava.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
            tokens = tower.compute(relevance.VisionHidden(hidden, 1))[0, 1:]
            for one in ask(scene, 10):
                if len(one.targets) != 1:
                    continue
                said = relevance._encoded(exported, one.text, torch.device("cpu")).mean(dim=0)
                scores = tokens @ said
                own = torch.zeros(256, dtype=torch.bool)
                own[list(scene.things[one.targets[0]].patches)] = True
                better += float((scores[own][:, None] > scores[~own]).float().mean())
                total += 1
        assert total >= 10
        assert better / total > 0.9, f"a patch of the object is above another in {better / total:.0%} of the pairs"
