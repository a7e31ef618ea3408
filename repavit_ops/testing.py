"""Numerical equivalence as an assertion, for tests of your own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from .verification import VerificationReport, verify


class NotEquivalentError(AssertionError):
    """What :func:`assert_equivalent` raises.

    Attributes:
        report: the whole comparison.
    """

    def __init__(self, report: VerificationReport) -> None:
        super().__init__(f"candidate: not equivalent to the reference\n{report}")
        self.report = report


def assert_equivalent(
    reference: nn.Module,
    candidate: nn.Module,
    inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    *,
    atol: float | None = None,
    least_cosine: float | None = None,
    block_types: tuple[type[nn.Module], ...] | None = None,
) -> VerificationReport:
    """Assert that a candidate (merged, fused, cast) computes what its reference does, as :func:`repavit_ops.verify`.

    ``max|candidate - fp64| <= 2 max|eager - fp64| + 1e-6`` for every output, where fp64 is the reference in float64
    and eager the reference in the candidate's dtype.

    Args:
        reference, candidate, inputs, atol, least_cosine, block_types: as :func:`repavit_ops.verify`.

    Returns:
        The report, for further assertions: ``.output.top1``, ``.output.cosine``, ``.blocks``.

    Raises:
        NotEquivalentError: an AssertionError: the models are not equivalent on these inputs; the message is the report,
            a line per block and per output.
        RuntimeError, ValueError: the models cannot be compared; see :func:`repavit_ops.verify`.
    """
    __tracebackhide__ = True  # pytest then points at the caller's line
    report = verify(reference, candidate, inputs, atol=atol, least_cosine=least_cosine, block_types=block_types)
    if not report:
        raise NotEquivalentError(report)
    return report
