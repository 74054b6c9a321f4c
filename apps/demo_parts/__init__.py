"""The parts of the web demo (apps/demo.py).

serving: turns.py (who may compute now), models.py (which models are in memory), guard.py (what is
    let through to the server at all)
doing: drawing.py (rows of pictures), looking.py (the bank's maps, reconstruction), gallery.py
    (pictures as HTML, PNG and zip)
showing: handlers.py (what the page's buttons call), api.py (the named endpoints), page.py (layout),
    style.css, script.js, texts.py
"""
