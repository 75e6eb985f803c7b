"""Train the model, in pieces: each process stops in time, saves everything and can be resumed.

Exit status 0 with `<work>/run/done` present means trained; 0 without it means "run me again".
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from .model import TinyLlama
from .muon import Muon
from .settings import DEFAULT_WORK, MINIATURE, SETTINGS, Settings, Training


class Windows:
    """The corpus on the device, and random windows of it."""

    def __init__(self, corpus: Path, length: int, aligned_share: float, device: str) -> None:
        ids = np.fromfile(corpus / "train.bin", dtype="<u2")
        # int32, since torch cannot index an embedding with uint16; 4 bytes a token fit anywhere.
        self._ids = torch.from_numpy(ids.astype(np.int32)).to(device)
        self._starts = torch.from_numpy(np.load(corpus / "starts.npy")).to(device)
        self._offsets = torch.arange(length + 1, device=device)
        self._length, self._aligned = length, aligned_share

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`(ids, targets)`, int64 [count, length]. A share of the windows begins with the document
        that follows a random place, the others at the place itself."""
        last = len(self._ids) - self._length - 1
        device = self._ids.device
        place = torch.randint(last, (count,), generator=generator, device=device)
        following = torch.searchsorted(self._starts, place).clamp_(max=len(self._starts) - 1)
        aligned = torch.rand(count, generator=generator, device=device) < self._aligned
        place = torch.where(aligned, self._starts[following].clamp(max=last), place)
        window = self._ids[place[:, None] + self._offsets].long()
        return window[:, :-1], window[:, 1:]


@dataclass
class Progress:
    """How far the training is, over all pieces."""

    step: int = 0
    trained_s: float = 0.0
    tokens: int = 0


def rate(share: float, settings: Training) -> float:
    """Factor on the peak learning rates when `share` of the time budget is used."""
    if share < settings.warmup_share:
        return max(share / settings.warmup_share, 0.01)
    if share < settings.decay_from:
        return 1.0
    return max(0.0, (1 - share) / (1 - settings.decay_from))


class Trainer:
    """Model, optimisers and progress, saved and resumed as one."""

    def __init__(self, settings: Settings, work: Path, device: str, *, compiled: bool) -> None:
        self.settings, self.run, self.device = settings, work / "run", device
        self.run.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(settings.training.seed)
        training = settings.training
        self.model = TinyLlama(settings.shape).to(device)
        if device == "cuda":
            self.model.stream_dtype = torch.bfloat16
        self.windows = Windows(
            work / "corpus",
            settings.shape.max_position_embeddings,
            training.aligned_share,
            device,
        )
        inner = [w for n, w in self.model.named_parameters() if w.ndim == 2 and "embed" not in n]
        norms = [w for w in self.model.parameters() if w.ndim < 2]
        self.muon = Muon(
            inner,
            momentum=training.matrix_momentum,
            weight_decay=training.weight_decay,
            compiled=compiled,
        )
        groups: list[dict[str, Any]] = [
            {"params": [self.model.model.embed_tokens.weight]},
            {"params": norms, "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(
            groups,
            lr=training.other_lr,
            betas=training.adam_betas,
            weight_decay=training.weight_decay,
            fused=device == "cuda",
        )
        self.generator = torch.Generator(device).manual_seed(training.seed)
        self.progress = Progress()
        self.loss = torch.compile(self.model, fullgraph=True) if compiled else self.model
        self._resume()

    @property
    def done(self) -> bool:
        """Whether the time budget is used up."""
        return self.progress.trained_s >= self.settings.training.train_s

    def step(self) -> Tensor:
        """One optimisation step; returns the loss in nats a token, still on the device."""
        training, progress = self.settings.training, self.progress
        ids, targets = self.windows.sample(training.batch_windows, self.generator)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            loss: Tensor = self.loss(ids, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), training.clip_norm)
        factor = rate(progress.trained_s / training.train_s, training)
        self.muon.step(training.matrix_lr * factor)
        for group in self.adam.param_groups:
            group["lr"] = training.other_lr * factor
        self.adam.step()
        self.model.zero_grad(set_to_none=True)
        progress.step += 1
        progress.tokens += ids.numel()
        return loss.detach()

    def save(self) -> None:
        """Write the checkpoint, and beside it the bf16 weights alone, each in one rename."""
        state = {
            "model": self.model.state_dict(),
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
            "generator": self.generator.get_state(),
            "progress": vars(self.progress),
        }
        torch.save(state, self.run / "checkpoint.new")
        weights = {n: w.detach().bfloat16().cpu() for n, w in self.model.state_dict().items()}
        save_file(weights, self.run / "weights.new", metadata={"format": "pt"})
        (self.run / "checkpoint.new").rename(self.run / "checkpoint.pt")
        (self.run / "weights.new").rename(self.run / "model.safetensors")
        name = torch.cuda.get_device_name() if self.device == "cuda" else self.device
        facts = {**vars(self.progress), "device": name, "settings": self.settings.as_json()}
        (self.run / "progress.json").write_text(json.dumps(facts, indent=1) + "\n")

    def _resume(self) -> None:
        path = self.run / "checkpoint.pt"
        if not path.exists():
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.generator.set_state(state["generator"].cpu())
        self.progress = Progress(**state["progress"])
        print(f"resumed at step {self.progress.step}", flush=True)


def train_piece(trainer: Trainer, deadline: float, *, fit: bool) -> None:
    """Train until the budget is used or the monotonic clock reaches `deadline`, then save. With
    `fit` the budget is shortened to what this piece can hold, so that it ends annealed."""
    progress = trainer.progress
    loss = trainer.step().item()
    print(f"first step done, loss {loss:.3f}; training", flush=True)
    if fit:
        room_s = 0.97 * (deadline - time.monotonic()) + progress.trained_s
        budget_s = min(trainer.settings.training.train_s, room_s)
        trainer.settings = with_budget(trainer.settings, budget_s)
    training = trainer.settings.training
    # Only now does the clock start: compilation is no part of the budget.
    clock = saved = shown = time.monotonic()
    shown_tokens = progress.tokens
    while not trainer.done and clock < deadline:
        latest = trainer.step()
        if progress.step % 10 == 0:
            # Waiting for the device now and then keeps the clock honest without draining it.
            loss = latest.item()
        now = time.monotonic()
        progress.trained_s += now - clock
        clock = now
        if now - shown >= 5:
            speed = (progress.tokens - shown_tokens) / (now - shown)
            print(
                f"step {progress.step} {progress.trained_s:.0f}/{training.train_s:.0f} s "
                f"loss {loss:.4f} {speed / 1e6:.3f} M tokens/s, "
                f"{progress.tokens / 1e6:.0f} M tokens seen",
                flush=True,
            )
            shown, shown_tokens = now, progress.tokens
        if now - saved >= training.checkpoint_every_s:
            trainer.save()
            # Saving is no part of the budget either.
            clock = saved = time.monotonic()
    trainer.save()


def main() -> None:
    """Run one piece."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK)
    parser.add_argument("--train-s", type=float, help="overrides the budget in settings.py")
    parser.add_argument("--max-seconds", type=float, help="wall time of this piece")
    parser.add_argument("--fit", action="store_true", help="end annealed within this piece")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--miniature", action="store_true", help="a rehearsal for a CPU")
    args = parser.parse_args()
    settings = with_budget(MINIATURE if args.miniature else SETTINGS, args.train_s)
    torch.set_float32_matmul_precision("high")
    piece_s = args.max_seconds or settings.training.max_piece_s
    trainer = Trainer(settings, args.work, args.device, compiled=not args.no_compile)
    if not trainer.done:
        train_piece(trainer, began + piece_s, fit=args.fit)
    if trainer.done:
        (trainer.run / "done").touch()
        print(f"trained: {trainer.progress}", flush=True)
    else:
        print(f"resume: {trainer.progress}", flush=True)


def with_budget(settings: Settings, train_s: float | None) -> Settings:
    """The settings with another training time, in seconds."""
    if train_s is None:
        return settings
    training = Training(**{**vars(settings.training), "train_s": train_s})
    return Settings(settings.shape, training, settings.corpus)


if __name__ == "__main__":
    main()
