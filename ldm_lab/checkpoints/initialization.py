"""Networks whose weights come from a file: drawing others first takes longer than reading those."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# What fills a tensor with random numbers; torch's other ways of initializing are made of these.
DRAWS = (Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)


class _NoDraws(TorchFunctionMode):
    def __torch_function__(
        self,
        function: Callable[..., Tensor],
        types: Sequence[type],
        args: tuple[Tensor, ...] = (),
        options: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        if function in DRAWS:
            return args[0] if args else (options or {})["tensor"]
        return function(*args, **(options or {}))


@contextmanager
def no_initial_weights(follow: bool = True) -> Iterator[None]:
    """Leave the random weights of networks that are built here undrawn: whatever lies in memory is there.

    What is set to a number, or computed from the options, is as always; so are a few small parameters that are drawn in
    other ways. Torch's random numbers are not where they would be afterwards: nothing else may be drawn of them.

    Args:
        follow: whether all of these networks' weights are read behind this; if not, they are drawn as always.
    """
    with _NoDraws() if follow else nullcontext():
        yield
