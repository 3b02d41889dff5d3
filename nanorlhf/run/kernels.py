"""How a trunk computes: compiled blocks, FlexAttention, products by oneDNN."""
import contextlib
import types

import torch
from torch import nn
from torch.nn import functional as F

MIN_WEIGHT_SIZE = 2**18              # weights from which on a product is worth a detour


def choose_kernels(trunk, device, dtype, compile=False, activation_checkpointing=False):
    """Chooses how a trunk computes.

    compile: the blocks as fused kernels, on CUDA with FlexAttention;  activation_checkpointing: keep only each block's input for the backward.
    float32 on a CPU: large products by oneDNN, as torch's own MKL is a tenth slower where there are hundreds of columns, and half as
    fast for the few of a decoding step.
    """
    trunk.activation_checkpointing = activation_checkpointing
    if compile:
        trunk.flex = device.type == "cuda" and dtype != "float64"
        torch._dynamo.config.recompile_limit = 64        # policy, reference and reward model share one count: with and without gradients, first, last and other layers
        for block in trunk.blocks:
            block.compile(dynamic=True)
    elif device.type == "cpu" and dtype == "float32" and torch.backends.mkldnn.is_available():
        trunk.lm_head_matmul = large_product
        for layer in trunk.modules():
            weight = getattr(layer, "weight", None)
            if weight is not None and weight.ndim == 2 and weight.numel() >= MIN_WEIGHT_SIZE and not isinstance(layer, nn.Embedding):
                layer.forward = types.MethodType(_layer_product, layer)


def onednn(x, weight, bias=None):
    """x (n,in), weight (out,in) or a transposed view of that shape  ->  x W^T + b"""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class Product(torch.autograd.Function):
    """x W + b by oneDNN, with its gradients. W is (out,in), as nn.Linear stores it, or (in,out), as GPT-2.  x (n,in)  ->  (n,out)"""

    @staticmethod
    def forward(ctx, x, weight, bias, out_first):
        ctx.save_for_backward(x, weight)
        ctx.out_first = out_first
        return onednn(x, weight if out_first else weight.t(), bias)

    @staticmethod
    def backward(ctx, gradient):
        (x, weight), (of_x, of_weight, of_bias, _) = ctx.saved_tensors, ctx.needs_input_grad
        both = (gradient.t(), x.t()) if ctx.out_first else (x.t(), gradient.t())       # in the weight's own layout, so that nothing is copied
        return (onednn(gradient, weight.t() if ctx.out_first else weight) if of_x else None, onednn(*both) if of_weight else None,
                gradient.sum(0) if of_bias else None, None)


def _product(x, weight, bias, out_first):
    """`Product`, or where nobody wants gradients its forward alone: a decoding step makes hundreds of small calls."""
    if torch.is_grad_enabled():
        return Product.apply(x, weight, bias, out_first)
    return onednn(x, weight if out_first else weight.t(), bias)


def _layer_product(layer, x):
    """The forward of a large nn.Linear or gpt2.Projection.  x (n,in) -> (n,out)"""
    return _product(x, layer.weight, layer.bias, isinstance(layer, nn.Linear))


def large_product(x, weight):
    """F.linear for a large head; what is small stays where it was."""
    return _product(x, weight, None, True) if x.ndim == 2 and weight.numel() >= MIN_WEIGHT_SIZE else F.linear(x, weight)


@contextlib.contextmanager
def allow_nondeterministic_writes():
    """On CUDA without the guard against sums of unknown order: every slot of the cache is written once, and the guard
    would copy all of it.
    """
    strict = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=True)


def capture_cudagraph(work):
    """What `work` launches on the GPU, recorded once and repeated without Python. The recording itself computes nothing.

    Recording waits for the GPU and gives unused memory back, so it pays for tens of tokens, not for a handful.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
