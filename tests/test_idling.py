"""A pretrained ViT in, a reparameterized one out: what is exact, what is solved, what is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from idling_helpers import OURS, TIMM, VANILLA, VIT, batches, ffns, fitted, idle, vanilla_ffn
from model_helpers import images, randomise, relative, tiny_vit
from torch import nn

import repavit_ops
from repavit_ops.idling import allocation, pretrained, solving
from repavit_ops.idling.allocation import Sensitivity, allocated, within_budget
from repavit_ops.idling.bar import bar
from repavit_ops.idling.blocks import in_call_order, open_blocks
from repavit_ops.idling.metric import features, metric_roots
from repavit_ops.idling.refining import refine
from repavit_ops.idling.scratch import Scratch
from repavit_ops.idling.selection import eliminate
from repavit_ops.idling.solving import MEND, goal_of, original, solve_ffn
from repavit_ops.idling.statistics import FitStatistics
from repavit_ops.idling.streams import Streams, Tokens

# --- the result -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", TIMM)
def test_timm_families_are_idled_and_what_comes_out_fuses(timm, name):
    config = TIMM[name]
    model, x = randomise(timm.create_model(name, **config)), images(4, config["img_size"], seed=99)
    before = model(x)
    idled = idle(model, 0.5, config["img_size"])
    changed = [ffn for ffn in ffns(idled) if ffn.w_merged is not None]
    assert len(changed) == len(idled.idle_report) == (4 if "swin" in name else 2)
    assert all(2 * ffn.act_channels == ffn.hidden and ffn.residual and ffn.norm_eps for ffn in changed)
    assert torch.equal(model(x), before)  # the original is not touched
    assert F.cosine_similarity(idled(x), before).min() > 0.95
    assert repavit_ops.verify(idled, repavit_ops.fuse(idled), x)


@torch.no_grad()
@pytest.mark.parametrize("name", OURS)
def test_our_models_are_idled_saved_and_exported(name, tmp_path):
    model, size = OURS[name](), 64 if name == "swin" else 32
    x = images(4, size, seed=99)
    idled = idle(model, 0.75, size)
    assert F.cosine_similarity(idled(x), model(x)).min() > 0.9
    repavit_ops.save_checkpoint(idled, tmp_path / "idled.safetensors")
    assert torch.equal(repavit_ops.load_checkpoint(tmp_path / "idled.safetensors")(x), idled(x))
    exported = torch.export.export(idled, (x,)).module()
    assert relative(exported(x), idled(x)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_base_patch16_224", "swin_tiny_patch4_window7_224"])
def test_files_of_timm_models_restore_them(timm, name, tmp_path):
    from repavit_ops.checkpoints.idled_timm import save_idled

    config = TIMM[name]
    ratios = [0.5, 0, 0.5, 0] if "swin" in name else [0.5, 0]
    idled = idle(randomise(timm.create_model(name, **config)), ratios, config["img_size"])
    save_idled(idled, tmp_path / "idled.safetensors", name, **config)
    x = images(2, config["img_size"], seed=99)
    again = repavit_ops.load_checkpoint(tmp_path / "idled.safetensors")
    assert torch.equal(again(x), idled(x))
    with pytest.raises(ValueError, match="pass none"):
        repavit_ops.load_checkpoint(tmp_path / "idled.safetensors", num_heads=3)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("local-dir:elsewhere", {}, "wanted the name of one of timm's architectures"),
        ("vit_base_patch16_224", {"checkpoint_path": "elsewhere.pth"}, "checkpoint_path for timm, wanted none"),
    ],
)
def test_a_file_cannot_send_timm_to_other_files(timm, name, arguments, message, tmp_path):
    from repavit_ops.checkpoints.idled_timm import save_idled

    save_idled(timm.create_model("vit_base_patch16_224", **VIT), tmp_path / "idled.safetensors", name, **arguments)
    with pytest.raises(ValueError, match=message):
        repavit_ops.load_checkpoint(tmp_path / "idled.safetensors")


@torch.no_grad()
def test_ratio_zero_is_the_original_bit_for_bit(timm):
    x = images(2, seed=99)
    for model in (randomise(timm.create_model("vit_base_patch16_224", **VIT)), tiny_vit(**VANILLA)):
        for allocate in (False, True):
            assert torch.equal(idle(model, 0, allocate=allocate)(x), model(x))


@torch.no_grad()
def test_a_ratio_per_block_leaves_the_others_alone(timm):
    model = randomise(timm.create_model("vit_base_patch16_224", **VIT))
    idled = idle(model, [0, 0.75])
    assert [block.act_channels for block in idled.idle_report] == [192, 48]
    assert torch.equal(idled.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight)
    assert idled.blocks[1].mlp.act_channels == 48


@torch.no_grad()
def test_ratio_one_is_linear_in_the_norm(timm):
    idled = idle(randomise(timm.create_model("vit_base_patch16_224", **VIT)), 1.0)
    assert [ffn.act_channels for ffn in ffns(idled)] == [0, 0]


@torch.no_grad()
def test_channels_that_are_linear_anyway_idle_without_loss():
    """Half of the hidden channels sit where GELU is the identity: these must be the idle ones, and nothing is lost."""
    model = tiny_vit(**VANILLA).double()
    generator = torch.Generator().manual_seed(5)
    for block in model.blocks:
        linear = torch.randperm(192, generator=generator)[:96]
        block.mlp.fc1.bias[linear] = 8.0
    x = images(4, seed=99).double()
    idled = idle(model, 0.5, ridge=1e-12)
    assert all(block.loss < 1e-9 for block in idled.idle_report)
    assert relative(idled(x), model(x)) < 1e-4


def test_the_same_seed_gives_the_same_model():
    model = tiny_vit(**VANILLA)
    first, again, other = (idle(model, 0.5, tokens_per_image=4, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_batches_of_other_sizes_give_the_same_fit():
    model, data = tiny_vit(**VANILLA), torch.cat(batches())
    one, other = (repavit_ops.idle_pretrained(model, data.split(n), 0.5, steps=0, progress=False) for n in (40, 7))
    for a, b in zip(one.idle_report, other.idle_report, strict=True):
        assert a.ridge == b.ridge
        assert (a.loss, a.held_out) == pytest.approx((b.loss, b.held_out), rel=1e-3)


# --- the walk ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", OURS)
def test_the_walk_gives_what_both_models_compute(name, tmp_path):
    """Behind each block the original's tokens; in front of its FFN the changed model's, whatever stands between."""
    model, data = OURS[name](), batches(2, 64 if name == "swin" else 32, of=3)
    changed, sites = open_blocks(model)
    with Scratch(tmp_path) as scratch:
        streams = Streams(scratch, data, data[0])
        sites = in_call_order(changed, sites, data[0])
        for index, site in enumerate(sites):
            walked = list(streams.at(changed, sites, index))
            for batch, tokens in enumerate(walked):
                assert relative(tokens.after, _output(model, site.name, data[batch]).flatten(1, -2)) < 1e-5
                assert relative(tokens.inside, _input(changed, f"{site.name}.mlp", data[batch]).flatten(1, -2)) < 1e-5
            with torch.no_grad():
                site.block.mlp = nn.Sequential(site.ffn, nn.Tanh())  # any change will do
    assert not list(tmp_path.iterdir())


def _output(model, name, x):
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda _m, _a, output: seen.append(output))
    model(x)
    handle.remove()
    return seen[0]


def _input(model, name, x):
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    model(x)
    handle.remove()
    return seen[0]


# --- the algebra ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_goal_mends_part_of_what_was_lost():
    ffn, inside, after = vanilla_ffn(), *torch.randn(2, 4, 6, 12)
    goal = goal_of(ffn, Tokens(inside, after, torch.zeros(4, dtype=torch.bool)))
    assert 0 < MEND < 1
    assert torch.allclose(goal, MEND * after + (1 - MEND) * ffn(inside), atol=1e-5)


def test_both_fit_and_steps_go_for_that_goal(monkeypatch):
    model, goals = tiny_vit(**VANILLA), []

    def recorded(ffn, sample, root, steps, seed):
        goals.append(torch.cat(sample.goal))
        return refine(ffn, sample, root, steps, seed)

    monkeypatch.setattr(pretrained, "refine", recorded)
    half = ffns(idle(model, 0.75))
    monkeypatch.setattr(solving, "MEND", 1.0)
    whole = ffns(idle(model, 0.75))
    assert torch.equal(half[0].w_out, whole[0].w_out)  # nothing is lost in front of the first
    assert torch.allclose(goals[0], goals[2], atol=1e-5)
    assert not torch.allclose(half[1].w_out, whole[1].w_out, rtol=1e-3)
    assert relative(goals[1], goals[3]) > 1e-3


@torch.no_grad()
def test_the_solution_is_that_of_a_direct_least_squares():
    ffn = vanilla_ffn().double()
    x, after, split = fitted(ffn)
    fit = solve_ffn(ffn, split, 10, ridge=1e-9)
    n = F.layer_norm(x, (12,), eps=1e-6).flatten(0, 1)
    h = F.gelu(F.linear(n, fit.ffn.w_in, fit.ffn.b_in))
    features = torch.cat((h, n, torch.ones(len(n), 1)), dim=1)
    target = (after - x).flatten(0, 1)
    # n sums to 0, so that columns depend on each other: there gelsy, the default, now and then returns nonsense
    best = features @ torch.linalg.lstsq(features, target, driver="gelsd").solution
    assert relative(fit.ffn(x).flatten(0, 1), x.flatten(0, 1) + best) < 1e-6
    assert fit.loss == pytest.approx(((best - target).square().sum() / target.square().sum()).item(), rel=1e-6)


@torch.no_grad()
def test_elimination_costs_what_a_refit_costs_and_takes_the_cheapest_channel():
    ffn = vanilla_ffn(hidden=16).double()
    _, _, split = fitted(ffn)
    total = split.fitted + split.held_out
    ridge, prior = torch.full((29,), 1e-6, dtype=torch.float64), original(ffn)
    path = eliminate(total, 16, 13, ridge, prior)
    assert [count for count, _ in path.curve] == [16, 15, 14, 13]
    gone: list[int] = []
    for channel, (_, cost) in zip(path.removed, path.curve[1:], strict=True):
        refits = {}
        for candidate in set(range(16)) - set(gone):
            kept = torch.tensor([i for i in range(29) if i not in (*gone, candidate)])
            refits[candidate] = total.loss(total.solve(kept, ridge, prior), kept)
        assert channel == min(refits, key=refits.__getitem__)
        assert cost == pytest.approx(refits[channel], rel=1e-4)
        gone.append(channel)
    assert sorted([*path.kept.tolist(), *gone]) == list(range(16))


@torch.no_grad()
def test_a_strong_ridge_draws_to_the_original_weights():
    ffn = vanilla_ffn()
    fit = solve_ffn(ffn, fitted(ffn)[2], 20, ridge=1e9)
    for row, out in zip(fit.ffn.w_in, fit.ffn.w_out.T, strict=True):
        source = (ffn.w_in - row).abs().sum(1).argmin()
        assert torch.allclose(out, ffn.w_out[:, source], atol=1e-5)
    assert fit.ffn.w_merged.abs().max() < 1e-5


@torch.no_grad()
def test_the_ridge_is_the_best_on_held_out_images():
    ffn = vanilla_ffn()
    _, _, split = fitted(ffn, tokens=80, noise=3.0)  # few and noisy tokens: a weak ridge learns the noise
    assert solve_ffn(ffn, split, 10, None).ridge >= 1e-1
    _, _, split = fitted(ffn, tokens=4000, noise=0.0)
    assert solve_ffn(ffn, split, 10, None).ridge <= 1e-3


def test_statistics_do_not_depend_on_how_tokens_arrive():
    features, targets = torch.randn(10_000, 7), torch.randn(10_000, 3)
    whole, parts = FitStatistics(7, 3), FitStatistics(7, 3)
    whole.update(features, targets)
    for f, y in zip(features.split(777), targets.split(777), strict=True):
        parts.update(f, y)
    exact = features.double().T @ features.double()
    for statistics in (whole, parts):
        assert statistics.gram.dtype is torch.float64
        assert relative(statistics.gram, exact) < 1e-5
        assert statistics.count == 10_000


# --- what errors cost -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", OURS)
def test_the_metric_tells_what_an_error_costs_at_the_end(name):
    """Errors along its dearest and its median direction change the final features' directions as it says."""
    model, x = OURS[name](), images(96, 64 if name == "swin" else 32)
    opened, sites = open_blocks(model)
    for site in (sites[0], sites[-1]):
        values, vectors = torch.linalg.eigh(metric_roots(opened, sites, x, bar(False))[site.name])
        middle = len(values) // 2
        dear, usual = (_cost(opened, site.block, 1e-3 * vectors[:, at].float(), x) for at in (-1, middle))
        assert dear / usual == pytest.approx((values[-1] / values[middle]).item() ** 2, rel=0.3)
        assert dear > 1.5 * usual


def _cost(model, block, error, x):
    """Squared change of the features' directions, summed, when ``error`` with random signs is added to tokens."""
    generator, total = torch.Generator().manual_seed(1), 0.0
    exact = F.normalize(features(model, x), dim=-1)
    for _ in range(8):

        def disturbed(_module, _args, output):
            return output + error * torch.randn((*output.shape[:-1], 1), generator=generator)

        handle = block.register_forward_hook(disturbed)
        total += (F.normalize(features(model, x), dim=-1) - exact).square().sum().item()
        handle.remove()
    return total


@torch.no_grad()
def test_fit_steps_and_allocation_all_count_by_the_metric(monkeypatch):
    model, used = tiny_vit(**VANILLA), []

    def recorded(function, position):
        def call(*arguments):
            used.append(arguments[position])
            return function(*arguments)

        return call

    monkeypatch.setattr(pretrained, "empty_split", recorded(pretrained.empty_split, 1))
    monkeypatch.setattr(pretrained, "refine", recorded(refine, 2))
    monkeypatch.setattr(allocation, "empty_split", recorded(allocation.empty_split, 1))
    idle(model, 0.75, allocate=True)
    opened, sites = open_blocks(model)
    first, second = metric_roots(opened, sites, torch.cat(batches()), bar(False)).values()
    assert len(used) == 6
    for root, wanted in zip(used, (first, second, first, first, second, second), strict=True):
        assert torch.equal(root, wanted)


def test_a_model_that_tells_nothing_of_its_blocks_is_refused():
    model = tiny_vit(**VANILLA)
    nn.init.zeros_(model.norm.weight), nn.init.zeros_(model.norm.bias)
    with pytest.raises(ValueError, match=r"blocks\.0 have a mean square of 0"):
        idle(model)


@torch.no_grad()
def test_the_metric_chooses_channels_and_leaves_the_least_squares():
    ffn = vanilla_ffn(hidden=16)
    ffn.w_out[0] = 0
    ffn.w_out[0, :4] = 0.5  # output 0 hears channels 0 to 3 alone, and softly
    one = torch.eye(12)
    outputs_0 = torch.diag(torch.tensor([1e3] + [1.0] * 11))
    even, uneven = (fitted(ffn, tokens=4000, noise=0.0, root=root)[2] for root in (one, outputs_0))
    assert _active(ffn, solve_ffn(ffn, uneven, 4, 1e-6)) == {0, 1, 2, 3}
    assert _active(ffn, solve_ffn(ffn, even, 4, 1e-6)) != {0, 1, 2, 3}
    whole = [solve_ffn(ffn, split, 16, 1e-3).ffn for split in (even, uneven)]
    assert torch.allclose(whole[0].w_out, whole[1].w_out, atol=1e-4)
    assert torch.allclose(whole[0].bias, whole[1].bias, atol=1e-4)


def _active(ffn, fit):
    return {(ffn.w_in - row).abs().sum(1).argmin().item() for row in fit.ffn.w_in}


# --- allocation -------------------------------------------------------------------------------------------------------


def test_the_budget_goes_to_the_sensitive_block():
    def curve(weight):
        return [(m, weight * (1 - m / 100) ** 2) for m in range(100, -1, -1)]

    cheap, dear = Sensitivity(curve(1.0), 1.0), Sensitivity(curve(9.0), 1.0)
    low, high = within_budget([cheap, dear], [50, 50])
    assert low + high <= 100
    assert (low, high) == (10, 90)  # equal slopes: 1 · (1 - .1) = 9 · (1 - .9)
    costly = Sensitivity(curve(1.0), 2.0)  # a channel costs twice as much: 2 (1 - .7) · 2 = 2 (1 - .4)
    assert within_budget([cheap, costly], [50, 50]) == [70, 40]
    assert allocated([cheap, dear], [50, 50]) == [16, 64]  # halfway is 30 and 70
    assert allocated([cheap, dear], [0, 0]) == [0, 0]


@torch.no_grad()
def test_allocation_keeps_the_budget_and_helps():
    model = tiny_vit(**VANILLA, depth=3)
    for scale, block in zip((0.1, 3.0, 0.1), model.blocks, strict=True):  # one block matters
        block.mlp.fc2.weight.mul_(scale)
    x = images(8, seed=99)
    even, uneven = idle(model, 0.5), idle(model, 0.5, allocate=True)
    counts = [block.act_channels for block in uneven.idle_report]
    assert sum(counts) <= 3 * 96
    assert counts[1] == max(counts)
    assert (uneven(x) - model(x)).norm() < 0.9 * (even(x) - model(x)).norm()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (1.5, "1.5 for block 0"),
        (-0.1, "wanted a share"),
        (float("nan"), "nan"),
        ([0.5], "got 1 values"),
        (True, "True"),
        ([0.5, "x"], "'x' for block 1"),
    ],
)
def test_ratios_out_of_range_are_refused(ratio, words):
    with pytest.raises(ValueError, match=words):
        idle(tiny_vit(**VANILLA), ratio)


def test_a_negative_number_of_steps_is_refused():
    with pytest.raises(ValueError, match="steps: got -1"):
        idle(tiny_vit(**VANILLA), steps=-1)


@pytest.mark.parametrize(
    ("loader", "error", "words"),
    [
        ([], ValueError, "no batches"),
        ([{"image": 1}], TypeError, "batch 0: got dict"),
        ([torch.zeros(3, 32, 32)], ValueError, r"shape \[3, 32, 32\]"),
        ([torch.zeros(1, 3, 32, 32, dtype=torch.uint8)], ValueError, "torch.uint8"),
        ([images(2), torch.full((1, 3, 32, 32), float("nan"))], ValueError, "batch 1: got images with NaN"),
    ],
)
def test_loaders_that_give_no_images_are_refused(loader, error, words):
    with pytest.raises(error, match=words):
        repavit_ops.idle_pretrained(tiny_vit(**VANILLA), loader, 0.5, progress=False)


def test_labels_behind_the_images_are_ignored():
    model = tiny_vit(**VANILLA)
    labelled = [(x, torch.zeros(len(x))) for x in batches()]
    plain, other = idle(model), repavit_ops.idle_pretrained(model, labelled, 0.5, steps=0, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))


def test_ffns_that_cannot_be_idled_are_named(timm):
    with pytest.raises(ValueError, match=r"blocks\.0.*gated"):
        idle(timm.create_model("vit_giant_patch14_dinov2", **VIT).eval())


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="without a block"):
        idle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU()).eval())
    with pytest.raises(ValueError, match="without a block"):
        idle(repavit_ops.reparameterize(tiny_vit()))  # idle already
    with pytest.raises(RuntimeError, match="training mode"):
        idle(tiny_vit(**VANILLA).train())
    broken = tiny_vit(**VANILLA)
    with torch.no_grad():
        broken.head.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        idle(broken)
    shared = tiny_vit(**VANILLA)
    shared.blocks[1] = shared.blocks[0]
    with pytest.raises(ValueError, match="exactly once"):
        idle(shared)
    with pytest.raises(ValueError, match="one ratio, the budget"):
        idle(tiny_vit(**VANILLA), [0.5, 0.5], allocate=True)


def test_the_core_does_not_import_it():
    code = (
        "import sys, repavit_ops; assert not [m for m in sys.modules if m.startswith('repavit_ops.idling')];"
        "repavit_ops.idle_pretrained; assert 'repavit_ops.idling' in sys.modules; assert not 'timm' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = repavit_ops.no_such_name
