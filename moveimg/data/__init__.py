"""Image sources, crops, and packed codes: written by `encode`, read in seeded batches."""

from moveimg.data.codes import (
    MANIFEST,
    Batches,
    PackedCodes,
    crop_choice,
    epoch_order,
    sha256_file,
)
from moveimg.data.datasets import is_named_source
from moveimg.data.encode import (
    ChangedSettingsError,
    code_grid,
    default_batch_size,
    encode_images,
    encode_splits,
)
from moveimg.data.folders import find_splits, open_flat_folder, walk_images
from moveimg.data.images import (
    ImageSource,
    Split,
    count_views,
    crop_views,
    digits_arrays,
    drop_unreadable,
    open_images,
    report_unreadable,
)

__all__ = [
    "MANIFEST", "Batches", "ChangedSettingsError", "ImageSource", "PackedCodes", "Split",
    "code_grid", "count_views", "crop_choice", "crop_views", "default_batch_size",
    "digits_arrays", "drop_unreadable", "encode_images", "encode_splits", "epoch_order",
    "find_splits", "is_named_source", "open_flat_folder", "open_images", "report_unreadable",
    "sha256_file", "walk_images",
]  # fmt: skip
