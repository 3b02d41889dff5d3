"""Number formats. --dtype names the forward's.

Under bfloat16 the matrix products are computed in it, while weights that are trained, softmax,
losses and optimizer stay float32.
"""
import torch


def master_dtype(dtype):
    """Of the weights, and of every number that a loss is computed from."""
    return torch.float64 if dtype == "float64" else torch.float32


def autocast(model, dtype):
    """The context of a forward in this number format."""
    device = next(model.parameters()).device
    return torch.autocast(device.type, torch.bfloat16, dtype == "bfloat16")


def freeze(model, device, dtype):
    """A model that is not trained, on its device.

    Under bfloat16 the matrices of its blocks are kept in bfloat16: autocast casts them so in every
    forward, so the outputs are the same bit for bit, with half the memory.
    """
    model.to(device, master_dtype(dtype))
    model.requires_grad_(False)
    if dtype == "bfloat16":
        for layer in model.trunk.blocks.modules():
            weight = getattr(layer, "weight", None)
            if weight is not None and weight.ndim == 2:
                layer.to(torch.bfloat16)
    return model
