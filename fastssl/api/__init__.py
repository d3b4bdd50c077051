"""The way in from Python: what the commands do, without a command line. `fastssl/__init__.py` hands it on."""
