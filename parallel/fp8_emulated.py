"""A linear layer that quantizes its operands to FP8 and multiplies them in the tensor's own precision, on any device.

It shows what FP8 does to a loss curve; it is slower than the plain layer, never faster. All three matrix products of
y = x Wᵀ + b take quantized operands, each tensor with one scale of its own ("current scaling"):

    s(x) = max(F) / max|x|,   x₈ = round_F(s(x)·x)
    forward   y  = (x₈ W₈ᵀ) / (s(x) s(W)) + b        F = E4M3 for x and W
    backward  dx = (g₈ W₈) / (s(g) s(W))              F = E5M2 for the incoming gradient g
              dW = (g₈ᵀ x₈) / (s(g) s(x)),  db = Σ g  (g as it came)

E4M3 holds up to 448 with 3 bits of mantissa, E5M2 up to 57344 with 2 (arXiv 2209.05433). FP8 values are exact in
bfloat16, so that these products equal those of an FP8 matrix unit up to the order of their sums. The layer needs whole
tensors: a shard would get another scale than its tensor.

Shapes: S tokens (any leading dimensions), I input features, O output features.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2


def scale_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The factor that brings the largest finite magnitude of x to the largest value of `dtype`; finite for zeros too.

    Returns a 0-dimensional tensor in float32 (float64 for float64 x).
    """
    wide = x.double() if x.dtype == torch.float64 else x.float()
    magnitudes = wide.abs().where(wide.isfinite(), 0.0)
    largest = magnitudes.amax() if x.numel() else wide.new_zeros(())
    # A tiny or zero maximum would make the factor infinite, and zeros times infinity NaN.
    return (torch.finfo(dtype).max / largest).clamp(max=torch.finfo(wide.dtype).max)


def to_fp8(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale`·x rounded to `dtype`, saturating at its largest value.

    Values that are not finite become NaN: E4M3 has no infinity, and saturating would hide one.
    """
    largest = torch.finfo(dtype).max
    scaled = (x.to(scale.dtype) * scale).clamp(-largest, largest)
    return scaled.where(x.isfinite(), torch.nan).to(dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        x_scale, w_scale = scale_of(x, FORWARD), scale_of(weight, FORWARD)
        x8, w8 = to_fp8(x, x_scale, FORWARD), to_fp8(weight, w_scale, FORWARD)
        ctx.save_for_backward(x8, w8, x_scale, w_scale)
        return _rescaled(x8.to(x.dtype) @ w8.to(weight.dtype).T, x_scale, w_scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x8, w8, x_scale, w_scale = ctx.saved_tensors
        g_scale = scale_of(grad, BACKWARD)
        g8 = to_fp8(grad, g_scale, BACKWARD).to(grad.dtype)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _rescaled(g8 @ w8.to(grad.dtype), g_scale, w_scale)
        if ctx.needs_input_grad[1]:
            grad_weight = _rescaled(g8.flatten(0, -2).T @ x8.to(grad.dtype).flatten(0, -2), g_scale, x_scale)
        return grad_x, grad_weight


def _rescaled(product: Tensor, *scales: Tensor) -> Tensor:
    """The product divided by each scale in turn, because the product of scales may leave the range of float32."""
    out = product.to(scales[0].dtype)
    for scale in scales:
        out = out / scale
    return out.to(product.dtype)


class EmulatedFp8Linear(nn.Linear):
    """`nn.Linear` with operands quantized to FP8: E4M3 forward, E5M2 gradients, one scale per tensor and use.

    Parameters are those of `nn.Linear` and stay in their own precision, in which the layer also adds the bias and sums
    its gradient. x (…, I) of the weight's dtype → (…, O); at least one leading dimension, which may be empty.
    """

    def forward(self, x: Tensor) -> Tensor:
        y = _Linear.apply(x, self.weight)
        return y if self.bias is None else y + self.bias
