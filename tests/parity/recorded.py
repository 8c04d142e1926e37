"""A recorded case: what went into an original program and what came out, to be compared with ldm_lab's results."""

import json
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fill import fill
from torch import Tensor


def patterns(described: Iterable[str]) -> list[str]:
    """Return the array names, with "*" in them, that "<image>.low_res / high_res" and the like stand for."""
    found = []
    for entry in described:
        first, *others = re.sub(r"<[^<>]*>", "*", entry).split(" / ")
        prefix = first[: first.rfind(".") + 1]
        found += [first, *(prefix + other for other in others)]
    return found


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
        outputs = patterns(self.json["outputs"])
        made = [key for key in values if any(fnmatchcase(key, pattern) for pattern in outputs)]
        self.inputs = {key: value for key, value in values.items() if key not in made}
        self.names = [key for key in made if not key.startswith("jax_")]
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

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Return the state dict of one of several networks, without its prefix ("base/")."""
        return {name.removeprefix(prefix): w for name, w in self.weights().items() if name.startswith(prefix)}

    def recorded(self, output: str) -> Tensor:
        """Return a recorded output, where its shape or length says what to compute."""
        return self._recorded[output]

    def check(self, output: str, ours: Tensor | float) -> None:
        """Compare an output by the relative L2 distance; a tolerance of 0 means equal.

        A case whose tolerance is a mapping is compared element by element: |ours - theirs| <= atol + rtol * |theirs|.
        """
        exact = not self._recorded[output].is_floating_point()
        theirs = self._recorded[output].double()
        ours = torch.as_tensor(ours).detach().double()
        self._compared.add(output)
        if ours.shape != theirs.shape:
            self._report.append(f"{output}: shape {list(ours.shape)} instead of {list(theirs.shape)}")
            return
        if isinstance(self.json["tolerance"], dict):
            allowed = self.json["tolerance"]
            allowed = {**allowed, **allowed.get("per_array", {}).get(output, {})}
            if exact or allowed.get("exact"):
                allowed = {"atol": 0.0, "rtol": 0.0}
            share = ((ours - theirs).abs() - allowed["atol"] - allowed["rtol"] * theirs.abs()).max()
            if not share <= 0:  # so written that nan fails, too
                off = float((ours - theirs).abs().max())
                self._report.append(f"{output}: off by {off:.3g}, {float(share):.3g} more than allowed")
            return
        norm = theirs.norm()
        distance = float((ours - theirs).norm() / (norm if norm > 0 else 1.0))
        if not distance <= self.tolerance(output):  # so written that nan fails, too
            self._report.append(f"{output}: off by {distance:.3g}, allowed is {self.tolerance(output):.3g}")

    def expect(self, what: str, ours: Any, theirs: Any) -> None:
        """Compare something that is in the json instead of among the arrays; it has to be equal."""
        if ours != theirs:
            self._report.append(f"{what}: {ours!r} instead of {theirs!r}")

    def finish(self) -> None:
        """Fail with everything that was off."""
        left = [f"{name}: not compared" for name in self.names if name not in self._compared]
        assert not self._report + left, f"{self.name}:\n  " + "\n  ".join(self._report + left)
