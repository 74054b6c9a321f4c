"""Images and packed codes: folders and digits, crops, encoding, and the order of batches.

    images.py   image sources, and what opens which
    folders.py  a folder with one subfolder per class
    imagenet.py ImageNet's own archives, read where they lie
    parquet.py  Parquet files of Hugging Face datasets (extra `datasets`)
    digits.py   scikit-learn's digits, with a fixed split
    decode.py   a file's bytes -> RGB
    crops.py    ADM's centre crop, five-crop, ten-crop; PIL images <-> tensors
    loading.py  images decoded and cropped in worker processes
    manifest.py the files of a packed-codes directory
    encode.py   images -> packed codes; shards.py: one shard of them
    resume.py   what an interrupted encoding leaves on disk
    ranks.py    the processes that share an encoding
    codes.py    packed codes opened for reading, and batches drawn from them

Nothing is imported here, so that reading packed codes does not load torchvision.
"""
