"""Image sources, crops, and packed codes: written by `encode`, read in seeded batches."""

# ruff: noqa: F401 (the package's names)
from moveimg.data.codes import MANIFEST, Batches, PackedCodes, crop_choice, epoch_order, sha256_file
from moveimg.data.datasets import is_named_source
from moveimg.data.encode import (
    ChangedSettingsError,
    code_grid,
    default_batch_size,
    encode_images,
    encode_splits,
)
from moveimg.data.folders import find_split_folders, open_flat_folder, walk_images
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
