"""The web demo.

requests: what the page and the API may ask for
jobs: models in memory; images drawn code by code, or scored
api: jobs as named endpoints          page, html: the layout, with the .css and .js files
server: which requests are served
"""

from __future__ import annotations

import os

os.environ |= {  # gradio reads them when it is imported
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_ANALYTICS_MAX_EVENTS": "100",  # it makes a table of them after every event
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
