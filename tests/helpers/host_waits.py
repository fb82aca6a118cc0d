"""Counts what a GPU's host would wait for, on a CPU: operations whose result, or its shape, the host must know."""

import sys
import threading
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[2]

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense,
    aten.bincount,
    aten.equal,
    aten.is_nonzero,
    aten.masked_select,
    aten.nonzero,
    aten.repeat_interleave,
    aten._unique2,
    aten.unique_consecutive,
    aten.unique_dim,
}
"""Operators that read numbers back, or whose result is as long as the numbers say."""

BY_MASK = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
"""Operators that are the same where one of their indices is a mask."""

READERS = ("tolist", "numpy")
"""Methods of a tensor that read it without an operator."""


class HostWaits(TorchDispatchMode):
    """While active, collects (file of this repository or of a library that asked, what it asked for).

    Not counted: rows being made in another thread, and the optimiser's own count of steps, which no GPU holds.
    """

    def __init__(self):
        super().__init__()
        self.found, self.thread = Counter(), threading.get_ident()

    def __enter__(self):
        self.originals = {name: getattr(torch.Tensor, name) for name in READERS}
        for name, method in self.originals.items():
            setattr(torch.Tensor, name, self._counted(name, method))
        return super().__enter__()

    def __exit__(self, *error):
        for name, method in self.originals.items():
            setattr(torch.Tensor, name, method)
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        packet = function.overloadpacket
        indices = args[1] if packet in BY_MASK else ()
        if packet in WAITING or any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in indices):
            self._note(packet.__name__)
        return function(*args, **(kwargs or {}))

    def _counted(self, name, method):
        def read(tensor, *args, **kwargs):
            if threading.get_ident() == self.thread:
                self._note(name)
            return method(tensor, *args, **kwargs)

        return read

    def _note(self, what):
        frame = sys._getframe(2)
        while "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
            if "/torch/optim/" in frame.f_code.co_filename:
                return
            frame = frame.f_back
        file = Path(frame.f_code.co_filename)
        ours = file.is_relative_to(ROOT) and "site-packages" not in file.parts
        name = file.relative_to(ROOT) if ours else Path(*file.parts[-2:])
        self.found[f"{name}: {frame.f_code.co_name}: {what}"] += 1
