"""A training between two steps: what it holds, how it advances, how it is saved and goes on."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrurec.errors import TrainingError
from lrurec.evaluation import Metrics, lists_by_model, metrics_of, ranks_in
from lrurec.interactions import HeldOut, Histories
from lrurec.model import LRURec
from lrurec.training.checkpoint import Progress, read_checkpoint, write_checkpoint
from lrurec.training.cooccurrence import cooccurrence_embeddings
from lrurec.training.gradients import loss_with_gradients
from lrurec.training.presets import TrainingSettings
from lrurec.training.windows import Batch, Windows, epoch_order

ADAM_EPS = 1e-9

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Of AdamW, as torch names them; with the number of steps they are all that it remembers."""


class TrainingRun:
    """Weights, their running average, the optimizer's moments, and the best weights so far.

    Whatever is random is drawn from (seed, step) and (seed, epoch), so that a run which was saved and resumed goes the
    same way as one that was not. Seeds torch's global generators: the caller keeps their state if it wants it back.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        train: Histories,
        validation: HeldOut,
        *,
        num_items: int,
        device: torch.device,
        run_id: str,
    ) -> None:
        self.settings = settings
        self.windows = Windows.cut(train, settings.max_len, whole=settings.whole_histories)
        self.steps = settings.steps_over(len(self.windows))
        self.step, self.best_step, self.best_recall = 0, 0, -1.0
        self.loss = torch.zeros((), device=device)
        self.curve: list[dict[str, Any]] = []
        self._validation, self.run_id = validation, run_id
        torch.manual_seed(settings.seed)
        self.model = LRURec(settings.architecture(num_items))
        if settings.bias_from_frequency:
            _set_bias_by_frequency(self.model, train)
        if settings.embeddings_from_cooccurrence:
            _set_embeddings_by_cooccurrence(self.model, train)
        self.model.to(device)
        self._average = copy.deepcopy(self.model).requires_grad_(requires_grad=False)
        self._best = copy.deepcopy(self._average)
        self._optimizer = _optimizer(self.model, settings)
        self._epoch, self._order = -1, np.empty(0, np.int64)

    @property
    def best(self) -> LRURec:
        """The weights with the best validation Recall@10, then NDCG@10, so far."""
        return self._best

    def wants_more(self) -> bool:
        validations_since_best = (self.step - self.best_step) // self.settings.validate_every
        return self.step < self.steps and validations_since_best < self.settings.patience

    def validation_is_due(self) -> bool:
        return self.step % self.settings.validate_every == 0 or self.step == self.steps

    def advance(self) -> None:
        """One step of the optimizer on the next batch."""
        settings, model = self.settings, self.model
        torch.manual_seed(_seed_of(settings.seed, self.step))
        for group in self._optimizer.param_groups:
            group["lr"] = settings.rate_at(self.step, self.steps)
        batch = self._next_batch()
        model.train()
        self._optimizer.zero_grad()
        loss = loss_with_gradients(model, batch, settings.label_smoothing, settings.precision)
        self._clip_gradients()
        self._optimizer.step()
        self._update_average()
        self.step += 1
        self.loss = torch.lerp(self.loss, loss, max(0.02, 1 / self.step))

    def validate(self) -> Metrics:
        """Metrics of the averaged weights, added to the curve; the weights are kept if they are the best so far.

        Raises `TrainingError` if the loss is no longer a number.
        """
        self._require_finite_loss()
        metrics = self.measure(self._average, self._validation)
        is_best = self._is_best(metrics)
        self.curve.append(self._curve_point(metrics))
        if is_best:
            self.best_recall, self.best_step = metrics.recall_at_10, self.step
            self._best.load_state_dict(self._average.state_dict())
        return metrics

    def _is_best(self, metrics: Metrics) -> bool:
        """By Recall@10; where that is equal, as it often is on few items or users, by NDCG@10."""
        if metrics.recall_at_10 != self.best_recall:
            return metrics.recall_at_10 > self.best_recall
        best = next(point["validation"] for point in self.curve if point["step"] == self.best_step)
        return bool(metrics.to_json()["ndcg@10"] > best["ndcg@10"])

    def measure(self, model: LRURec, held_out: HeldOut) -> Metrics:
        lists = lists_by_model(model, held_out.histories, window=self.settings.max_len)
        return metrics_of(ranks_in(lists, held_out.answers))

    def save(self, path: Path) -> None:
        """Replace the checkpoint by one of this step. Raises `TrainingError` if the loss is no longer a number."""
        self._require_finite_loss()
        progress = Progress(self.run_id, self.step, self.best_step, self.best_recall, self.curve)
        write_checkpoint(path, progress, self._tensors())

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint, if there is one. Raises `TrainingError` if it is another run's."""
        found = read_checkpoint(path, self.run_id, expected=self._tensors())
        if found is None:
            return
        progress, tensors = found
        self.step, self.best_step, self.best_recall = progress.step, progress.best_step, progress.best_recall
        self.curve = list(progress.curve)
        for name, tensor in self._tensors().items():
            tensor.copy_(tensors[name])
        for parameter in self.model.parameters():
            self._optimizer.state[parameter]["step"].fill_(self.step)

    def _require_finite_loss(self) -> None:
        """Nothing that follows a loss that is no number could be one, also not after a resume."""
        if not self.loss.isfinite():
            raise TrainingError(
                f"the loss is {self.loss.item()} at step {self.step:,}; train again with a lower learning rate "
                f"than {self.settings.learning_rate:g}"
            )

    def _curve_point(self, metrics: Metrics) -> dict[str, Any]:
        """What the bundle's metadata keep of a validation. No clock: a resumed run has the curve of an unbroken one."""
        return {
            "step": self.step,
            "loss": round(float(self.loss), 6),
            "learning_rate": self.settings.rate_at(self.step - 1, self.steps),
            "validation": metrics.to_json(),
        }

    def _next_batch(self) -> Batch:
        size = self.settings.batch_size
        batches = -(-len(self.windows) // size)
        epoch, index = divmod(self.step, batches)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(len(self.windows), self.settings.seed, epoch)
        return self.windows.batch(self._order[index * size : (index + 1) * size]).to(self.loss.device)

    def _clip_gradients(self) -> None:
        """As torch's `clip_grad_norm_`, which also multiplies by 1 where there is nothing to clip."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not norm <= self.settings.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.settings.clip_norm, norm)

    @torch.no_grad()
    def _update_average(self) -> None:
        # Young averages forget faster: the first weights are noise.
        decay = min(self.settings.average_decay, (1 + self.step) / (10 + self.step))
        if self.settings.average_decay == 0:
            decay = 0.0
        for average, weight in zip(self._average.parameters(), self.model.parameters(), strict=True):
            average.lerp_(weight, 1 - decay)

    def _tensors(self) -> dict[str, Tensor]:
        """All that changes from step to step, by name; the tensors themselves, not copies."""
        parts = {"model": self.model, "average": self._average, "best": self._best}
        tensors = {"loss": self.loss} | {
            f"{part}/{name}": value for part, model in parts.items() for name, value in model.state_dict().items()
        }
        for name, parameter in self.model.named_parameters():
            tensors |= {f"{moment}/{name}": self._optimizer.state[parameter][moment] for moment in MOMENTS}
        return tensors


def _seed_of(seed: int, step: int) -> int:
    """What a step draws from. Torch's generator on a CPU takes no more than 32 bits of it: both have to be in those."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1)[0])


def _set_bias_by_frequency(model: LRURec, train: Histories) -> None:
    # One click more for everyone: what nobody clicked is rare, not impossible.
    clicks = np.bincount(train.items, minlength=len(model.item_bias)) + 1
    with torch.no_grad():
        model.item_bias.copy_(torch.from_numpy(np.log(clicks / clicks.sum())))


def _set_embeddings_by_cooccurrence(model: LRURec, train: Histories) -> None:
    weight = model.item_embedding.weight
    embeddings = torch.from_numpy(cooccurrence_embeddings(train, *weight.shape))
    known = embeddings.any(1)
    with torch.no_grad():
        weight[known] = embeddings[known]


def _optimizer(model: LRURec, settings: TrainingSettings) -> torch.optim.AdamW:
    """AdamW with its moments made at once, so that a checkpoint always holds them."""
    plain = [p for name, p in model.named_parameters() if "bias" in name or "layer_norm" in name]
    decayed = [p for name, p in model.named_parameters() if "bias" not in name and "layer_norm" not in name]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, eps=ADAM_EPS, fused=True)
    for parameter in model.parameters():
        moments = {moment: torch.zeros_like(parameter) for moment in MOMENTS}
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
    return optimizer
