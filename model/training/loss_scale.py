"""The loss scale of float16 training: keeps gradients in range, and skips steps in which they left it."""

import torch

from model.config import ConfigError

GROWTH, BACKOFF, INTERVAL = 2.0, 0.5, 2000  # those of torch.amp.GradScaler
MOST_SKIPPED = 100  # in a row: a dynamic scale has gone down by 2^100 then


class LossScale:
    """Scales the loss; after backward, unscales the gradients and says whether the step is one to skip.

    All of it stays on the device, as scalars: `scale` (what the loss is multiplied by), `found` (1.0 where a gradient
    of the last step was infinite or no number, else 0.0), `skipped` (how many steps were). dynamic: the scale doubles
    after 2,000 good steps in a row and halves after a bad one; else it stays. `bad`: steps skipped in a row by now.
    """

    def __init__(self, scale: float, dynamic: bool, device: torch.device):
        self._dynamic = dynamic
        self.scale, self.found = torch.tensor(scale, device=device), torch.zeros((), device=device)
        self._one = torch.ones((), device=device)
        self._good, self.skipped, self.bad = (torch.zeros((), dtype=torch.int32, device=device) for _ in range(3))

    def begin(self) -> None:
        """A step begins: nothing is found yet."""
        self.found.zero_()

    def unscale(self, gradients: list[torch.Tensor], others: list[torch.Tensor]) -> None:
        """Divide the gradients by the scale, in place, and look whether all of them and the others are finite; kernels
        that make gradients may have put into `found` what they saw of theirs.

        The others stay as they are: divided in float16, small ones would become 0.
        """
        inverse = self.scale.double().reciprocal().float()
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, self.found, inverse)
        if others:
            torch._amp_foreach_non_finite_check_and_unscale_(others, self.found, self._one)

    def update(self) -> None:
        """After a step, good or skipped: the scale of the next one."""
        self.found.copy_(self.found > 0)  # where ranks have added theirs up
        self.skipped.add_(self.found.int())
        self.bad.add_(1).mul_(self.found.int())
        if self._dynamic:
            torch._amp_update_scale_(self.scale, self._good, self.found, GROWTH, BACKOFF, INTERVAL)

    def check(self, steps: int) -> None:
        """Raise ConfigError where nothing is trained any more: MOST_SKIPPED steps in a row were skipped, or all of
        `steps`, those since this trainer began. Waits for the device."""
        bad, scale = int(self.bad), self.scale.item()
        if steps and (bad >= MOST_SKIPPED or bad >= steps):
            if self._dynamic and bad >= MOST_SKIPPED:
                remedy = "the gradients are infinite whatever the scale: lower --lr, or use --amp"
            else:
                remedy = f"lower --loss_scale ({scale:g} now), or let it find its size: --dynamic_loss_scale"
            raise ConfigError(
                f"--fp16: gradients have left float16's range in each of the last {bad:,} steps, which were skipped: "
                f"nothing is being trained; {remedy}"
            )

    def state(self) -> dict[str, float]:
        """For a checkpoint: numbers."""
        return {"scale": self.scale.item(), "good": self._good.item(), "skipped": self.skipped.item()}

    def restore(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint's state()."""
        self.scale.fill_(state["scale"])
        self._good.fill_(state["good"])
        self.skipped.fill_(state["skipped"])
