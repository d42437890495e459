"""Uses of the initialisers of a model by several nodes, through views of them."""

from __future__ import annotations

from collections import defaultdict

from onnx_oamip.core.records import Model, Node
from onnx_oamip.graph.computed_constants import Constants
from onnx_oamip.graph.linear_layers import site
from onnx_oamip.graph.ops.matrix_view import Site
from onnx_oamip.graph.outputs import is_float


class Sharing:
    """Uses of the initialisers of a model, through nodes that transpose, reshape, cast or dequantise them."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._main = {node.name for node in model.nodes}
        self._given_out = {model.source(port.name) for port in model.outputs}
        self._uses: dict[str, list[tuple[Node, int]]] = defaultdict(list)
        for node in model.every:
            is_view = bool(node.outputs) and node.outputs[0] in model.views
            for slot, name in enumerate(node.inputs):
                if name in model.constants and not (is_view and slot == 0):
                    self._uses[model.source(name)].append((node, slot))

    def family(self, place: Site) -> tuple[Site, ...]:
        """Find the linear nodes that read the weight of a node.

        Args:
            place: A linear node.

        Returns:
            The nodes in graph order.
        """
        nodes = [node for node, _ in self._uses[self._model.source(place.weight)]]
        places = (site(node, self._model.constants) for node in nodes if node.name in self._main)
        return tuple(other for other in places if other is not None)

    def obstacle(self, place: Site) -> str:
        """Find why the weight of a linear node cannot be refitted.

        Args:
            place: The linear node.

        Returns:
            The reason, empty where it can.
        """
        model = self._model
        source = model.source(place.weight)
        if source in model.computed:
            return f"its weight '{place.weight}' is computed from constants"
        kind = model.dtypes[source]
        if not is_float(kind) and kind.kind not in "iu":
            return f"its weight is stored as '{source}' of {model.dtypes[source]}"
        if source in self._given_out:
            return f"its weight '{source}' is a graph output"
        form = _form(model, place)
        for node, slot in self._uses[source]:
            if node.name in self._main:
                other = site(node, model.constants)
            else:
                other = None
            is_alike = other is not None and other.weight_slot == slot
            if other is None or not is_alike or _form(model, other) != form:
                return (
                    f"its weight '{source}' is shared with {node}, which reads it in another form"
                )
        return ""


def _form(model: Model, place: Site) -> tuple[object, ...]:
    """Form in which a linear node reads its weight as a matrix; equal for nodes that read it alike."""
    path: list[bytes] = []
    if isinstance(model.constants, Constants):
        for node in model.constants.path(place.weight):
            attributes = [a.SerializeToString(deterministic=True) for a in node.attribute]
            path += [
                node.op_type.encode(),
                *attributes,
                *(name.encode() for name in node.input[1:]),
            ]
    rules = place.rules
    plain = rules.spatial, rules.scatters, place.weight_axis, place.groups, place.kernel
    return (*plain, *path)
