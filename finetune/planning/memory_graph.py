"""The memory graph: a forward as a list of operations on sizes -> the most bytes that forward and backward hold.

Autograd's rules are few. An operation that needs a gradient keeps what its backward will read; a tensor that several
operations keep is in memory once. In the backward a gradient is as large as its tensor, and lives until it has been
passed on. So sizes alone, replayed in order, give the bytes that live at every moment. No torch:

    graph = MemoryGraph("mlp")
    x = graph.apply((), graph.tensor(2048, 512, 4))
    y = graph.apply((x,), graph.tensor(2048, 1376, 4), saves=(x,), gradients=4 * 512 * 1376)      # y = x @ W
    loss = graph.apply((y,), graph.tensor(1, 1, 4))
    peak(graph.operations, accumulated=False)                               # {"mlp": ..., "gradients": 2_818_048}
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

GRADIENTS = "gradients"
"""The part of memory for gradients of parameters."""


@dataclass(eq=False, slots=True)
class Tensor:
    """The size of a tensor, [rows, width]. A view is the tensor that it views."""

    rows: int
    width: int
    item: int
    """Bytes of a number."""
    part: str
    """The part of memory that it counts in."""
    needs_grad: bool = False

    @property
    def nbytes(self) -> int:
        return self.rows * self.width * self.item


@dataclass(slots=True)
class Operation:
    """output = operation(inputs)."""

    inputs: tuple[Tensor, ...]
    output: Tensor
    saved: tuple[Tensor, ...] = ()
    """What its backward reads."""
    gradients: int = 0
    """Bytes of the gradients of its parameters."""
    scratch: int = 0
    """Bytes that it needs besides while it runs, in the forward and in the backward."""
    passes_gradient_on: bool = False
    """Whether its inputs get its output's gradient itself and not a new one: a sum, a slice, a view."""
    body: list["Operation"] = field(default_factory=list)
    """Of a checkpoint: the operations that run in the forward without saving, and once more before their backward."""


class MemoryGraph:
    """The operations of a forward, in the order in which they run."""

    def __init__(self, part: str = ""):
        self.operations: list[Operation] = []
        self._part = part

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the tensors that are made inside in this part."""
        before, self._part = self._part, name
        yield
        self._part = before

    def tensor(self, rows: int, width: int, item: int) -> Tensor:
        return Tensor(rows, width, item, self._part)

    def apply(
        self,
        inputs: Sequence[Tensor],
        output: Tensor,
        *,
        saves: Sequence[Tensor] = (),
        gradients: int = 0,
        scratch: int = 0,
        passes_gradient_on: bool = False,
    ) -> Tensor:
        """Add an operation and return its output, which needs a gradient where an input or a parameter does."""
        output.needs_grad = gradients > 0 or any(one.needs_grad for one in inputs)
        saved = tuple(saves) if output.needs_grad else ()
        self.operations.append(Operation(tuple(inputs), output, saved, gradients, scratch, passes_gradient_on))
        return output

    def elementwise(
        self, tensor: Tensor, *others: Tensor, saves: Sequence[Tensor] = (), passes_gradient_on: bool = False
    ) -> Tensor:
        """Add an operation whose output is as large as its first input, in the widest of its inputs' types."""
        output = self.tensor(tensor.rows, tensor.width, max(one.item for one in (tensor, *others)))
        return self.apply((tensor, *others), output, saves=saves, passes_gradient_on=passes_gradient_on)

    def add(self, tensor: Tensor, other: Tensor) -> Tensor:
        return self.elementwise(tensor, other, passes_gradient_on=True)

    def cast(self, tensor: Tensor, item: int) -> Tensor:
        """Return the tensor itself where it has this type already."""
        return tensor if tensor.item == item else self.apply((tensor,), self.tensor(tensor.rows, tensor.width, item))

    def keep(self, *tensors: Tensor) -> None:
        """Keep these tensors alive up to here, as a variable does that still holds them."""
        self.operations.append(Operation(tensors, self.tensor(0, 0, 0)))

    def checkpoint(self, layer: Callable[[Tensor], Tensor], tensor: Tensor, *others: Tensor) -> Tensor:
        """Return layer(tensor), of which only the inputs (`others` among them) are kept until it runs once more."""
        outer, self.operations = self.operations, []
        output = layer(tensor)
        body, self.operations = self.operations, outer
        inputs = (tensor, *others)
        self.operations.append(Operation(inputs, output, inputs if output.needs_grad else (), body=body))
        return output


def peak(operations: Sequence[Operation], *, accumulated: bool) -> dict[str, int]:
    """Return part -> bytes at the moment when most is held, between the start of the forward and the end of backward.

    `accumulated`: gradients of parameters exist already and are counted elsewhere; new ones are added to them.
    """
    replay = _Replay(accumulated)
    replay.forward(operations, save=True)
    loss = operations[-1].output
    replay.backward(operations, {loss: _Gradient(0, loss.part)})
    return replay.at_peak


@dataclass(slots=True)
class _Gradient:
    nbytes: int
    part: str
    owners: int = 1
    """Tensors whose gradient this is: a sum passes one gradient on to all its inputs."""


class _Replay:
    """Runs operations forward and backward, and counts the bytes that live."""

    def __init__(self, accumulated: bool):
        self.accumulated = accumulated
        self.live: Counter[str] = Counter()
        self.total = self.highest = 0
        self.at_peak: dict[str, int] = {}
        self.references: Counter[Tensor] = Counter()

    def forward(self, operations: Sequence[Operation], *, save: bool) -> None:
        """Run them in order. At the end the last output lives, and where operations `save`, what they saved."""
        uses = Counter(tensor for one in operations for tensor in set(one.inputs))
        made: set[Tensor] = set()
        for number, one in enumerate(operations):
            if one.body:
                self.forward(one.body, save=False)
            else:
                self._acquire(one.output)
            self._allocate_briefly(one.output.part, one.scratch)
            made.add(one.output)
            if save:
                for tensor in one.saved:
                    self._acquire(tensor)
            for tensor in set(one.inputs):
                uses[tensor] -= 1
                if not uses[tensor] and tensor in made:
                    self._release(tensor)
            if not uses[one.output] and number < len(operations) - 1:
                self._release(one.output)

    def backward(self, operations: Sequence[Operation], gradients: dict[Tensor, _Gradient]) -> None:
        """Run them in reverse. `gradients`: those of the outputs that later operations have computed."""
        for one in reversed(operations):
            gradient = gradients.pop(one.output, None)
            if gradient is not None and one.body:
                self.forward(one.body, save=True)
                self._release(one.output)
                gradients[one.output] = gradient
                self.backward(one.body, gradients)
            elif gradient is not None:
                self._allocate_briefly(one.output.part, one.scratch)
                for tensor in one.inputs:
                    if tensor.needs_grad:
                        self._add_gradient(tensor, gradient if one.passes_gradient_on else None, gradients)
                if self.accumulated:
                    self._allocate_briefly(GRADIENTS, one.gradients)
                else:
                    self._allocate(GRADIENTS, one.gradients)
                gradient.owners -= 1
                if not gradient.owners:
                    self._allocate(gradient.part, -gradient.nbytes)
            for tensor in one.saved:
                self._release(tensor)

    def _add_gradient(self, tensor: Tensor, passed_on: _Gradient | None, gradients: dict[Tensor, _Gradient]) -> None:
        """Add to a tensor's gradient: in place, unless it is another tensor's gradient, too."""
        before = gradients.get(tensor)
        if before is None and passed_on is not None:
            passed_on.owners += 1
            gradients[tensor] = passed_on
        elif before is None or before.owners > 1:
            self._allocate(tensor.part, tensor.nbytes)
            gradients[tensor] = _Gradient(tensor.nbytes, tensor.part)
            if before is not None:
                before.owners -= 1
        elif passed_on is None:
            self._allocate_briefly(before.part, tensor.nbytes)

    def _acquire(self, tensor: Tensor) -> None:
        if not self.references[tensor]:
            self._allocate(tensor.part, tensor.nbytes)
        self.references[tensor] += 1

    def _release(self, tensor: Tensor) -> None:
        self.references[tensor] -= 1
        if not self.references[tensor]:
            self._allocate(tensor.part, -tensor.nbytes)

    def _allocate_briefly(self, part: str, nbytes: int) -> None:
        self._allocate(part, nbytes)
        self._allocate(part, -nbytes)

    def _allocate(self, part: str, nbytes: int) -> None:
        self.live[part] += nbytes
        self.total += nbytes
        if self.total > self.highest:
            self.highest, self.at_peak = self.total, dict(self.live)
