"""Image sources, crops, and packed codes: written by `encode`, read in seeded batches."""

from moveimg.data.codes import (
    MANIFEST,
    Batches,
    PackedCodes,
    crop_choice,
    epoch_order,
    sha256_file,
)
from moveimg.data.crops import count_views, crop_views
from moveimg.data.encode import (
    code_grid,
    default_batch_size,
    encode_images,
    encode_splits,
    make_encoder,
)
from moveimg.data.folders import find_splits, open_flat_folder, walk_images
from moveimg.data.images import (
    ImageSource,
    Split,
    digits_arrays,
    drop_unreadable,
    is_named_source,
    open_images,
    report_unreadable,
)
from moveimg.data.shards import ChangedSettingsError, codes_bytes

__all__ = [
    "MANIFEST",
    "Batches",
    "ChangedSettingsError",
    "ImageSource",
    "PackedCodes",
    "Split",
    "code_grid",
    "codes_bytes",
    "count_views",
    "crop_choice",
    "crop_views",
    "default_batch_size",
    "digits_arrays",
    "drop_unreadable",
    "encode_images",
    "encode_splits",
    "epoch_order",
    "find_splits",
    "is_named_source",
    "make_encoder",
    "open_flat_folder",
    "open_images",
    "report_unreadable",
    "sha256_file",
    "walk_images",
]
