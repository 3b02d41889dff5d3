"""AdamW, its learning rate, and one clipped step."""
import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

MAX_GRAD_NORM = 1.0


def adamw(model, lr, eps=1e-8):
    """AdamW without weight decay.

    PPO takes eps 1e-5, as its reference code: tiny second moments make wild steps.
    fused: one pass over memory instead of eight, on CPUs too.
    """
    return torch.optim.AdamW(
        model.parameters(), lr,
        betas=(0.9, 0.95),
        eps=eps,
        weight_decay=0.0,
        fused=True
    )


def learning_rate(lr, step, steps, schedule, warmup=0):
    """`constant`, or `linear` from lr down to lr / steps at the last step.

    The first `warmup` steps climb linearly to it.
    """
    decay = 1.0 if schedule == "constant" else 1 - step / steps
    return lr * decay * min(1.0, (step + 1) / (warmup + 1))


def gradient_norm(model):
    """The norm of the whole gradient, after dist.all_reduce_gradients: of the whole step.

    -> a scalar tensor, NaN or infinite where a gradient is
    """
    return get_total_norm(p.grad for p in model.parameters() if p.grad is not None)


def update(model, optimizer, lr, norm):
    """Clips the whole gradient, which has this norm, and takes the step.

    A norm that is not finite must not get here: one such step makes every weight NaN.
    """
    if norm > MAX_GRAD_NORM:               # else a pass over all gradients would multiply them by 1
        clip_grads_with_norm_(model.parameters(), MAX_GRAD_NORM, norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
