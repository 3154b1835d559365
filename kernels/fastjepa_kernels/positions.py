"""Rotary positions on three axes: the settings that `rope3d` and `indexed_attention` share."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rope:
    """Rotary positions of the tokens of a grid (T, H, W): token n lies at (n // (H * W), n // W % H, n % W).

    Each axis turns 2 * ((d // 3) // 2) neighbouring channels of a head of d, time first; the rest stays as it is. The
    members of a pair turn by one angle; with `compat` the angles are laid out as in the released V-JEPA 2 weights,
    where they are repeated as a whole and not one by one. Errors: ValueError for a grid or theta that is not positive.
    """

    grid: tuple[int, int, int]
    theta: float = 10000.0
    compat: bool = False

    def __post_init__(self) -> None:
        """Refuse what is no grid."""
        if len(self.grid) != 3 or min(self.grid) < 1:
            raise ValueError(f"Rope: grid must be three positive numbers (T, H, W), got {self.grid}")
        if self.theta <= 0:
            raise ValueError(f"Rope: theta must be positive, got {self.theta}")
