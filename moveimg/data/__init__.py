"""Images and packed codes: folders and digits, crops, encoding, and the order of batches.

    images.py   image sources: the bundled digits, or a folder with one subfolder per class
    digits.py   scikit-learn's digits, with a fixed split
    crops.py    ADM's centre crop, five-crop, ten-crop; PIL images <-> tensors
    manifest.py the files of a packed-codes directory
    codes.py    packed codes opened for reading, and batches drawn from them
    loading.py  images decoded and cropped in worker processes
    encode.py   images -> packed codes, resumable

Nothing is imported here, so that reading packed codes does not load torchvision.
"""
