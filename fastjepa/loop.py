"""The training loop: once in a while log, probe and save; then one training step."""

import resource
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastjepa import checkpoint, config, health, parallel
from fastjepa.build import build_dataset, build_decoding, build_optimizer_pass
from fastjepa.config import Settings
from fastjepa.data.crashes import LISTED, Crashes
from fastjepa.data.dataset import ClipDataset
from fastjepa.data.decoders.choose import Decoder
from fastjepa.data.decoders.stage import Failures
from fastjepa.data.guard import Guard
from fastjepa.data.loader import Batch, EncodedBatch, make_loader, running
from fastjepa.data.replaced import ReplacedFiles
from fastjepa.data.source import Videos
from fastjepa.data.upload import uploaded
from fastjepa.evaluation import draw_pictures, run_probe, should_probe
from fastjepa.exits import Exit
from fastjepa.gpus import peak_flops
from fastjepa.jepa import JEPA
from fastjepa.log import RunLog, duration
from fastjepa.masks import GeneratorCollator
from fastjepa.noise import noise_draws
from fastjepa.optim import OptimizerPass
from fastjepa.plan import Plan
from fastjepa.probe import ProbeStopped
from fastjepa.runfolder import RunFolder
from fastjepa.signals import Interrupts

SAVES_THAT_MAY_FAIL = 3
SHORT_FILES_NAMED = 10
BAD_STEPS_IN_A_ROW = 3
# float16 finds its loss scale by overflowing: from 65536 down to 1 takes 16 steps that say nothing about the run.
BAD_STEPS_IN_A_ROW_FLOAT16 = 20


@dataclass
class Clock:
    """Wall time since the last log line, and the part of it spent waiting for data."""

    started: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    steps: int = 0


@dataclass
class StepDone:
    """What a step leaves behind, 0-dim on the device; health on log steps only.

    `loss` is what was minimised, `loss_jepa` the prediction error in it, without the regulariser.
    """

    loss: Tensor
    loss_jepa: Tensor
    grad_norm: Tensor
    health: health.Health | None


@dataclass
class Trainer:
    """Everything that one run holds on to."""

    settings: Settings
    run: RunFolder
    log: RunLog
    device: torch.device
    jepa: JEPA
    masks: GeneratorCollator
    videos: Videos
    decoder: Decoder
    plan: Plan
    bad_files: ReplacedFiles
    interrupts: Interrupts
    workers: int

    def __post_init__(self) -> None:
        self.scaler = parallel.gradient_scaler(self.device, self.settings.optim.dtype)
        self.update: OptimizerPass = build_optimizer_pass(
            self.settings, self.jepa, self.scaler, accumulation=self.plan.accumulation
        )
        self.patience = BAD_STEPS_IN_A_ROW if self.scaler is None else BAD_STEPS_IN_A_ROW_FLOAT16
        self.clock = Clock()
        self.failed_saves = 0
        self.saved_step = -1
        # Listed like bad files, but any number of them is fine.
        self.short_files = ReplacedFiles(
            self.run.path / "short_files.jsonl", len(self.videos.train), None, self.log.say
        )

    # -- state --------------------------------------------------------------------------------------------------------

    def restore(self) -> int:
        """Continue from the newest intact checkpoint; returns the step to start with."""
        found = checkpoint.newest(self.run.checkpoints, self.log.say)
        if found is None:
            self.log.rewind(0)
            return 0
        checkpoint.load(found, self.update.tensors())
        self.update.restored()
        if self.scaler is not None:
            self.scaler.load_state_dict(found.trainer["scaler"])
        self.saved_step = found.step
        self.log.rewind(found.step)
        self.log.say(f"resumed    from {found.folder}, step {found.step}")
        return found.step

    def save(self, step: int) -> bool:
        """Commit a checkpoint. A failure is said and tried again at the next interval, three times."""
        trainer: dict[str, Any] = {
            "samples_seen": step * self.settings.optim.global_batch,
            "settings": config.flat(self.settings),
            "data": self.videos.fingerprint,
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }
        try:
            checkpoint.save(
                self.run.checkpoints, step, self.update.tensors(), trainer, self.settings.checkpoint.keep, self.log.say
            )
        except checkpoint.SaveFailed as error:
            self.failed_saves += 1
            self.log.say(f"warning: {error}; failed saves in a row: {self.failed_saves}")
            return False
        self.failed_saves, self.saved_step = 0, step
        return True

    # -- the loop -----------------------------------------------------------------------------------------------------

    def train(self) -> Exit:
        """Train to the last step, or until something ends the run; returns how it ended."""
        log, last = self.log, self.settings.last_step
        first = self.restore()
        if first >= last and self.run.status().get("state") == "done":
            log.say(f"done       this run has its {last} steps: {self.run.path}")
            return Exit.DONE
        if first > last:
            log.say(f"done       this run is at step {first} already, beyond runtime.stop_at {last}: {self.run.path}")
            return Exit.DONE
        log.status("training", first)
        log.start_progress(first)
        dataset = build_dataset(self.settings, self.videos, self.decoder)
        failures = Failures(self.run.path / "decoder_failures.jsonl", first * self.settings.optim.global_batch)
        decoding = build_decoding(
            self.settings, self.decoder, dataset, self.plan.batch_size, self.device, log.say, failures
        )
        with (
            running(self._loader(dataset, first, last)) as loaded,
            closing(decoding(loaded)) as decoded,
            closing(uploaded(decoded, self.device)) as batches,
        ):
            ended = self._steps(first, last, batches)
        log.stop_progress()
        return self._finish(last) if ended is None else ended

    def _steps(self, first: int, last: int, batches: Iterator[Batch]) -> Exit | None:
        """The steps [first, last); returns how the run ended, or None where it came to its last step."""
        s = self.settings
        self.clock = Clock()
        for step in range(first, last):
            logging = (step + 1) % s.log.every == 0 or step + 1 == last
            done = self._step(step, batches, logging)
            if done is not None:
                self.log.advance(step + 1)
                self.clock.steps += 1
                if logging:
                    self._report(step + 1, done)
                    if self.update.skipped_in_a_row.item() >= self.patience:
                        return self._fail(step + 1, Exit.NON_FINITE, "loss or gradients are not finite again and again")
            count = step if done is None else step + 1
            stopping = self.interrupts.received is not None
            if count % s.checkpoint.every == 0 or count == last or stopping:
                saved = count == self.saved_step or self.save(count)
                if self.failed_saves >= SAVES_THAT_MAY_FAIL or (not saved and (stopping or count == last)):
                    return self._fail(count, Exit.FAILED, "checkpoints cannot be written")
            if stopping:
                return self._leave(count)
            if s.eval.every and count % s.eval.every == 0 and count < last:
                if not self._probe(count):
                    return self._leave(count)
                self.clock = Clock()
        return None

    def _step(self, step: int, batches: Iterator[Batch], look: bool) -> StepDone | None:
        """One training step; None where a signal came between its batches: nothing has changed then.

        `look` measures the health of the last batch's target features, before they are updated.
        """
        s, parts = self.settings, self.plan.accumulation
        loss, loss_jepa, features = torch.zeros((), device=self.device), torch.zeros((), device=self.device), None
        for part in range(parts):
            if part and self.interrupts.received is not None:
                self.update.drop_gradients()
                return None
            batch = self._next(batches)
            draws = None
            if s.model.targets == "noised":
                width = s.model.predictor_dim
                keyed = self.jepa.operations.keyed_noise
                draws = noise_draws(s.optim.seed, batch.slots, batch.masks_target, width, self.device, keyed=keyed)
            with parallel.autocast(self.device, s.optim.dtype):
                out = self.jepa(batch.clips, batch.masks_context, batch.masks_target, draws, union=batch.union)
                if look and part + 1 == parts:
                    # One clip of each video: clips of the same one are too alike to tell what is trivial.
                    features = self.jepa.target_features(batch.clips[:: s.data.clips_per_video])
            self.update.backward(out.loss / parts)
            loss += out.loss.detach() / parts
            loss_jepa += out.loss_jepa.detach() / parts
        measured = None if features is None else health.measure(features, s.loss.exponent)
        return StepDone(loss, loss_jepa, self.update.step(step, loss).total, measured)

    def _loader(self, dataset: ClipDataset, first: int, last: int) -> Iterable[Batch | EncodedBatch]:
        s = self.settings
        crashes = Crashes(self.videos.paths, self.run.path / LISTED, self.log.say)
        return make_loader(
            dataset,
            self.masks,
            first_step=first,
            last_step=last,
            global_batch=s.optim.global_batch,
            batch_size=self.plan.batch_size,
            workers=self.workers,
            pin_memory=self.device.type == "cuda",
            tokens=self.plan.tokens,
            guard=Guard(crashes, s.data.decode_seconds, self.log.say, self.log.note),
        )

    def _next(self, batches: Iterator[Batch]) -> Batch:
        """The next batch on the device; the time until the loader gives what is asked of it counts as waited."""
        began = time.perf_counter()
        batch = next(batches)
        self.clock.waited += time.perf_counter() - began
        for path, reason in self.bad_files.report(batch.bad):
            self.log.say(f"bad file   {path}: {reason} (pyav); another video takes its place")
        known = len(self.short_files.reasons)
        for number, (path, reason) in enumerate(self.short_files.report(batch.short), start=known + 1):
            # A collection may have thousands of them.
            if number <= SHORT_FILES_NAMED:
                more = f"; further ones are listed in {self.short_files.path}" if number == SHORT_FILES_NAMED else ""
                self.log.say(f"short file {path}: {reason}; another video takes its place{more}")
        return batch

    def _report(self, step: int, done: StepDone) -> None:
        assert done.health is not None, "a step is reported only after its health was measured"
        s, plan, clock = self.settings, self.update.schedule, self.clock
        parallel.synchronise(self.device)
        seconds = time.perf_counter() - clock.started
        clips = clock.steps * s.optim.global_batch / seconds
        value, trivial = done.loss.item(), done.health.trivial_loss.item()
        row = {
            "step": step,
            "loss": value,
            "loss_ratio": done.loss_jepa.item() / trivial if trivial > 0 else None,
            "lr": plan.lr_at(step - 1),
            "weight_decay": plan.weight_decay_at(step - 1),
            "momentum": plan.momentum_at(step - 1),
            "grad_norm": done.grad_norm.item(),
            "rank": done.health.rank.item(),
            "skipped": int(self.update.skipped.item()),
            "clips_per_s": clips,
            "data_wait": clock.waited / seconds,
            "memory_gb": _memory_gb(self.device),
        }
        peak = peak_flops(self.device)
        if peak is not None:
            row["mfu"] = clips * self.plan.flop_per_clip / peak
        self.log.metrics(row)
        left = (s.last_step - step) * seconds / clock.steps
        ratio = "-" if row["loss_ratio"] is None else f"{row['loss_ratio']:.3f}"
        mfu = f"  MFU {row['mfu']:.1%}" if "mfu" in row else ""
        skipped = f"  {row['skipped']} skipped" if row["skipped"] else ""
        self.log.say(
            f"step {step}/{s.last_step}  loss {value:.4f} ({ratio} of trivial)  rank {row['rank']:.1f}  "
            f"{clips:.4g} clips/s{mfu}  data wait {row['data_wait']:.0%}  {row['memory_gb']:.2g} GB{skipped}  "
            f"{duration(left)} left"
        )
        self.log.status("training", step, loss=value, clips_per_s=clips, seconds_left=left)
        self.clock = Clock()

    # -- endings ------------------------------------------------------------------------------------------------------

    def _probe(self, step: int) -> bool:
        """Probe where there is something to probe; False where a signal ended it."""
        wanted, why_not = should_probe(self.settings, self.videos)
        if not wanted:
            if why_not:
                self.log.say(why_not)
            return True
        try:
            with self.update.masters.in_place():
                run_probe(
                    self.settings, self.jepa, self.videos, self.log, step, lambda: self.interrupts.received is not None
                )
        except ProbeStopped:
            if self.saved_step != step:
                self.save(step)
            return False
        except OSError as error:  # a full disk, say: features can be probed later, training goes on
            self.log.say(f"no probe: {error}")
        return True

    def _finish(self, step: int) -> Exit:
        self.log.status("evaluating", step)
        if not self._probe(step):
            return self._leave(step)
        if self.settings.log.images:
            draw_pictures(self.settings, self.videos, self.log)
        if self.bad_files.reasons:
            self.log.say(
                f"bad files  {len(self.bad_files.reasons)} of {self.bad_files.total}, listed in {self.bad_files.path}"
            )
        if self.short_files.reasons:
            short = self.short_files
            self.log.say(f"short      {len(short.reasons)} of {short.total} videos replaced, listed in {short.path}")
        self.log.status("done", step)
        self.log.say(f"done       {step} steps: {self.run.path}")
        return Exit.DONE

    def _fail(self, step: int, code: Exit, reason: str) -> Exit:
        self.log.stop_progress()
        self.log.say(f"stopped    at step {step}: {reason}; the last checkpoint is of step {max(0, self.saved_step)}")
        self.log.status("failed", step, reason=reason)
        return code

    def _leave(self, step: int) -> Exit:
        self.log.stop_progress()
        self.log.say(f"stopped    by {self.interrupts.received}, saved at step {step}; the same command continues")
        self.log.status("stopped", step, reason=self.interrupts.received)
        return Exit.SAVED_AFTER_SIGNAL


def _memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
