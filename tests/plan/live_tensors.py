"""An independent count of living tensor bytes, to hold estimates against: it looks at what a real training holds.

It shares nothing with `swift.train.live_bytes`: it keeps weak references to storages and asks after each operation
which of them still live, and it runs on real tensors in a real `swift` run.
"""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from swift.train.callbacks.base import Callback


class LiveTensors(TorchDispatchMode):
    """The largest sum of bytes of living storages seen so far in ``peak``."""

    def __init__(self):
        super().__init__()
        self.storages = {}
        self.at_most = 0  # living ones, and dead ones that nobody has looked at yet
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.note((args, kwargs))
        result = func(*args, **(kwargs or {}))
        self.note(result)
        return result

    def note(self, values):
        for value in tree_flatten(values)[0]:
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                known = self.storages.get(storage._cdata)
                if known is None or known[0].expired():
                    self.at_most += storage.nbytes() - (known[1] if known else 0)
                    self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        if self.at_most > self.peak:
            self.storages = {key: entry for key, entry in self.storages.items() if not entry[0].expired()}
            self.at_most = sum(size for _, size in self.storages.values())
            self.peak = max(self.peak, self.at_most)


class PeakOfSteps(Callback):
    """``bytes``: the peak from the beginning of training to the end of its last step."""

    def __init__(self, counter):
        self.counter, self.bytes = counter, 0

    def on_train_begin(self, run):
        for tensor in [*run.engine.model.parameters(), *run.engine.model.buffers()]:
            self.counter.note(tensor)
        self.counter.peak = 0

    def on_step_end(self, run):
        self.bytes = self.counter.peak
