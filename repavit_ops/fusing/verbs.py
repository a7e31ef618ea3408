"""The verbs that change a model: ``reparameterize`` (merge, plain PyTorch) and ``fuse`` (swap in kernels)."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .. import backends, reparam
from ..backends import BACKENDS, Backend, warn_without_kernels, why_unavailable
from ..nn import (
    Attention,
    Block,
    ChannelIdleFFN,
    ConvReLU2d,
    DeployedShapeFFN,
    JoinedBranchAttention,
    JoinedBranchFFN,
    PartialGELUFFN,
    TokenBatchNorm,
    recorders,
)
from ..nn.given import cast_real, copied, other_device, reason_against_weights, require_weights, unwrapped
from ..nn.mode import require_eval
from ..nn.packed_weights import PackedWeights
from ..nn.stand_in import stand_in_class
from ..ops import _check
from ..reference_int8 import LEAST_COSINE
from ..stack import FusedStack, LoopedBlocks, LoopOwner, OneCall
from .calibration import Batch, calibrate
from .folding import fold_batchnorm
from .nothing import nothing_fuses
from .patches import fuse_patches
from .quantizing import quantize_weights
from .rules import FUSED_INSIDE, can_fuse, loop_of, reset, rule_of

LARGE = 2**22  # bytes of a module's weights from which on freed ones are worth a system call
TRAINING_FORMS = (ChannelIdleFFN, DeployedShapeFFN, JoinedBranchFFN, JoinedBranchAttention)


def reparameterize(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Merge every training form of a model into its deployed form, exactly; the result is plain PyTorch.

    Channel-idle FFNs become ``W3 gelu(W2 x + b2) + W1 x + b1`` (RePaViT, eq. 6), joined branches one branch, and a
    BatchNorm in front of attention goes into qkv. Everything else stays as it is: LayerNorm, attention, head. The
    result can be exported, saved in the authors' layout and passed to :func:`fuse`. Merging twice changes nothing.

    Args:
        model: any module; may itself be a training form. Modules that are shared are merged once and stay shared. Out
            of DistributedDataParallel, DataParallel, AveragedModel and torch.compile's wrapper it comes unwrapped.
        inplace: change ``model`` instead of a copy. Use the return value either way: a root that is itself a training
            form is replaced.

    Returns:
        The merged model, in evaluation mode.

    Raises:
        RuntimeError: some part is in training mode, or branches are joined with α < 1; says where and the fix.
        ValueError: a merged weight is not finite; weights are on the meta device or sharded; the model cannot be
            copied. Names the place and what to do.
    """
    model, device = _taken(model, inplace, "merge")
    merged = _swap(model, _merged)
    return merged if device is None else merged.to(device)


def fuse(
    model: nn.Module,
    backend: Backend = "auto",
    dtype: torch.dtype | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    strict: bool = False,
    inplace: bool = False,
    keep_unpacked: bool = True,
    quantize: str = "none",
    calibration: Iterable[Batch] | None = None,
    least_cosine: float = LEAST_COSINE,
) -> nn.Module:
    """Swap the blocks of a model for fused modules that compute the same, each in one operator call.

    Reparameterizes first what still needs it, then folds LayerNorm affine, scale, K and V bias, LayerScale and 1/λ.
    Convolutions over patches and Swin's mergings become projections without im2col, LV-ViT's stem folds its norms, and
    runs of fused blocks in an ``nn.Sequential`` become a :class:`repavit_ops.stack.FusedStack`, one call for all;
    a plain ViT or Swin of :mod:`repavit_ops.models` goes through one call from the image to the logits.
    What cannot be fused stays and :func:`repavit_ops.fusion_report` says why; if that is everything, a warning names
    the classes that were looked at. Fusing twice changes nothing.

    Args:
        model: any module; may itself be fusible. Modules that are shared are fused once and stay shared. Out of
            DistributedDataParallel, DataParallel, AveragedModel and torch.compile's wrapper it comes unwrapped.
        backend: "auto" takes each device's kernels, and plain PyTorch where there are none and for float64;
            "reference", "cpp" and "triton" are used or raise.
        dtype: cast the whole model (bfloat16, float16, …). Shortcuts folded into a merged matrix are taken out again
            first where that rounds less, since rounding 1 + w loses w; in float32 they always are, for kernels.
        filter_fn: called with (module, its name); False leaves a sub-block as it is, unmerged and unfused.
        strict: raise if any sub-block of a known kind cannot be fused.
        inplace: change ``model`` instead of a copy. Use the return value either way.
        keep_unpacked: False frees the plain weights once they are packed for the CPU kernels (≤ 1.15x instead of
            ≤ 2.1x the weights): state_dict unpacks them, load_state_dict and assigned parameters are packed; training,
            and whatever else reads or writes a freed weight, raises.
        quantize: "int8": products of FFNs and attention's projections in whole numbers, weights per output channel,
            tokens per token and call, so no data is needed beforehand; the rest stays in the model's dtype
            (docs/int8.md). Not exact, not differentiable; patches and the head keep their floats.
        calibration: batches of inputs like those to come: tensors, (images, labels), dictionaries of arguments. With
            them the mean of what int8 is off leaves the biases, and the sub-blocks that int8 hurts most stay in floats,
            as many as ``least_cosine`` asks for; the report names each one's error. Without them all are quantized.
        least_cosine: of the last tokens with those of floats, as calibration predicts it.

    Returns:
        The fused model, in evaluation mode. Its outputs follow its weights, whoever writes them: optimizers, loads,
        averages, collectives, other processes, ``.data``; eager, compiled and exported alike. What cannot be seen is a
        change of few numbers of a weight that raises no version counter (through ``.data``, numpy, or in inference
        mode; in compiled and exported programs any): call ``repack()`` of its module behind one. Gradients flow, but
        fused blocks have neither Dropout nor DropPath: train first.

    Raises:
        RuntimeError: a part is in training mode or α < 1; a forced backend is not available; strict and something
            was skipped (each named with its reason).
        UserWarning: nothing was fused; or inference mode is on, in which no parameter that can be trained is made.
        TypeError: ``model`` is no module.
        ValueError: an unknown backend, dtype or form of quantize; float64 with "int8"; calibration without quantize, or
            of no batch; least_cosine out of [0, 1]; a folded weight is not finite; weights are on the meta device or
            sharded; the model cannot be copied.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, wanted one of {', '.join(BACKENDS)}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype: got {dtype!r}, wanted a floating dtype such as torch.bfloat16")
    _check.form_of_quantize(quantize)
    if calibration is not None and quantize == "none":
        raise ValueError("calibration: is for quantize='int8', got quantize='none'")
    if not 0 <= least_cosine <= 1:
        raise ValueError(f"least_cosine: got {least_cosine}, wanted a number from 0 to 1")
    if (reason := why_unavailable(backend)) is not None:
        raise RuntimeError(f"backend {backend!r} is not available: {reason}")
    at_once = quantize != "none" and calibration is None

    def wanted(module: nn.Module, name: str) -> bool:
        return filter_fn is None or filter_fn(module, name)

    if torch.is_inference_mode_enabled():
        warnings.warn(
            "repavit_ops.fuse: called inside torch.inference_mode(), so the result can never be trained; fuse outside, "
            "or under torch.no_grad()",
            stacklevel=2,
        )

    def finished(module: nn.Module) -> None:
        """Cast and pack a module as soon as it stands, so that no more than one block has its weights twice."""
        if not isinstance(module, PackedWeights):
            return
        if at_once:
            quantize_weights(module, quantize)
        if device is not None:
            return
        if dtype is not None:
            _cast(module, dtype)
        module.current()
        if not keep_unpacked and calibration is None:
            module.drop_unpacked()
        if (packed := module.packed_copy) is not None and packed.nbytes >= LARGE:
            backends.release_freed_memory()

    model, device = _taken(model, inplace, "fuse")
    keeps_shortcut = at_once or dtype not in (None, torch.float32)  # which those take out by themselves
    model = _swapped(model, backend, wanted, keeps_shortcut, strict, finished)
    if dtype is not None:
        _cast(model, dtype)
    if calibration is not None:
        with torch.no_grad():
            calibrate(model, calibration, quantize, least_cosine)
        for module in model.modules():
            if isinstance(module, PackedWeights) and device is None and not keep_unpacked:
                module.drop_unpacked()
    if device is not None:
        model.to(device)
    if backend == "auto":
        for kind in {p.device.type for p in model.parameters()}:
            warn_without_kernels(kind)
    if filter_fn is None and not any(isinstance(module, PackedWeights | ConvReLU2d) for module in model.modules()):
        warnings.warn(f"repavit_ops.fuse: {nothing_fuses(model)}", stacklevel=2)
    return model


def fused_structure(model: nn.Module) -> nn.Module:
    """What :func:`fuse` makes of a model without weights: the same modules, names and shapes, on the meta device.

    Args:
        model: on the meta device, in evaluation mode; it is changed.
    """
    return _swapped(unwrapped(model), "auto", lambda module, name: True)


def stacked(model: nn.Module) -> nn.Module:
    """A model whose blocks are fused, changed so that runs of them, or all of it, go through one operator call."""
    return _swap(model, _stacked)


def _swapped(
    model: nn.Module,
    backend: Backend,
    wanted: Callable[[nn.Module, str], bool],
    keeps_shortcut: bool = False,
    strict: bool = False,
    finished: Callable[[nn.Module], None] = lambda module: None,
) -> nn.Module:
    """The model with training forms merged, then sub-blocks and patches fused where ``wanted``, then blocks stacked."""

    def merged(module: nn.Module, name: str) -> nn.Module:
        return _merged(module, name) if wanted(module, name) else module

    def fused(module: nn.Module, name: str) -> nn.Module:
        rule = rule_of(module)
        if rule is None or can_fuse(module) is not None or not wanted(module, name):
            return module
        made = rule.fold(module, backend)
        if isinstance(made, PartialGELUFFN) and backend != "reference" and not keeps_shortcut:
            made.take_out_shortcut()
        return made

    def patches(module: nn.Module, name: str) -> nn.Module:
        return fuse_patches(module, backend) if wanted(module, name) else module

    model = _swap(model, merged)
    if strict:
        _require_fusible(model, wanted)
    for module in model.modules():
        recorders.forget(module)
        reset(module)
    model = stacked(_swap(_swap(model, fused, finished), patches, finished))
    _refuse_saving(model)
    return model


def _taken(model: nn.Module, inplace: bool, verb: str) -> tuple[nn.Module, torch.device | None]:
    """The model to change, out of its wrappers, and the device to move it back to, where folds need another."""
    model = unwrapped(model)
    require_eval(model)
    require_weights(model, verb)
    if not inplace:
        model = copied(model, verb)
    if (device := other_device(model)) is not None:
        model.to("cpu")
    return model, device


def _require_fusible(model: nn.Module, wanted: Callable[[nn.Module, str], bool]) -> None:
    skipped = [
        f"{name or type(module).__name__}: {can_fuse(module)}"
        for name, module in model.named_modules()
        if rule_of(module) is not None and can_fuse(module) not in (None, FUSED_INSIDE) and wanted(module, name)
    ]
    if skipped:
        raise RuntimeError("fuse(strict=True): not fused: " + "; ".join(skipped))


def _merged(module: nn.Module, name: str) -> nn.Module:
    if reason_against_weights(module) is not None:
        return module
    if isinstance(module, TRAINING_FORMS):
        return module.fuse()
    if type(module) is Attention and isinstance(module.norm, TokenBatchNorm):
        return fold_batchnorm(module)
    return module


def _stacked(module: nn.Module, name: str) -> nn.Module:
    if isinstance(module, OneCall):
        module.in_one_call = True
    if (name_of_blocks := loop_of(module)) is not None:
        return _looped(module, name_of_blocks)
    if type(module) is not nn.Sequential:
        return module
    stack = FusedStack.replacing(module)
    return module if stack.has_no_run() else stack


class _Refused:
    """A method of a model that would do something wrong with its fused parts."""

    def __init__(self, name: str, why: str) -> None:
        self.name, self.why = name, why

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        raise RuntimeError(f"{self.name}: this model is fused, {self.why}")


def _refuse_saving(model: nn.Module) -> None:
    """Let save_pretrained say what it cannot do: nothing could load the folded weights under the class's own keys."""
    why = (
        "and its folded weights fit no from_pretrained; save the model before fusing, and fuse what from_pretrained "
        "gives back (torch.save of the whole fused model works too)"
    )
    for module in model.modules():
        if callable(getattr(module, "save_pretrained", None)) and any(isinstance(m, Block) for m in module.modules()):
            for name in ("save_pretrained", "push_to_hub"):
                vars(module)[name] = _Refused(name, why)


def _looped(owner: nn.Module, name: str) -> nn.Module:
    blocks = getattr(owner, name, None)
    if isinstance(blocks, nn.ModuleList) and LoopedBlocks.can_replace(blocks):
        setattr(owner, name, LoopedBlocks.replacing(blocks))
        classes: tuple[Any, Any] = LoopOwner, type(owner)
        owner.__class__ = stand_in_class(*classes)
        vars(owner)["loops_over"] = name
    return owner


def _swap(
    model: nn.Module,
    replace: Callable[[nn.Module, str], nn.Module],
    finished: Callable[[nn.Module], None] = lambda module: None,
) -> nn.Module:
    """Replace modules from the root down; what replaced a module is looked at inside too, each module once.

    ``finished`` is called with every module behind all that it contains. What was replaced is held by nothing here.
    """
    done: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()

    def visit(module: nn.Module, name: str) -> nn.Module:
        known = done[module]() if module in done else None
        if known is not None:
            return known
        new = replace(module, name)
        if new is not module and not any(p.requires_grad for p in module.parameters()):
            new.requires_grad_(False)
        done[module] = done[new] = weakref.ref(new)
        for key in [key for key, child in new._modules.items() if child is not None]:
            setattr(new, key, visit(unwrapped(new.get_submodule(key)), f"{name}.{key}" if name else key))
        finished(new)
        return new

    with torch.no_grad():
        return visit(model, "").eval()


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the model, first taking folded shortcuts out of merged matrices where that loses less to rounding."""
    if not any(isinstance(module, PackedWeights) for module in model.modules()):
        cast_real(model, dtype)
    elif isinstance(model, PackedWeights):
        if getattr(model, model.packed_names[0]).dtype == dtype:
            return  # moving it would pack it again
        if isinstance(model, PartialGELUFFN):
            _take_out_shortcut(model, dtype)
        model.to(dtype)
    else:
        for child in model.children():
            _cast(child, dtype)
        nn.Module._apply(model, lambda t: t.to(dtype) if t.is_floating_point() else t, recurse=False)  # its own


def _take_out_shortcut(module: PartialGELUFFN, dtype: torch.dtype) -> None:
    if (folded := module.w_merged) is None or module.residual or module.norm_eps is not None:
        return
    if _shortcut_rounds_better_apart(folded, dtype):
        apart = reparam.unfold_identity(folded.detach())
        module.w_merged = nn.Parameter(apart.to(folded.dtype), folded.requires_grad)
        module.residual = True


def _shortcut_rounds_better_apart(w_merged: nn.Parameter, dtype: torch.dtype) -> bool:
    folded = w_merged.detach().double()
    loss_folded, loss_apart = ((w.to(dtype).double() - w).norm() for w in (folded, reparam.unfold_identity(folded)))
    return bool(loss_apart < loss_folded)
