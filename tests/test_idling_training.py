"""Training of idled models: gradient steps on one block, and distillation from end to end."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from idling_helpers import OURS, VANILLA, batches, ffns, fitted, idle, vanilla_ffn
from model_helpers import images, relative, tiny_vit

import repavit_ops
from repavit_ops.idling import block_distillation
from repavit_ops.idling.bar import bar
from repavit_ops.idling.blocks import open_blocks
from repavit_ops.idling.distillation import idled_blocks, outputs
from repavit_ops.idling.metric import metric_roots
from repavit_ops.idling.refining import TOKENS, Sample, refine
from repavit_ops.idling.solving import goal_of, solve_ffn
from repavit_ops.idling.streams import Tokens

# --- gradient steps ---------------------------------------------------------------------------------------------------


def sampled(x, after):
    sample = Sample(len(x))
    sample.add(x, after)
    return sample


def test_steps_explain_more_than_the_closed_form():
    ffn = vanilla_ffn(hidden=48)
    x, after, split = fitted(ffn, tokens=4000, noise=0.0)
    fit = solve_ffn(ffn, split, 12, ridge=1e-9)
    before = {key: value.clone() for key, value in fit.ffn.state_dict().items()}
    refined = refine(fit.ffn, sampled(x, after), torch.eye(12), 200, seed=0)
    with torch.no_grad():
        left = (refined.ffn(x) - after).square().sum() / (after - x).square().sum()
    assert left < 0.8 * fit.loss
    assert refined.loss == pytest.approx(left.item(), rel=0.2)
    assert not torch.equal(refined.ffn.w_in, fit.ffn.w_in)
    assert all(torch.equal(value, before[key]) for key, value in fit.ffn.state_dict().items())


def test_steps_mend_what_the_metric_counts():
    ffn = vanilla_ffn(hidden=48)
    x, after, split = fitted(ffn, tokens=4000, noise=0.0)
    fit = solve_ffn(ffn, split, 12, ridge=1e-9)
    half = torch.diag(torch.tensor([1.0] * 6 + [1e-3] * 6))
    even, uneven = (refine(fit.ffn, sampled(x, after), root, 200, seed=0).ffn for root in (torch.eye(12), half))
    with torch.no_grad():
        errors = [(model(x) - after).square().sum(dim=(0, 1)) for model in (even, uneven)]
    assert errors[1][:6].sum() < 0.9 * errors[0][:6].sum()
    assert errors[1][6:].sum() > errors[0][6:].sum()


def test_no_steps_and_no_active_channels_change_nothing():
    ffn = vanilla_ffn()
    x, after, split = fitted(ffn)
    sample = sampled(x, after)
    for keep, steps in ((10, 0), (0, 50)):
        fit = solve_ffn(ffn, split, keep, ridge=1e-3)
        assert refine(fit.ffn, sample, torch.eye(12), steps, seed=0).ffn is fit.ffn


def test_a_sample_takes_as_many_tokens_of_every_image():
    x = torch.arange(2 * 7.0).view(2, 7, 1)
    sample = Sample(images=TOKENS // 3)
    sample.add(x, x + 0.5)
    assert torch.cat(sample.inside).flatten().tolist() == [0, 3, 6, 7, 10, 13]
    assert torch.equal(torch.cat(sample.goal), torch.cat(sample.inside) + 0.5)
    assert Sample(images=10 * TOKENS).per_image == 1


def test_steps_bring_a_model_closer_and_repeat():
    model, x = tiny_vit(**VANILLA), images(8, seed=99)
    closed, first, again, other = (idle(model, 0.75, steps=n, seed=s) for n, s in ((0, 0), (60, 0), (60, 0), (60, 1)))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    assert all(block.unexplained == block.refined < block.loss for block in first.idle_report)
    assert all(block.unexplained == block.loss for block in closed.idle_report)
    with torch.no_grad():
        assert (first(x) - model(x)).norm() < (closed(x) - model(x)).norm()


# --- distillation, block by block -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_distilling_blocks_brings_the_student_closer_and_repeats(name):
    torch.manual_seed(0)
    teacher, size = OURS[name](), 64 if name == "swin" else 32
    data = batches(size=size)
    student, x = idle(teacher, 0.75, size), torch.cat(data)
    with torch.no_grad():
        for ffn in ffns(student):
            ffn.w_merged.add_(0.1 * ffn.w_merged.std() * torch.randn_like(ffn.w_merged))
    again = copy.deepcopy(student)
    theirs, ours = (copy.deepcopy(model.state_dict()) for model in (teacher, student))
    with torch.no_grad():
        gap = (student(x) - teacher(x)).norm()
        losses = repavit_ops.distill_blocks(student, teacher, data, steps=60, lr=0.03, progress=False)
        repavit_ops.distill_blocks(again, teacher, data, steps=60, lr=0.03, progress=False)
        assert (student(x) - teacher(x)).norm() < 0.9 * gap
        assert torch.equal(student(x), again(x))
    assert list(losses) == [block.name for block in student.idle_report]
    assert all(torch.equal(theirs[key], value) for key, value in teacher.state_dict().items())
    changed = {key for key, value in student.state_dict().items() if not torch.equal(ours[key], value)}
    assert changed == {key for key, value in ours.items() if ".mlp." in key and value.numel()}


def test_a_block_is_distilled_on_what_the_trained_ones_in_front_give(monkeypatch):
    teacher, data, seen = tiny_vit(**VANILLA), batches(), []
    student = idle(teacher, 0.75)

    def recorded(ffn, sample, *others):
        seen.append((torch.cat(sample.inside), torch.cat(sample.goal), *others))
        return refine(ffn, sample, *others)

    monkeypatch.setattr(block_distillation, "refine", recorded)
    repavit_ops.distill_blocks(student, teacher, data, steps=20, progress=False)
    inside, goal, root, *settings = seen[1]
    opened, sites = open_blocks(teacher)
    given, after, x = [], [], torch.cat(data)
    student.blocks[1].mlp.register_forward_pre_hook(lambda _m, args: given.append(args[0]))
    with torch.no_grad():
        student(x)
        assert relative(root, metric_roots(opened, sites, x, bar(False))["blocks.1"]) < 1e-4
        opened.blocks[1].register_forward_hook(lambda _m, _args, output: after.append(output))
        opened(x)
        tokens = Tokens(given[0], after[0], torch.zeros(len(x), dtype=torch.bool))
        assert relative(goal, goal_of(sites[1].ffn, tokens).flatten(0, 1)) < 1e-5
    assert relative(inside, given[0].flatten(0, 1)) < 1e-5
    assert settings == [20, 0, 0.015]


def test_block_distillation_refuses_what_it_cannot_use():
    teacher = tiny_vit(**VANILLA)
    student = idle(teacher)
    with pytest.raises(ValueError, match=r"steps: got 0"):
        repavit_ops.distill_blocks(student, teacher, batches(), steps=0)
    with pytest.raises(ValueError, match="without idled blocks"):
        repavit_ops.distill_blocks(teacher, teacher, batches())
    with pytest.raises(ValueError, match="got no batches"):
        repavit_ops.distill_blocks(student, teacher, [], progress=False)
    repavit_ops.distill(student, teacher, batches(), steps=2, lr=1e-2, progress=False)
    with pytest.raises(ValueError, match=r"differs from the teacher at .*comes before distill"):
        repavit_ops.distill_blocks(student, teacher, batches())


# --- distillation, end to end -----------------------------------------------------------------------------------------


def test_distilling_brings_the_student_closer_and_leaves_the_teacher(tmp_path):
    teacher = tiny_vit(**VANILLA)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    student, x = idle(teacher, 1.0), torch.cat(batches())
    gap = (student(x) - teacher(x)).norm().item()
    losses = repavit_ops.distill(student, teacher, batches(), steps=60, lr=2e-2, progress=False)
    assert len(losses) == 60
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert (student(x) - teacher(x)).norm() < 0.9 * gap
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())
    assert all(p.requires_grad for p in teacher.parameters())


def test_the_loss_is_of_the_final_features_and_of_blocks_where_asked():
    teacher, x = tiny_vit(**VANILLA), images(4)
    student = idle(teacher, 1.0)
    names = idled_blocks(student, teacher)
    with torch.no_grad():
        (blocks, features, logits), (true_blocks, true_features, true_logits) = (
            outputs(model, names, x) for model in (student, teacher)
        )
    final = (1 - F.cosine_similarity(features, true_features, dim=-1)).mean()
    relative = [(a - b).square().sum() / b.square().sum() for a, b in zip(blocks, true_blocks, strict=True)]
    apart = F.softmax(true_logits, -1) * (F.log_softmax(true_logits, -1) - F.log_softmax(logits, -1))
    for block_weight, logit_weight in ((None, 0.0), (0.0, 0.5), (2.0, 0.0)):
        weights = {"logit_weight": logit_weight, **({} if block_weight is None else {"block_weight": block_weight})}
        loss = repavit_ops.distill(copy.deepcopy(student), teacher, [x], steps=1, progress=False, **weights)[0]
        wanted = final + (block_weight or 0.0) * sum(relative) / len(relative) + logit_weight * apart.sum(-1).mean()
        assert loss == pytest.approx(wanted.item(), rel=1e-4)


def test_the_learning_rate_is_a_share_of_each_weight():
    teacher = tiny_vit(**VANILLA)
    student = idle(teacher, 1.0)
    before = [p.detach().clone() for p in student.parameters()]
    repavit_ops.distill(student, teacher, batches(), steps=10, lr=1e-3, progress=False)
    for old, new in zip(before, student.parameters(), strict=True):
        size = max(old.square().mean().sqrt().item(), 1e-3) if old.numel() else 0.0
        assert ((new - old).abs() <= 1.5 * 10 * 1e-3 * size).all()  # Adam's step is about its rate
        assert not old.numel() or not torch.equal(old, new)


def test_distillation_goes_on_where_it_stopped(tmp_path):
    teacher, data = tiny_vit(**VANILLA), [images(4)]

    class Stop(Exception):
        pass

    def interrupted():
        for _ in range(20):
            yield images(4)
        raise Stop

    file = tmp_path / "distill.pt"
    long = {"steps": 24, "lr": 1e-2, "progress": False}
    straight, broken = idle(teacher), idle(teacher)
    repavit_ops.distill(straight, teacher, data, **long)
    with pytest.raises(Stop):
        repavit_ops.distill(broken, teacher, interrupted(), checkpoint=file, **long)
    resumed = idle(teacher)  # another process: only the file is left
    assert len(repavit_ops.distill(resumed, teacher, data, checkpoint=file, **long)) == 4
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert repavit_ops.distill(resumed, teacher, data, checkpoint=file, **long) == []  # done
    with pytest.raises(ValueError, match="another training"):
        repavit_ops.distill(idle(teacher, 0.75), teacher, data, checkpoint=file, **long)


def test_distillation_refuses_what_it_cannot_use():
    teacher = tiny_vit(**VANILLA)
    student = idle(teacher)
    with pytest.raises(ValueError, match="exactly one"):
        repavit_ops.distill(student, teacher, batches())
    with pytest.raises(ValueError, match="without idled blocks"):
        repavit_ops.distill(teacher, teacher, batches(), steps=1)
    with pytest.raises(ValueError, match=r"lacks the student's blocks blocks\.1"):
        repavit_ops.distill(student, tiny_vit(**VANILLA, depth=1), batches(), steps=1)
    with pytest.raises(ValueError, match="no batches"):
        repavit_ops.distill(student, teacher, iter(()), steps=1, progress=False)
    with pytest.raises(RuntimeError, match="not finite"):
        repavit_ops.distill(student, teacher, batches(), steps=9, lr=1e30, progress=False)
