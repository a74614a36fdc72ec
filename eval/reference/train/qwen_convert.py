"""Turn the first layers of the pretrained DINOv2 tower into a Qwen2.5-VL vision tower, in closed form.

The two architectures differ in five ways; four can be bridged:

- *LayerNorm to RMSNorm.* They agree on vectors of zero mean, so everything that writes to the residual stream is
  centred; the norms' weights and biases move into the matrices that follow.
- *GELU to a gated MLP.* ``gelu(z)`` is ``silu(1.702 z) / 1.702`` to within 0.02: the gate computes ``1.702 z`` and
  the other branch starts as a constant. Only the most active units are kept.
- *Learned to rotary positions.* Each head's comparison of query and key is rewritten by a singular value
  decomposition; the directions that matter least make room on the fast-turning dimensions, where constant queries and
  keys now express how much the head prefers which distance, fitted to the teacher's mean attention logits.
- *[CLS].* What a head takes from [CLS] on average becomes a constant.
- *Absolute places* are lost; nothing in this tower can know them.

What these steps leave as error is then reduced layer by layer: the output matrices of attention and MLP are fitted by
ridge regression so that the stream matches the teacher's on a few dozen pictures, given the converted layers below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Dinov2Model, Qwen2_5_VLForConditionalGeneration

from eval.reference.train.qwen_model import FRAMES_PER_PATCH, PATCH, WINDOW, config

_GELU_SLOPE: Final = 1.702  # gelu(z) is nearly z * sigmoid(1.702 z) (Hendrycks and Gimpel, 2016, section 2)
_WHITENING_FLOOR: Final = 0.01  # share of the mean variance below which a direction counts as noise
_FREQUENCIES: Final = 7  # per axis: fast enough to tell distances within a picture apart
_RIDGE: Final = 0.02  # pull towards the converted matrix, as a share of the features' mean power
_FRAME_SHARES: Final = (
    0.7,
    0.3,
)  # of a patch's two frames; if equal, before and after would look the same
_REACH: Final = 5.0  # patches: how far away the preferred distances are fitted well


def blank_tower() -> nn.Module:
    """A vision tower of the reference model's shape with stock initial weights."""
    names = ("pad", "bos", "eos", "image", "video", "vision_start", "vision_end")
    tower: nn.Module = Qwen2_5_VLForConditionalGeneration(
        config(8, dict(zip(names, range(7), strict=True)))
    ).model.visual
    return tower


@dataclass
class _Layer:
    """What the teacher does in one layer, on all patches of all pictures (``B`` pictures, ``P`` patches).

    ``inside`` and ``after`` are the centred streams ``(B, P, width)`` after attention and after the MLP, places
    removed."""

    weights: dict[str, Tensor]
    logits: Tensor  # (heads, P, P), mean over pictures
    cls_share: Tensor  # (heads,)
    cls_value: Tensor  # (heads, size)
    units_spread: Tensor  # (units,)
    inside: Tensor
    after: Tensor


@torch.no_grad()
def convert(teacher: Dinov2Model, pixels: Tensor) -> nn.Module:
    """A Qwen2.5-VL tower that computes nearly what the first layers of ``teacher`` do; its merger is a whitening.

    Parameters
    ----------
    teacher : Dinov2Model
        The pretrained tower, of the same width and number of heads.
    pixels : Tensor (n, 3, 224, 224)
        Normalised pictures to fit to; a few dozen.
    """
    visual: Any = blank_tower()
    weights = {name: tensor.float() for name, tensor in teacher.state_dict().items()}
    kernel = weights["embeddings.patch_embeddings.projection.weight"]
    centre = torch.eye(len(kernel)) - 1.0 / len(kernel)
    centred = (centre @ kernel.flatten(1)).view_as(kernel)
    shares = torch.tensor(_FRAME_SHARES).view(1, 1, FRAMES_PER_PATCH, 1, 1)
    visual.patch_embed.proj.weight.copy_(centred[:, :, None] * shares)
    stream = functional.conv2d(pixels, centred, stride=PATCH).flatten(2).transpose(1, 2)
    teacher_stream = teacher.embeddings(pixels)
    for index, block in enumerate(visual.blocks):
        layer, teacher_stream = _watch(teacher, index, teacher_stream, centre)
        full = index in visual.fullatt_block_indexes
        stream = _fit_attention(block, layer, stream, centre, visual.rotary_pos_emb.inv_freq, full)
        stream = _fit_mlp(block, layer, stream, centre)
    _begin_merger(visual, stream)
    tower: nn.Module = visual
    return tower


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _watch(teacher: Dinov2Model, index: int, x: Tensor, centre: Tensor) -> tuple[_Layer, Tensor]:
    """Run one layer of the teacher on ``x (B, 1 + P, width)``, noting what happens; returns its output too."""
    prefix = f"encoder.layer.{index}."
    w = {k.removeprefix(prefix): v.float() for k, v in teacher.state_dict().items() if k.startswith(prefix)}
    heads, width = teacher.config.num_attention_heads, x.shape[-1]
    eps = teacher.config.layer_norm_eps
    h = functional.layer_norm(x, (width,), w["norm1.weight"], w["norm1.bias"], eps)
    query, key, value = (
        _heads(functional.linear(h, w[f"attention.{n}_proj.weight"], w[f"attention.{n}_proj.bias"]), heads)
        for n in "qkv"
    )
    mean_logits = torch.zeros(heads, x.shape[1], x.shape[1])
    cls_share = torch.zeros(heads)
    attended = torch.empty_like(query)
    for row in range(len(x)):  # one picture at a time: all logits at once would not fit
        logits = query[row] @ key[row].transpose(1, 2) / query.shape[-1] ** 0.5
        shares = logits.softmax(-1)
        attended[row] = shares @ value[row]
        mean_logits += logits / len(x)
        cls_share += shares[:, 1:, 0].mean(1) / len(x)
    attention = functional.linear(
        attended.transpose(1, 2).flatten(2), w["attention.o_proj.weight"], w["attention.o_proj.bias"]
    )
    inside = x + w["layer_scale1.lambda1"] * attention
    h = functional.layer_norm(inside, (width,), w["norm2.weight"], w["norm2.bias"], eps)
    units = functional.gelu(functional.linear(h, w["mlp.fc1.weight"], w["mlp.fc1.bias"]))
    after = inside + w["layer_scale2.lambda1"] * functional.linear(units, w["mlp.fc2.weight"], w["mlp.fc2.bias"])

    def without_places(states: Tensor) -> Tensor:
        patches = states[:, 1:] @ centre
        return patches - patches.mean(0) + patches.mean((0, 1))

    layer = _Layer(
        w,
        mean_logits[:, 1:, 1:],
        cls_share,
        value[:, :, 0].mean(0),
        units[:, 1:].flatten(0, 1).std(0),
        without_places(inside),
        without_places(after),
    )
    return layer, after


def _distances(logits: Tensor) -> Tensor:
    """Mean of ``logits (heads, S * S, S * S)`` by distance from query to key, ``(heads, 2 S - 1, 2 S - 1)``."""
    side = round(logits.shape[-1] ** 0.5)
    grid = (logits - logits.mean(-1, keepdim=True)).view(-1, side, side, side, side)
    total = logits.new_zeros(len(logits), 2 * side - 1, 2 * side - 1)
    for row in range(side):
        for column in range(side):
            total[:, side - 1 - row : 2 * side - 1 - row, side - 1 - column : 2 * side - 1 - column] += grid[
                :, row, column
            ]
    steps = (side - (torch.arange(2 * side - 1) - side + 1).abs()).float()
    return total / torch.outer(steps, steps)


def _fit_attention(block: Any, layer: _Layer, x: Tensor, centre: Tensor, frequencies: Tensor, full: bool) -> Tensor:
    heads, width, w = block.attn.num_heads, x.shape[-1], layer.weights
    size, slow = width // heads, len(frequencies)

    def after_norm(name: str) -> Tensor:
        """Weight and bias ``(heads, size, width + 1)`` for what the norm gives without its own weight and bias."""
        weight, bias = w[f"attention.{name}_proj.weight"], w[f"attention.{name}_proj.bias"]
        joint = torch.cat([weight * w["norm1.weight"], (bias + weight @ w["norm1.bias"])[:, None]], 1)
        return joint.view(heads, size, -1)

    fast_pairs = torch.tensor([axis * slow + i for axis in (0, 1) for i in range(_FREQUENCIES)])
    fast = torch.cat([fast_pairs, fast_pairs + size // 2])
    rest = [i for i in range(size) if i not in set(fast.tolist())]
    places = torch.tensor(sorted(rest, key=lambda i: -(i % slow)))  # the strongest direction where least turns
    query, key, value = after_norm("q"), after_norm("k"), after_norm("v")
    new_query, new_key = torch.zeros_like(query), torch.zeros_like(key)
    for head in range(heads):
        basis_q, rest_q = torch.linalg.qr(query[head].T)
        basis_k, rest_k = torch.linalg.qr(key[head].T)
        left, strength, right = torch.linalg.svd(rest_q @ rest_k.T)
        kept = len(places)
        new_query[head, places] = (basis_q @ left * strength.sqrt()).T[:kept]
        new_key[head, places] = (basis_k @ right.T * strength.sqrt()).T[:kept]

    normed = functional.rms_norm(x, (width,), eps=1e-6)
    ones = torch.cat([normed, torch.ones_like(normed[..., :1])], -1)
    content = torch.zeros_like(layer.logits)
    for row in range(len(x)):
        q, k = (_heads((ones[row : row + 1] @ part.flatten(0, 1).T), heads)[0] for part in (new_query, new_key))
        content += q @ k.transpose(1, 2) / size**0.5 / len(x)
    wanted = _distances(layer.logits) - _distances(content)  # what the contents do not explain, places must
    for head in range(heads):
        constant_q, constant_k = _preference(wanted[head], frequencies[:_FREQUENCIES], size)
        new_query[head, fast, -1], new_key[head, fast, -1] = constant_q, constant_k

    joint = torch.cat([part.flatten(0, 1) for part in (new_query, new_key, value)])
    block.norm1.weight.fill_(1.0)
    block.attn.qkv.weight.copy_(joint[:, :-1])
    block.attn.qkv.bias.copy_(joint[:, -1])

    attended = _attend(block, normed, frequencies, full)
    out = centre @ (w["layer_scale1.lambda1"][:, None] * w["attention.o_proj.weight"])
    bias = centre @ (w["layer_scale1.lambda1"] * w["attention.o_proj.bias"])
    bias = bias + out @ (layer.cls_share[:, None] * layer.cls_value).flatten()
    out = out * (1 - layer.cls_share).repeat_interleave(size)
    _refit(block.attn.proj, attended, layer.inside - x, out, bias)
    return x + block.attn.proj(attended)


def _preference(wanted: Tensor, frequencies: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Constant query and key, on the fast dimensions, whose rotated product fits ``wanted (2 S - 1, 2 S - 1)``."""
    side = (len(wanted) + 1) // 2
    steps = torch.arange(2 * side - 1).float() - side + 1
    waves = torch.cat([(steps[:, None] * frequencies).cos(), (steps[:, None] * frequencies).sin()], 1)
    rows = waves[:, None].expand(-1, len(steps), -1)
    columns = waves[None].expand(len(steps), -1, -1)
    basis = torch.cat([rows, columns, torch.ones(len(steps), len(steps), 1)], -1).flatten(0, 1)
    near = torch.exp(-(steps**2) / (2 * _REACH**2))
    weight = (torch.outer(near, near) + 0.02).flatten().sqrt()[:, None]
    gram = (basis * weight).T @ (basis * weight)
    solution = torch.linalg.solve(
        gram + 1e-3 * gram.diagonal().mean() * torch.eye(len(gram)), (basis * weight**2).T @ wanted.flatten()
    )
    count = len(frequencies)
    parts = solution[:-1].view(2, 2, count)  # axis, (cos, sin), frequency
    strength = parts.norm(dim=1).flatten() * size**0.5
    phase = torch.atan2(parts[:, 1], parts[:, 0]).flatten()
    half = strength.sqrt()
    return torch.cat([half, torch.zeros_like(half)]), torch.cat([half * phase.cos(), -half * phase.sin()])


def _attend(block: Any, normed: Tensor, frequencies: Tensor, full: bool) -> Tensor:
    """The block's attention before its output matrix, for square pictures ``(B, P, width)`` in raster order."""
    batch, patches, width = normed.shape
    side, heads = round(patches**0.5), block.attn.num_heads
    windows = 1 if full else side * PATCH // WINDOW
    reach = side // windows
    places = torch.arange(side).float()
    turns = torch.cat(
        [places.repeat_interleave(side)[:, None] * frequencies, places.repeat(side)[:, None] * frequencies], 1
    )
    cos, sin = torch.cat([turns, turns], 1).cos()[:, None], torch.cat([turns, turns], 1).sin()[:, None]
    query, key, value = block.attn.qkv(normed).view(batch, patches, 3, heads, -1).unbind(2)

    def rotated(t: Tensor) -> Tensor:
        first, second = t.chunk(2, -1)
        return t * cos + torch.cat((-second, first), -1) * sin

    def windowed(t: Tensor) -> Tensor:
        split = t.reshape(batch, windows, reach, windows, reach, heads, -1).permute(0, 1, 3, 5, 2, 4, 6)
        return split.reshape(batch * windows * windows, heads, reach * reach, -1)

    out = functional.scaled_dot_product_attention(windowed(rotated(query)), windowed(rotated(key)), windowed(value))
    out = out.view(batch, windows, windows, heads, reach, reach, -1).permute(0, 1, 4, 2, 5, 3, 6)
    return out.reshape(batch, patches, width)


def _fit_mlp(block: Any, layer: _Layer, x: Tensor, centre: Tensor) -> Tensor:
    w = layer.weights
    weight, bias = w["mlp.fc1.weight"], w["mlp.fc1.bias"]
    out = centre @ (w["layer_scale2.lambda1"][:, None] * w["mlp.fc2.weight"])
    kept = (layer.units_spread * out.norm(dim=0)).argsort(descending=True)[: block.mlp.gate_proj.out_features]
    block.norm2.weight.fill_(1.0)
    block.mlp.gate_proj.weight.copy_(_GELU_SLOPE * (weight * w["norm2.weight"])[kept])
    block.mlp.gate_proj.bias.copy_(_GELU_SLOPE * (bias + weight @ w["norm2.bias"])[kept])
    block.mlp.up_proj.weight.zero_()
    block.mlp.up_proj.bias.fill_(1.0 / _GELU_SLOPE)
    units = functional.silu(block.mlp.gate_proj(functional.rms_norm(x, x.shape[-1:], eps=1e-6))) / _GELU_SLOPE
    _refit(
        block.mlp.down_proj,
        units,
        layer.after - x,
        out[:, kept],
        centre @ (w["layer_scale2.lambda1"] * w["mlp.fc2.bias"]),
    )
    return x + block.mlp.down_proj(units)


def _refit(linear: nn.Linear, features: Tensor, target: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Ridge regression of ``target`` on ``features``, pulled towards ``weight`` instead of towards zero."""
    flat, goal = features.flatten(0, 1), target.flatten(0, 1)
    missing = goal - flat @ weight.T - bias
    centred = flat - flat.mean(0)
    gram = centred.T @ centred
    gram = gram + _RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    change = torch.linalg.solve(gram, centred.T @ (missing - missing.mean(0)))
    linear.weight.copy_(weight + change.T)
    linear.bias.copy_(bias + missing.mean(0) - flat.mean(0) @ change)


def _begin_merger(visual: Any, stream: Tensor) -> None:
    """Start the merger as a whitening of what it receives: pretrained features are far from evenly scaled.

    What tells a square from a circle is a small part of such features; unwhitened, gradient descent is slow to find it.
    """
    features = functional.rms_norm(stream, stream.shape[-1:], eps=1e-6).flatten(0, 1)
    values, vectors = torch.linalg.eigh(torch.cov(features.T))
    spread = values.clamp_min(_WHITENING_FLOOR * float(values.mean())).rsqrt()
    whitening = vectors @ (spread[:, None] * vectors.T)
    first, _, last = visual.merger.mlp
    first.weight.copy_(whitening)
    first.bias.copy_(-whitening @ features.mean(0))
    nn.init.normal_(last.weight, std=last.in_features**-0.5)
    nn.init.zeros_(last.bias)
