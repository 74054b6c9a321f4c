"""Images -> features -> statistics -> numbers. It sees images and arrays, and no model of ours.

    sets.py        sets of images on disk: ADM's .npz, or a folder of pictures
    writing.py     .npz and PNG sets written part by part
    guards.py      what can be wrong with a set or a comparison, each by its name
    inception.py   torch-fidelity's Inception with the spatial layer of sFID
    classifier.py  a small classifier as an extractor for small data sets
    features.py    one pass of an extractor over a set, kept by content hash
    statistics.py  mean and covariance of features
    reference.py   what a set is compared with
    metrics.py     FID, sFID, IS, precision, recall, KID of features, by torch-fidelity
    scoring.py     a set against a reference: guards, one pass, all numbers
    pixels.py      PSNR and SSIM
    peers.py       numbers as others published them
    results.py     results as JSON, as a row, side by side with published ones

Nothing is imported here, so that a part can be had without the others' libraries.
"""
