"""The training itself: a student that rounds learns to answer as its teacher does, the program as it was uploaded.

Channels are brought to like size first, where the student is better for it. Then Adam, with a learning rate that falls
as a cosine, for weights and for the ranges of activations; gradients of weights are clipped by their norm. At regular
steps the student is judged on samples that were held out, and the best weights and ranges so far are kept: at the worst
those it began with. Where it got worse, or no better twice, it goes back to these with a third of the learning rate.
Needs torch.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from app.domain.failures import StageFailure, model_failure
from workers.data import Batch, Samples
from workers.graph import learned_ranges
from workers.graph.exported_program import ProgramFolder
from workers.graph.qat import batches, channels, distance, placement, rounding
from workers.graph.qat.distance import Output
from workers.graph.qat.progress import MOST_EVALUATIONS, Progress, Terms, short, too_short
from workers.graph.qat.running import Runner, not_gradual

_JUDGING_SHARE = 0.2  # of the time, at most, where there would be fewer steps for it
_LEAST_APART = 5  # steps between two of them
_PATIENCE = 6  # evaluations without any that is better, after which it ends
_MOST_NORM = 1.0
_WARM_UP = 0.05  # of the steps, in which the learning rate rises
_CALIBRATING = 16  # batches, before the first step
_BETTER = 0.999  # times the best loss so far
_RISE, _STUCK = 1.2, 2  # times the best loss, and evaluations without a better one, at which the rate is too high
_SMALLER = 1 / 3  # of the rate it had
_USUAL_SIZE, _LEAST_RATE = 0.1, 0.02  # root of a parameter's mean square that has the whole rate; of it at least
_RANGES_RATE = 10.0  # times the weights' learning rate: that of the logarithms of scales
_PROBED = 5  # steps that are timed before it is known how many there will be
_PROBED_THREADS = 2  # steps with one thread, and with all
_WORTH_THREADS = 0.8  # of the time with one thread, for which the others are taken from who else computes
_LEAST_STEPS = 20  # that are worth a training


class Training:
    """Of one program. `training`, `held_out`: disjoint samples. `device`: as torch names it."""

    def __init__(
        self,
        source: ProgramFolder,
        training: Samples,
        held_out: Samples,
        terms: Terms,
        *,
        op_types: Sequence[str],
        activations: rounding.Activations,
        levels: int,
        device: str,
    ) -> None:
        """Raises StageFailure: `not_trainable`, `nothing_to_train`, `training_labels_mismatch`."""
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what its products need to be the same each time
        torch.manual_seed(terms.seed)
        torch.use_deterministic_algorithms(True, warn_only=True)
        placement.check_trainable(source.program)
        self.training, self.held_out, self.terms = training, held_out, terms
        self.runner = Runner(source, device)
        self.teacher, self.student = self.runner.module(), self.runner.module()
        self._groups = channels.groups_of(self.student)
        self.placed = placement.place(self.student, op_types, activations, levels)
        self.student.to(self.runner.device)  # with the modules that were placed
        self.ranges = rounding.ranges_of(self.student)
        own = {id(p) for p in self.ranges}
        floating = (p for p in self.student.parameters() if p.requires_grad and p.is_floating_point())
        self.weights = [p for p in floating if id(p) not in own]
        self.optimizer = self._optimizer()
        self.progress = Progress()
        first = next(iter(held_out.batches(terms.batch)))
        names = [spec.name for spec in source.interface.outputs]
        answers = self.runner.answers(self.teacher, first)
        self.outputs = distance.outputs_of(names, answers, terms.metric)
        self._places = {o.name: names.index(o.name) for o in self.outputs}
        self.labelled = self._labelled(answers)
        self._best: dict[str, Tensor] = {}

    # State

    def state(self) -> dict[str, Any]:
        """Tensors and plain values, which `torch.load` reads without unpickling objects."""
        tensors = {n: t.detach().cpu() for n, t in self.student.state_dict().items()}
        return {
            "progress": vars(self.progress),
            "student": tensors,
            "best": self._best,
            "optimizer": self.optimizer.state_dict(),
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        self.progress = Progress(**state["progress"])
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._best = dict(state["best"])
        torch.set_num_threads(self.progress.threads)

    def trained(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The best parameters, by name as the program has them, and the ranges that go with them
        (`learned_ranges.document`)."""
        self.student.load_state_dict(self._best, strict=False)
        modules: dict[str, Any] = dict(self.student.named_modules())
        points = []
        for name, value in self.placed.points:
            limits = modules[name].limits()
            if limits is not None:
                points.append({"value": value, "low": limits[0], "high": limits[1]})
        inner = ("query", "key", "weights", "value")
        attentions = [{n: getattr(modules[name], n).limits() for n in inner} for name in self.placed.attentions]
        seen = [{n: limits for n, limits in each.items() if limits is not None} for each in attentions]
        own = {name for name, part in self.student.named_parameters() if any(part is r for r in self.ranges)}
        return {n: t for n, t in self._best.items() if n not in own}, learned_ranges.document(points, seen)

    # Training

    def begin(self, seconds: float) -> None:
        """Calibrate, judge the student untrained, and settle how many steps there will be within `seconds`. Raises
        StageFailure `not_trainable`, `training_diverged`, `training_budget_too_short`."""
        began = time.monotonic()
        self.progress.threads = self._threads()
        torch.set_num_threads(self.progress.threads)
        self._calibrate()
        self._equalize()
        self._evaluate(None)
        wanted = max(self.terms.epochs * self._per_epoch(), 1)
        each = self._seconds_a_step()
        took = self.progress.curve[0].pop("took")
        self.progress.evaluations = min(max(int(_JUDGING_SHARE * seconds / max(took, 1e-6)), 2), MOST_EVALUATIONS)
        evaluating = self.progress.evaluations * took
        held = int((seconds - (time.monotonic() - began) - evaluating) / each)
        if held < min(wanted, _LEAST_STEPS):
            raise too_short(seconds, each, wanted, evaluating)
        self.progress.steps = min(wanted, held)
        self.progress.cut = held < wanted
        self.progress.seconds = time.monotonic() - began

    def run(self, until: int, seconds: float, tell: Callable[[float, str], None]) -> None:
        """Train up to step `until`; after `seconds` it ends for good. `tell`: fraction of all steps, and a message."""
        began, before = time.monotonic(), self.progress.seconds
        every = max(_LEAST_APART, self.progress.steps // self.progress.evaluations)
        known = self.progress
        while known.ended is None and known.step < until:
            for batch in itertools.islice(self._epoch(known.epoch), known.in_epoch, None):
                loss = self._step(batch)
                known.step, known.in_epoch = known.step + 1, known.in_epoch + 1
                known.seconds = before + time.monotonic() - began
                if not math.isfinite(loss):
                    self._diverged(loss)
                elif known.step % every == 0 or known.step >= known.steps:
                    self._evaluate(loss)
                    tell(known.step / known.steps, self._told())
                if time.monotonic() - began > seconds and known.ended is None:
                    known.ended, known.cut = "its time was over", True
                if known.ended is not None or known.step >= until:
                    return
            known.epoch, known.in_epoch = known.epoch + 1, 0

    def _step(self, batch: Batch) -> float:
        self._set_rate()
        rounding.observe(self.student, observing=False, rounding=True)
        with torch.no_grad():
            wanted = self.runner.answers(self.teacher, batch)
        try:
            loss = self._loss(wanted, self.runner.answers(self.student, batch), batch)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
        except (StageFailure, MemoryError):
            raise
        except (RuntimeError, NotImplementedError) as error:
            raise not_gradual(self.runner, self.student, batch, error) from error
        if all(p.grad is None for p in self.weights):
            raise not_gradual(self.runner, self.student, batch, RuntimeError("no weight gets a gradient"))
        nn.utils.clip_grad_norm_([p for p in self.weights if p.grad is not None], _MOST_NORM)
        value = float(loss.detach())
        if math.isfinite(value):
            self.optimizer.step()
            rounding.keep_bounds(self.student)
        return value

    def _set_rate(self) -> None:
        done = self.progress.step / max(self.progress.steps, 1)
        rise = min(1.0, (done + 1 / max(self.progress.steps, 1)) / _WARM_UP)
        for group in self.optimizer.param_groups:
            rate = self.terms.learning_rate * self.progress.rate * group["times"]
            group["lr"] = rate * rise * (0.5 * (1 + math.cos(math.pi * min(done, 1.0))) + 1e-2)

    def _loss(self, wanted: Sequence[Any], found: Sequence[Any], batch: Batch) -> Tensor:
        places = self._places
        loss = torch.stack([o.distance(wanted[places[o.name]], found[places[o.name]]) for o in self.outputs]).sum()
        labels = self.runner.labels(batch)
        if self.labelled is None or labels is None:
            return loss
        scores = found[places[self.labelled.name]]
        distance.check_labels(self.labelled, scores.shape[self.labelled.axis], labels)
        return loss + self.labelled.of_labels(labels, scores)

    # Before the first step

    def _calibrate(self) -> None:
        """Ranges by the extremes of some batches."""
        for part in self.student.modules():
            if isinstance(part, rounding.RoundedActivation):
                part.forget()
        rounding.observe(self.student, observing=True, rounding=False)
        with torch.no_grad():
            for batch in itertools.islice(self._epoch(0), _CALIBRATING):
                self.runner.answers(self.student, batch)
        rounding.observe(self.student, observing=False, rounding=True)

    def _equalize(self) -> None:
        """Channels of like size, unless the student is worse for it."""
        loss, agreement = self._judge()
        if not math.isfinite(loss):
            self._diverged(loss)
        self.progress.before = {"loss": short(loss), "agreement": short(agreement)}
        if not self._groups:
            return
        kept = {n: t.clone() for n, t in self.student.state_dict().items()}
        rounding.observe(self.student, observing=False, rounding=False)
        sizes = channels.Sizes(self.student, self._groups)
        with torch.no_grad():
            for batch in itertools.islice(self._epoch(0), _CALIBRATING):
                self.runner.interpreted(sizes, batch)
        self.progress.equalized = channels.equalize(self.student, self._groups, sizes.found)
        self._calibrate()
        made, _ = self._judge()
        if not made < loss:
            self.student.load_state_dict(kept)
            self.progress.equalized = 0

    def _threads(self) -> int:
        """One, or all that torch was given: on a busy machine, and for small products, one is faster."""
        every = torch.get_num_threads()
        if every == 1:
            return every
        took = {}
        for threads in (every, 1):
            torch.set_num_threads(threads)
            took[threads] = min(self._probe(_PROBED_THREADS))
        return every if took[every] < _WORTH_THREADS * took[1] else 1

    def _seconds_a_step(self) -> float:
        times = sorted(self._probe(_PROBED))
        return max(times[len(times) // 2], 1e-6)

    def _probe(self, count: int) -> list[float]:
        """Seconds of some steps, whose changes are undone."""
        kept = {n: t.clone() for n, t in self.student.state_dict().items()}
        self.progress.steps = 1
        times = []
        for batch in itertools.islice(itertools.chain.from_iterable(map(self._epoch, range(count))), count):
            began = time.monotonic()
            self._step(batch)
            times.append(time.monotonic() - began)
        self.student.load_state_dict(kept)
        self.optimizer = self._optimizer()
        self.progress.steps = 0
        return times

    def _optimizer(self) -> torch.optim.Adam:
        """A step of Adam has one size whatever the parameter's: small ones take smaller steps."""
        with torch.no_grad():
            sizes = [float(p.square().mean().sqrt()) for p in self.weights]
        groups: list[dict[str, Any]] = [
            {"params": [p], "times": min(max(size / _USUAL_SIZE, _LEAST_RATE), 1.0)}
            for p, size in zip(self.weights, sizes, strict=True)
        ]
        groups.append({"params": self.ranges, "times": _RANGES_RATE, "betas": (0.9, 0.99)})
        return torch.optim.Adam(groups, lr=self.terms.learning_rate)

    # Judging

    def _judge(self) -> tuple[float, float]:
        """On the samples held out: the loss, with that of their labels where it trains with labels; and of the outputs'
        mean agreements the least."""
        rounding.observe(self.student, observing=False, rounding=True)
        losses: dict[str, float] = {o.name: 0.0 for o in self.outputs}
        agreed: dict[str, list[Tensor]] = {o.name: [] for o in self.outputs}
        rows = 0
        with torch.no_grad():
            for batch in self.held_out.batches(self.terms.batch):
                wanted, found = (self.runner.answers(m, batch) for m in (self.teacher, self.student))
                rows += len(batch)
                for o in self.outputs:
                    a, b = wanted[self._places[o.name]], found[self._places[o.name]]
                    losses[o.name] += float(o.distance(a, b)) * len(batch)
                    agreed[o.name].append(o.agreement(a, b).float())
                labels, known = self.runner.labels(batch), self.labelled
                if known is not None and labels is not None and known.has(labels, found[self._places[known.name]]):
                    scores = found[self._places[known.name]]
                    losses[known.name] += float(known.of_labels(labels, scores)) * len(batch)
        worst = min(float(torch.cat(each).mean()) for each in agreed.values())
        return sum(losses.values()) / max(rows, 1), worst

    def _evaluate(self, train_loss: float | None) -> None:
        """Note how good the student is, keep it where it is the best so far, and end where that is long ago."""
        began = time.monotonic()
        loss, worst = self._judge()
        known = self.progress
        if not math.isfinite(loss):
            self._diverged(loss)
            return
        entry = {
            "step": known.step,
            "seconds": round(known.seconds, 2),
            "loss": short(loss),
            "agreement": short(worst),
        }
        if train_loss is not None:
            entry |= {
                "train_loss": short(train_loss),
                "learning_rate": short(self.optimizer.param_groups[-1]["lr"] / _RANGES_RATE),
            }
        else:
            entry["took"] = time.monotonic() - began
        before = next((e["loss"] for e in known.curve if e["step"] == known.best), math.inf)
        known.curve.append(entry)
        if loss < before * _BETTER or not self._best:
            known.best, known.worse, known.stuck = known.step, 0, 0
            self._best = {n: p.detach().cpu().clone() for n, p in self.student.named_parameters()}
        else:
            known.worse, known.stuck = known.worse + 1, known.stuck + 1
            if known.worse >= _PATIENCE:
                known.ended = f"no better for {_PATIENCE} evaluations"
            elif loss > before * _RISE or known.stuck >= _STUCK:
                self._back_off()
        if known.steps and known.step >= known.steps and known.ended is None:
            known.ended = "all steps were made"

    def _back_off(self) -> None:
        """From the best weights on with a smaller rate, and without the momentum that led away from them."""
        self.student.load_state_dict(self._best, strict=False)
        self.optimizer = self._optimizer()
        known = self.progress
        known.rate, known.backed_off, known.stuck = known.rate * _SMALLER, known.backed_off + 1, 0

    def _diverged(self, loss: float) -> None:
        known = self.progress
        known.ended = f"the loss became {loss} at step {known.step}; the best weights before that are taken"
        if known.best == 0:
            raise model_failure(
                "training_diverged",
                f"The training's loss became {loss} at step {known.step}, before anything was learned.",
                remedy="Give a smaller quantization.training.learning_rate, or look for extreme values in the data.",
            )

    def _told(self) -> str:
        now = self.progress.curve[-1]
        agreed = f"agreement {100 * now['agreement']:.2f} %"
        return f"step {now['step']} of {self.progress.steps}: loss {now['loss']:.3g}, {agreed}"

    # Running

    def _epoch(self, epoch: int) -> Iterator[Batch]:
        return batches.shuffled(self.training, self.terms.batch, self.terms.seed, epoch)

    def _per_epoch(self) -> int:
        return max(len(self.training) // self.terms.batch, 1)

    def _labelled(self, answers: Sequence[Any]) -> Output | None:
        batch = next(iter(self.training.batches(self.terms.batch)))
        labels = self.runner.labels(batch)
        if labels is None:
            return None
        shapes = {o.name: [*answers[self._places[o.name]].shape] for o in self.outputs}
        size = len(labels)
        for shape in shapes.values():
            shape[0] = size
        return distance.labelled(self.outputs, shapes, labels)
