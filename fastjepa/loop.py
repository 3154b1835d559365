"""The training loop: once in a while log, probe and save; then one training step."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastjepa import parallel
from fastjepa.alarms import Alarms
from fastjepa.badsteps import BadSteps, file_names
from fastjepa.build import build_dataset, build_decoding, build_loading, build_optimizer_pass
from fastjepa.checkpoint import Found
from fastjepa.config import Settings
from fastjepa.data.batches import Batch, EncodedBatch, MixedBatch
from fastjepa.data.crashes import LISTED, Crashes
from fastjepa.data.dataset import ClipDataset
from fastjepa.data.decoders.choose import Decoder
from fastjepa.data.decoders.stage import Failures
from fastjepa.data.guard import Guard
from fastjepa.data.loader import make_loader, running
from fastjepa.data.source import Videos
from fastjepa.data.upload import uploaded
from fastjepa.dense import context_loss_weight
from fastjepa.eta import Aside, Eta
from fastjepa.evaluation import draw_pictures, run_probe, should_probe, show_pictures
from fastjepa.exchange import Exchange
from fastjepa.exits import Exit
from fastjepa.findings import Findings
from fastjepa.jepa import JEPA
from fastjepa.keeping import Keeper
from fastjepa.log import Log, read_metrics
from fastjepa.looking import Looking
from fastjepa.masks import GeneratorCollator
from fastjepa.models.predictor import Draw
from fastjepa.noise import noise_draws, noise_seed
from fastjepa.optim import OptimizerPass
from fastjepa.parallel import World
from fastjepa.plan import Plan
from fastjepa.probe import MOST_VIDEOS, ProbeStopped
from fastjepa.profiling import Profiler
from fastjepa.reporting import Clock, StepDone, console_line, metrics_row, mfu
from fastjepa.runfolder import RunFolder
from fastjepa.signals import Interrupts
from fastjepa.streams import Purpose, torch_seed
from fastjepa.verdict import DIVERGED, Judge
from fastjepa.watchdog import Watchdog

# How much longer than anything else some things may take: compilation in the first step, a checkpoint on a slow disk.
PATIENCE = 4.0


class Wish(IntEnum):
    """What a process wants to do after a step: the largest of several processes' wishes is done."""

    GO_ON = 0
    LEAVE = 1
    STOP_COLLAPSED = 2
    GIVE_UP = 3


@dataclass
class Trainer:
    """Everything that one run holds on to in one of its processes."""

    settings: Settings
    run: RunFolder
    log: Log
    device: torch.device
    world: World
    jepa: JEPA
    exchange: Exchange
    masks: Mapping[int, GeneratorCollator]
    videos: Videos
    decoder: Decoder
    plan: Plan
    interrupts: Interrupts
    watchdog: Watchdog
    workers: int
    # A checkpoint of another run, whose optimizer state a new run goes on with.
    begins_with: Found | None = None

    def __post_init__(self) -> None:
        s = self.settings
        self.scaler = parallel.gradient_scaler(self.device, s.optim.dtype)
        self.update: OptimizerPass = build_optimizer_pass(
            s, self.jepa, self.scaler, accumulation=self.plan.accumulation, exchange=self.exchange
        )
        self.keeper = Keeper(s, self.run, self.log, self.world, self.update, self.scaler, self.videos.fingerprint)
        self.findings = Findings(
            self.run.path,
            self.world,
            self.log,
            files=len(self.videos.paths),
            trained=len(self.videos.train),
            max_bad_fraction=s.data.max_bad_fraction,
        )
        # What the first process says of the health of the run is measured on its own clips.
        self.judge = Judge(Alarms(s.optim.warmup_steps))
        self.clock = Clock()
        self.profiler = Profiler(
            s.runtime.profile if self.world.first else None, self.run.path, self.device, self.log.say
        )
        self.eta = Eta(s.last_step, {"probe": self._probes_to_come(), "save": Aside(s.checkpoint.every, True)})
        self._patience = 1.0

    # -- the loop -----------------------------------------------------------------------------------------------------

    def train(self) -> Exit:
        """Train to the last step, or until something ends the run; returns how it ended."""
        log, last = self.log, self.settings.last_step
        self.watchdog.stage("looking for a checkpoint", 0, PATIENCE)
        first = self.keeper.restore(self.begins_with)
        self.run.describe()
        if first >= last and self.world.first_does(self.run.status).get("state") == "done":
            log.say(f"done       this run has its {last} steps: {self.run.path}")
            return Exit.DONE
        if first > last:
            log.say(f"done       this run is at step {first} already, beyond runtime.stop_at {last}: {self.run.path}")
            return Exit.DONE
        self.profiler.begin(first)
        log.start_progress(first)
        dataset = build_dataset(self.settings, self.videos, self.decoder)
        self.bad_steps = self._bad_steps(dataset)
        self.bad_steps.rewind(first)
        if self.world.first:
            self.judge.replay(read_metrics(self.run.path))
        self._status("training", first)
        batch = self.settings.optim.global_batch
        # Of several processes each has its part of a step: its batches are no neighbours.
        apart = batch if self.world.size > 1 else self.plan.batch_size
        failures = Failures(self._own("decoder_failures.jsonl"), first * batch, apart)
        decoding = build_decoding(
            self.settings, self.decoder, dataset, self.plan.batch_size, self.device, log.tell, failures
        )
        with (
            self.keeper,
            running(self._loader(dataset, first, last)) as loaded,
            closing(decoding(loaded)) as decoded,
            closing(uploaded(decoded, self.device)) as batches,
            closing(self.profiler),
        ):
            ended = self._steps(first, last, batches)
        log.stop_progress()
        return self._finish(last) if ended is None else ended

    def _steps(self, first: int, last: int, batches: Iterator[Batch | MixedBatch]) -> Exit | None:
        """The steps [first, last); returns how the run ended, or None where it came to its last step."""
        s, keeper = self.settings, self.keeper
        self.clock = Clock()
        for step in range(first, last):
            self._patience = PATIENCE if step == first else 1.0
            logging = (step + 1) % s.log.every == 0 or step + 1 == last
            with self.profiler.step(step + 1):
                done = self._step(step, batches, logging)
            if done is not None:
                if step == first:
                    self.eta.stepped(step + 1)
                self.log.advance(step + 1, self.eta.left(step + 1))
                self.clock.steps += 1
                if logging:
                    self.findings.share()
                    if self.world.first:
                        self._report(step + 1, done)
                    self.clock = Clock()
            count = step if done is None else step + 1
            wish = self._wish()
            if wish is Wish.LEAVE or count == last or count % s.checkpoint.every == 0:
                # What a checkpoint is followed by must know of every bad step before it.
                self.watchdog.stage("waiting for the device", count, self._patience)
                self.bad_steps.wait()
                wish = max(wish, self._wish())
            if wish is Wish.GIVE_UP:
                return self._give_up(count)
            if wish is Wish.STOP_COLLAPSED:
                return self._fail(count, Exit.FAILED, "the target features have collapsed (runtime.stop_on_collapse)")
            stopping = wish is Wish.LEAVE
            ending = count == last or stopping
            keeper.look()
            if count % s.checkpoint.every == 0 or ending:
                self.watchdog.stage("saving a checkpoint", count, PATIENCE)
                with self.eta.aside("save"):
                    keeper.save(count, wait=ending)
            if keeper.hopeless or (ending and keeper.saved_step != count):
                return self._fail(count, Exit.FAILED, "checkpoints cannot be written")
            if stopping:
                return self._leave(count)
            if s.eval.every and count % s.eval.every == 0 and count < last:
                with self.eta.aside("probe"):
                    ended = self._probe(count)
                if ended is not None:
                    return ended
                self.clock = Clock()
        return None

    def _wish(self) -> Wish:
        """What one of the processes wants; they agree on the host, where no device is waited for."""
        # More patience than with any work: it is the process which works that has a name to tell.
        self.watchdog.stage("waiting for the other processes", patience=2 * self._patience)
        own = Wish.LEAVE if self._interrupted() else Wish.GO_ON
        if self.judge.alarms.collapsed and self.settings.runtime.stop_on_collapse:
            own = Wish.STOP_COLLAPSED
        if self.bad_steps.check():
            own = Wish.GIVE_UP
        return Wish(self.world.most(own))

    def _step(self, step: int, batches: Iterator[Batch | MixedBatch], look: bool) -> StepDone | None:
        """One training step; None where a signal came between its batches: nothing has changed then.

        `look` measures its health, with the weights that its loss was computed with.
        """
        s, parts = self.settings, self.plan.accumulation
        total = torch.zeros(2 + self.jepa.dense, device=self.device)
        looking = Looking(s, self.jepa.levels, self.device) if look else None
        slots, losses = [], []
        for part in range(parts):
            if part and self._wish() is Wish.LEAVE:
                self.update.drop_gradients()
                return None
            last = part + 1 == parts
            self.watchdog.stage("waiting for data", step + 1)
            batch = self._next(batches)
            self.watchdog.stage("computing", step + 1, self._patience)
            draws = None
            if s.model.targets == "noised":
                draws = batch.each(partial(self._noise, noise_seed(s.optim.seed, self.device)))
            if s.model.drop_path:  # its draws too follow from what they are for: there is no state to save
                torch.manual_seed(torch_seed(s.optim.seed, Purpose.DROP_PATH, batch.slots[0]))
            with self.exchange.part(last):
                with parallel.autocast(self.device, s.optim.dtype):
                    out = self.exchange.loss(
                        batch.each(lambda one: one.clips),
                        batch.each(lambda one: one.masks_context),
                        batch.each(lambda one: one.masks_target),
                        draws,
                        union=batch.each(lambda one: one.union),
                        look=looking is not None and looking.at(last),
                        context_weight=context_loss_weight(
                            step, s.loss.context, s.loss.context_start, s.loss.context_full
                        ),
                        shares=batch.shares,
                    )
                self.update.backward(out.loss / parts, last)
            if looking is not None and looking.at(last):
                looking.take(batch, out)
            slots.append(batch.slots)
            losses.append(out.loss.detach())
            every = (out.loss, out.loss_jepa, *(() if out.loss_context is None else (out.loss_context,)))
            total += torch.stack([one.detach() for one in every]) / parts
        loss, loss_jepa, *loss_context = self.exchange.mean(total)
        distance = self.update.ema_distance() if look else None
        norms = self.update.step(step, loss)
        self.bad_steps.note(step + 1, slots, losses, loss, norms)
        measured, compared = (None, None) if looking is None else looking.measured()
        return StepDone(loss, loss_jepa, norms, measured, distance, loss_context[0] if loss_context else None, compared)

    def _noise(self, seed: torch.Tensor, batch: Batch) -> list[Draw]:
        """What enters the noised predictor."""
        width, keyed = self.settings.model.predictor_dim, self.jepa.operations.keyed_noise
        return noise_draws(seed, batch.slots, batch.masks_target, width, self.device, keyed=keyed)

    def _bad_steps(self, dataset: ClipDataset) -> BadSteps:
        reasons = (self.findings.bad.reasons, self.findings.short.reasons)
        names = file_names(
            dataset.plan.order,
            dataset.reader.paths,
            dataset.plan.clips_per_video,
            lambda path: any(path in known for known in reasons),
        )
        most = self.settings.optim.max_bad_steps
        return BadSteps(self._own("bad_steps.jsonl"), most, names, self.log.tell, scaled=self.scaler is not None)

    def _loader(self, dataset: ClipDataset, first: int, last: int) -> Iterable[Batch | MixedBatch | EncodedBatch]:
        s = self.settings
        masks, tokens = build_loading(s, self.masks, dataset)
        crashes = Crashes(self.videos.paths, self._own(LISTED), self.log.tell)
        return make_loader(
            dataset,
            masks,
            first_step=first,
            last_step=last,
            global_batch=s.optim.global_batch,
            batch_size=self.plan.batch_size,
            workers=self.workers,
            pin_memory=self.device.type == "cuda",
            tokens=tokens,
            rank=self.world.rank,
            world=self.world.size,
            guard=Guard(crashes, s.data.decode_seconds, self.log.tell, self.log.note),
        )

    def _own(self, name: str) -> Path:
        """A file of the run folder that each process has one of: the first one under this name."""
        path = self.run.path / name
        return path if self.world.first else path.with_stem(f"{path.stem}-{self.world.rank}")

    def _next(self, batches: Iterator[Batch | MixedBatch]) -> Batch | MixedBatch:
        """The next batch on the device; the time until the loader gives what is asked of it counts as waited."""
        began = time.perf_counter()
        batch = next(batches)
        self.clock.waited += time.perf_counter() - began
        self.findings.note(batch)
        return batch

    def _report(self, step: int, done: StepDone) -> None:
        s, clock, update = self.settings, self.clock, self.update
        self.watchdog.stage("waiting for the device", step, self._patience)
        parallel.synchronise(self.device)
        row = metrics_row(step, done, update.schedule, update.skipped, clock, self.device, s.optim.global_batch)
        row |= mfu(row["clips_per_s"], self.plan.flop_per_clip, self.device, self.world.size)
        row |= self.profiler.touches(step, clock.steps)
        said = self.judge.check(step, row)
        self.log.metrics(row | {"verdict": self.judge.verdict.word})
        if "profiled" in row:
            self.eta.forget()
        self.eta.stepped(step)
        left = self.eta.left(step)
        self.log.say(console_line(row, s.last_step, left))
        for sentence in said:
            self.log.say(sentence)
        since = clock.steps * s.optim.global_batch / row["clips_per_s"]
        told = {"loss": row["loss"], "clips_per_s": row["clips_per_s"], "seconds_left": left, "log_seconds": since}
        self._status("training", step, **told)

    def _status(self, state: str, step: int, **more: Any) -> None:
        verdict = self.judge.verdict
        self.log.status(state, step, verdict=verdict.word, verdict_text=verdict.sentence, **more)

    # -- endings ------------------------------------------------------------------------------------------------------

    def _probes_to_come(self) -> Aside:
        """That of probes: until one was seen, reading and encoding a video takes as long as training on a clip."""
        wanted, _ = should_probe(self.settings, self.videos)
        clips = min(len(self.videos.paths), MOST_VIDEOS)
        return Aside(self.settings.eval.every if wanted else 0, wanted, clips / self.settings.optim.global_batch)

    def _probe(self, step: int) -> Exit | None:
        """Probe where there is something to probe, in the first process; how the run ended where a signal came."""
        wanted, why_not = should_probe(self.settings, self.videos)
        if not wanted:
            if why_not:
                self.log.say(why_not)
            return None
        self.watchdog.stage("probing", step, PATIENCE)
        state = self.exchange.target_state()
        stopped = False
        if self.world.first:
            try:
                with self.update.masters.in_place():
                    run_probe(self.settings, self.jepa, self.videos, self.log, step, self._still_probing, state)
            except ProbeStopped:
                stopped = True
            except OSError as error:  # a full disk, say: features can be probed later, training goes on
                self.log.say(f"no probe: {error}")
        self._wait_for_the_first()
        if not self.world.any(stopped):
            return None
        self.watchdog.stage("saving a checkpoint", step, PATIENCE)
        self.keeper.save(step, wait=True)
        if self.keeper.saved_step != step:
            return self._fail(step, Exit.FAILED, "checkpoints cannot be written")
        return self._leave(step)

    def _draw(self, step: int) -> None:
        self.watchdog.stage("drawing pictures", step, PATIENCE)
        state = self.exchange.target_state()
        if self.world.first:
            with self.update.masters.in_place():
                drawn = draw_pictures(
                    self.settings, self.jepa, self.videos, self.log, step, state,
                    lambda: self.watchdog.stage("drawing pictures"),
                )  # fmt: skip
            show_pictures(self.log, step, drawn)

    def _interrupted(self) -> bool:
        return self.interrupts.received is not None

    def _still_probing(self) -> bool:
        self.watchdog.stage("probing")
        return self._interrupted()

    def _wait_for_the_first(self) -> None:
        self.world.wait(lambda: self.watchdog.stage("waiting for the first process"))

    def _finish(self, step: int) -> Exit:
        self.findings.share()
        self._status("evaluating", step)
        if (ended := self._probe(step)) is not None:
            return ended
        if self.settings.log.images:
            self._draw(step)
        self._wait_for_the_first()
        for line in self.findings.summary():
            self.log.say(line)
        self._status("done", step)
        self.log.say(f"verdict    {self.judge.verdict}")
        self.log.say(f"done       {step} steps: {self.run.path}")
        return Exit.DONE

    def _give_up(self, step: int) -> Exit:
        """The end of a run whose steps are not finite; what may explain it is left in a file."""
        self.bad_steps.wait()
        path = self._own("non_finite.json")
        schedule = self.update.schedule
        more = {"step": step, "lr": schedule.lr_at(step - 1), "weight_decay": schedule.weight_decay_at(step - 1)}
        self.judge.verdict = DIVERGED  # these steps may not have come to a row yet
        self.bad_steps.diagnose(path, self.update.norms_of_bad_step(), more)
        reason = self.bad_steps.reason or "another process had too many steps that were not finite"
        return self._fail(step, Exit.NON_FINITE, f"{reason}; what is known of them is in {path}")

    def _fail(self, step: int, code: Exit, reason: str) -> Exit:
        self.log.stop_progress()
        self.findings.share()
        self.keeper.settle()
        kept = (
            "there is no checkpoint"
            if self.keeper.saved_step < 0
            else f"the last checkpoint is of step {self.keeper.saved_step}"
        )
        self.log.say(f"stopped    at step {step}: {reason}; {kept}")
        self._status("failed", step, reason=reason)
        return code

    def _leave(self, step: int) -> Exit:
        self.findings.share()
        self.log.stop_progress()
        reason = self.interrupts.received or "a signal to another process"
        self.log.say(f"stopped    by {reason}, saved at step {step}; the same command continues")
        self._status("stopped", step, reason=reason)
        return Exit.SAVED_AFTER_SIGNAL
