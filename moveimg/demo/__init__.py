"""The web demo.

requests: what the page and the API may ask for    models: which models are in memory
queue: who may compute now                          jobs: rows of images, drawn code by code
analysis: bank maps, reconstruction, likelihoods    html: images and status lines as HTML
uploads: images that visitors send
handlers: jobs as the page's buttons                api: jobs as named endpoints
page: the layout, with the .css and .js files       server, guard: which requests are served
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile


def configure_gradio() -> str:
    """Set what gradio reads from the environment; returns the folder of temporary files.

    Call it before gradio is imported.
    """
    folder = tempfile.mkdtemp(prefix="moveimg-demo-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ |= {
        "GRADIO_TEMP_DIR": folder,
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_ANALYTICS_MAX_EVENTS": "100",  # it makes a table of them after every event
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return folder
