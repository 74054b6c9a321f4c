"""The web demo: api (requests and endpoints), jobs, page (with .css, .js and .html), server."""

import os

os.environ |= {  # gradio reads them when it is imported
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_ANALYTICS_MAX_EVENTS": "100",  # gradio makes a table of all of them after every event
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
