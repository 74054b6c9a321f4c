"""Images -> features -> statistics -> metrics. Only `run` and `sample` see a model of ours.

    sets.py         sets of images on disk: ADM's .npz, or a folder of images
    guards.py       problems of a set or a comparison, each with a name
    inception.py    torch-fidelity's Inception with the spatial layer of sFID
    classifier.py   a small classifier as extractor for small data sets
    features.py     one pass of an extractor over a set, cached by content hash
    reference.py    statistics and features of real images
    metrics.py      FID, sFID, IS, precision, recall and KID of features; PSNR and SSIM of images
    scoring.py      a set against a reference: guards, one pass, all metrics
    sample.py       sample sets: the same bytes on any number of processes
    run.py          `moveimg evaluate`
    reconstruct.py  `moveimg reconstruct`
    results.py      results.json, its table beside published numbers, the plot of a sweep

Nothing is imported here, so that each module comes without the libraries of the others.
"""
