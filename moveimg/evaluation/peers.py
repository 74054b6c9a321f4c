"""Numbers as their authors published them, to lay beside one's own. None of them was measured here.

ImageNet 256 x 256, 50,000 samples, ADM's evaluator (some samples are drawn at 384 and scored at
256). LlamaGen: arXiv 2406.06525; MoVE and LaVE: arXiv 2601.22887; RAR: 2411.00776; VAR:
2404.02905; MAR: 2406.11838.
"""

from __future__ import annotations

# name, FID, inception score, precision, recall; None: not at hand
PUBLISHED_PEERS: list[tuple[str, float, float | None, float | None, float | None]] = [
    ("LlamaGen-B, 256", 5.46, 193.6, 0.84, 0.46),
    ("LlamaGen-B, 384", 6.09, None, None, None),
    ("LlamaGen-L, 256", 3.80, 248.3, 0.83, 0.51),
    ("LlamaGen-L, 384", 3.07, 256.1, 0.83, 0.52),
    ("LlamaGen-XL, 384", 2.62, 244.1, 0.80, 0.57),
    ("LlamaGen-XXL, 384", 2.34, 253.9, 0.80, 0.59),
    ("LlamaGen-3B, 384", 2.18, 263.3, 0.81, 0.58),
    ("MoVE paper: GPT-B Standard", 6.53, None, None, None),
    ("MoVE paper: GPT-B MoVE x1", 5.62, None, None, None),
    ("MoVE paper: GPT-L Standard", 3.47, None, None, None),
    ("MoVE paper: GPT-L LaVE", 3.77, None, None, None),
    ("MoVE paper: GPT-L MoVE x1", 3.10, None, None, None),
    ("RAR-B", 1.95, None, None, None),
    ("RAR-L", 1.70, None, None, None),
    ("RAR-XL", 1.50, None, None, None),
    ("RAR-XXL", 1.48, None, None, None),
    ("VAR-d16", 3.30, None, None, None),
    ("VAR-d20", 2.57, None, None, None),
    ("VAR-d24", 2.09, None, None, None),
    ("VAR-d30", 1.92, None, None, None),
    ("MAR-B", 2.31, None, None, None),
    ("MAR-L", 1.78, None, None, None),
    ("MAR-H", 1.55, None, None, None),
    ("RandAR-L", 2.55, None, None, None),
    ("AliTok, 177M", 1.44, None, None, None),
]
