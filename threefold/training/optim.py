"""AdamW for vectors and embeddings, Muon for the matrices between them.

Decisions:
- Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) steps along the nearest orthogonal matrix of the
  momentum; weight decay is decoupled as in Moonlight (arXiv:2502.16982). Its learning rate carries over between widths, so one
  value serves every size. A matrix that stores several side by side (query, key and value) is stepped part by part.
- Matrices of one shape are stacked, so that the Newton-Schulz iteration is a few batched products and not many small ones.
- AdamW is torch's own, fused (Loshchilov & Hutter, arXiv:1711.05101); weights of one dimension are not decayed.
- State is named tensors, nothing else: it goes into safetensors and comes back bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

# Quintic coefficients that lift every singular value into about [0.7, 1.2] in five rounds (the reference's own choice).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices_NIO: Tensor, rounds: int = 5) -> Tensor:
    """The nearest (semi-)orthogonal matrices, roughly: singular values near 1, singular vectors kept. Shape and dtype stay.

    Works in float64 for float64 input (exactness is tested there), in bfloat16 for the rest: the iteration corrects itself.
    """
    x = matrices_NIO if matrices_NIO.dtype == torch.float64 else matrices_NIO.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(rounds):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices_NIO.dtype)


class Muon:
    """Muon over the given named matrices; `parts[name]` lists the row counts of matrices stored as one."""

    def __init__(self, named: dict[str, nn.Parameter], parts: Mapping[str, tuple[int, ...]], *, lr: float, momentum: float = 0.95,
                 weight_decay: float = 0.0) -> None:
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.named = named
        self.buffers = {name: torch.zeros_like(p, memory_format=torch.contiguous_format) for name, p in named.items()}
        self._groups: dict[tuple[int, int], list[tuple[str, slice]]] = {}
        for name, p in named.items():
            start = 0
            for rows in parts.get(name, (p.shape[0],)):
                self._groups.setdefault((rows, p.shape[1]), []).append((name, slice(start, start + rows)))
                start += rows

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update at `factor` times the peak rate."""
        lr = self.lr * factor
        for name, p in self.named.items():
            assert p.grad is not None
            self.buffers[name].lerp_(p.grad, 1 - self.momentum)
            p.grad.lerp_(self.buffers[name], self.momentum)  # Nesterov: the gradient is not needed again
            if self.weight_decay:
                p.mul_(1 - lr * self.weight_decay)
        for (rows, columns), members in self._groups.items():
            updates = orthogonalise(torch.stack([self.named[name].grad[part] for name, part in members]))  # type: ignore[index]
            scale = lr * max(1.0, rows / columns) ** 0.5
            for (name, part), update in zip(members, updates, strict=True):
                self.named[name][part].sub_(update, alpha=scale)


class Optimizer:
    """What the trainer steps: the parameters of a model shared between Muon and AdamW.

    matrices: names of the matrices that Muon steps, with the row counts of those stored as one (`build.matrix_parts`); what is
    not named, and everything where it is empty, is AdamW's. lr: the peak rate of Muon, or of AdamW where it has everything.
    """

    def __init__(self, model: nn.Module, matrices: Mapping[str, tuple[int, ...]], *, lr: float, adamw_lr: float, weight_decay: float,
                 betas: tuple[float, float] = (0.9, 0.95), momentum: float = 0.95) -> None:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.muon = Muon({n: p for n, p in named.items() if n in matrices}, matrices, lr=lr, momentum=momentum, weight_decay=weight_decay)
        self.rest = {n: p for n, p in named.items() if n not in matrices}
        decayed = [p for p in self.rest.values() if p.dim() >= 2]
        plain = [p for p in self.rest.values() if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": 0.0 if matrices else weight_decay},
                  {"params": plain, "weight_decay": 0.0}]
        self.adamw_lr = adamw_lr if matrices else lr
        self.adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=self.adamw_lr, betas=betas, eps=1e-8, fused=True) \
            if self.rest else None
        self.parameters = list(named.values())
        self.peak = lr

    def step(self, factor: float) -> None:
        """One update of every parameter at `factor` times its peak rate; gradients are used up."""
        self.muon.step(factor)
        if self.adamw is not None:
            for group in self.adamw.param_groups:
                group["lr"] = self.adamw_lr * factor
            self.adamw.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for p in self.parameters:
            p.grad = None

    def state(self) -> dict[str, Tensor]:
        """Named tensors, enough to go on bit for bit: `muon.NAME`, `adamw.mean.NAME`, `adamw.square.NAME`, `adamw.steps.NAME`."""
        state = {f"muon.{name}": buffer for name, buffer in self.muon.buffers.items()}
        for name, p in self.rest.items():
            own = self.adamw.state.get(p, {}) if self.adamw is not None else {}
            if own:
                state |= {f"adamw.mean.{name}": own["exp_avg"], f"adamw.square.{name}": own["exp_avg_sq"],
                          f"adamw.steps.{name}": own["step"]}
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave. Names that do not fit raise KeyError: a checkpoint of another model or optimizer."""
        if {n for n in state if n.startswith("muon.")} != {f"muon.{n}" for n in self.muon.buffers}:
            raise KeyError("the optimizer state names other parameters than the model")
        for name, buffer in self.muon.buffers.items():
            buffer.copy_(state[f"muon.{name}"])
        for name, p in self.rest.items():
            if self.adamw is None or f"adamw.mean.{name}" not in state:
                continue
            self.adamw.state[p] = {"step": state[f"adamw.steps.{name}"].clone(),
                                   "exp_avg": state[f"adamw.mean.{name}"].clone(),
                                   "exp_avg_sq": state[f"adamw.square.{name}"].clone()}


def clip_gradients(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Scale the gradients down to a norm of `limit` (0: never) and return the norm before, a float32 (or float64) scalar."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    if limit > 0:
        torch._foreach_mul_(gradients, torch.clamp(limit / (norm + 1e-6), max=1.0))
    return norm
