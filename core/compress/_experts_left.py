"""How many experts a share leaves, and what that leaves of the parameters; plain arithmetic, no model."""

from __future__ import annotations

from collections.abc import Mapping

from core.errors import CannotCompress


def kept_by_share(n_experts: int, share: float, *, n_groups: int = 1) -> int:
    """Experts left per layer when ``share`` of each router group goes, rounded within the group.

    Raises ``CannotCompress`` where it rounds to none.
    """
    size = n_experts // n_groups
    gone = round(size * share)
    if not gone:
        of = f"the {size} experts of a router group" if n_groups > 1 else f"{size} experts"
        raise CannotCompress(f"share={share} of {of} rounds to none; choose at least {1 / size:.3g}")
    return (size - gone) * n_groups


def share_left(n_kept: int, n_experts: int) -> Mapping[str, float]:
    """Component → the share of its parameters that stays with ``n_kept`` of the experts."""
    return {"experts": n_kept / n_experts, "router": n_kept / n_experts}
