"""Whether a module still is what was lowered: its submodules, their hooks, their attention processors."""

from itertools import repeat
from operator import contains

from torch import nn

from fastdiff.models.lower.record import UnsupportedError


class Structure:
    """What a module was made of when it was lowered.

    Someone may add a hook, a LoRA, a processor or an adapter at any time; the packed layers would not show it. A look
    costs about 10 us for 100 modules, since it compares whole dictionaries.
    """

    def __init__(self, module: nn.Module) -> None:
        inner = [child for child in module.modules() if child is not module]
        parents = [parent for parent in (module, *inner) if parent._modules]
        self._children = [parent._modules for parent in parents]
        self._children_then = [dict(children) for children in self._children]
        self._dicts = [child.__dict__ for child in inner]
        self._hooks = [hooks for child in inner for hooks in (child._forward_hooks, child._forward_pre_hooks)]
        self._attentions = [child.__dict__ for child in inner if "processor" in child.__dict__]
        self._processors = [attention["processor"] for attention in self._attentions]
        self._coded = [child.__dict__ for child in inner if "revision" in child.__dict__]  # quantized layers
        self._revisions = [layer["revision"] for layer in self._coded]
        self._dropouts = [child for child in inner if isinstance(child, nn.Dropout) and child.p > 0]
        self.check()

    def check(self) -> None:
        """Raises UnsupportedError where the module's own forward would now compute something else."""
        if self._children != self._children_then:
            raise UnsupportedError("layers were replaced after lowering")
        if any(self._hooks) or any(map(contains, self._dicts, repeat("forward"))):
            raise UnsupportedError("a submodule has hooks or a forward of its own")
        if [attention["processor"] for attention in self._attentions] != self._processors:
            raise UnsupportedError("attention processors were replaced after lowering")
        if [layer["revision"] for layer in self._coded] != self._revisions:
            raise UnsupportedError("quantized layers were changed after lowering")
        if any(dropout.training for dropout in self._dropouts):
            raise UnsupportedError("dropout is active")
