"""How often a plan passes over each of its sources, and the warning when that is more than repeating is worth. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from picotrain.data.amounts import Amount
from picotrain.text import size

if TYPE_CHECKING:
    from picotrain.planning import Plan

WARNING_EPOCHS = 4.0  # repeating up to about 4 times costs little (arXiv:2305.16264)


def epochs(amounts: Sequence[Amount], total_tokens: int, bytes_per_token: float) -> float | None:
    """Passes over all the text together; None: the amount of some source is not known."""
    text_bytes = [amount.text_bytes for amount in amounts]
    known = sum(n for n in text_bytes if n is not None)
    return total_tokens * bytes_per_token / known if amounts and None not in text_bytes and known else None


def passes(amounts: Sequence[Amount], total_tokens: int, bytes_per_token: float) -> dict[str, float]:
    """Expected passes over each source of a mixture whose amount is known. All sources are taken to have the same bytes per token.

    A source that leaves is passed over once at most. Its share of what then remains goes to the others in proportion. {} for a single
    corpus.
    """
    if len(amounts) < 2:
        return {}
    left = {amount.name: amount for amount in amounts}
    text = total_tokens * bytes_per_token  # still to be given to those that are left
    while True:
        shares = sum(amount.share for amount in left.values())
        gone = [a for a in left.values() if not a.repeats and a.text_bytes is not None and text * a.share / shares >= a.text_bytes]
        if not gone:
            break
        for amount in gone:
            del left[amount.name]
            text -= amount.text_bytes or 0
    return {
        amount.name: text * amount.share / shares / amount.text_bytes if amount.name in left else 1.0
        for amount in amounts
        if amount.text_bytes
    }


def warnings(plan: Plan) -> list[str]:
    """One for the corpus, or for each source of a mixture, that is passed over more than WARNING_EPOCHS times."""
    several = {f"the source {name}": n for name, n in plan.sources.items()}
    found = several or {"the corpus": plan.epochs or 0.0}
    return [_warning(plan, what, n) for what, n in found.items() if n > WARNING_EPOCHS]


def _warning(plan: Plan, what: str, n: float) -> str:
    estimated = f", by an estimate from {plan.text_estimate}" if plan.text_estimate else ""
    amount = f" ({size(plan.text_bytes)} of text{estimated})" if plan.text_bytes and not plan.sources else ""
    steps = int(plan.num_steps * WARNING_EPOCHS / n)
    smaller = f"train.max_steps={steps} ({steps * plan.total_batch_size:,} tokens)" if steps else "a smaller train.total_batch_size"
    if plan.horizon == "train.num_train_epochs" and not plan.sources:
        smaller = f"train.num_train_epochs={WARNING_EPOCHS:.0f}, about {smaller}"
    less = "" if not plan.sources else "a smaller weight for it, "
    return (
        f"warning: {_count(n)} passes over {what}{amount}; beyond {WARNING_EPOCHS:.0f} repeated data teaches less and less. "
        f"More text would be right, {less}or a smaller horizon: {smaller}"
    )


def _count(n: float) -> str:
    return f"{n:,.1f}" if n < 1000 else f"{n:,.0f}"
