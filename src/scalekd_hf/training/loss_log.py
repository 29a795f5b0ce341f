"""The loss terms between two logs, added up on the device, and the first loss that is not finite."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .run_folder import last_checkpoint


__all__ = ["LossLog", "NonFiniteLossError"]


class NonFiniteLossError(FloatingPointError):
    """Training was stopped because a loss was NaN or infinite."""


class LossLog:
    """Averages the loss and each of its terms between two logs without waiting for the device before the log.

    Attributes:
        images_seen: by all processes, since the start of the run.
    """

    def __init__(self) -> None:
        self.images_seen = 0
        self.reset()

    def reset(self, images_seen: int = 0, kept: dict[str, Any] | None = None, micro_batch: int = 1) -> None:
        """A new `train()` begins.

        Args:
            images_seen: since the start of the run.
            kept: by a checkpoint, see `state`. Without it, everything is forgotten.
            micro_batch: images of a micro-step now, by which those before are counted.
        """
        kept, self._micro_batch = kept or {}, micro_batch
        if (factor := kept.get("micro_batch", micro_batch) / micro_batch) != 1:
            kept = {name: factor * value for name, value in kept.items() if name != "sums"} | {
                "sums": {name: factor * value for name, value in kept["sums"].items()}
            }
        self.images_seen = self._images_logged = images_seen
        self._kept: dict[str, float] = kept.get("sums", {})
        self._names: list[str] = []
        self._sums: Tensor | None = None  # (1 + terms,), the weighted loss first
        self._first_bad: Tensor | None = None  # (1 + terms,): step and terms of the first loss that is not finite
        self._micro_steps: float = kept.get("micro_steps", 0)
        self._logged: float = kept.get("logged", 0.0)  # sum of the losses, and their number, before the last log
        self._logged_micro_steps: float = kept.get("logged_micro_steps", 0)
        self._waited = 0.0
        self._time_logged = time.perf_counter()

    def add(self, step: int, loss: Tensor, losses: dict[str, Tensor]) -> None:
        """Take in one micro-step: its weighted loss and its terms."""
        terms = torch.stack([value.detach().float() for value in (loss, *losses.values())])
        if self._sums is None or self._first_bad is None:
            self._names = ["loss", *losses]
            if self._kept and self._kept.keys() != {
                *self._names
            }:  # other terms than before: these averages begin anew
                self._kept, self._micro_steps = {}, 0
            self._time_logged, self._waited = time.perf_counter(), 0.0
            self._sums = terms.new_tensor([self._kept.get(name, 0.0) for name in self._names])
            self._first_bad = torch.cat([terms.new_full((1,), -1.0), torch.zeros_like(terms[1:])])
        self._sums += terms
        self._micro_steps += 1
        now = torch.cat([terms.new_full((1,), float(step)), terms[1:]])
        is_first = ~torch.isfinite(terms[0]) & (self._first_bad[0] < 0)
        self._first_bad = torch.where(is_first, now, self._first_bad)

    def state(self, accelerator: Accelerator) -> dict[str, Any]:
        """What a checkpoint keeps, so that the next averages are over the whole of their steps; every process must call it."""
        sums = accelerator.reduce(self._sums, "mean").tolist() if self._sums is not None else self._kept.values()
        names = self._names or self._kept
        return {
            "sums": dict(zip(names, sums, strict=True)),
            "micro_steps": self._micro_steps,
            "logged": self._logged,
            "logged_micro_steps": self._logged_micro_steps,
            "micro_batch": self._micro_batch,
        }

    def count(self, images: int) -> None:
        """A micro-step has ended, of so many images on all processes."""
        self.images_seen += images

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count in images per second: evaluating and saving."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._time_logged += time.perf_counter() - start

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What happens inside is waiting for data."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - start

    def averages(self, accelerator: Accelerator) -> dict[str, float]:
        """Mean of the loss and of each term since the last call, over all processes; images per second and images seen, and
        the share of the time that this process waited for data."""
        if self._sums is None or not self._micro_steps:
            return {}
        means = accelerator.reduce(self._sums / self._micro_steps, "mean").tolist()
        elapsed = time.perf_counter() - self._time_logged
        images = self.images_seen - self._images_logged
        speed = {"images_per_second": round(images / elapsed, 2), "data_wait": round(self._waited / elapsed, 4)}
        self._logged += means[0] * self._micro_steps
        self._logged_micro_steps += self._micro_steps
        self._sums.zero_()
        self._micro_steps, self._waited = 0, 0.0
        self._images_logged, self._time_logged = self.images_seen, time.perf_counter()
        averages = dict(zip(self._names, means, strict=True))
        return averages | speed | {"images_seen": self.images_seen}

    def mean_loss(self, accelerator: Accelerator) -> float:
        """Of the whole run, also of what came before it was resumed; NaN of none. Every process must call it."""
        state = self.state(accelerator)
        micro_steps = self._logged_micro_steps + self._micro_steps
        return (self._logged + state["sums"].get("loss", 0.0)) / micro_steps if micro_steps else float("nan")

    def stop_if_not_finite(self, accelerator: Accelerator, output_dir: str | None) -> None:
        """Stop on every process if a loss on any was not finite.

        Args:
            output_dir: of the run, whose last checkpoint the error names.

        Raises:
            NonFiniteLossError: with the first such step and its terms.
        """
        if self._first_bad is None:
            return
        for step, *terms in accelerator.gather(self._first_bad[None]).tolist():
            if step >= 0:
                values = ", ".join(f"{name}={value:.4g}" for name, value in zip(self._names[1:], terms, strict=True))
                raise NonFiniteLossError(
                    f"The loss is not finite at step {int(step)}: {values}. Nothing was saved since; the last checkpoint "
                    f"is kept: {last_checkpoint(str(output_dir)) or 'there is none'}. A lower `learning_rate`, `max_grad_norm`, a longer "
                    "warm-up, or `bf16` instead of `fp16` may help; resume with `allow_settings_mismatch` then."
                )
