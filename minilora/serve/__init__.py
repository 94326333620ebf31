"""One base and its adapters, served over HTTP: engine.py computes, protocol.py speaks as OpenAI does, app.py answers
requests, bounds.py keeps bad ones out, run.py starts and ends it, demo.py trains what there is to show, page.html."""
