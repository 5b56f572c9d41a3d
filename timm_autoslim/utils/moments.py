"""Second moments of the inputs and outputs of a layer, over batches and processes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from timm_autoslim.utils.processes import Pool


@dataclass(frozen=True)
class Moments:
    """Second moments of inputs and outputs, by group of the convolution: G groups, I inputs and O outputs in each.

    Attributes:
        count: of rows.
        x, y: means (G, I) and (G, O).
        xx, xy, yy: means of the products (G, I, I), (G, I, O), (G, O).
    """

    count: int
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    def move(self, x: Tensor, y: Tensor) -> Moments:
        """Return the moments after (G, I) and (G, O) were added to all rows."""
        sums, products = (
            self.x[:, :, None] * x[:, None],
            self.x[:, :, None] * y[:, None] + x[:, :, None] * self.y[:, None],
        )
        xx = self.xx + sums + sums.transpose(1, 2) + x[:, :, None] * x[:, None]
        xy = self.xy + products + x[:, :, None] * y[:, None]
        return Moments(self.count, self.x + x, self.y + y, xx, xy, self.yy + 2 * y * self.y + y**2)

    def center(self) -> Moments:
        """Return the moments about the means."""
        xx = self.xx - self.x[:, :, None] * self.x[:, None, :]
        xy = self.xy - self.x[:, :, None] * self.y[:, None, :]
        return Moments(self.count, self.x, self.y, xx, xy, self.yy - self.y**2)

    def pool(self, pool: Pool) -> Moments:
        """Return the moments of the rows of all processes."""
        count, *sums = pool([self.x.new_tensor(self.count), *(self.count * value for value in self._list())])
        return Moments(int(count), *(value / max(1, int(count)) for value in sums))

    def _list(self) -> tuple[Tensor, ...]:
        return self.x, self.y, self.xx, self.xy, self.yy


class Sums:
    """Sums of rows and of their products, to which batches are added."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        """Begin with nothing.

        Args:
            x, y: (G, I) and (G, O), numbers near the means. Rows are taken relative to them, since products of large
                means are not exact in float32.
        """
        self._origin = x.double(), y.double()
        self._near = x[:, None], y[:, None]
        self._count = 0
        self._sums: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows of inputs (G, R, I) and outputs (G, R, O), both in float32."""
        x, y = x - self._near[0], y - self._near[1]
        products = [x.sum(1), y.sum(1), x.transpose(1, 2) @ x, x.transpose(1, 2) @ y, (y * y).sum(1)]
        doubles = [product.double() for product in products]
        self._sums = [a + b for a, b in zip(self._sums, doubles, strict=True)] if self._sums else doubles
        self._count += x.shape[1]

    def read(self, pool: Pool) -> Moments:
        """Return the moments of all rows, of all processes, in float64."""
        means = [value / max(1, self._count) for value in self._sums]
        return Moments(self._count, *means).move(*self._origin).pool(pool)
