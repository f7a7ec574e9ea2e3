"""Run by test_adamw.py with TRITON_INTERPRET=1: the kernel against torch's AdamW, and its skip."""

from __future__ import annotations

import torch

from aiprod_ds.engine.kernels.adamw import update

SIZE = 2500  # of two blocks and a part
BETAS, EPSILON, RATE, DECAY = (0.9, 0.999), 1e-8, 0.1, 0.1


def main() -> None:
    """Asserts that five updates are torch's, and that a sixth that is to be skipped changes nothing."""
    torch.manual_seed(0)
    own = torch.randn(SIZE)
    theirs = own.clone().requires_grad_()
    moments, weight = (torch.zeros(SIZE), torch.zeros(SIZE)), torch.zeros(SIZE)
    expected = torch.optim.AdamW([theirs], lr=RATE, betas=BETAS, eps=EPSILON, weight_decay=DECAY)

    def step(gradient: torch.Tensor, numbers: list[float]) -> None:
        update(
            gradient, own, moments, weight, torch.tensor(numbers),
            rate=RATE, decay=DECAY, betas=BETAS, epsilon=EPSILON,
        )  # fmt: skip

    for count in range(1, 6):
        gradient = torch.randn(SIZE)
        step(gradient, [0.0, 2.0, 1 / (1 - BETAS[0] ** count), (1 - BETAS[1] ** count) ** -0.5])
        theirs.grad = gradient / 2
        expected.step()
        # Of fp32: a few roundings, and the moments' sums in another order.
        torch.testing.assert_close(own, theirs.detach(), rtol=2e-6, atol=1e-6)
        assert torch.equal(weight, own)
    kept = [each.clone() for each in (own, *moments, weight)]
    step(torch.full((SIZE,), torch.nan), [1.0, 2.0, 1.0, 1.0])
    assert all(torch.equal(one, other) for one, other in zip((own, *moments, weight), kept, strict=True))


if __name__ == "__main__":
    main()
