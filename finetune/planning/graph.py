"""A forward, written down operation by operation -> the most it holds in memory, backward included. No torch.

Autograd's rules are few: an operation that needs a gradient keeps what its backward will read, each tensor once,
however many operations keep it; going back, a gradient is as large as its tensor and lives until it has been handed on.
So sizes alone, replayed in order, tell how many bytes live at every moment.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

GRADIENTS = "gradients"
"""The part that gradients of parameters belong to."""

FP32 = 4
"""Bytes of a number."""


@dataclass(eq=False, slots=True)
class Tensor:
    """Sizes of a tensor that lives while it is needed. Views are the tensor they look at."""

    rows: int
    width: int
    item: int
    """Bytes of a number."""
    part: str
    needs_grad: bool = False

    @property
    def nbytes(self) -> int:
        return self.rows * self.width * self.item


@dataclass(slots=True)
class Operation:
    inputs: tuple[Tensor, ...]
    output: Tensor
    saved: tuple[Tensor, ...] = ()
    """What its backward reads."""
    gradients: int = 0
    """Bytes of the gradients of its parameters."""
    scratch: int = 0
    """Bytes it needs besides while it runs, forward and backward."""
    hands_on: bool = False
    """Its inputs' gradients are its output's, not copies: a sum, a slice, a view."""
    body: list["Operation"] = field(default_factory=list)
    """Of a checkpoint: what is run once without keeping anything, and again before its backward."""


class Tape:
    """Operations in the order in which they run."""

    def __init__(self, part: str = ""):
        self.operations: list[Operation] = []
        self.part = part

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """What is made inside belongs to this part."""
        before, self.part = self.part, part
        yield
        self.part = before

    def new(self, rows: int, width: int, item: int, *, needs_grad: bool = False) -> Tensor:
        return Tensor(rows, width, item, self.part, needs_grad)

    def run(
        self,
        inputs: Sequence[Tensor],
        output: Tensor,
        *,
        saves: Sequence[Tensor] = (),
        gradients: int = 0,
        scratch: int = 0,
        hands_on: bool = False,
    ) -> Tensor:
        """`output` = operation(`inputs`), which needs a gradient where an input or a parameter of it does."""
        output.needs_grad = gradients > 0 or any(one.needs_grad for one in inputs)
        saved = tuple(saves) if output.needs_grad else ()
        self.operations.append(Operation(tuple(inputs), output, saved, gradients, scratch, hands_on))
        return output

    def like(self, tensor: Tensor, *others: Tensor, saves: Sequence[Tensor] = (), hands_on: bool = False) -> Tensor:
        """An element-wise operation: its result is as large as its first input."""
        output = self.new(tensor.rows, tensor.width, max(one.item for one in (tensor, *others)))
        return self.run((tensor, *others), output, saves=saves, hands_on=hands_on)

    def add(self, tensor: Tensor, other: Tensor) -> Tensor:
        return self.like(tensor, other, hands_on=True)

    def cast(self, tensor: Tensor, item: int) -> Tensor:
        """The tensor itself where it has this type already."""
        return tensor if tensor.item == item else self.run((tensor,), self.new(tensor.rows, tensor.width, item))

    def touch(self, *tensors: Tensor) -> None:
        """A variable still holds these here."""
        self.operations.append(Operation(tensors, Tensor(0, 0, 0, self.part)))

    def checkpoint(self, layer: Callable[[Tensor], Tensor], tensor: Tensor, *held: Tensor) -> Tensor:
        """`layer(tensor)`, of which only the inputs (`held`: the others) are kept until its backward runs it again."""
        outer, self.operations = self.operations, []
        output = layer(tensor)
        body, self.operations = self.operations, outer
        saved = (tensor, *held) if output.needs_grad else ()
        self.operations.append(Operation((tensor, *held), output, saved, body=body))
        return output


def peak(operations: Sequence[Operation], *, accumulated: bool) -> dict[str, int]:
    """Part -> bytes at the moment when most is held, between the start of the forward and the end of the backward.

    accumulated: gradients of parameters are there already, counted elsewhere, and new ones are added to them.
    """
    walk = _Walk(accumulated)
    walk.forward(operations, keep=True)
    loss = operations[-1].output
    walk.backward(operations, {loss: _Gradient(0, loss.part)})
    return walk.most


@dataclass(slots=True)
class _Gradient:
    nbytes: int
    part: str
    owners: int = 1


class _Walk:
    """Runs operations forward and backward, and keeps count."""

    def __init__(self, accumulated: bool):
        self.accumulated = accumulated
        self.live: Counter[str] = Counter()
        self.total = self.highest = 0
        self.most: dict[str, int] = {}
        self.holders: Counter[Tensor] = Counter()

    def forward(self, operations: Sequence[Operation], *, keep: bool) -> None:
        """The last output stays held; the others only while something here still uses them, or has saved them."""
        uses = Counter(tensor for one in operations for tensor in set(one.inputs))
        made: set[Tensor] = set()
        for number, one in enumerate(operations):
            if one.body:
                self.forward(one.body, keep=False)
            else:
                self._hold(one.output)
            self._brief(one.output.part, one.scratch)
            made.add(one.output)
            if keep:
                for tensor in one.saved:
                    self._hold(tensor)
            for tensor in set(one.inputs):
                uses[tensor] -= 1
                if not uses[tensor] and tensor in made:
                    self._release(tensor)
            if not uses[one.output] and number < len(operations) - 1:
                self._release(one.output)

    def backward(self, operations: Sequence[Operation], gradients: dict[Tensor, _Gradient]) -> None:
        for one in reversed(operations):
            gradient = gradients.pop(one.output, None)
            if gradient is not None and one.body:
                self.forward(one.body, keep=True)
                self._release(one.output)
                gradients[one.output] = gradient
                self.backward(one.body, gradients)
            elif gradient is not None:
                self._step_back(one, gradient, gradients)
            for tensor in one.saved:
                self._release(tensor)

    def _step_back(self, one: Operation, gradient: _Gradient, gradients: dict[Tensor, _Gradient]) -> None:
        self._brief(one.output.part, one.scratch)
        for tensor in one.inputs:
            if tensor.needs_grad:
                self._give(tensor, gradient if one.hands_on else None, gradients)
        if self.accumulated:
            self._brief(GRADIENTS, one.gradients)
        else:
            self._add(GRADIENTS, one.gradients)
        self._drop(gradient)

    def _give(self, tensor: Tensor, same: _Gradient | None, gradients: dict[Tensor, _Gradient]) -> None:
        """Add to the gradient of a tensor: in place where nobody else looks at it."""
        before = gradients.get(tensor)
        if before is None and same is not None:
            same.owners += 1
            gradients[tensor] = same
        elif before is None or before.owners > 1:
            gradients[tensor] = self._new_gradient(tensor)
            if before is not None:
                before.owners -= 1
        elif same is None:
            self._brief(before.part, tensor.nbytes)

    def _new_gradient(self, tensor: Tensor) -> _Gradient:
        self._add(tensor.part, tensor.nbytes)
        return _Gradient(tensor.nbytes, tensor.part)

    def _drop(self, gradient: _Gradient) -> None:
        gradient.owners -= 1
        if not gradient.owners:
            self._add(gradient.part, -gradient.nbytes)

    def _hold(self, tensor: Tensor) -> None:
        if not self.holders[tensor]:
            self._add(tensor.part, tensor.nbytes)
        self.holders[tensor] += 1

    def _release(self, tensor: Tensor) -> None:
        self.holders[tensor] -= 1
        if not self.holders[tensor]:
            self._add(tensor.part, -tensor.nbytes)

    def _brief(self, part: str, nbytes: int) -> None:
        self._add(part, nbytes)
        self._add(part, -nbytes)

    def _add(self, part: str, nbytes: int) -> None:
        self.live[part] += nbytes
        self.total += nbytes
        if self.total > self.highest:
            self.highest, self.most = self.total, dict(self.live)
