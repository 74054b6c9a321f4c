"""The parts of the web demo (apps/demo.py).

requests: what the page and the API may ask for    models: which models are in memory
queue: who may compute now                          jobs: rows of images, drawn code by code
analysis: bank maps and reconstruction              html: images and status lines as HTML
handlers: jobs as the page's buttons                api: jobs as named endpoints
page: the layout, with the .css and .js files       server, guard: which requests are served
"""
