"""How a trunk computes: compiled blocks, FlexAttention, matrix products by oneDNN."""
import contextlib
from types import MethodType

import torch
from torch import nn
from torch.nn import functional as F

from ..gpt2 import Projection

MIN_WEIGHT_SIZE = 2**18              # weights from which on a product by oneDNN pays


def choose_kernels(trunk, device, dtype, compile=False, activation_checkpointing=False):
    """Chooses how a trunk computes.

    compile: the blocks as fused kernels, on CUDA with FlexAttention
    activation_checkpointing: keeps only each block's input for the backward

    float32 on a CPU: large products by oneDNN, since torch's own MKL is a tenth slower where there
    are hundreds of columns, and half as fast for the few of a decoding step.
    """
    trunk.activation_checkpointing = activation_checkpointing
    if compile:
        trunk.flex = device.type == "cuda" and dtype != "float64"
        # policy, reference and reward model share one count: with and without gradients, first,
        # last and other layers
        torch._dynamo.config.recompile_limit = 64
        for block in trunk.blocks:
            block.compile(dynamic=True)
    elif device.type == "cpu" and dtype == "float32" and torch.backends.mkldnn.is_available():
        trunk.lm_head_matmul = large_product
        for layer in trunk.modules():
            is_product = isinstance(layer, (nn.Linear, Projection))
            if is_product and layer.weight.numel() >= MIN_WEIGHT_SIZE:
                layer.forward = MethodType(_layer_product, layer)


def onednn(x, weight, bias=None):
    """x (n,in), weight (out,in) or a transposed view of that shape  ->  x W^T + b"""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class Product(torch.autograd.Function):
    """x W^T + b by oneDNN, with its gradients.  x (n,in), W (out,in)  ->  (n,out)"""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return onednn(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_weight = None
        if needs_weight and weight.is_contiguous():
            grad_weight = onednn(grad.t(), x.t())
        elif needs_weight:                       # in the weight's own layout: nothing is copied
            grad_weight = onednn(x.t(), grad.t()).t()
        grad_x = onednn(grad, weight.t()) if needs_x else None
        return grad_x, grad_weight, grad.sum(0) if needs_bias else None


def _product(x, weight, bias=None):
    """`Product`, or its forward alone where no gradients are recorded.

    A decoding step makes hundreds of small calls, which Product would slow down.
    """
    product = Product.apply if torch.is_grad_enabled() else onednn
    return product(x, weight, bias)


def _layer_product(layer, x):
    """The forward of a large nn.Linear, or Projection with W (in,out).  x (n,in)  ->  (n,out)"""
    weight = layer.weight.t() if isinstance(layer, Projection) else layer.weight
    return _product(x, weight, layer.bias)


def large_product(x, weight):
    """F.linear for a head, by oneDNN where the head is large."""
    if x.ndim == 2 and weight.numel() >= MIN_WEIGHT_SIZE:
        return _product(x, weight)
    return F.linear(x, weight)


@contextlib.contextmanager
def allow_nondeterministic_writes():
    """On CUDA without the guard against sums of unknown order.

    Every slot of the KV cache is written once, and the guard would copy all of it.
    """
    strict = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=True)


def capture_cudagraph(work):
    """What `work` launches on the GPU, recorded once and repeated without Python.

    The recording itself computes nothing. It waits for the GPU and gives unused memory back, so it
    pays for tens of tokens, not for a handful.
    -> a function that repeats the work
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
