"""Numbers from features, each by torch-fidelity's own function.

N images   D features   K logits; `samples` are generated, `reference` is real
"""

from __future__ import annotations

import numpy as np
import torch
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
from torch_fidelity.metric_isc import (
    KEY_METRIC_ISC_MEAN,
    KEY_METRIC_ISC_STD,
    isc_features_to_metric,
)
from torch_fidelity.metric_kid import (
    KEY_METRIC_KID_MEAN,
    KEY_METRIC_KID_STD,
    kid_features_to_metric,
)
from torch_fidelity.metric_prc import (
    KEY_METRIC_PRECISION,
    KEY_METRIC_RECALL,
    prc_features_to_metric,
)

from moveimg.evaluation.statistics import Statistics

NEIGHBOURS = 3  # k of the manifolds of precision and recall (Kynkäänniemi et al. 2019; ADM)
KID_SUBSET, KID_SUBSETS = 1000, 100  # torch-fidelity's defaults
IS_SPLITS, ADM_SPLIT = 10, 5000
PRC_BLOCK = 1000  # rows of a distance matrix held at a time: 0.2 GB beside 50,000 images


def frechet_distance(samples: Statistics, reference: Statistics) -> float:
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017): FID and sFID."""
    pair = [{"mu": s.mu, "sigma": s.sigma} for s in (samples, reference)]
    return fid_statistics_to_metric(*pair, verbose=False)[KEY_METRIC_FID]


def inception_scores(logits: np.ndarray) -> dict[str, float]:
    """exp E KL(p(y|x) | p(y)) of bias-free logits [N, K] (Salimans et al. 2016), in two ways.

    inception_score_shuffled: torch-fidelity's, 10 splits of shuffled images, with its deviation
    over the splits. inception_score_adm: ADM's, mean over contiguous runs of 5,000 images as they
    come; a class-sorted set gives a wrong one.
    """
    features = torch.from_numpy(np.asarray(logits))
    shuffled = isc_features_to_metric(features, splits=min(IS_SPLITS, len(features)), shuffle=True)
    runs = [
        isc_features_to_metric(run, splits=1, shuffle=False)[KEY_METRIC_ISC_MEAN]
        for run in features.split(ADM_SPLIT)
    ]
    return {
        "inception_score_shuffled": shuffled[KEY_METRIC_ISC_MEAN],
        "inception_score_shuffled_std": shuffled[KEY_METRIC_ISC_STD],
        "inception_score_adm": float(np.mean(runs)),
    }


def precision_recall(samples: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Shares of samples in the reference's k-NN manifold and the other way round, k = 3.

    Features [N, D] and [M, D]; each set needs more than k images (ValueError).
    """
    fewest = min(len(samples), len(reference))
    if fewest <= NEIGHBOURS:
        raise ValueError(
            f"too-few-samples: precision and recall of {fewest} images: expected more than "
            f"{NEIGHBOURS}"
        )
    found = prc_features_to_metric(
        torch.from_numpy(np.asarray(samples)),
        torch.from_numpy(np.asarray(reference)),
        prc_neighborhood=NEIGHBOURS,
        prc_batch_size=PRC_BLOCK,
        save_cpu_ram=True,
        verbose=False,
    )
    return {"precision": found[KEY_METRIC_PRECISION], "recall": found[KEY_METRIC_RECALL]}


def kernel_distance(samples: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Unbiased MMD^2 with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018), over 100 subsets.

    Subsets hold 1,000 images, or as many as the smaller set has.
    """
    subset = min(KID_SUBSET, len(samples), len(reference))
    found = kid_features_to_metric(
        torch.from_numpy(np.asarray(samples)),
        torch.from_numpy(np.asarray(reference)),
        kid_subsets=KID_SUBSETS,
        kid_subset_size=subset,
        verbose=False,
    )
    return {
        "kid": found[KEY_METRIC_KID_MEAN],
        "kid_std": found[KEY_METRIC_KID_STD],
        "kid_subset_size": subset,
    }
