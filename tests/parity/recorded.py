"""A recorded case: what went into an original program and what came out, to be compared with ldm_lab's results."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fill import fill
from torch import Tensor


class Case:
    """One case. `check` compares an output; `finish` fails if one is off, or if one has not been compared.

    Attributes:
        config, json: the case's configuration, and all of its json.
        inputs: the arrays that went in.
        names: the outputs that have to be compared: all but those for information only (`jax_*`).
    """

    def __init__(self, folder: Path, name: str, at_most: float) -> None:
        """`at_most` bounds the relative distance where the case's own tolerance is wider."""
        path = folder / f"{name}.json"
        if not path.is_file():
            pytest.skip(f"{folder} has no case {name}")
        self.folder, self.name, self.at_most = folder, name, at_most
        self.json: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        self.config: dict[str, Any] = self.json.get("config", {})
        with np.load(folder / f"{name}.npz") as arrays:
            values = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
        self.inputs = {key: values[key] for key in self.json["inputs"]}
        self.names = [key for key in self.json["outputs"] if not key.startswith("jax_")]
        self._recorded = {key: values[key] for key in self.names}
        self._report: list[str] = []
        self._compared: set[str] = set()

    def weights(self) -> dict[str, Tensor]:
        """Return the state dict that the original ran with, under its own names."""
        return {name: fill(name, shape, self.json["seed"]) for name, shape in self.json["weights"].items()}

    def suffixes(self, prefix: str) -> list[str]:
        """Return what follows `prefix` in the names of inputs, e.g. ["a", "b"] for x_a, x_b and "x_"."""
        return [name.removeprefix(prefix) for name in self.inputs if name.startswith(prefix)]

    def tolerance(self, output: str) -> float:
        """Return the relative distance that an output may have."""
        return min(self.json["outputs"][output].get("tolerance", self.json["tolerance"]), self.at_most)

    def recorded(self, output: str) -> Tensor:
        """Return a recorded output, where its shape or length says what to compute."""
        return self._recorded[output]

    def check(self, output: str, ours: Tensor | float, *others: Tensor) -> None:
        """Compare an output by the relative L2 distance; a tolerance of 0 means equal.

        Of several computations of it, one has to be near enough.
        """
        theirs = self._recorded[output].double()
        values = [torch.as_tensor(value).detach().double() for value in (ours, *others)]
        self._compared.add(output)
        if values[0].shape != theirs.shape:
            self._report.append(f"{output}: shape {list(values[0].shape)} instead of {list(theirs.shape)}")
            return
        norm = theirs.norm()
        distances = [float((value - theirs).norm() / (norm if norm > 0 else 1.0)) for value in values]
        if not any(distance <= self.tolerance(output) for distance in distances):  # so written that nan fails, too
            off = " and ".join(f"{distance:.3g}" for distance in distances)
            self._report.append(f"{output}: off by {off}, allowed is {self.tolerance(output):.3g}")

    def expect(self, what: str, ours: Any, theirs: Any) -> None:
        """Compare something that is in the json instead of among the arrays; it has to be equal."""
        if ours != theirs:
            self._report.append(f"{what}: {ours!r} instead of {theirs!r}")

    def finish(self) -> None:
        """Fail with everything that was off."""
        left = [f"{name}: not compared" for name in self.names if name not in self._compared]
        assert not self._report + left, f"{self.name}:\n  " + "\n  ".join(self._report + left)
