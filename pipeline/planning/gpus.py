"""GPUs by their datasheets: dense 16-bit tensor operations with float32 accumulation, without sparsity."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU by its datasheet."""

    memory: float
    """Bytes."""
    operations: float
    """Dense bf16 operations per second."""
    bandwidth: float
    """Memory bandwidth in bytes per second."""
    link: float
    """Bytes per second to other GPUs, one way: NVLink, or PCIe 4.0 x16."""


PCIE = 32e9

GPUS = {
    "a10g": Gpu(24e9, 70e12, 600e9, PCIE),
    "a10": Gpu(24e9, 125e12, 600e9, PCIE),
    "l4": Gpu(24e9, 121e12, 300e9, PCIE),
    "rtx3090": Gpu(24e9, 71e12, 936e9, PCIE),
    "rtx4090": Gpu(24e9, 165e12, 1008e9, PCIE),
    "l40s": Gpu(48e9, 362e12, 864e9, PCIE),
    "a100-40": Gpu(40e9, 312e12, 1555e9, 300e9),
    "a100-80": Gpu(80e9, 312e12, 2039e9, 300e9),
    "h100": Gpu(80e9, 989e12, 3350e9, 450e9),
    "h200": Gpu(141e9, 989e12, 4800e9, 450e9),
}
"""GPUs by name, of equal ones the most common in clouds first: nvidia.com/en-us/data-center/{a10-gpu, l4, l40s, a100, h100,
h200}, the Ampere GA102 and Ada architecture whitepapers for the RTX cards, aws.amazon.com/ec2/instance-types/g5 for the A10G.
SXM modules of A100, H100 and H200."""
