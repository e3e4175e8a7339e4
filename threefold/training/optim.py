"""AdamW for vectors and embeddings, Muon for the matrices between them.

Decisions:
- Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) steps along the nearest orthogonal matrix of the
  momentum; weight decay is decoupled as in Moonlight (arXiv:2502.16982). Its learning rate carries over between
  widths, so one value serves every size. A matrix that stores several side by side (query, key and value) is stepped
  part by part.
- The Newton-Schulz iteration corrects itself, so it runs in the dtype that the machine multiplies fastest: bfloat16
  where the model computes in it, else the weights' own. On a processor without bfloat16 units it takes twice the time
  in bfloat16, and it is a quarter of the step of a small model.
- Matrices of one shape are stacked, so that the Newton-Schulz iteration is a few batched products and not many small
  ones.
- AdamW (Loshchilov & Hutter, arXiv:1711.05101) is torch's fused operation, which reads and writes every number once: written
  out as ten operations over lists of tensors it was a sixth of a step of fine-tuning. It is called without `torch.optim`, whose
  import brings torch's compiler and takes longer than the first steps of a small model. Weights of one dimension are not
  decayed.
- State is named tensors, nothing else: it goes into safetensors and comes back bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

FIRST_MOMENTUM, LAST_MOMENTUM, MOMENTUM_STEPS = 0.8, 0.95, 2000
# Quintic coefficients that lift every singular value into about [0.7, 1.2] in five rounds (the reference's own choice).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices_NIO: Tensor, rounds: int = 5) -> Tensor:
    """The nearest (semi-)orthogonal matrices, roughly: singular values near 1, singular vectors kept. Shape and dtype
    stay; the dtype is that of the iteration."""
    x = matrices_NIO
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(rounds):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon:
    """Muon over the given named matrices; `parts[name]` lists the row counts of matrices stored as one. `iterate_in` is
    the dtype of the Newton-Schulz iteration, None that of the weights."""

    def __init__(
        self,
        named: dict[str, nn.Parameter],
        parts: Mapping[str, tuple[int, ...]],
        *,
        lr: float,
        weight_decay: float = 0.0,
        iterate_in: torch.dtype | None = None,
    ) -> None:
        self.lr, self.weight_decay, self.iterate_in = lr, weight_decay, iterate_in
        self.named = named
        self.buffers = {name: torch.zeros_like(p, memory_format=torch.contiguous_format) for name, p in named.items()}
        self._groups: dict[tuple[int, int], list[tuple[str, slice]]] = {}
        for name, p in named.items():
            start = 0
            for rows in parts.get(name, (p.shape[0],)):
                self._groups.setdefault((rows, p.shape[1]), []).append((name, slice(start, start + rows)))
                start += rows

    @torch.no_grad()
    def step(self, factor: float, momentum: float) -> None:
        """One update at `factor` times the peak rate."""
        lr = self.lr * factor
        weights: list[Tensor] = list(self.named.values())
        buffers = list(self.buffers.values())
        gradients = _gradients(weights)
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        torch._foreach_lerp_(gradients, buffers, momentum)  # Nesterov: the gradient is not needed again
        if self.weight_decay:
            torch._foreach_mul_(weights, 1 - lr * self.weight_decay)
        for (rows, columns), members in self._groups.items():
            stacked = torch.stack([self.named[name].grad[part] for name, part in members])  # type: ignore[index]
            updates = orthogonalise(stacked.to(self.iterate_in or stacked.dtype))
            scale = lr * max(1.0, rows / columns) ** 0.5
            for (name, part), update in zip(members, updates, strict=True):
                self.named[name][part].sub_(update, alpha=scale)


class AdamW:
    """AdamW over the given named parameters; those of two dimensions or more are decayed. `scales`: factors of the rate by name, 1
    where there is none."""

    def __init__(
        self,
        named: dict[str, nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        eps: float = 1e-8,
        scales: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        self.lr, self.betas, self.weight_decay, self.eps = lr, betas, weight_decay, eps
        self.named, self.steps = named, 0
        self._groups: dict[tuple[bool, float], list[str]] = {}
        for name, p in named.items():
            self._groups.setdefault((p.dim() >= 2, scales.get(name, 1.0)), []).append(name)
        self.means = {name: torch.zeros_like(p, memory_format=torch.contiguous_format) for name, p in named.items()}
        self.squares = {name: torch.zeros_like(p, memory_format=torch.contiguous_format) for name, p in named.items()}

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update at `factor` times the peak rate."""
        self.steps += 1
        for (decays, scale), names in self._groups.items():
            weights: list[Tensor] = [self.named[name] for name in names]
            torch._fused_adamw_(
                weights, _gradients(weights), [self.means[name] for name in names], [self.squares[name] for name in names], [],
                [torch.full((), float(self.steps), device=weights[0].device)] * len(weights), lr=self.lr * factor * scale, beta1=self.betas[0],
                beta2=self.betas[1], weight_decay=self.weight_decay if decays else 0.0, eps=self.eps, amsgrad=False, maximize=False)


class Optimizer:
    """What the trainer steps: the parameters of a model shared between Muon and AdamW.

    matrices: names of the matrices that Muon steps, with the row counts of those stored as one (`build.matrix_parts`);
    what is not named, and everything where it is empty, is AdamW's. lr: the peak rate of Muon, or of AdamW where it has
    everything. iterate_in: see Muon. scales: see AdamW.
    """

    def __init__(
        self,
        model: nn.Module,
        matrices: Mapping[str, tuple[int, ...]],
        *,
        lr: float,
        adamw_lr: float,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.95),
        iterate_in: torch.dtype | None = None,
        scales: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.muon = Muon({n: p for n, p in named.items() if n in matrices}, matrices, lr=lr, weight_decay=weight_decay,
                         iterate_in=iterate_in)
        self.adamw = AdamW(
            {n: p for n, p in named.items() if n not in matrices},
            lr=adamw_lr if matrices else lr,
            betas=betas,
            weight_decay=0.0 if matrices else weight_decay,
            scales=scales,
        )
        self.parameters = list(named.values())
        self.peak = lr

    def step(self, factor: float, step: int) -> None:
        """Update number `step` (from 0) of every parameter, at `factor` times its peak rate; gradients are used up."""
        if self.muon.named:
            self.muon.step(factor, momentum(step))
        if self.adamw.named:
            self.adamw.step(factor)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for p in self.parameters:
            p.grad = None

    def state(self) -> dict[str, Tensor]:
        """Named tensors, enough to go on bit for bit: `muon.NAME`, `adamw.mean.NAME`, `adamw.square.NAME`,
        `adamw.steps`."""
        return {f"{kind}.{name}": tensor for kind, tensors in self._tensors() for name, tensor in tensors.items()} \
            | {"adamw.steps": torch.tensor(self.adamw.steps)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave. Names that do not fit raise KeyError: a checkpoint of another model or
        optimizer."""
        if set(state) != set(self.state()):
            raise KeyError("the optimizer state names other parameters than the model")
        for kind, tensors in self._tensors():
            for name, tensor in tensors.items():
                tensor.copy_(state[f"{kind}.{name}"])
        self.adamw.steps = int(state["adamw.steps"])

    def _tensors(self) -> list[tuple[str, dict[str, Tensor]]]:
        return [("muon", self.muon.buffers), ("adamw.mean", self.adamw.means), ("adamw.square", self.adamw.squares)]


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    """The gradients; zeros where a loss did not reach a parameter, so that no state falls behind."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    return [p.grad for p in parameters if p.grad is not None]


def momentum(step: int) -> float:
    """Muon's momentum rises with the step: early gradients are soon out of date, and a short run never leaves that
    phase."""
    return LAST_MOMENTUM - (LAST_MOMENTUM - FIRST_MOMENTUM) * max(0.0, 1 - step / MOMENTUM_STEPS)


def clip_gradients(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Scale the gradients down to a norm of `limit` (0: never) and return the norm before, a float32 (or float64)
    scalar."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    if limit > 0:
        torch._foreach_mul_(gradients, torch.clamp(limit / (norm + 1e-6), max=1.0))
    return norm
