"""Prints `docs/compatibility.md`: models that were quantised, placed, wrapped or handed to another program, compressed.

    python -m eval.compatibility > docs/compatibility.md

Every line is tried on the reference LLaVA on the CPU. Packages that are not installed are named as such:
pip install bitsandbytes torchao optimum-quanto hqq compressed-tensors gptqmodel
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import vtc
import vtc.reference
from eval import four_bits

__all__ = ["main"]

_KEEP = 0.25
_QUESTION = "What is left of the cup?"
_SAY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}

_ABOUT = """\
# Models that others have changed

What happens when a model that was quantised, spread over devices, wrapped or handed to another program is compressed.
"works" means all of this: the verbs reach the model; keeping everything gives the same logits, bit for bit; with a
quarter of the tokens, logits differ from those of the same model with the others masked by no more than the number
given, for a method that looks at features (`divprune`) and for one that reads attention of the tower (`vtc-cls`);
`generate` answers; a stage inside the decoder (`fastv`) shortens its later layers; after `vtc.restore` the logits are
those of before.

Where activations are rounded as well (bfloat16, and packages that quantise them while the model runs), sums without a
token round otherwise than sums in which it is masked: 0.03 is that, on logits between -6 and 13.

`torch.jit.trace` and `torch.export` of a compressed model are refused: the graph would keep one picture's choice.
Within `vtc.disabled(model)` they do what they do without `vtc`.
"""


@dataclass(frozen=True)
class Given:
    """What every line starts from: the folder of a checkpoint, its processor, and a question about a picture."""

    folder: Path
    processor: Any
    image: Any
    inputs: Any
    scratch: Path

    def model(self, **options: Any) -> Any:
        return vtc.load(self.folder, dtype=torch.float32, **options)[0]


@dataclass(frozen=True)
class Line:
    """One line of the table: what was done to the model, by which packages, and how the result is tried."""

    name: str
    packages: tuple[str, ...]
    make: Callable[[Given], Any]
    use: Callable[[Given, Any], str] | None = None


class NotRunError(Exception):
    """The package or transformers does not do this here."""

    def __str__(self) -> str:
        why = super().__str__()
        return f"not runnable on a CPU: {why}" if "GPU" in why or "CUDA" in why else f"refused by its package: {why}"


# -------------------------------------------------------------------------------------------------- what is checked


def _logits(model: Any, inputs: Any, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(**{**inputs, **more}).logits
    return out[:, -1].float()


def _masked(model: Any, inputs: Any, report: vtc.Report, placeholder: int) -> torch.Tensor:
    """Return the last logits of the uncompressed model with the dropped tokens masked, at their own positions."""
    mask = inputs["attention_mask"].clone()
    columns = (inputs["input_ids"][0] == placeholder).nonzero().flatten()
    mask[0, columns] = 0
    mask[0, columns[report.segments[0].kept]] = 1
    positions = torch.arange(mask.shape[1])[None]
    return _logits(model, inputs, attention_mask=mask, position_ids=positions)


def exercised(given: Given, model: Any) -> str:
    """Run a model through what the page promises; returns "works, ..." or says what was wrong."""
    inputs, wrong = dict(given.inputs), []
    placeholder = given.processor.image_token_id
    before = _logits(model, inputs)
    if not before.isfinite().all():
        raise RuntimeError("the logits are not finite before it is compressed")
    generate = model.generate if hasattr(model, "generate") else model.module.generate
    error = 0.0
    for method in ("divprune", "vtc-cls"):
        with vtc.compressed(model, method, keep_ratio=1.0):
            if not torch.equal(_logits(model, inputs), before):
                wrong.append(f"{method} that keeps everything changes the logits")
        vtc.compress(model, method, keep_ratio=_KEEP)
        packed, report = _logits(model, inputs), vtc.report(model)
        if not packed.isfinite().all():
            wrong.append(f"{method} makes logits that are not finite")
        if not vtc.is_compressed(model) or report.visual_tokens_after * 4 != report.visual_tokens_before:
            wrong.append(f"{method} kept {report.visual_tokens_after} of {report.visual_tokens_before}")
        generate(**inputs, **_SAY)
        with vtc.disabled(model):
            difference = (packed - _masked(model, inputs, report, placeholder)).abs().max().item()
        error = max(error, difference)
        vtc.restore(model)
        if not torch.equal(_logits(model, inputs), before):
            wrong.append(f"restore after {method} leaves other logits")
    with vtc.compressed(model, "fastv", keep_ratio=_KEEP):
        _logits(model, inputs)
        per_layer = vtc.report(model).lengths_per_layer
    if per_layer[-1][0] >= per_layer[0][0]:
        wrong.append("fastv shortens nothing")
    if wrong:
        return "DIFFERS: " + "; ".join(wrong)
    return f"works, {error:.0e} from masking" if error else "works, equal to masking"


def _put_on(given: Given, model: Any) -> str:
    vtc.compress(model, keep_ratio=_KEEP)
    return "compressed, and not run on this machine"


def _piped(given: Given, model: Any) -> str:
    pipe = transformers.pipeline("image-text-to-text", model=model, processor=given.processor)
    chat = [{"role": "user", "content": [{"type": "image", "image": given.image}, {"type": "text", "text": _QUESTION}]}]

    def said() -> str:
        answer: str = pipe(text=chat, return_full_text=False, generate_kwargs=_SAY)[0]["generated_text"]
        return answer

    full = said()
    with vtc.compressed(model, keep_ratio=_KEEP):
        compressed = said()
        report = vtc.report(model)
        out = model.generate(**given.inputs, **_SAY)[0, given.inputs["input_ids"].shape[1] :]
        expected = given.processor.decode(out, skip_special_tokens=True)
    if compressed.strip() != expected.strip() or said() != full:
        return f"DIFFERS: {compressed!r} for {expected!r}"
    return f"works, {report.visual_tokens_after} of {report.visual_tokens_before} tokens, the answer of `generate`"


def _trained(given: Given, model: Any) -> str:
    """Train on one sample for two steps: the losses are those of a loop without the Trainer."""
    sample = {name: value[0] for name, value in given.inputs.items()}
    sample["labels"] = torch.where(sample["input_ids"] == given.processor.image_token_id, -100, sample["input_ids"])
    vtc.compress(model, keep_ratio=_KEEP)
    with torch.no_grad():
        expected = float(model(**{name: value[None] for name, value in sample.items()}).loss)
    arguments = transformers.TrainingArguments(
        output_dir=str(given.scratch / "trainer"),
        max_steps=2,
        per_device_train_batch_size=1,
        learning_rate=1e-4,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=[sample] * 2)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    report = vtc.report(model)
    if abs(losses[0] - expected) > 1e-3 or not losses[1] < losses[0]:
        return f"DIFFERS: losses {losses}, expected {expected:.4f} and then less"
    return f"works, {report.visual_tokens_after} of {report.visual_tokens_before} tokens, the first loss that of a loop"


# ------------------------------------------------------------------------------------------------ what is done first


def _quantised(config: Callable[[], Any]) -> Callable[[Given], Any]:
    """Load with a `quantization_config`; a refusal of the package is not ours."""

    def make(given: Given) -> Any:
        try:
            model = given.model(quantization_config=config())
            _logits(model, given.inputs)
        except Exception as error:  # whatever a package says to a machine without a GPU
            raise NotRunError(_line(error)) from error
        return model

    return make


def _torchao(name: str) -> Callable[[], Any]:
    def config() -> Any:
        from torchao import quantization

        return transformers.TorchAoConfig(
            getattr(quantization, name)(), modules_to_not_convert=["lm_head", "vision_tower"]
        )

    return config


def _packed(method: str, dtype: torch.dtype) -> Callable[[Given], Any]:
    """Load a checkpoint whose decoder was rounded to 4 bits, in the layout of GPTQ or AWQ; GPTQModel runs it."""

    def make(given: Given) -> Any:
        folder = four_bits.write(given.folder, given.scratch / method, method)
        try:
            model = vtc.load(folder, dtype=dtype)[0]
            _logits(model, given.inputs)
        except Exception as error:
            raise NotRunError(_line(error)) from error
        return model

    return make


def _by_torchao(name: str) -> Callable[[Given], Any]:
    """Let torchao itself round the decoder: what it says to a machine without a GPU gets lost in transformers."""

    def make(given: Given) -> Any:
        from torchao import quantization

        model = given.model()
        try:
            quantization.quantize_(model.model.language_model, getattr(quantization, name)())
        except AssertionError as error:
            raise NotRunError(_line(error)) from error
        return model

    return make


def _by_hqq(given: Given) -> Any:
    """Round the decoder's projections by hqq itself, as it does for models that transformers does not know."""
    from hqq.core import quantize

    model = given.model()
    settings = quantize.BaseQuantizeConfig(nbits=4, group_size=64)
    for layer in model.model.language_model.layers:
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                rounded = quantize.HQQLinear(module, settings, compute_dtype=torch.float32, device="cpu")
                layer.set_submodule(name, rounded)
    return model


def _offloaded(given: Given) -> Any:
    places = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
    places |= {f"model.language_model.{part}": "cpu" for part in ("embed_tokens", "norm", "rotary_emb")}
    places |= {f"model.language_model.layers.{index}": "disk" if index > 2 else "cpu" for index in range(6)}
    return given.model(device_map=places, offload_folder=str(given.scratch / "offload"))


def _brought_in(given: Given) -> Any:
    import accelerate

    return accelerate.cpu_offload(given.model(), execution_device=torch.device("cpu"))


def _compiled(given: Given) -> Any:
    return torch.compile(given.model(), backend="eager")


def _compiled_in_place(given: Given) -> Any:
    model = given.model()
    model.compile(backend="eager")
    return model


def _compiled_forward(given: Given) -> Any:
    model = given.model()
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def _compiled_part(given: Given) -> Any:
    model = given.model()
    model.model.language_model = torch.compile(model.model.language_model, backend="eager")
    return model


def _parallel(devices: list[int] | None) -> Callable[[Given], Any]:
    def make(given: Given) -> Any:
        wrapped = nn.DataParallel(given.model())
        if devices is not None:
            wrapped.device_ids = devices
        return wrapped

    return make


def _fsdp(given: Given) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(given.model(), use_orig_params=True, device_id=torch.device("cpu"))


def _sharded(given: Given) -> Any:
    from torch.distributed import device_mesh, fsdp

    model, mesh = given.model(), device_mesh.init_device_mesh("cpu", (1,))
    for layer in model.model.language_model.layers:
        fsdp.fully_shard(layer, mesh=mesh)
    return fsdp.fully_shard(model, mesh=mesh)


def _lora(merged: bool, **settings: Any) -> Callable[[Given], Any]:
    def make(given: Given) -> Any:
        import peft

        torch.manual_seed(0)
        targets = r".*language_model.*\.(q_proj|v_proj|up_proj)"
        config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **settings)
        model = peft.get_peft_model(given.model(), config).eval()
        return model.merge_and_unload() if merged else model

    return make


def _prompt_tuned(given: Given) -> Any:
    import peft

    torch.manual_seed(0)
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, token_dim=256, num_layers=6, num_attention_heads=4
    )
    return peft.get_peft_model(given.model(), config).eval()


def _plain(given: Given) -> Any:
    return given.model()


LINES = (
    Line("nothing", (), _plain),
    Line("bfloat16", (), lambda given: given.model().to(torch.bfloat16)),
    Line(
        "bitsandbytes, 8 bit",
        ("bitsandbytes", "accelerate"),
        _quantised(lambda: transformers.BitsAndBytesConfig(load_in_8bit=True)),
    ),
    Line(
        "bitsandbytes, 4 bit (nf4)",
        ("bitsandbytes", "accelerate"),
        _quantised(
            lambda: transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
            )
        ),
    ),
    Line("torchao, int8 weights", ("torchao",), _quantised(_torchao("Int8WeightOnlyConfig"))),
    Line(
        "torchao, int8 weights and activations",
        ("torchao",),
        _quantised(_torchao("Int8DynamicActivationInt8WeightConfig")),
    ),
    Line("torchao, float8 weights", ("torchao",), _quantised(_torchao("Float8WeightOnlyConfig"))),
    Line(
        "torchao, float8 weights and activations",
        ("torchao",),
        _by_torchao("Float8DynamicActivationFloat8WeightConfig"),
    ),
    Line(
        "quanto, int8 weights",
        ("optimum-quanto",),
        _quantised(lambda: transformers.QuantoConfig(weights="int8", modules_to_not_convert=["lm_head"])),
    ),
    Line("HQQ, 4 bit", ("hqq",), _by_hqq),
    Line("HQQ, 4 bit, by `HqqConfig`", ("hqq",), _quantised(lambda: transformers.HqqConfig(nbits=4, group_size=64))),
    Line("GPTQ, 4 bit", ("gptqmodel", "optimum"), _packed("gptq", torch.float32)),
    Line("AWQ, 4 bit", ("gptqmodel",), _packed("awq", torch.float16)),
    Line("fp8 in blocks", (), _quantised(lambda: transformers.FineGrainedFP8Config())),
    Line("`device_map` with layers on the disk", ("accelerate",), _offloaded),
    Line("`accelerate.cpu_offload`", ("accelerate",), _brought_in),
    Line("`torch.compile(model)`", (), _compiled),
    Line("`model.compile()`", (), _compiled_in_place),
    Line("`model.forward = torch.compile(model.forward)`", (), _compiled_forward),
    Line("`language_model = torch.compile(language_model)`", (), _compiled_part),
    Line("DataParallel, one device", (), _parallel(None)),
    Line("DataParallel, two devices", (), _parallel([0, 1]), _put_on),
    Line("DistributedDataParallel", (), lambda given: nn.parallel.DistributedDataParallel(given.model())),
    Line("FullyShardedDataParallel", (), _fsdp),
    Line("`fully_shard` (FSDP 2)", (), _sharded),
    Line("PEFT, LoRA", ("peft",), _lora(False)),
    Line("PEFT, DoRA", ("peft",), _lora(False, use_dora=True)),
    Line("PEFT, LoRA merged", ("peft",), _lora(True)),
    Line("PEFT, prompt tuning", ("peft",), _prompt_tuned),
    Line('`pipeline("image-text-to-text")`', (), _plain, _piped),
    Line("`Trainer`", ("accelerate",), _plain, _trained),
)


# --------------------------------------------------------------------------------------------------------- the table


def tried(line: Line, given: Given) -> str:
    """Say what came of one line."""
    lacking = [name for name in line.packages if _version(name) is None]
    if lacking:
        return f"not tried: {', '.join(lacking)} not installed"
    torch.compiler.reset()
    try:
        return (line.use or exercised)(given, line.make(given))
    except NotRunError as error:
        return str(error)
    except vtc.VtcError as error:
        return f"refused: {_line(error)}"
    except Exception as error:
        return f"FAILS: {type(error).__name__}: {_line(error)}"


def _line(error: BaseException) -> str:
    cause = error.__cause__ if isinstance(error, vtc.InputError) and error.__cause__ else error
    return " ".join(str(cause).split())[:160].replace("|", "/") or type(error).__name__


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """A process group of one process, which the wrappers of torch want."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _given() -> Iterator[Given]:
    with tempfile.TemporaryDirectory() as place:
        model, processor = vtc.reference.load("llava")
        folder = Path(place) / "llava"
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        image = vtc.open_image(vtc.reference.samples()[6])
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _QUESTION}]}]
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = processor(images=[image], text=[prompt], return_tensors="pt")
        yield Given(folder, processor, image, inputs, Path(place))


def main(argv: list[str] | None = None) -> int:
    """Print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="lines whose names hold one of these")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    print(_ABOUT)
    print(
        "This table was made by `python -m eval.compatibility` on a CPU: the reference model llava, transformers "
        f"{transformers.__version__},\ntorch {torch.__version__}, one prompt, float32 where nothing else is said. "
        '"refused" are errors of `vtc`; "refused by\nits package" and "not runnable on a CPU" are errors of '
        "transformers or of the package, before `vtc` had a part in it.\n"
    )
    print("| the model is | packages | compressing it |\n| --- | --- | --- |")
    with _given() as given, _alone():
        for line in LINES:
            if any(text in line.name for text in args.only):
                versions = ", ".join(f"{name} {_version(name) or '-'}" for name in line.packages)
                print(f"| {line.name} | {versions} | {tried(line, given)} |", flush=True)
                print(line.name, file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
