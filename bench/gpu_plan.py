"""What the GPU day measures, in which order and for how long: the most telling first, so that a cut costs the least.

first      one FFN, one attention, one window, one whole model: right or wrong against float64
ceilings   bf16 product, copy, nodes of a graph
headline   DeiT-S, DeiT-B and Swin-T at batch 128 and 1 beside merged and vanilla, eager and compiled; host time
tests      pytest -m gpu, side by side
ops        FFN, attention and windows beside every peer
tune       tiles for what was short of its goal, then that again
cpu        the machine's own cores
rest       the other models, batches and operators; the slow tests
failed     only with --again-short: what failed in the first call, again
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpu_cases import Case

MINUTES = 8.0  # of the whole plan


@dataclass(frozen=True)
class Stage:
    """One step of the plan: at most so many seconds, and what leaves them over gives them to the last."""

    name: str
    seconds: float


# Stages in one bracket share a process: torch and a GPU's context take some seconds to start.
PLAN = (
    (Stage("first", 35), Stage("ceilings", 10), Stage("headline", 175)),
    (Stage("tests", 70),),
    (Stage("ops", 45), Stage("tune", 50)),
    (Stage("cpu", 60),),
    (Stage("rest", 600),),
)
AGAIN_SHORT = ((Stage("failed", 60), Stage("tune", 420)),)
STAGES = tuple(dict.fromkeys(stage.name for group in (*PLAN, *AGAIN_SHORT) for stage in group))
BATCHES = (128, 1, 8)


def seconds_of(stage: Stage, minutes: float) -> float:
    """Its share of another number of minutes."""
    return stage.seconds * minutes / MINUTES


def cases(stage: str, small: bool = False) -> list[Case]:
    """The cases of a stage that has some; ``small``: one of each kind, tiny."""
    makers = {"first": _first, "headline": _headline, "ops": _ops, "rest": _rest}
    return list(makers[stage](small)) if stage in makers else []


def every_case() -> dict[str, Case]:
    return {case.name: case for stage in ("headline", "ops", "rest") for case in cases(stage)}


def _first(small: bool) -> Iterator[Case]:
    from gpu_cases import attention_case, ffn_case, window_case
    from gpu_model_cases import model_case
    from gpu_models import TINY

    if small:
        yield from (ffn_case(16, 1), attention_case(2, 16, 1), window_case(14, 32, 1))
        yield model_case("deit_tiny", "plain", 1, **TINY)
        return
    yield from (ffn_case(384, 8), attention_case(6, 64, 8), window_case(28, 192, 8))
    yield model_case("deit_small", "plain", 8)


def _headline(small: bool) -> Iterator[Case]:
    from gpu_model_cases import FORMS, model_case
    from gpu_models import HEADLINE, HEADLINE_BATCHES, TINY

    if small:
        yield from (model_case("deit_tiny", form, 1, **TINY) for form in FORMS)
        return
    for form in ("plain", "merged compiled", "vanilla compiled"):
        yield from (model_case(name, form, batch) for batch in HEADLINE_BATCHES for name in HEADLINE)
    yield model_case("deit_small", "merged max_autotune", 128)


def _ops(small: bool) -> Iterator[Case]:
    from gpu_cases import FFN_CHANNELS, HEADS, STAGES, attention_case, ffn_case, window_case

    if small:
        yield from (ffn_case(16, 1), attention_case(2, 16, 1), window_case(14, 32, 1))
        return
    yield from (ffn_case(c, 128) for c in FFN_CHANNELS)
    yield from (attention_case(h, d, 128) for h, d in HEADS)
    yield from (window_case(side, c, 128) for side, c in STAGES)


def _rest(small: bool) -> Iterator[Case]:
    from gpu_cases import FFN_CHANNELS, HEADS, STAGES, attention_case, ffn_case, window_case
    from gpu_model_cases import model_case
    from gpu_models import HEADLINE, HEADLINE_BATCHES, MODELS

    if small:
        return
    others = [name for name in MODELS if name not in HEADLINE]
    yield model_case("deit_tiny", "merged compiled", 1)
    yield model_case("deit_small", "merged max_autotune", 128)  # where the headline had no time for it
    yield from (model_case(name, "plain", 128) for name in others)
    yield from (model_case(name, "vanilla compiled", 128) for name in others)
    yield from (ffn_case(c, batch) for batch in BATCHES[1:] for c in FFN_CHANNELS)
    yield from (attention_case(h, d, batch) for batch in BATCHES[1:] for h, d in HEADS)
    yield from (window_case(side, c, batch) for batch in BATCHES[1:] for side, c in STAGES)
    given = {(name, batch) for name in HEADLINE for batch in HEADLINE_BATCHES} | {(name, 128) for name in others}
    yield from (model_case(n, "plain", b) for b in BATCHES for n in MODELS if (n, b) not in given)
    yield model_case("deit_tiny", "merged compiled", 128)
