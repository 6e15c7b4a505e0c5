"""A notation for ONNX graphs: one line a node, constants where they are used."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from favor_np._version import __version__

Array: TypeAlias = npt.NDArray[Any]

TYPES = {
    "bool": TensorProto.BOOL,
    "float16": TensorProto.FLOAT16,
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "int64": TensorProto.INT64,
}
BOOL, DOUBLE = TYPES["bool"], TYPES["float64"]
#: The first operators with Trilu, and with LinearAttention; the newest that models are tested with.
OLDEST, LINEAR_ATTENTION = 14, 27
NEWEST = min(27, onnx.defs.onnx_opset_version())
#: Where onnxruntime has LinearAttention as an operator of its own.
CONTRIB = "com.microsoft"


def end(name: str, kind: int, *shape: str | int) -> Any:
    """Return an input or output of a model."""
    return helper.make_tensor_value_info(name, kind, shape)


class Graph:
    """Nodes in the order in which they are written: ``graph.Add(a, b)`` returns a name.

    An input is the name of another node's output, or a constant: a Python integer or a list of them
    becomes int64, a float becomes `real`, an array stays as it is.

    Parameters
    ----------
    opset : int
        Version of the operators.
    real : dtype
        In which the graph computes: float32 or float64.
    parent : Graph, optional
        For the body of a Scan or an If: the graph it belongs to.  Names are unique in all of them.
    """

    def __init__(self, opset: int, real: np.dtype[Any], parent: Graph | None = None) -> None:
        if not OLDEST <= opset <= NEWEST:
            raise ValueError(f"opset must be from {OLDEST} to {NEWEST}, got {opset}")
        self.opset, self.real, self.type = opset, real, TYPES[real.name]
        self._names: set[str] = set() if parent is None else parent._names
        self._constants: dict[Any, Any] = {}
        self._nodes: list[Any] = []
        self._inputs: list[Any] = []

    def body(self) -> Graph:
        """Begin the body of a Scan, or a branch of an If."""
        return Graph(self.opset, self.real, self)

    def takes(self, *names: str) -> list[str]:
        """Declare inputs of a Scan's body."""
        taken = [self._name(name) for name in names]
        self._inputs += (helper.make_tensor_value_info(x, self.type, None) for x in taken)
        return taken

    def gives(self, name: str, *outputs: str) -> Any:
        """End a body; return it."""
        results = (helper.make_tensor_value_info(x, self.type, None) for x in outputs)
        return self.finished(name, self._inputs, list(results))

    def finished(self, name: str, inputs: list[Any], outputs: list[Any]) -> Any:
        """Return the graph, which has these inputs and outputs."""
        constants = list(self._constants.values())
        return helper.make_graph(self._nodes, name, inputs, outputs, constants)

    def model(
        self, name: str, inputs: list[Any], outputs: list[Any], facts: Mapping[str, Any]
    ) -> onnx.ModelProto:
        """Return the graph as a model that is checked, and says these facts of itself."""
        opsets = [helper.make_opsetid("", self.opset)]
        if any(node.domain == CONTRIB for node in self._nodes):
            opsets.append(helper.make_opsetid(CONTRIB, 1))
        model = helper.make_model(
            self.finished(name, inputs, outputs),
            opset_imports=opsets,
            ir_version=helper.find_min_ir_version_for(opsets, ignore_unknown=True),
            producer_name="favor_np",
            producer_version=__version__,
        )
        texts = {n: x if isinstance(x, str) else json.dumps(x) for n, x in facts.items()}
        helper.set_model_props(model, {f"favor_np.{n}": x for n, x in texts.items()})
        onnx.checker.check_model(model, full_check=True)
        return model

    def __getattr__(self, operator: str) -> Callable[..., str]:
        """Return a function that appends a node of the operator, and returns its output."""
        if not operator[0].isupper():
            raise AttributeError(operator)

        def append(*inputs: Any, **attributes: Any) -> str:
            return self.several(operator, inputs, 1, **attributes)[0]

        return append

    def several(
        self, operator: str, inputs: Iterable[Any], outputs: int, **attributes: Any
    ) -> list[str]:
        """Append a node with several outputs; return them."""
        names = [x if isinstance(x, str) else self.constant(x) for x in inputs]
        results = [self._name(operator) for _ in range(outputs)]
        self._nodes.append(helper.make_node(operator, names, results, **attributes))
        return results

    def choice(self, condition: str, true: Any, false: Any, outputs: int) -> list[str]:
        """Append an If with these branches; return its outputs."""
        return self.several("If", [condition], outputs, then_branch=true, else_branch=false)

    def reduce(self, operator: str, x: str, axis: int) -> str:
        """Append a node that reduces one axis, which stays with length 1."""
        if self.opset < 18:
            return self.several(operator, [x], 1, axes=[axis], keepdims=1)[0]
        return self.several(operator, [x, [axis]], 1, keepdims=1)[0]

    def swap(self, x: str) -> str:
        """Append a node that transposes matrices (batch, heads, ., .)."""
        return self.Transpose(x, perm=[0, 1, 3, 2])

    def named(self, x: str, name: str) -> None:
        """Call `x` by a name that the world outside knows."""
        for node in self._nodes:
            for names in (node.input, node.output):
                names[:] = [name if n == x else n for n in names]

    def constant(self, value: Any) -> str:
        """Return the name of a constant."""
        array = np.asarray(value)
        if not isinstance(value, np.ndarray):
            array = array.astype(np.int64 if array.dtype.kind == "i" else self.real)
        key = array.dtype.str, array.shape, array.tobytes()
        if key not in self._constants:
            self._constants[key] = numpy_helper.from_array(array, self._name("constant"))
        return str(self._constants[key].name)

    def weight(self, value: Array) -> str:
        """Return the name of a constant array of the type in which the graph computes."""
        return self.constant(np.ascontiguousarray(value, self.real))

    def _name(self, wanted: str) -> str:
        name = f"{wanted}_{len(self._names)}"
        self._names.add(name)
        return name
