"""Attention in its fused forms."""

from __future__ import annotations

from typing import Any

import torch

from onnx_oamip.recovery.operators.calls import Call, Kernel, Tensor, UnsupportedForm, padded


def _heads(x: Tensor, count: int) -> Tensor:
    """(samples, positions, channels) as (samples, heads, positions, channels of a head)."""
    return x.reshape(x.shape[0], x.shape[1], count, -1).transpose(1, 2)


def _merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None,
    added: Tensor | None,
    causal: bool,
) -> Tensor:
    scores = q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
    if added is not None:
        scores = scores + added
    if causal:
        rows, columns = scores.shape[-2:]
        hidden = torch.ones(rows, columns, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return torch.softmax(scores, -1) @ v


def _refuse(inputs: tuple[Any, ...], names: tuple[str, ...]) -> None:
    for value, name in zip(inputs, names, strict=False):
        if value is not None:
            raise UnsupportedForm(f"it has {name}")


def _packed(
    call: Call,
    x: Tensor,
    w: Tensor,
    *more: Tensor | None,
) -> Tensor:
    b, mask, past, added, *rest = padded(more, 4)
    _refuse((past, *rest), ("a past state", "a shared past state"))
    if call.attr("do_rotary", 0):
        raise UnsupportedForm("it rotates its positions")
    heads = int(call.attr("num_heads"))
    y = x @ w
    if b is not None:
        y = y + b
    sizes = call.attr("qkv_hidden_sizes") or [y.shape[-1] // 3] * 3
    q, k, v = (_heads(part, heads) for part in torch.split(y, list(sizes), -1))
    if mask is not None:
        hidden = _hidden_keys(mask, k.shape[2], call.attr("mask_filter_value", -10000.0))
        added = hidden if added is None else hidden + added
    is_causal = bool(call.attr("unidirectional", 0))
    return _merged(_attend(q, k, v, scale=call.attr("scale"), added=added, causal=is_causal))


def _hidden_keys(mask: Tensor, length: int, value: float) -> Tensor:
    """Numbers added to the logits of keys that a mask hides."""
    if mask.dim() == 2 and mask.shape[1] == length:
        is_kept = mask.bool().reshape(mask.shape[0], 1, 1, length)
    elif mask.dim() == 1:
        keys = torch.arange(length, device=mask.device)
        is_kept = (keys < mask.reshape(-1, 1)).reshape(-1, 1, 1, length)
    else:
        raise UnsupportedForm("its mask has another form than one per key")
    return torch.where(is_kept, 0.0, value)


def _multi_head(
    call: Call,
    q: Tensor,
    *more: Tensor | None,
) -> Tensor:
    k, v, b, mask, added, *rest = padded(more, 5)
    _refuse(tuple(rest), ("past keys", "past values"))
    if k is None or v is None or k.dim() != 3 or q.dim() != 3:
        raise UnsupportedForm("its queries, keys and values are packed")
    heads = int(call.attr("num_heads"))
    if b is not None:
        bq, bk, bv = torch.split(b, [q.shape[-1], k.shape[-1], v.shape[-1]])
        q, k, v = q + bq, k + bk, v + bv
    if mask is not None:
        hidden = _hidden_keys(mask, k.shape[1], call.attr("mask_filter_value", -10000.0))
        added = hidden if added is None else hidden + added
    is_causal = bool(call.attr("unidirectional", 0))
    q, k, v = (_heads(x, heads) for x in (q, k, v))
    return _merged(_attend(q, k, v, scale=call.attr("scale"), added=added, causal=is_causal))


_STANDARD = {
    "is_causal",
    "kv_num_heads",
    "q_num_heads",
    "qk_matmul_output_mode",
    "scale",
    "softcap",
    "softmax_precision",
}
"""Attributes of ONNX's operator that the function below knows."""


def _standard(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *past: Any,
) -> Tensor:
    _refuse(past, ("past keys", "past values", "lengths of its keys"))
    unknown = set(call.node.attrs) - _STANDARD
    if unknown:
        raise UnsupportedForm(f"it has the attribute {min(unknown)}")
    if call.wants(1):
        raise UnsupportedForm("it gives out more than its result")
    if call.attr("softcap", 0.0):
        raise UnsupportedForm("it caps its logits")
    is_flat = q.dim() == 3
    if is_flat:
        q = _heads(q, int(call.attr("q_num_heads")))
        k, v = (_heads(x, int(call.attr("kv_num_heads"))) for x in (k, v))
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    added = mask
    if mask is not None and mask.dtype == torch.bool:
        added = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, float("-inf"))
    is_causal = bool(call.attr("is_causal", 0))
    y = _attend(q, k, v, scale=call.attr("scale"), added=added, causal=is_causal)
    return _merged(y) if is_flat else y


def _rotated(call: Call, x: Tensor, cosines: Tensor, sines: Tensor, size: int) -> Tensor:
    """Queries or keys, rotated within every head, pair by pair, by the angles of their positions.

    Args:
        call: The node.
        x: (samples, heads, positions, values of a head), or (samples, positions, channels).
        cosines: Of the angles (samples or 1, positions, pairs).
        sines: Of the angles.
        size: Values of a head, 0 where those of one head are rotated whole.

    Returns:
        A tensor of the shape of ``x``.
    """
    pairs = cosines.shape[-1]
    is_flat = x.dim() == 3
    if is_flat:
        x = _heads(x, x.shape[2] // (size or 2 * pairs))
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    is_interleaved = bool(call.attr("interleaved", 0))
    if is_interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
    else:
        first, second = turned[..., :pairs], turned[..., pairs:]
    cosines, sines = cosines.unsqueeze(1), sines.unsqueeze(1)
    parts = (first * cosines - second * sines, second * cosines + first * sines)
    joined = torch.stack(parts, -1).flatten(-2) if is_interleaved else torch.cat(parts, -1)
    y = torch.cat((joined, rest), -1)
    return _merged(y) if is_flat else y


def _head_size(call: Call, x: Tensor) -> int:
    """Values of a head of (samples, positions, channels) where the number of heads is given, else 0."""
    heads = int(call.attr("num_heads", 0))
    return x.shape[2] // heads if heads and x.dim() == 3 else 0


def _rotary(
    call: Call,
    x: Tensor,
    cosines: Tensor,
    sines: Tensor,
    positions: Tensor | None = None,
) -> Tensor:
    if positions is not None:
        cosines, sines = cosines[positions], sines[positions]
    return _rotated(call, x, cosines, sines, _head_size(call, x))


def _rotary_of_runtime(
    call: Call,
    x: Tensor,
    positions: Tensor,
    cosines: Tensor,
    sines: Tensor,
) -> Tensor:
    if call.attr("is_packed_batching", 0):
        raise UnsupportedForm("its samples are packed")
    length = x.shape[-2] if x.dim() == 4 else x.shape[1]
    if positions.numel() == 1:
        # One number is the position of the first token.
        positions = positions.reshape(1, 1) + torch.arange(length, device=x.device)
    return _rotated(call, x, cosines[positions], sines[positions], _head_size(call, x))


KERNELS = {
    ("com.microsoft", "Attention"): Kernel(_packed, trained=(1, 2)),
    ("com.microsoft", "MultiHeadAttention"): Kernel(_multi_head, trained=(3,)),
    ("", "Attention"): Kernel(_standard),
    ("com.microsoft", "RotaryEmbedding"): Kernel(_rotary_of_runtime),
    ("", "RotaryEmbedding"): Kernel(_rotary),
}
