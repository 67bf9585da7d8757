"""Which operators run a kernel on CUDA tensors, and which their composition.

Compositions run until CUDA is in use. Then the first call of an operator decides for the process,
by :mod:`l2rw_ext.ops.trust`. Nothing else depends on the decision: neither the forms that a step
takes nor what it communicates.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch

from l2rw_ext.errors import warn

from . import _native, trust

__all__ = ["COMPOSED", "decide", "decided", "outcome", "register"]

COMPOSED: set[str] = set()
"""The operators whose compositions run on CUDA tensors."""
_ALL: dict[str, Callable[..., Any]] = {}
_lock = threading.Lock()
# Registrations end with the object that made them.
_registered = torch.library.Library("l2rw_ext", "IMPL", "CUDA")
mode = trust.mode()
if mode == "on":
    _native.load_cuda()
decided = mode != "auto" or bool(_native.libraries()[1].reason)
"""Whether the set will not change any more."""
outcome = {
    "on": "on, not checked here",
    "off": "off",
    "auto": "auto, none to check" if decided else "auto, to be checked when a GPU is in use",
}[mode]
"""The setting and what came of it, for the doctor."""


def register(name: str, composition: Callable[..., Any], kernel: bool = True) -> None:
    """Have a composition run on CUDA tensors if there is no kernel, or if it is not to run."""
    _ALL[name] = composition
    found = torch._C._dispatch_has_kernel_for_dispatch_key(f"l2rw_ext::{name}", "CUDA")
    if found and kernel:
        COMPOSED.discard(name)
    else:
        COMPOSED.add(name)
        _registered.impl(name, composition, allow_override=True)


def decide() -> None:
    """Replace compositions by the kernels that are trusted here, if CUDA is in use.

    A check may take a minute. While a CUDA graph is captured nothing is decided.
    """
    global decided, outcome, _registered
    if not torch.cuda.is_initialized() or torch.cuda.is_current_stream_capturing():
        return
    with _lock:
        path = _native.find_cuda().path
        if decided or path is None:
            return
        reason = ""
        try:
            verdict = trust.verdict(path)
        except trust.NoVerdictError as error:
            verdict, reason = trust.Verdict(()), f"no CUDA kernel of this package is used: {error}"
        if verdict.left_out:
            reasons = "; ".join(f"{name} ({why})" for name, why in verdict.left_out.items())
            reason = f"some CUDA kernels of this package are not used: {reasons}"
        if verdict.agreed != ():
            _registered._destroy()
            _registered = torch.library.Library("l2rw_ext", "IMPL", "CUDA")
            _native.load_cuda()
            with warnings.catch_warnings():  # torch warns where a kernel is left out
                warnings.simplefilter("ignore")
                for name, composition in _ALL.items():
                    register(name, composition, verdict.agreed is None or name in verdict.agreed)
        outcome = f"auto, {reason or 'all agreed'} on {'; '.join(trust.devices())}"
        decided = True
    if reason:
        warn(f"{reason}. Compositions of torch's operations run in their place")
