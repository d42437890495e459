"""LSTM, GRU and RNN: torch's own kernels where they compute the same, and a loop over the steps elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from onnx_oamip.recovery.operators.calls import Call, Kernel, Tensor, UnsupportedForm, padded

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "hardsigmoid": lambda x: torch.clamp(0.2 * x + 0.5, 0.0, 1.0),
}
"""Functions of gates by the name that ONNX gives them, in lower case."""


@dataclass(frozen=True, slots=True)
class _Direction:
    """Weights of one direction; ``steps``: projected inputs (time, batch, gates x hidden)."""

    steps: Tensor
    recurrent: Tensor
    bias: Tensor
    hidden: Tensor
    cell: Tensor | None
    peepholes: Tensor | None
    functions: list[Callable[[Tensor], Tensor]]


def _functions(call: Call, defaults: list[str], directions: int) -> list[list[Any]]:
    if call.attr("activation_alpha") or call.attr("activation_beta"):
        raise UnsupportedForm("its activations have parameters")
    names = call.attr("activations")
    if names is None:
        names = defaults * directions
    names = [name.decode() if isinstance(name, bytes) else name for name in names]
    unknown = [name for name in names if name.lower() not in ACTIVATIONS]
    if unknown:
        raise UnsupportedForm(f"one of its activations is {unknown[0]}")
    found = [ACTIVATIONS[name.lower()] for name in names]
    each = len(defaults)
    return [found[i * each : (i + 1) * each] for i in range(directions)]


def _clipped(call: Call, x: Tensor) -> Tensor:
    limit = call.attr("clip")
    return x if limit is None else x.clamp(-limit, limit)


def _lstm_step(call: Call, d: _Direction, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    f, g, out = d.functions
    i_in, o_in, f_in, c_in = (x + h @ d.recurrent.t() + d.bias).chunk(4, -1)
    if d.peepholes is not None:
        p_i, p_o, p_f = d.peepholes.chunk(3)
        i_in, f_in = i_in + p_i * c, f_in + p_f * c
    i = f(_clipped(call, i_in))
    forget = 1 - i if call.attr("input_forget", 0) else f(_clipped(call, f_in))
    cell = forget * c + i * g(_clipped(call, c_in))
    if d.peepholes is not None:
        o_in = o_in + p_o * cell
    return f(_clipped(call, o_in)) * out(cell), cell


def _gru_step(call: Call, d: _Direction, x: Tensor, h: Tensor) -> Tensor:
    f, g = d.functions
    width = h.shape[-1]
    gates = h @ d.recurrent[: 2 * width].t() + d.bias[: 2 * width]
    z = f(_clipped(call, x[..., :width] + gates[..., :width]))
    r = f(_clipped(call, x[..., width : 2 * width] + gates[..., width:]))
    weight, bias = d.recurrent[2 * width :], d.bias[2 * width :]
    if call.attr("linear_before_reset", 0):
        inner = r * (h @ weight.t() + bias)
    else:
        inner = (r * h) @ weight.t() + bias
    new = g(_clipped(call, x[..., 2 * width :] + inner))
    return (1 - z) * new + z * h


def _rnn_step(call: Call, d: _Direction, x: Tensor, h: Tensor) -> Tensor:
    return d.functions[0](_clipped(call, x + h @ d.recurrent.t() + d.bias))


def _one_direction(call: Call, d: _Direction, lengths: Tensor | None, step: Any) -> tuple[Any, ...]:
    """Outputs of all steps (time, batch, hidden), and the last states."""
    h, c = d.hidden, d.cell
    outputs = []
    for t in range(d.steps.shape[0]):
        if c is None:
            new_h, new_c = step(call, d, d.steps[t], h), None
        else:
            new_h, new_c = step(call, d, d.steps[t], h, c)
        if lengths is None:
            h, c = new_h, new_c
            outputs.append(h)
            continue
        is_inside = (t < lengths).unsqueeze(-1)
        outputs.append(torch.where(is_inside, new_h, torch.zeros_like(new_h)))
        h = torch.where(is_inside, new_h, h)
        c = None if c is None else torch.where(is_inside, new_c, c)
    return torch.stack(outputs), h, c


def _reversed(x: Tensor, lengths: Tensor | None) -> Tensor:
    """The steps of every sample in reverse order, those behind its end in place."""
    if lengths is None:
        return x.flip(0)
    steps = torch.arange(x.shape[0], device=x.device).reshape(-1, 1)
    places = torch.where(steps < lengths, lengths - 1 - steps, steps)
    return x.gather(0, places.unsqueeze(-1).expand(x.shape))


def _recurrent(gates: int, defaults: list[str], step: Any, has_cell: bool) -> Any:
    def run(
        call: Call,
        x: Tensor,
        w: Tensor,
        r: Tensor,
        *more: Tensor | None,
    ) -> Any:
        b, lengths, h0, c0, peepholes = padded(more, 5)
        if call.attr("layout", 0):
            raise UnsupportedForm("its layout is 1")
        directions = w.shape[0]
        width = r.shape[-1]
        functions = _functions(call, defaults, directions)
        none = x.new_zeros(x.shape[1], width)
        outputs, hidden, cells = [], [], []
        for k in range(directions):
            is_backward = call.attr("direction", "forward") == "reverse" or k == 1
            bias = x.new_zeros(2 * gates * width) if b is None else b[k]
            data = _reversed(x, lengths) if is_backward else x
            direction = _Direction(
                steps=data @ w[k].t() + bias[: gates * width],
                recurrent=r[k],
                bias=bias[gates * width :],
                hidden=none if h0 is None else h0[k],
                cell=(none if c0 is None else c0[k]) if has_cell else None,
                peepholes=None if peepholes is None else peepholes[k],
                functions=functions[k],
            )
            y, h, c = _one_direction(call, direction, lengths, step)
            outputs.append(_reversed(y, lengths) if is_backward else y)
            hidden.append(h)
            cells.append(c)
        states = (torch.stack(hidden), torch.stack(cells)) if has_cell else (torch.stack(hidden),)
        return torch.stack(outputs, 1), *states

    return run


KERNELS = {
    ("", "LSTM"): Kernel(
        _recurrent(4, ["Sigmoid", "Tanh", "Tanh"], _lstm_step, True), trained=(1, 2, 3, 7)
    ),
    ("", "GRU"): Kernel(_recurrent(3, ["Sigmoid", "Tanh"], _gru_step, False), trained=(1, 2, 3)),
    ("", "RNN"): Kernel(_recurrent(1, ["Tanh"], _rnn_step, False), trained=(1, 2, 3)),
}
