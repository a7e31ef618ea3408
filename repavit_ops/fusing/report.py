"""What of a model is fused, what is not and why, and on which kernels it will run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .. import backends, reference_int8, reparam
from ..nn import PartialGELUFFN, PatchConv2d, PatchProjection
from ..nn.dropped_weight import DroppedWeight
from ..nn.foreign_block import BiasedAttention, MaskedAttention, OpenBranch
from ..nn.given import is_plain, require_unsharded
from ..nn.packed_weights import PackedWeights
from ..stack import OneCall
from ..stack.block_runs import BlockRuns
from .nothing import nothing_fuses
from .rules import FUSED_INSIDE, can_fuse, rule_of
from .verbs import TRAINING_FORMS

Status = Literal["fused", "merged", "skipped", "stacked", "apart", "projected"]
TOLERANCE = "max|fused - fp64| <= 2 max|eager - fp64| + 1e-6, both in the model's dtype (repavit_ops.verify checks it)"


@dataclass(frozen=True)
class ReportEntry:
    """One sub-block: its name in the model, its operator or class, what became of it, and why."""

    name: str
    kind: str
    status: Status
    note: str = ""


@dataclass(frozen=True)
class FusionReport:
    """Result of :func:`fusion_report`; ``str()`` gives a table.

    Attributes:
        entries: one per sub-block of a known kind, in the model's order.
        runs_on: the kernels that the fused modules take on the model's device, or why there are none.
        memory: of the weights and their packed copies, and the scratch that the CPU kernels keep in this process.
        nothing: of a model of which nothing fuses, the classes that were looked at and the nearest that would.
        tolerance: what "equal" means for the fused model.
    """

    entries: tuple[ReportEntry, ...]
    runs_on: str
    memory: str = ""
    nothing: str = ""
    tolerance: str = TOLERANCE

    def with_status(self, status: Status) -> tuple[ReportEntry, ...]:
        """The entries of one status.

        Of sub-blocks: fused (kernels), merged (plain PyTorch), skipped; of containers: stacked, apart; of patch
        embeddings and mergings: projected.
        """
        return tuple(entry for entry in self.entries if entry.status == status)

    @property
    def fused(self) -> tuple[ReportEntry, ...]:
        return self.with_status("fused")

    @property
    def skipped(self) -> tuple[ReportEntry, ...]:
        return self.with_status("skipped")

    def __str__(self) -> str:
        counts = ", ".join(f"{len(self.with_status(s))} {s}" for s in ("fused", "merged", "skipped"))
        width = max((len(e.name) for e in self.entries), default=0)
        kind = max((len(e.kind) for e in self.entries), default=0)
        rows = [f"  {e.name:<{width}}  {e.kind:<{kind}}  {e.status:<9}  {e.note}".rstrip() for e in self.entries]
        rows += [f"  {self.nothing}"] if self.nothing else []
        ends = [f"memory: {self.memory}", f"tolerance: {self.tolerance}"]
        return "\n".join([f"{counts}; runs on {self.runs_on}", *rows, *ends])


def fusion_report(model: nn.Module) -> FusionReport:
    """List every sub-block of a known kind: fused, merged but in plain PyTorch, or skipped and why.

    Works on any model, before or after :func:`repavit_ops.fuse`; it reads the modules and keeps no record.
    """
    require_unsharded(model, "report on")
    modules = dict(model.named_modules())
    told = {name for name, module in modules.items() for name in _told_elsewhere(name, module)}
    entries = [e for name, m in modules.items() if name not in told and (e := _entry(name, m)) is not None]
    devices = sorted({p.device.type for p in model.parameters()})
    done = any(entry.status in ("fused", "merged", "projected") for entry in entries)
    return FusionReport(
        tuple(entries),
        "; ".join(_runs_on(d, list(modules.values())) for d in devices) or "no parameters",
        _memory(list(modules.values())),
        "" if done or any(can_fuse(module) is None for module in modules.values()) else nothing_fuses(model),
    )


def _told_elsewhere(name: str, module: nn.Module) -> list[str]:
    """Names that would say what another entry says: the body of an unfused half, a block whose halves speak."""
    if isinstance(module, OpenBranch):
        return [f"{name}.body"] if can_fuse(module.body) is not None else []
    rule = rule_of(module)
    if rule is not None and rule.kind == "unsupported":  # of an attention around an attention, the inner one speaks
        inner = (rule_of(part) for part in module.modules() if part is not module)
        return [name] if any(part is not None and part.kind == "unsupported" for part in inner) else []
    if rule is None or not rule.keeps_children:
        return []
    closes = rule.can_fuse(module) is None
    alone = (MaskedAttention, BiasedAttention)
    bodies_alone = any(isinstance(body, alone) or can_fuse(body) is None for body in module.children())
    return [] if bodies_alone and not closes else [name]


def _entry(name: str, module: nn.Module) -> ReportEntry | None:
    name = name or type(module).__name__
    if isinstance(module, TRAINING_FORMS):
        note = "training form, slower than the vanilla block: call reparameterize() or fuse()"
        return ReportEntry(name, type(module).__name__, "skipped", note)
    if isinstance(module, OneCall):
        if not module.in_one_call:
            return None
        apart = module.why_apart()
        note = f"the whole model in {_calls(module)}; part by part under gradients, autocast or hooks"
        return ReportEntry(name, "fused_blocks", "apart" if apart else "stacked", apart or note)
    if isinstance(module, BlockRuns):
        apart = module.why_apart()
        note = f"{len(module._modules)} blocks in {_calls(module)}; one by one under masks, gradients or autocast"
        return ReportEntry(name, "fused_blocks", "apart" if apart else "stacked", apart or note)
    if isinstance(module, PatchConv2d | PatchProjection):
        note = str(module.choice) if _left_to_pytorch(module) else "one product of the patches, without im2col"
        return ReportEntry(name, "patch_projection", "projected", note)
    rule = rule_of(module)
    if rule is None or can_fuse(module) == FUSED_INSIDE:
        return None
    if isinstance(module, PackedWeights):
        status: Status = "merged" if module.backend == "reference" else "fused"
        return ReportEntry(name, rule.kind, status, _note(module))
    source = module.body if isinstance(module, OpenBranch) else module
    return ReportEntry(name, type(source).__name__, "skipped", can_fuse(module) or "not fused: call fuse()")


def _note(module: PackedWeights) -> str:
    notes = []
    if isinstance(module, PartialGELUFFN) and module.hidden is not None:
        m, idle = module.act_channels, module.hidden - module.act_channels
        notes.append(f"m = {m} of {module.hidden}")
        if reparam.merging_adds_work(module.hidden, m, module.dim):
            notes.append(f"merging {idle} idle channels (<= C/2) into a C x C matrix adds work")
    if module.norm_eps is not None:
        notes.append(f"{'RMSNorm' if module.norm == 'rms' else 'LayerNorm'} core kept")
    if module.residual:
        notes.append("shortcut in the epilogue")
    if module.quantize != "none":
        kernels = backends.KERNELS_OF.get(getattr(module, module.packed_names[0]).device.type)
        notes.append(f"{module.quantize}, {_rounding(module) if kernels else 'by its formula: no kernel here has it'}")
    if (error := module.quantization_error) is not None:
        notes.append(_calibrated(error, module.quantize != "none"))
    if _left_to_pytorch(module):
        notes.append(str(module.choice))
    return ", ".join(notes)


def _rounding(module: PackedWeights) -> str:
    """How far the weights are from what the module computes with, over their size."""
    errors = []
    for w in module.sources():
        if w is not None and is_plain(w) and w.numel():
            used = reference_int8.weights(w.detach().float())
            errors.append(((used.q * used.scale - w.detach()).norm() / w.detach().norm()).item())
    return f"weights {max(errors):.1e} off" if errors else "weights freed"


def _calibrated(error: float, quantized: bool) -> str:
    """What calibration saw of a sub-block, and what followed."""
    if not math.isfinite(error):
        return "in floats: no batch of the calibration came here"
    return f"outputs {error:.1e} off" if quantized else f"in floats: int8 would be {error:.1e} off"


def _memory(modules: list[nn.Module]) -> str:
    weights = [t for m in modules for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))]
    packed = [m.packed_copy for m in modules if isinstance(m, PackedWeights) and m.packed_copy is not None]
    text = f"weights {_mebibytes(weights)}, packed copies {_mebibytes(packed)}"
    if backends.why_unavailable("cpp") is not None:
        return text
    return f"{text}, scratch of all threads {torch.ops.repavit_ops.scratch_bytes() / 2**20:.1f} MiB"


def _mebibytes(tensors: list[Tensor]) -> str:
    """Size of the memory blocks behind tensors, each counted once."""
    blocks: dict[int, int] = {}
    for t in tensors:
        if is_plain(t) or isinstance(t, DroppedWeight):
            blocks[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        else:  # quantised, sharded, …: with no one block of memory behind it
            blocks[id(t)] = t.nbytes
    return f"{sum(blocks.values()) / 2**20:.1f} MiB"


def _left_to_pytorch(module: nn.Module) -> bool:
    """Whether a table leaves some calls of a module to PyTorch."""
    choice = module.choice if isinstance(module, PackedWeights) else None
    return choice is not None and bool(choice.sizes or choice.others)


def _calls(module: nn.Module) -> str:
    return "few calls around what is PyTorch's" if any(map(_left_to_pytorch, module.modules())) else "one call"


def _runs_on(device_type: str, modules: list[nn.Module]) -> str:
    kernels = backends.KERNELS_OF.get(device_type)
    if kernels is None:
        return f"{device_type}: plain PyTorch (no kernels for this device)"
    if (reason := backends.why_unavailable(kernels)) is not None:
        return f"{device_type}: plain PyTorch ({reason})"
    if kernels == "cpp":
        left = [module.choice for module in modules if isinstance(module, PackedWeights) and _left_to_pytorch(module)]
        reasons = "; ".join(dict.fromkeys(choice.why for choice in left if choice is not None))
        text = f"cpu: C++ kernels, {backends.cpu_isa()}"
        return f"{text}; {len(left)} fused modules in PyTorch's own form {reasons}" if left else text
    return f"{device_type}: Triton kernels, {torch.cuda.get_device_name()}"
