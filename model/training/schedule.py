"""Learning-rate schedule of MLPerf DLRM: linear warm-up, plateau, polynomial decay, end value."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Learning rate per step, steps counted from 1 over the whole run.

    warm-up: rises to `lr` over `warmup_steps`, starting 2^-warmup_factor below it (factor 0: from 0);
    decay: from `decay_start_step` on, lr * ((end - step) / decay_steps)^decay_power, not below `decay_end_lr`, which
    also holds afterwards. decay_steps 0: no decay.
    Source: mlcommons training_results_v0.7, NVIDIA DLRM.
    """

    lr: float
    warmup_steps: int = 0
    warmup_factor: int = 0
    decay_start_step: int = 0
    decay_steps: int = 0
    decay_power: int = 2
    decay_end_lr: float = 0.0

    def at(self, step: int) -> float:
        """Learning rate of step `step` (from 1)."""
        if step <= self.warmup_steps:
            return self.lr * (1 - (self.warmup_steps - step) / (self.warmup_steps * 2**self.warmup_factor))
        if step <= self.decay_start_step or not self.decay_steps:
            return self.lr
        left = self.decay_start_step + self.decay_steps - step
        if left < 0:
            return self.decay_end_lr
        return max(self.lr * (left / self.decay_steps) ** self.decay_power, self.decay_end_lr)

    def warnings(self, total_steps: int) -> list[str]:
        """What a run of `total_steps` will not see of this schedule, in words."""
        found = []
        if self.warmup_steps >= total_steps:
            last, reached = self.at(total_steps), self.warmup_steps == total_steps
            where = f"reaches {self.lr:g} in the last step only" if reached else _apart(last, self.lr)
            found.append(
                f"the warm-up of {self.warmup_steps} steps {'fills' if reached else 'outlasts'} the run of "
                f"{total_steps}: the learning rate {where}; lower --warmup_steps"
            )
        if self.decay_steps and self.decay_start_step >= total_steps:
            found.append(
                f"the decay (from step {self.decay_start_step}) is never reached in {total_steps} steps; "
                "lower --decay_start_step"
            )
        return found


def _apart(last: float, height: float) -> str:
    """Where a learning rate ends, in as many digits as tell it from the height."""
    digits = next((digits for digits in (4, 8, 16) if f"{last:.{digits}g}" != f"{height:.{digits}g}"), 17)
    return f"ends at {last:.{digits}g}, not {height:.{digits}g}"
