"""DropPos: pre-train a vision transformer by asking where its patches stand.

The method of "DropPos: Pre-Training Vision Transformers by Reconstructing Dropped
Positions" (NeurIPS 2023, arXiv 2309.03576). This package knows tensors only: it imports
torch and timm, never Ray, MLflow or storage; those live in ``pipelines``.

Nothing is imported here, so that a process that only decodes pictures
(:mod:`droppos.pictures`) does not pay four CPU-seconds for torch.
"""

__version__ = "0.1.0"
