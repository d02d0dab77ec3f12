"""A layer of 2-bit codes with a few trained scales per row: what a method has to say besides is two functions."""

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from wrinklefree.core.codes import Codes
from wrinklefree.core.method import QuantLinear
from wrinklefree.core.ste import round_fp16


class RowScaledLinear(QuantLinear):
    """Scales [out, `num_scales`] are trained as logarithms, so they stay positive. They start at `fitted`."""

    num_scales: ClassVar[int]

    @staticmethod
    @abstractmethod
    def codes_of(weight: Tensor, scales: Tensor) -> Tensor:
        """The codes, uint8, of some columns of a weight [out, columns], given scales [out, num_scales]."""

    @staticmethod
    @abstractmethod
    def fitted(weight: Tensor, importance: Tensor) -> Tensor:
        """Least-squares scales [out, num_scales] of a weight [out, in], its columns weighted by `importance` [in]."""

    def setup(self) -> None:
        start = self.weight.new_ones(self.out_features, self.num_scales)  # trained values are loaded next
        if self.fits:
            start = self.fitted(self.weight.detach(), self.weight.new_ones(self.in_features))
        self.log_scales = nn.Parameter(start.detach().log())

    def nearest(self, weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        return self.codes_of(weight, tensors["scales"].detach())

    def fit(self, importance: Tensor) -> None:
        self.log_scales.data.copy_(self.fitted(self.weight.detach(), importance).log())

    def encode(self) -> Codes:
        scales = {"scales": round_fp16(self.log_scales.exp())}
        return Codes(self.nearest(self.weight.detach(), scales), 2, scales, (self.out_features, self.in_features))
