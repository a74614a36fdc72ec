"""Turn the first layers of the pretrained DINOv2 tower into a Qwen2.5-VL vision tower, in closed form.

The two architectures differ in five ways; four can be bridged:

- *LayerNorm to RMSNorm.* They agree on vectors of zero mean, so everything that writes to the residual stream is
  centred; the norms' weights and biases move into the matrices that follow.
- *GELU to a gated MLP.* ``gelu(z)`` is ``silu(1.702 z) / 1.702`` to within 0.02: the gate computes ``1.702 z`` and
  the other branch starts as a constant. Only the most active units are kept.
- *Learned to rotary positions.* Each head's comparison of query and key is rewritten by a singular value
  decomposition; the directions that matter least give way on the fast-rotating dimensions to constant queries and keys,
  which express the head's preference for distances, fitted to the teacher's mean attention logits.
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
from transformers import Dinov2Model
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_position_ids

from eval.reference.train.cache import FRAMES_PER_PATCH, PATCH
from eval.reference.train.models import new_model

_GELU_SLOPE: Final = 1.702  # gelu(z) is nearly z * sigmoid(1.702 z) (Hendrycks and Gimpel, 2016, section 2)
_WHITENING_FLOOR: Final = 0.01  # share of the mean variance below which a direction counts as noise
_FREQUENCIES: Final = 7  # per axis: fast enough to distinguish distances within a picture
_RIDGE: Final = 0.02  # pull towards the converted matrix, as a share of the features' mean power
_FRAME_SHARES: Final = (0.7, 0.3)  # of a patch's two frames; if equal, before and after would look the same
_REACH: Final = 5.0  # patches: how far away the preferred distances are fitted well


@dataclass
class _Layer:
    """What the teacher does in one layer, on all patches of all pictures (``B`` pictures, ``P`` patches).

    ``inside`` and ``after`` are the centred streams ``(B, P, width)`` after attention and MLP, places removed.
    """

    weights: dict[str, Tensor]
    logits: Tensor  # (heads, P, P), mean over pictures
    cls_share: Tensor  # (heads,)
    cls_value: Tensor  # (heads, size)
    units_spread: Tensor  # (units,)
    inside: Tensor
    after: Tensor


@torch.no_grad()
def convert(teacher: Dinov2Model, pixels: Tensor) -> Any:
    """Build a Qwen2.5-VL tower that computes nearly what the first layers of ``teacher`` do; its merger is a whitening.

    ``pixels (n, 3, 224, 224)`` are a few dozen normalised pictures to fit to.
    """
    visual = new_model("qwen2_5_vl").model.visual
    kernel = teacher.embeddings.patch_embeddings.projection.weight.float()
    centre = torch.eye(len(kernel)) - 1.0 / len(kernel)
    centred = (centre @ kernel.flatten(1)).view_as(kernel)
    shares = torch.tensor(_FRAME_SHARES).view(1, 1, FRAMES_PER_PATCH, 1, 1)
    visual.patch_embed.proj.weight.copy_(centred[:, :, None] * shares)
    stream = functional.conv2d(pixels, centred, stride=PATCH).flatten(2).transpose(1, 2)
    teacher_stream = teacher.embeddings(pixels)
    for index, block in enumerate(visual.blocks):
        layer, teacher_stream = _run_teacher(teacher, index, teacher_stream, centre)
        stream = _fit_attention(visual, block, layer, stream, centre, index in visual.fullatt_block_indexes)
        stream = _fit_mlp(block, layer, stream, centre)
    _fit_merger(visual, stream)
    return visual


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _run_teacher(teacher: Dinov2Model, index: int, x: Tensor, centre: Tensor) -> tuple[_Layer, Tensor]:
    """Run one layer of the teacher on ``x (B, 1 + P, width)`` and record it; returns its output too."""
    layer = teacher.encoder.layer[index]
    attention, heads = layer.attention, teacher.config.num_attention_heads
    normed = layer.norm1(x)
    query, key, value = (_heads(p(normed), heads) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    mean_logits = torch.zeros(heads, x.shape[1], x.shape[1])
    cls_share = torch.zeros(heads)
    attended = torch.empty_like(query)
    for row in range(len(x)):  # one picture at a time: all logits at once would not fit
        logits = query[row] @ key[row].transpose(1, 2) / query.shape[-1] ** 0.5
        shares = logits.softmax(-1)
        attended[row] = shares @ value[row]
        mean_logits += logits / len(x)
        cls_share += shares[:, 1:, 0].mean(1) / len(x)
    inside = x + layer.layer_scale1(attention.o_proj(attended.transpose(1, 2).flatten(2)))
    units = functional.gelu(layer.mlp.fc1(layer.norm2(inside)))
    after = inside + layer.layer_scale2(layer.mlp.fc2(units))

    def without_places(states: Tensor) -> Tensor:
        patches = states[:, 1:] @ centre
        return patches - patches.mean(0) + patches.mean((0, 1))

    record = _Layer(
        weights=layer.state_dict(),
        logits=mean_logits[:, 1:, 1:],
        cls_share=cls_share,
        cls_value=value[:, :, 0].mean(0),
        units_spread=units[:, 1:].flatten(0, 1).std(0),
        inside=without_places(inside),
        after=without_places(after),
    )
    return record, after


def _by_distance(logits: Tensor) -> Tensor:
    """Mean of ``logits (heads, S * S, S * S)`` by distance from query to key, ``(heads, 2 S - 1, 2 S - 1)``."""
    side = round(logits.shape[-1] ** 0.5)
    grid = (logits - logits.mean(-1, keepdim=True)).view(-1, side, side, side, side)
    total = logits.new_zeros(len(logits), 2 * side - 1, 2 * side - 1)
    for row in range(side):
        for column in range(side):
            down, right = side - 1 - row, side - 1 - column
            total[:, down : down + side, right : right + side] += grid[:, row, column]
    steps = (side - (torch.arange(2 * side - 1) - side + 1).abs()).float()
    return total / torch.outer(steps, steps)


def _fit_attention(visual: Any, block: Any, layer: _Layer, x: Tensor, centre: Tensor, full: bool) -> Tensor:
    frequencies = visual.rotary_pos_emb.inv_freq
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
    places = torch.tensor(sorted(rest, key=lambda i: -(i % slow)))  # the strongest direction where least rotates
    query, key, value = after_norm("q"), after_norm("k"), after_norm("v")
    new_query, new_key = torch.zeros_like(query), torch.zeros_like(key)
    for head in range(heads):
        basis_q, rest_q = torch.linalg.qr(query[head].T)
        basis_k, rest_k = torch.linalg.qr(key[head].T)
        left, strength, right = torch.linalg.svd(rest_q @ rest_k.T)
        new_query[head, places] = (basis_q @ left * strength.sqrt()).T[: len(places)]
        new_key[head, places] = (basis_k @ right.T * strength.sqrt()).T[: len(places)]

    normed = functional.rms_norm(x, (width,), eps=1e-6)
    ones = torch.cat([normed, torch.ones_like(normed[..., :1])], -1)
    content = torch.zeros_like(layer.logits)
    for row in range(len(x)):
        q, k = (_heads((ones[row : row + 1] @ part.flatten(0, 1).T), heads)[0] for part in (new_query, new_key))
        content += q @ k.transpose(1, 2) / size**0.5 / len(x)
    wanted = _by_distance(layer.logits) - _by_distance(content)  # what the contents do not explain, places must
    for head in range(heads):
        constant_q, constant_k = _fit_preference(wanted[head], frequencies[:_FREQUENCIES], size)
        new_query[head, fast, -1], new_key[head, fast, -1] = constant_q, constant_k

    joint = torch.cat([part.flatten(0, 1) for part in (new_query, new_key, value)])
    block.norm1.weight.fill_(1.0)
    block.attn.qkv.weight.copy_(joint[:, :-1])
    block.attn.qkv.bias.copy_(joint[:, -1])

    attended = _attend(visual, block, normed, full)
    out = centre @ (w["layer_scale1.lambda1"][:, None] * w["attention.o_proj.weight"])
    bias = centre @ (w["layer_scale1.lambda1"] * w["attention.o_proj.bias"])
    bias = bias + out @ (layer.cls_share[:, None] * layer.cls_value).flatten()
    out = out * (1 - layer.cls_share).repeat_interleave(size)
    _refit(block.attn.proj, attended, layer.inside - x, out, bias)
    return x + block.attn.proj(attended)


def _fit_preference(wanted: Tensor, frequencies: Tensor, size: int) -> tuple[Tensor, Tensor]:
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
    gram = gram + 1e-3 * gram.diagonal().mean() * torch.eye(len(gram))
    solution = torch.linalg.solve(gram, (basis * weight**2).T @ wanted.flatten())
    parts = solution[:-1].view(2, 2, len(frequencies))  # axis, (cos, sin), frequency
    half = (parts.norm(dim=1).flatten() * size**0.5).sqrt()
    phase = torch.atan2(parts[:, 1], parts[:, 0]).flatten()
    return torch.cat([half, torch.zeros_like(half)]), torch.cat([half * phase.cos(), -half * phase.sin()])


def _attend(visual: Any, block: Any, normed: Tensor, full: bool) -> Tensor:
    """The block's attention before its output matrix, for square pictures ``(B, P, width)`` in raster order."""
    batch, patches, width = normed.shape
    side, heads = round(patches**0.5), block.attn.num_heads
    windows = 1 if full else side * PATCH // visual.window_size
    grid = torch.tensor([[1, side, side]])
    cos, sin = visual.rotary_pos_emb(normed, get_vision_position_ids(grid, 1))
    query, key, value = block.attn.qkv(normed).view(batch, patches, 3, heads, -1).unbind(2)
    query, key = apply_rotary_pos_emb_vision(query, key, cos, sin)

    def windowed(t: Tensor) -> Tensor:
        split = t.reshape(batch, windows, side // windows, windows, side // windows, heads, -1)
        return split.permute(0, 1, 3, 5, 2, 4, 6).reshape(batch * windows**2, heads, patches // windows**2, -1)

    out = functional.scaled_dot_product_attention(windowed(query), windowed(key), windowed(value))
    out = out.view(batch, windows, windows, heads, side // windows, side // windows, -1).permute(0, 1, 4, 2, 5, 3, 6)
    return out.reshape(batch, patches, width)


def _fit_mlp(block: Any, layer: _Layer, x: Tensor, centre: Tensor) -> Tensor:
    w = layer.weights
    weight, bias = w["mlp.fc1.weight"], w["mlp.fc1.bias"]
    out = centre @ (w["layer_scale2.lambda1"][:, None] * w["mlp.fc2.weight"])
    out_bias = centre @ (w["layer_scale2.lambda1"] * w["mlp.fc2.bias"])
    kept = (layer.units_spread * out.norm(dim=0)).argsort(descending=True)[: block.mlp.gate_proj.out_features]
    block.norm2.weight.fill_(1.0)
    block.mlp.gate_proj.weight.copy_(_GELU_SLOPE * (weight * w["norm2.weight"])[kept])
    block.mlp.gate_proj.bias.copy_(_GELU_SLOPE * (bias + weight @ w["norm2.bias"])[kept])
    block.mlp.up_proj.weight.zero_()
    block.mlp.up_proj.bias.fill_(1.0 / _GELU_SLOPE)
    units = functional.silu(block.mlp.gate_proj(functional.rms_norm(x, x.shape[-1:], eps=1e-6))) / _GELU_SLOPE
    _refit(block.mlp.down_proj, units, layer.after - x, out[:, kept], out_bias)
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


def _fit_merger(visual: Any, stream: Tensor) -> None:
    """Start the merger as a whitening of what it receives: pretrained features are far from evenly scaled.

    What distinguishes a square from a circle is a small part of such features; unwhitened, gradient descent is slow to
    find it.
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
