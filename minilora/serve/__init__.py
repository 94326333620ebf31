"""One base and its adapters over HTTP: engine.py computes, protocol.py reads and writes as OpenAI does, app.py has the
handlers, bounds.py refuses what would hurt, server.py listens; page.html is the page."""
