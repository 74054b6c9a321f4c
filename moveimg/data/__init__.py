"""Image sources, crops, and packed codes, which are read in seeded batches."""

# ruff: noqa: F401 (re-exports)
from moveimg.data.codes import MANIFEST, PackedCodes, draw_batch, draw_views, sha256_file
from moveimg.data.datasets import is_named_source
from moveimg.data.encode import (
    code_grid,
    count_workers,
    default_batch_size,
    encode_images,
    encode_splits,
)
from moveimg.data.images import (
    ImageSource,
    count_views,
    crop_views,
    drop_unreadable,
    evenly_spaced,
    find_split_folders,
    open_flat_folder,
)
from moveimg.data.sources import Split, open_images
