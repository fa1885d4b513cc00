"""Preconditioning at the end of a backward pass, before a loop that one cannot edit clips gradients."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.network.layer_kinds import Layer
from bnp_analysis.training.bnp.hooks import EndOfBackward


class BeforeClipping:
    """Counts backward passes, and calls an owner's `step()` after as many as one optimizer step has.

    Args:
        owner: the BNP object, by a weak reference: a forgotten one does nothing.
        layers: its layers; a backward pass that reaches none of their weights does not count.
        passes: backward passes for each optimizer step.
    """

    def __init__(self, owner: weakref.ref[Any], layers: Sequence[Layer], passes: int) -> None:
        self._owner, self._passes = owner, passes
        self._count, self._done = 0, False
        self._end = EndOfBackward([layer.own_weight for layer in layers], self.after_backward)

    def after_backward(self) -> None:
        """A backward pass has ended.

        Raises:
            InvalidInputError: it has added to gradients that are preconditioned already.
        """
        owner = self._owner()
        if owner is None:
            return
        if self._done and owner.added():
            raise InvalidInputError(
                "a backward pass has added to gradients that BNP has preconditioned at the end of the one before: "
                "where gradients are accumulated, write attach(optimizer, before_clipping=n) with the number n of "
                "backward passes for each step; where a step is skipped, zero_grad() must set gradients to None"
            )
        self._count += 1
        self._done = self._count == self._passes
        if self._done:
            self._count = 0
            owner.step()

    def taken(self) -> bool:
        """The optimizer steps: whether its gradients are preconditioned; where there were fewer passes they are not."""
        done = self._done
        self.forget()
        return done

    def forget(self) -> None:
        """What came since the last step does not count."""
        self._count, self._done = 0, False

    def remove(self) -> None:
        """Take the hooks away."""
        self._end.remove()


def require_passes(before_clipping: object) -> int:
    """How many backward passes a step has where they are counted, 0 where they are not.

    Raises:
        InvalidInputError: neither a bool nor a positive integer.

    Example:
        >>> require_passes(True), require_passes(False), require_passes(4)
        (1, 0, 4)
    """
    if not isinstance(before_clipping, int) or (before_clipping < 1 and before_clipping is not False):
        raise InvalidInputError(
            "before_clipping must be True, False or the number of backward passes for each step, got "
            f"{before_clipping!r}"
        )
    return int(before_clipping)
