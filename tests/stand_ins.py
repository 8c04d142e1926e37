"""Parts made of functions, where a test knows what a network would say."""

from collections.abc import Callable

from torch import Tensor

from ldm_lab.interfaces import Denoiser, TimeInput


class FunctionDenoiser(Denoiser):
    """A denoiser that puts out what a function says: x [B, C, h, w], time [B], **conditions -> [B, C or 2C, h, w]."""

    spec = {}

    def __init__(self, function: Callable[..., Tensor], time_input: TimeInput = "t") -> None:
        super().__init__()
        self.function, self.time_input = function, time_input

    def forward(self, x: Tensor, time: Tensor, **conditions: Tensor) -> Tensor:
        """Return what the function says."""
        return self.function(x, time, **conditions)
